"""8-bit weights: a quarter of the memory of float32, computed in float32."""

from __future__ import annotations

import numpy as np
from mindspore import nn

from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.operators import linear

#: Rows that are upcast to float32 at a time while a weight is quantized.
ROWS = 256


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize (out, in) floats to int8 and a scale for each row, (out,) float32: symmetric, nearest."""
    values, scale = np.empty(weight.shape, np.int8), np.ones(len(weight), np.float32)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        wide = np.asarray(weight[rows], np.float32)
        largest = np.abs(wide).max(1)
        scale[rows] = np.where(largest > 0, largest / 127.0, 1)
        values[rows] = np.rint(wide / scale[rows, None])
    return values, scale


class Int8Linear(nn.Cell):
    """``Linear`` without bias whose weight is int8 with a scale for each output: (..., in) -> (..., out) float32.

    The weight is upcast for each product: the float32 memory of one layer at a time.
    """

    dtype = ms.float32

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        if bias:
            raise PixArtNBError("Int8Linear has no bias; the layers that T5 quantizes have none")
        self.weight = ms.Parameter(
            ms.Tensor(np.zeros((out_features, in_features), np.int8)), name="weight", requires_grad=False
        )
        self.scale = ms.Parameter(ms.Tensor(np.ones(out_features, np.float32)), name="scale", requires_grad=False)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return linear(x.astype(ms.float32), self.weight.astype(ms.float32)) * self.scale

    def in_float32(self, x: ms.Tensor) -> ms.Tensor:
        """Compute ``construct``; the counterpart of ``Linear.in_float32``."""
        return self(x)

    def take(self, weight: np.ndarray) -> None:
        """Quantize a weight (out, in) and store it."""
        values, scale = quantize(weight)
        self.weight.set_data(ms.Tensor(values))
        self.scale.set_data(ms.Tensor(scale))
