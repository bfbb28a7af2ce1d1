"""Weights in 8 or 4 bits: a quarter or a seventh of the memory of float32, computed in float32."""

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


#: Levels of NF4, the quantiles of a normal distribution (Dettmers et al. 2023, appendix E), and pairs of them by byte.
NF4 = np.array(
    [-1, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0,
     0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1],
    np.float32,
)  # fmt: skip
_PAIRS = np.stack([np.repeat(NF4, 16), np.tile(NF4, 16)], 1)
#: Weights that share a scale in 4 bits.
BLOCK = 64


def quantize_4bit(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize (out, in) floats to NF4: two weights in each byte, and the largest magnitude of each ``BLOCK`` of them.

    -> (blocks, BLOCK / 2) uint8 and (blocks,) float32; the last block is filled with zeros.
    """
    count = -(-weight.size // BLOCK)
    packed, scale = np.empty((count, BLOCK // 2), np.uint8), np.empty(count, np.float32)
    flat, middle = weight.reshape(-1), (NF4[1:] + NF4[:-1]) / 2
    for start in range(0, count, ROWS * BLOCK):
        part = np.asarray(flat[start * BLOCK : (start + ROWS * BLOCK) * BLOCK], np.float32)
        part = np.pad(part, (0, -len(part) % BLOCK)).reshape(-1, BLOCK)
        blocks = slice(start, start + len(part))
        largest = np.abs(part).max(1)
        scale[blocks] = largest
        levels = np.searchsorted(middle, part / np.where(largest > 0, largest, 1)[:, None]).astype(np.uint8)
        packed[blocks] = levels[:, ::2] << 4 | levels[:, 1::2]
    return packed, scale


def dequantize_4bit(packed: np.ndarray, scale: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the weight of ``quantize_4bit``: (out, in) float32."""
    values = _PAIRS[packed].reshape(len(packed), BLOCK)
    values *= scale[:, None]
    return values.reshape(-1)[: shape[0] * shape[1]].reshape(shape)


class QuantizedLinear(nn.Cell):
    """``Linear`` without bias whose weight is quantized when it is loaded: (..., in) -> (..., out) float32.

    The weight is upcast for each product: the float32 memory of one layer at a time.
    """

    dtype = ms.float32

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        if bias:
            raise PixArtNBError("quantized layers have no bias; the layers that T5 quantizes have none")
        self.shape = (out_features, in_features)
        self.weight, self.scale = (
            ms.Parameter(ms.Tensor(array), name=name, requires_grad=False)
            for name, array in zip(("weight", "scale"), self.empty(), strict=True)
        )

    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        """Return a weight and a scale of the stored shapes and dtypes."""
        raise NotImplementedError

    def in_float32(self, x: ms.Tensor) -> ms.Tensor:
        """Compute ``construct``; the counterpart of ``Linear.in_float32``."""
        return self(x)

    def take(self, weight: np.ndarray) -> None:
        """Quantize a weight (out, in) and store it."""
        values, scale = self.quantized(weight)
        self.weight.set_data(ms.Tensor(values))
        self.scale.set_data(ms.Tensor(scale))


class Int8Linear(QuantizedLinear):
    """A weight of int8 with a scale for each output."""

    quantized = staticmethod(quantize)

    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        """Return a weight and a scale of the stored shapes and dtypes."""
        return np.zeros(self.shape, np.int8), np.ones(self.shape[0], np.float32)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return linear(x.astype(ms.float32), self.weight.astype(ms.float32)) * self.scale


class NF4Linear(QuantizedLinear):
    """A weight of 4 bits (NF4) with a scale for each ``BLOCK`` of weights: 0.5625 bytes per weight."""

    quantized = staticmethod(quantize_4bit)

    def empty(self) -> tuple[np.ndarray, np.ndarray]:
        """Return a weight and a scale of the stored shapes and dtypes."""
        blocks = -(-self.shape[0] * self.shape[1] // BLOCK)
        return np.zeros((blocks, BLOCK // 2), np.uint8), np.zeros(blocks, np.float32)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        weight = dequantize_4bit(self.weight.asnumpy(), self.scale.asnumpy(), self.shape)
        return linear(x.astype(ms.float32), ms.Tensor.from_numpy(weight))
