"""KV token compression (PixArt-Sigma, section 3.2): keys and values on a grid shrunk by a ratio in each direction."""

from __future__ import annotations

from mindspore import nn, ops

from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.layers import LayerNorm, parameter

#: ``conv``: learned depthwise convolution, then LayerNorm (the paper's). ``ave`` and ``uniform``: the upper left token
#: of each cell, which is what the official code computes under both names. ``mean``: the true average of each cell.
OPERATORS = ("conv", "ave", "uniform", "mean")


class DepthwiseReduction(nn.Cell):
    """Depthwise convolution with kernel and stride ``ratio``, started as the average (weights 1/R^2, bias 0)."""

    def __init__(self, size: int, ratio: int):
        super().__init__()
        self.weight = parameter((size, 1, ratio, ratio), 1.0 / ratio**2)
        self.bias = parameter((size,), name="bias")

    def construct(self, cells: list[ms.Tensor]) -> ms.Tensor:
        """cells: R * R tensors (M, D), row by row within a cell -> (M, D)."""
        tokens, size = cells[0].shape
        ratio = self.weight.shape[-1]
        taps = self.weight.reshape(size, ratio * ratio)
        total = None
        for place, cell in enumerate(cells):
            part = cell * ops.tile(taps[:, place].reshape(1, size), (tokens, 1))
            total = part if total is None else total + part
        return ops.bias_add(total, self.bias)


def split_cells(x: ms.Tensor, height: int, width: int, ratio: int, places: int) -> list[ms.Tensor]:
    """(B, height * width, D) -> tensors (B h w, D): the tokens at the first ``places`` places of the R x R cells.

    Places are counted row by row. Rows and columns that fill no whole cell are left out. Only what is used is made:
    reshaping a view that nothing then computes with can corrupt the heap on the CPU (MindSpore 2.8).
    """
    batch, _, size = x.shape
    rows, columns = height // ratio, width // ratio
    grid = x.reshape(batch, height, width, size)[:, : rows * ratio, : columns * ratio]
    lines = grid.reshape(batch * rows, ratio, columns, ratio * size)
    tokens = batch * rows * columns
    return [
        lines[:, place // ratio, :, place % ratio * size : (place % ratio + 1) * size].reshape(tokens, size)
        for place in range(places)
    ]


def compress_tokens(
    x: ms.Tensor,
    height: int,
    width: int,
    ratio: int,
    operator: str,
    reduction: DepthwiseReduction | None = None,
    norm: LayerNorm | None = None,
) -> ms.Tensor:
    """Shrink the token grid: x (B, height * width, D) -> (B, (height // ratio) * (width // ratio), D)."""
    for part in successive_ratios(operator, ratio):
        cells = split_cells(x, height, width, part, places_used(operator, part))
        x = shrink_cells(cells, operator, reduction, norm).reshape(x.shape[0], -1, x.shape[2])
        height, width = height // part, width // part
    return x


def places_used(operator: str | None, ratio: int) -> int:
    """How many places of the R x R cells an operator reads, counted row by row."""
    return ratio**2 if operator in ("conv", "mean") else 1


def successive_ratios(operator: str | None, ratio: int) -> list[int]:
    """Ratios that, one after the other, shrink as ``ratio`` does: for the mean its prime factors, which is less work.

    >>> successive_ratios("mean", 12), successive_ratios("conv", 12), successive_ratios("mean", 1)
    ([2, 2, 3], [12], [1])
    """
    found: list[int] = []
    factor = 2
    while operator == "mean" and factor * factor <= ratio:
        if ratio % factor:
            factor += 1
        else:
            found.append(factor)
            ratio //= factor
    return [*found, ratio]


def shrink_cells(
    cells: list[ms.Tensor],
    operator: str,
    reduction: DepthwiseReduction | None = None,
    norm: LayerNorm | None = None,
) -> ms.Tensor:
    """One token for each cell: tensors (M, D), the tokens place by place -> (M, D)."""
    if operator == "conv":
        return norm(reduction(cells))
    if operator == "mean":
        return sum(cells[1:], cells[0]) * (1 / len(cells))  # dividing takes five times as long on the CPU
    return cells[0]


def check_compression(operator: str | None, ratio: int, layers: tuple[int, ...], depth: int) -> None:
    """Refuse an operator that is not known, a ratio below 1, and layers that the model does not have."""
    if layers and ratio > 1 and operator not in OPERATORS:
        raise PixArtNBError(
            f"KV compression operator {operator!r} is not known; expected one of {', '.join(OPERATORS)}"
        )
    if int(ratio) != ratio or ratio < 1:
        raise PixArtNBError(f"KV compression scale_factor is {ratio}; expected a whole number of at least 1")
    outside = [layer for layer in layers if not 0 <= layer < depth]
    if outside:
        raise PixArtNBError(
            f"kv_compress_layer names layers {outside}; this model has layers 0 to {depth - 1}"
        )
