"""KV token compression (PixArt-Sigma, section 3.2): keys and values on a grid R times coarser in each direction."""

from __future__ import annotations

from collections.abc import Mapping

from mindspore import mint, nn, ops

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models import ascend_operators
from pixart_nb.core.models.layers import LayerNorm, parameter
from pixart_nb.core.models.operators import transpose

#: ``conv``: learned depthwise convolution, then LayerNorm (the paper's). ``ave`` and ``uniform``: the upper left token
#: of each cell, which is what the official code computes under both names. ``mean``: the true average of each cell.
OPERATORS = ("conv", "ave", "uniform", "mean")
MAX_RATIO = 256


class DepthwiseReduction(nn.Cell):
    """Depthwise convolution with kernel and stride ``ratio``, initialized as the average (weights 1/R^2, bias 0)."""

    def __init__(self, size: int, ratio: int):
        super().__init__()
        self.weight = parameter((size, 1, ratio, ratio), 1.0 / ratio**2)
        self.bias = parameter((size,), name="bias")

    def enlarged(self, ratio: int) -> DepthwiseReduction:
        """Return a reduction to cells ``ratio`` times larger: each is the mean of ``ratio**2`` of these cells."""
        size, _, own, _ = self.weight.shape
        out = DepthwiseReduction(size, own * ratio)
        kernel = mint.tile(self.weight, (1, 1, ratio, ratio)) / ratio**2
        for target, value in ((out.weight, kernel), (out.bias, self.bias.copy())):
            target.set_data(value.astype(self.weight.dtype))
        return out

    def construct(self, positions: list[ms.Tensor]) -> ms.Tensor:
        """positions: R * R tensors (M, D), one for each position within a cell, row by row -> (M, D)."""
        cells, size = positions[0].shape
        ratio = self.weight.shape[-1]
        dtype = positions[0].dtype  # the CPU computes in float32 with weights of any dtype
        taps = self.weight.reshape(size, ratio * ratio).astype(dtype)
        total = None
        for index, tokens in enumerate(positions):
            term = tokens * ops.tile(taps[:, index].reshape(1, size), (cells, 1))
            total = term if total is None else total + term
        return ops.bias_add(total, self.bias.astype(dtype))


def compress_tokens(
    x: ms.Tensor,
    height: int,
    width: int,
    ratio: int,
    operator: str,
    reduction: DepthwiseReduction | None = None,
    norm: LayerNorm | None = None,
) -> ms.Tensor:
    """Compress the token grid: x (B, height * width, D) -> (B, (height // ratio) * (width // ratio), D)."""
    if backend.on_ascend() and operator == "conv":
        return norm(transpose(convolve_cells(x, height, width, reduction.weight, reduction.bias), 0, 2, 1))
    if backend.on_ascend() and operator == "mean":
        kernel = mean_kernel(x.shape[2], ratio, x.dtype)
        return transpose(convolve_cells(x, height, width, kernel, None), 0, 2, 1)
    for factor in successive_ratios(operator, ratio):
        positions = _cell_positions(x, height, width, factor, positions_read(operator, factor))
        x = compress_cells(positions, operator, reduction, norm).reshape(x.shape[0], -1, x.shape[2])
        height, width = height // factor, width // factor
    return x


def convolve_cells(x: ms.Tensor, height: int, width: int, weight: ms.Tensor, bias: ms.Tensor | None) -> ms.Tensor:
    """Convolve the token grid (B, height * width, D) with weight (D, 1, R, R) and stride R, on Ascend: (B, D, M)."""
    batch, _, size = x.shape
    grid = transpose(x.reshape(batch, height, width, size), 0, 3, 1, 2)
    return ascend_operators.conv2d(grid, weight, bias, stride=weight.shape[-1], groups=size).reshape(batch, size, -1)


def mean_kernel(size: int, ratio: int, dtype: ms.Type) -> ms.Tensor:
    """Return the weight (size, 1, ratio, ratio) of a depthwise convolution that averages."""
    return mint.ones((size, 1, ratio, ratio), dtype=dtype) * (1 / ratio**2)


def _cell_positions(x: ms.Tensor, height: int, width: int, ratio: int, count: int) -> list[ms.Tensor]:
    """(B, height * width, D) -> ``count`` tensors (M, D): the tokens at one position of each of the M cells.

    Positions are counted row by row within the R x R cell. Rows and columns that fill no whole cell are left out. Only
    what is used is made: reshaping a view that is not used afterwards can corrupt the heap on the CPU (MindSpore 2.8).
    """
    batch, _, size = x.shape
    rows, columns = height // ratio, width // ratio
    grid = x.reshape(batch, height, width, size)[:, : rows * ratio, : columns * ratio]
    lines = grid.reshape(batch * rows, ratio, columns, ratio * size)
    cells = batch * rows * columns
    return [
        lines[:, i // ratio, :, i % ratio * size : (i % ratio + 1) * size].reshape(cells, size) for i in range(count)
    ]


def positions_read(operator: str | None, ratio: int) -> int:
    """Return how many positions of each R x R cell an operator reads, counted row by row."""
    return ratio**2 if operator in ("conv", "mean") else 1


def successive_ratios(operator: str | None, ratio: int) -> list[int]:
    """Return ratios that compress by ``ratio`` one after another: for the mean its prime factors, which is less work.

    >>> successive_ratios("mean", 12), successive_ratios("conv", 12), successive_ratios("mean", 1)
    ([2, 2, 3], [12], [1])
    """
    ratios: list[int] = []
    factor = 2
    while operator == "mean" and factor * factor <= ratio:
        if ratio % factor:
            factor += 1
        else:
            ratios.append(factor)
            ratio //= factor
    return [*ratios, ratio]


def compress_cells(
    positions: list[ms.Tensor],
    operator: str,
    reduction: DepthwiseReduction | None = None,
    norm: LayerNorm | None = None,
) -> ms.Tensor:
    """Return one token for each cell: the tokens of M cells, position by position, (M, D) each -> (M, D)."""
    if operator == "conv":
        return norm(reduction(positions))
    if operator == "mean":
        # dividing takes five times as long on the CPU
        return sum(positions[1:], positions[0]) * (1 / len(positions))
    return positions[0]


def check_compression(config: Mapping, depth: int) -> None:
    """Refuse a ``kv_compress_config`` with an unknown key or operator, a ratio below 1, or layers beyond ``depth``."""
    unknown = set(config) - {"sampling", "scale_factor", "kv_compress_layer"}
    if unknown:
        raise PixArtNBError(
            f"kv_compress_config has unknown keys {sorted(map(str, unknown))!s:.60}; expected sampling, scale_factor "
            "and kv_compress_layer"
        )
    operator, ratio, layers = (
        config.get("sampling"),
        config.get("scale_factor", 1),
        config.get("kv_compress_layer") or (),
    )
    if type(ratio) is not int or not 1 <= ratio <= MAX_RATIO:
        raise PixArtNBError(
            f"KV compression scale_factor is {ratio!r:.60}; expected a whole number from 1 to {MAX_RATIO}"
        )
    if not isinstance(layers, list | tuple):
        raise PixArtNBError(f"kv_compress_layer is {layers!r:.60}; expected a list of layer numbers")
    outside = [layer for layer in layers if type(layer) is not int or not 0 <= layer < depth]
    if outside:
        raise PixArtNBError(f"kv_compress_layer names layers {outside!s:.60}; this model has layers 0 to {depth - 1}")
    if layers and ratio > 1 and operator not in OPERATORS:
        raise PixArtNBError(
            f"KV compression operator {operator!r:.60} is unknown; expected one of {', '.join(OPERATORS)}"
        )
