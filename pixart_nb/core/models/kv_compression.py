"""KV token compression (PixArt-Sigma, section 3.2): keys and values on a grid shrunk by a ratio in each direction."""

from __future__ import annotations

import numpy as np

from pixart_nb.core.backend import ms
from mindspore import nn, ops

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

    def construct(self, cells: ms.Tensor) -> ms.Tensor:
        """cells (B, h, R, w, R, D) -> (B h w, D)."""
        batch, height, ratio, width, _, size = cells.shape
        tokens = batch * height * width
        taps = self.weight.reshape(size, ratio * ratio)
        total = None
        for i in range(ratio):
            for j in range(ratio):
                tap = ops.tile(taps[:, i * ratio + j].reshape(1, size), (tokens, 1))
                part = cells[:, :, i, :, j, :].reshape(tokens, size) * tap
                total = part if total is None else total + part
        return ops.bias_add(total, self.bias)


def split_cells(x: ms.Tensor, height: int, width: int, ratio: int) -> ms.Tensor:
    """(B, height * width, D) -> (B, h, R, w, R, D); rows and columns that fill no whole cell are left out."""
    batch, _, size = x.shape
    rows, columns = height // ratio, width // ratio
    grid = x.reshape(batch, height, width, size)[:, : rows * ratio, : columns * ratio]
    return grid.reshape(batch, rows, ratio, columns, ratio, size)


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
    cells = split_cells(x, height, width, ratio)
    batch, rows, _, columns, _, size = cells.shape
    if operator == "conv":
        out = norm(reduction(cells))
    elif operator == "mean":
        out = cells.mean((2, 4))
    else:
        out = cells[:, :, 0, :, 0, :]
    return out.reshape(batch, rows * columns, size)


def check_compression(operator: str | None, ratio: int, layers: tuple[int, ...], depth: int) -> None:
    """Refuse an operator that is not known, a ratio below 1, and layers that the model does not have."""
    if layers and ratio > 1 and operator not in OPERATORS:
        raise ValueError(f"KV compression operator {operator!r} is not known; expected one of {', '.join(OPERATORS)}")
    if int(ratio) != ratio or ratio < 1:
        raise ValueError(f"KV compression scale_factor is {ratio}; expected a whole number of at least 1")
    outside = [layer for layer in layers if not 0 <= layer < depth]
    if outside:
        raise ValueError(f"kv_compress_layer names layers {outside}; this model has layers 0 to {depth - 1}")


def average_kernel(size: int, ratio: int) -> np.ndarray:
    """The kernel compression starts from, (size, 1, ratio, ratio) float32: each weight 1/R^2."""
    return np.full((size, 1, ratio, ratio), 1.0 / ratio**2, np.float32)
