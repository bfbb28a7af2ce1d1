"""Linear layers and embeddings for inference, with weights in bfloat16, or in 8 or 4 bits.

bfloat16, half the memory of float32: MindSpore 2.8 has no product of bfloat16 matrices on the CPU, but the oneDNN
library that it ships has one. Inputs are rounded to bfloat16, sums and outputs are float32.

8 or 4 bits, a quarter or a seventh of the memory of float32: computed in float32. No layer has a gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
from mindspore import nn

from pixart_nb.core import backend, onednn
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models import ascend_operators
from pixart_nb.core.models.layers import Embedding, Linear, parameter
from pixart_nb.core.models.operators import linear
from pixart_nb.core.onednn import rounded_bits

#: Pattern of the warnings of ``for_inference``.
REPLACED = "b?float16 weights are (rounded to bfloat16|kept and computed in float32)"


@cache
def unsupported() -> str:
    """Return why this machine has no bfloat16 products, or the empty string if it has them."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or not {"avx512_bf16", "amx_bf16"} & set(flags.read_text().split()):
        return "this processor has neither AVX512-BF16 nor AMX-BF16"
    if onednn.primitives() is None or onednn.function(onednn.BF16) is None:
        return f"MindSpore {ms.__version__} ships no oneDNN 2 library with {onednn.BF16}"
    rng = np.random.default_rng(0)
    x, weight = (rounded_bits(rng.standard_normal(shape, dtype=np.float32)) for shape in ((48, 64), (32, 64)))
    exact, error = _upcast(x) @ _upcast(weight).T, 0.0
    try:
        for few in (slice(0, 8), slice(None)):  # two functions of oneDNN
            error = max(error, np.abs(onednn.linear(_upcast(x[few]), weight) - exact[few]).max())
    except PixArtNBError as failed:
        return str(failed)
    return "" if error < 1e-3 else f"oneDNN's bfloat16 product is wrong by {error:.2g} in a test of 48 x 64 x 32"


def _upcast(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bits(parameter: ms.Tensor) -> np.ndarray:
    """Return the memory of a bfloat16 tensor as uint16."""
    return parameter.asnumpy().view(np.uint16)


class BFloat16Linear(Linear):
    """``Linear`` with a bfloat16 weight: (..., in) float32 -> (..., out) float32. For inference only."""

    dtype = ms.float32

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        self.weight.set_dtype(ms.bfloat16)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        if self.training:
            raise PixArtNBError("bfloat16 layers have no gradient on the CPU: train with dtype fp32")
        rows = np.ascontiguousarray(x.astype(ms.float32).asnumpy()).reshape(-1, x.shape[-1])
        bias = None if self.bias is None else self.bias.asnumpy()
        out = onednn.linear(rows, self.bits, bias)
        return ms.Tensor.from_numpy(out).reshape(*x.shape[:-1], out.shape[1])

    @property
    def bits(self) -> np.ndarray:
        """The memory of the weight, (out, in) uint16, or that of ``use_blocks``."""
        return _bits(self.weight)

    def use_blocks(self) -> None:
        """Keep the weight in oneDNN's own layout from now on: a product with few rows takes half the time.

        ``weight`` is then (out / 64, in, 64) uint16; ``plain_weight`` returns its values.
        """
        if self.weight.ndim == 2 and onednn.has_blocks(self.weight.shape):
            blocks = onednn.in_blocks(self.bits)
            memory = self.bits.reshape(blocks.shape)  # reused: MindSpore does not release that of a parameter
            memory[...] = blocks
            self.weight = parameter(blocks.shape)
            self.weight.set_dtype(ms.uint16)
            self.weight.set_data(ms.Tensor.from_numpy(memory))  # no copy; ms.Parameter(tensor) makes one

    def plain_weight(self) -> np.ndarray:
        """Return the weight as checkpoints have it, (out, in) float32."""
        return _upcast(self.bits if self.weight.ndim == 2 else onednn.out_of_blocks(self.bits))

    def in_float32(self, x: ms.Tensor) -> ms.Tensor:
        """Compute ``construct``: bfloat16 has the range of float32."""
        return self(x)


class BFloat16Embedding(Embedding):
    """``Embedding`` with a bfloat16 table: integers (...) -> (..., size) float32."""

    dtype = ms.float32

    def __init__(self, count: int, size: int):
        super().__init__(count, size)
        self.weight.set_dtype(ms.bfloat16)

    def construct(self, ids: ms.Tensor) -> ms.Tensor:
        return ms.Tensor.from_numpy(_upcast(_bits(self.weight)[ids.asnumpy()]))


def inference_dtype(dtype: str | ms.Type) -> ms.Type:
    """Return the dtype that the weights of a network are kept in where ``dtype`` is asked for. Training keeps its own.

    On a CPU, float16 would be slower than float32: there both half precisions are bfloat16 on a processor that
    multiplies it, and float32 on others.
    """
    dtype = backend.dtype_from_name(dtype)
    if dtype == ms.float32 or backend.on_ascend():
        return dtype
    return ms.float32 if unsupported() else ms.bfloat16


def inference_dtype_name(dtype: str | ms.Type) -> str:
    """Return ``inference_dtype`` by its name in configurations: fp32, fp16 or bf16."""
    return next(name for name in backend.DTYPE_NAMES if backend.dtype_from_name(name) == inference_dtype(dtype))


def for_inference(net: nn.Cell, dtype: ms.Type) -> nn.Cell:
    """Give a network bfloat16 layers where ``inference_dtype`` is bfloat16 on a CPU; else it stays as it is.

    A warning tells what a CPU computes in instead of ``dtype``, and why.
    """
    chosen, name = inference_dtype(dtype), str(dtype).lower()
    if chosen == ms.float32 != dtype:
        warnings.warn(f"{name} weights are kept and computed in float32: {unsupported()}", stacklevel=1)
    elif chosen != dtype:
        warnings.warn(f"{name} weights are rounded to bfloat16, which this processor multiplies faster", stacklevel=1)
    return to_bfloat16(net) if chosen == ms.bfloat16 and not backend.on_ascend() else net


def to_bfloat16(net: nn.Cell) -> nn.Cell:
    """Replace the linear layers and embeddings of a network, before its weights are loaded, and return it."""
    for _, parent in list(net.cells_and_names()):
        for name, cell in list(parent.name_cells().items()):
            if type(cell) in (Linear, Embedding):
                new = _counterpart(cell)
                if isinstance(parent, nn.CellList):
                    parent[int(name)] = new
                else:
                    setattr(parent, name, new)
    return net


def use_blocks(net: nn.Cell) -> None:
    """Keep the weights of all bfloat16 layers in oneDNN's layout: for a network with few rows, as a text encoder."""
    for _, cell in net.cells_and_names():
        if isinstance(cell, BFloat16Linear):
            cell.use_blocks()


def _counterpart(cell: Linear | Embedding) -> nn.Cell:
    rows, columns = cell.weight.shape
    if isinstance(cell, Embedding):
        return BFloat16Embedding(rows, columns)
    return BFloat16Linear(columns, rows, cell.bias is not None)


def on_arrays(layer: Linear | QuantizedLinear) -> Callable[[np.ndarray], np.ndarray]:
    """Return a linear layer as a function of arrays, (M, in) float32 -> (M, out) float32."""
    bias = None if layer.bias is None else backend.to_numpy(layer.bias)
    if type(layer) is BFloat16Linear:
        return partial(onednn.linear, weight=layer.bits, bias=bias)
    if type(layer) is Linear and layer.dtype == ms.float32:
        return partial(onednn.linear, weight=layer.weight.asnumpy(), bias=bias)
    return lambda x: backend.to_numpy(layer(ms.Tensor.from_numpy(x).astype(layer.dtype)))


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
    bias = None

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
        if backend.on_ascend():
            weight = self._dequantized_on_device()
        else:
            weight = ms.Tensor.from_numpy(dequantize_4bit(self.weight.asnumpy(), self.scale.asnumpy(), self.shape))
        return linear(x.astype(ms.float32), weight)

    def _dequantized_on_device(self) -> ms.Tensor:
        """Compute ``dequantize_4bit`` without reading the weight. **Not run on Ascend.**"""
        values = ascend_operators.embedding(ms.Tensor(_PAIRS), self.weight.astype(ms.int32)).reshape(-1, BLOCK)
        values = (values * self.scale.reshape(-1, 1)).reshape(-1)
        return values[: self.shape[0] * self.shape[1]].reshape(self.shape)
