"""Operators of the oneDNN library that MindSpore ships, on NumPy arrays. They release the GIL.

They run in the thread that calls them, but for ``linear``, so that several threads can compute parts of one array.
Products: ``multiply``. Operators on rows pass over the memory once: rows are contiguous matrices (M, D) of float32,
those of ``rounded_bits`` any. Without oneDNN 2, NumPy computes the same in many passes.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError

#: Functions of oneDNN's C interface: products of float32, and of bfloat16 with float32 results.
SGEMM, BF16 = "dnnl_sgemm", "dnnl_gemm_bf16bf16f32"
_GELU_LINEAR, _GELU_CUBE = np.float32(1.5957691216057308), np.float32(0.07135481627260025)
#: Elements that NumPy rounds at a time: they stay in the cache.
_PART = 2**15
#: Rows of x from which on each thread of ``linear`` takes a part of them, rather than of the weight.
ROWS, ROWS_BFLOAT16 = 1024, 256
#: Rows or columns below which a product is not split further among the threads.
SMALLEST_PART = 16
#: Outputs in a block of ``in_blocks``; its inputs come in this multiple.
BLOCK, BLOCK_INPUTS = 64, 64

# Numbers of oneDNN 2's header dnnl_types.h.
_CPU, _IN_ORDER, _TRAINING, _INFERENCE, _GELU_TANH, _SWISH, _WITH_SCALE_SHIFT = 1, 1, 64, 96, 0xCF, 0xDF, 2
_DTYPES = {np.dtype(np.uint16): 2, np.dtype(np.float32): 3}
_SRC, _DST, _WEIGHTS, _BIAS, _MEAN, _VARIANCE, _DIFF_SRC, _DIFF_DST = 1, 17, 33, 41, 49, 50, 129, 145
_ANY, _WEIGHTS_LAYOUT = 1, 131
#: Two threads that create the same operator at the same time crash oneDNN 2.2.
_CREATING = threading.Lock()
#: Bytes that hold any descriptor of a tensor, and of an operator.
_TENSOR_BYTES, _OPERATOR_BYTES = 2048, 16384


@cache
def library() -> ctypes.CDLL | None:
    """Return the oneDNN library of MindSpore, or None where there is none."""
    try:
        return ctypes.CDLL(str(next((Path(ms.__file__).parent / "lib").glob("libdnnl.so*"))))
    except (OSError, StopIteration):
        return None


@cache
def function(name: str) -> Callable | None:
    """Return a product of oneDNN, or None where it is missing."""
    gemm = getattr(library(), name, None)
    if gemm is None:
        return None
    char, size, real, pointer = ctypes.c_char, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    gemm.argtypes = [char, char, size, size, size, real, pointer, size, pointer, size, real, pointer, size]
    gemm.restype = ctypes.c_int
    return gemm


def multiply(a: np.ndarray, b: np.ndarray, out: np.ndarray, *, scale: float = 1.0, add: bool = False) -> None:
    """Write ``scale a @ b`` to ``out`` (..., M, N) float32, or add it: a (..., M, K) and b (..., K, N).

    a and b are float32, or the bits of bfloat16 (uint16). There is at most one leading axis. Each array may be a part
    of a larger one, and matrices of a and b may be transposed; one of their two axes has to be contiguous, in ``out``
    the last one. Without oneDNN, NumPy computes float32.
    """
    call = function(BF16 if a.dtype == np.uint16 else SGEMM)
    if call is None and a.dtype == np.float32:
        product = np.matmul(a, b)
        product *= np.float32(scale)
        np.add(out, product, out=out) if add else np.copyto(out, product)
        return
    (rows, columns), inner = out.shape[-2:], a.shape[-1]
    trans_a, stride_a = _layout(a)
    trans_b, stride_b = _layout(b)
    stride = max(out.strides[-2] // out.itemsize if rows > 1 else columns, columns)
    beta, count = float(add), len(out) if out.ndim == 3 else 1
    (at_a, step_a), (at_b, step_b), (at_out, step_out) = _address(a), _address(b), _address(out)
    for i in range(count):
        status = call(
            trans_a, trans_b, rows, columns, inner, scale, at_a + i * step_a, stride_a, at_b + i * step_b, stride_b,
            beta, at_out + i * step_out, stride,
        )  # fmt: skip
        if status:
            raise PixArtNBError(f"oneDNN refused a product of {rows} x {inner} x {columns} (status {status})")


def write_linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, out: np.ndarray) -> None:
    """Write ``x @ weight.T + bias`` to ``out`` (M, N): x (M, K), weight (N, K), bias (N,)."""
    if bias is not None:
        out[...] = bias
    multiply(x, weight.T, out, add=bias is not None)


def _address(x: np.ndarray) -> tuple[int, int]:
    """Return the address of an array, and the bytes from one of its matrices to the next."""
    return x.__array_interface__["data"][0], x.strides[0] if x.ndim == 3 else 0


def _layout(x: np.ndarray) -> tuple[bytes, int]:
    """Return whether matrices are transposed in memory, and the elements between their rows (or columns)."""
    (rows, columns), (first, second), size = x.shape[-2:], x.strides[-2:], x.itemsize
    if second == size or columns == 1:
        return b"N", max(first // size if rows > 1 else columns, columns)
    if first == size or rows == 1:
        return b"T", max(second // size, rows)
    raise PixArtNBError(f"a product needs a contiguous axis; an array of shape {x.shape} has strides {x.strides}")


def gelu(x: np.ndarray, out: np.ndarray) -> None:
    """Write the tanh approximation of GELU of x (M, D) to ``out``, which may be x."""
    if primitives() is None:
        np.divide(x, _gelu_divisor(x), out=out)
        return
    _operator("gelu", _alike(x, out))({_SRC: x, _DST: out})


def silu(x: np.ndarray) -> None:
    """Replace x (M, D) by x sigmoid(x)."""
    if primitives() is None:
        with np.errstate(over="ignore"):
            x /= 1 + np.exp(-x)
        return
    _operator("silu", _alike(x))({_SRC: x, _DST: x})


def gelu_gradient(x: np.ndarray, dout: np.ndarray) -> None:
    """Multiply dout (M, D) by the derivative of ``gelu`` at x: g + u' x g (1 - g), with u' = a + 3 b x^2."""
    if primitives() is None:
        gate = 1 / _gelu_divisor(x)
        dout *= gate + (_GELU_LINEAR + 3 * _GELU_CUBE * x * x) * x * gate * (1 - gate)
        return
    _operator("gelu_gradient", _alike(x, dout))({_SRC: x, _DIFF_DST: dout, _DIFF_SRC: dout})


def layer_norm(
    x: np.ndarray, eps: float, out: np.ndarray, gain: np.ndarray | None = None, offset: np.ndarray | None = None
) -> np.ndarray:
    """Write ``(x - mean) / sqrt(variance + eps)``, times gain (D,) plus offset (D,), to ``out``. Returns the variances.

    x and out (M, D), which may be the same -> (M,).
    """
    if primitives() is None:
        np.subtract(x, x.mean(1, keepdims=True, dtype=np.float64).astype(np.float32), out=out)
        variance = np.einsum("md,md->m", out, out) / np.float32(x.shape[1])
        out *= (1 / np.sqrt(variance + np.float32(eps)))[:, None]
        if gain is not None:
            out *= gain
            out += offset
        return variance
    mean, variance = np.empty(len(x), np.float32), np.empty(len(x), np.float32)
    arrays = {_SRC: x, _DST: out, _MEAN: mean, _VARIANCE: variance}
    if gain is not None:
        arrays[_WEIGHTS] = np.stack([gain, offset])
    _operator("layer_norm", _alike(x, out), float(eps), gain is not None)(arrays)
    return variance


def softmax(x: np.ndarray, out: np.ndarray) -> None:
    """Write the softmax of every row of x (M, D) to ``out``, which may be x."""
    if primitives() is None:
        np.subtract(x, x.max(1, keepdims=True), out=out)
        np.exp(out, out=out)
        out /= out.sum(1, keepdims=True)
        return
    _operator("softmax", _alike(x, out))({_SRC: x, _DST: out})


def softmax_gradient(y: np.ndarray, dout: np.ndarray) -> None:
    """Replace the gradient dout (M, D) of y = softmax(x) by that of x: y (dout - sum(y dout))."""
    if primitives() is None:
        dout -= np.einsum("md,md->m", y, dout)[:, None]
        dout *= y
        return
    _operator("softmax_gradient", _alike(y, dout))({_DST: y, _DIFF_DST: dout, _DIFF_SRC: dout})


def rounded_bits(x: np.ndarray) -> np.ndarray:
    """Round float32 (M, D) to the nearest bfloat16, halves to even: its bits, uint16."""
    out = np.empty(x.shape, np.uint16)
    if _rounds():
        _operator("reorder", _strided(x), _alike(out))({_SRC: x, _DST: out})
        return out
    bits, flat = np.ascontiguousarray(x).reshape(-1).view(np.uint32), out.reshape(-1)
    for start in range(0, x.size, _PART):
        part = bits[start : start + _PART]
        flat[start : start + _PART] = ((part + (np.uint32(0x7FFF) + (part >> 16 & 1))) >> 16).astype(np.uint16)
        flat[start : start + _PART][np.isnan(part.view(np.float32))] = 0x7FC0  # some would become numbers
    return out


def bfloat16_linear(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, out: np.ndarray, with_gelu: bool = False
) -> None:
    """Write ``x @ weight.T + bias``, or its GELU, to ``out`` (M, N).

    x (M, K) and weight (N, K), which may be ``in_blocks``, are bits of bfloat16, bias (N,) and sums float32. ``out`` is
    float32, or uint16 for the bits of bfloat16. Needs oneDNN.
    """
    operator = _operator("linear", _alike(x), _alike(weight), _alike(out), bias is not None, with_gelu)
    operator({_SRC: x, _WEIGHTS: weight, _DST: out} | ({} if bias is None else {_BIAS: bias}))


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Return ``x @ weight.T + bias``, (M, N) float32, computed by all threads.

    x (M, K) float32, weight (N, K) float32 or bits of bfloat16, which may be ``in_blocks``, bias (N,).
    """
    block = BLOCK if weight.ndim == 3 else 1
    out, half = np.empty((len(x), len(weight) * block), np.float32), weight.dtype == np.uint16
    by_rows = len(x) >= min(out.shape[1], ROWS_BFLOAT16 if half else ROWS)
    whole = rounded_bits(x) if half and not by_rows else x

    def work(part: slice) -> None:
        if not by_rows:  # each thread reads its part of the weight only
            outputs = slice(part.start * block, part.stop * block)
            write = write_linear if block == 1 else _write_blocked_linear
            write(whole, weight[part], None if bias is None else bias[outputs], out[:, outputs])
        elif half:
            bfloat16_linear(rounded_bits(x[part]), weight, bias, out[part])
        else:
            write_linear(x[part], weight, bias, out[part])

    least = SMALLEST_PART if by_rows or block == 1 else 1
    backend.in_threads(work, backend.thread_slices(len(x) if by_rows else len(weight), least))
    return out


def _write_blocked_linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, out: np.ndarray) -> None:
    """Compute ``bfloat16_linear`` into a part of the columns of an array."""
    product = np.empty(out.shape, np.float32)
    bfloat16_linear(x, weight, bias, product)
    out[...] = product


def in_blocks(weight: np.ndarray) -> np.ndarray:
    """Return a weight (N, K), bits of bfloat16, in oneDNN's own layout: (N / BLOCK, K, BLOCK) uint16.

    A product with few rows takes half the time, as oneDNN need not make this layout first.
    """
    blocks = np.empty((len(weight) // BLOCK, weight.shape[1], BLOCK), np.uint16)

    def work(part: slice) -> None:
        _reorder_rows(weight[part.start * BLOCK : part.stop * BLOCK], blocks[part])

    backend.in_threads(work, backend.thread_slices(len(blocks)))
    return blocks


def out_of_blocks(blocks: np.ndarray) -> np.ndarray:
    """Return the weight (N, K) of ``in_blocks``."""
    weight = np.empty((len(blocks) * BLOCK, blocks.shape[1]), np.uint16)
    _reorder_rows(blocks, weight)
    return weight


def has_blocks(shape: tuple[int, int]) -> bool:
    """Return whether ``in_blocks`` has a layout for a weight (N, K) on this machine."""
    return primitives() is not None and not (shape[0] % BLOCK or shape[1] % BLOCK_INPUTS) and _blocks_have_an_order()


@cache
def _blocks_have_an_order() -> bool:
    """Return whether each block of oneDNN's layout holds ``BLOCK`` outputs and nothing else."""
    weight = np.arange(4 * BLOCK * 3 * BLOCK_INPUTS, dtype=np.uint16).reshape(4 * BLOCK, -1)
    whole = np.empty((4, weight.shape[1], BLOCK), np.uint16)
    try:
        for count in (4, 1):
            parts = [whole] if count == 4 else [np.empty_like(whole[:1]) for _ in whole]
            for i, part in enumerate(parts):
                _reorder_rows(weight[i * BLOCK : (i + count) * BLOCK], part)
    except PixArtNBError:
        return False
    return np.array_equal(whole, np.concatenate(parts)) and np.array_equal(out_of_blocks(whole), weight)


def _reorder_rows(source: np.ndarray, target: np.ndarray) -> None:
    """Copy a weight into blocks, or out of them."""
    _operator("reorder", _alike(source), _alike(target))({_SRC: source, _DST: target})


def _gelu_divisor(x: np.ndarray) -> np.ndarray:
    """Return ``1 + exp(-x (a + b x^2))``: x divided by it is the tanh approximation of GELU."""
    out = x * x
    out *= -_GELU_CUBE
    out -= _GELU_LINEAR
    out *= x
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += np.float32(1)
    return out


@cache
def primitives() -> ctypes.CDLL | None:
    """Return oneDNN, or None where it is missing or not version 2, whose numbers are above."""
    loaded = library()
    if loaded is None:
        return None
    loaded.dnnl_version.restype = ctypes.POINTER(ctypes.c_int)  # major, minor, patch, and more
    return loaded if loaded.dnnl_version()[0] == 2 else None


def _alike(*arrays: np.ndarray) -> tuple:
    """Return shape, strides in elements and dtype of arrays that are alike, with all rows side by side in memory."""
    layouts = {_strided(x) for x in arrays}
    if len(layouts) > 1 or not arrays[0].flags.c_contiguous:
        raise PixArtNBError(f"expected contiguous arrays of one shape and dtype, got {sorted(map(str, layouts))}")
    return layouts.pop()


def _strided(x: np.ndarray) -> tuple:
    return x.shape, tuple(stride // x.itemsize for stride in x.strides), x.dtype


def _operator(name: str, *options) -> Operator:
    """Return an operator of this thread: two threads cannot share the memory it works in."""
    return _operator_of_thread(threading.get_ident(), name, *options)


@lru_cache(maxsize=1024)
def _operator_of_thread(thread: int, name: str, *options) -> Operator:
    with _CREATING:
        return _BUILDERS[name](*options)


class Operator:
    """A primitive of oneDNN; ``operator({argument: array})`` runs it on arrays of the layouts it was made for."""

    def __init__(self, description: _Handle, tensors: Mapping[int, ctypes.Array]):
        self.primitive = _created("primitive_create", description)
        self.stream = _created("stream_create", _engine(), _IN_ORDER)
        self.memory = {number: _created("memory_create", t, _engine(), None) for number, t in tensors.items()}
        pairs = [(number, memory.address) for number, memory in self.memory.items()]
        self.arguments = (_Argument * len(pairs))(*pairs)

    def __call__(self, arrays: Mapping[int, np.ndarray]) -> None:
        for number, x in arrays.items():
            _call("memory_set_data_handle", self.memory[number], ctypes.c_void_p(x.__array_interface__["data"][0]))
        _call("primitive_execute", self.primitive, self.stream, len(self.arguments), self.arguments)


class _Argument(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int), ("memory", ctypes.c_void_p))


class _Handle:
    """An object of oneDNN, destroyed with its last reference; ctypes passes it as ``_as_parameter_``."""

    def __init__(self, address: int, destroy: Callable):
        self.address, self._as_parameter_ = address, ctypes.c_void_p(address)
        weakref.finalize(self, destroy, ctypes.c_void_p(address)).atexit = False


def _call(name: str, *arguments) -> None:
    status = getattr(primitives(), f"dnnl_{name}")(*arguments)
    if status:
        raise PixArtNBError(f"oneDNN refused {name} (status {status})")


def _created(name: str, *arguments) -> _Handle:
    """Return what ``dnnl_<name>`` creates."""
    address = ctypes.c_void_p()
    _call(name, ctypes.byref(address), *arguments)
    destroy = name.removeprefix("reorder_").replace("_create", "_destroy")
    return _Handle(address.value, getattr(primitives(), f"dnnl_{destroy}"))


@cache
def _engine() -> _Handle:
    return _created("engine_create", _CPU, ctypes.c_size_t(0))


@cache
def _rounds() -> bool:
    """Return whether oneDNN rounds to bfloat16: not on a processor without AVX-512."""
    layouts = [_strided(np.empty((1, 1), dtype)) for dtype in (np.float32, np.uint16)]
    try:
        with _CREATING:
            return primitives() is not None and _reorder(*layouts) is not None
    except PixArtNBError:
        return False


def _tensor(layout: tuple) -> ctypes.Array:
    """Return the descriptor of a tensor."""
    shape, strides, dtype = layout
    sizes, description = ctypes.c_int64 * len(shape), ctypes.create_string_buffer(_TENSOR_BYTES)
    _call("memory_desc_init_by_strides", description, len(shape), sizes(*shape), _DTYPES[dtype], sizes(*strides))
    return description


@cache
def _product(outputs: int, inputs: int) -> _Handle:
    """Describe a product, for the layout of its weight; it is the same for any number of rows."""
    sizes, weight = (ctypes.c_int64 * 2)(outputs, inputs), ctypes.create_string_buffer(_TENSOR_BYTES)
    _call("memory_desc_init_by_tag", weight, 2, sizes, _DTYPES[np.dtype(np.uint16)], _ANY)
    shapes = (((BLOCK, inputs), np.dtype(np.uint16)), ((BLOCK, outputs), np.dtype(np.float32)))
    x, out = (_tensor((shape, (shape[1], 1), dtype)) for shape, dtype in shapes)
    return _described("inner_product_forward", _INFERENCE, x, weight, None, out)


def _weight_tensor(layout: tuple) -> ctypes.Array | ctypes.c_void_p:
    """Return the descriptor of a weight (N, K), which may be ``in_blocks``."""
    shape = layout[0]
    if len(shape) == 2:
        return _tensor(layout)
    query, size = primitives().dnnl_primitive_desc_query_md, primitives().dnnl_memory_desc_get_size
    query.restype, size.restype = ctypes.c_void_p, ctypes.c_size_t
    described = ctypes.c_void_p(query(_product(shape[0] * BLOCK, shape[1]), _WEIGHTS_LAYOUT, 0))
    if size(described) != 2 * np.prod(shape):
        raise PixArtNBError(f"oneDNN has no layout of {BLOCK} outputs for a weight of {shape[0] * BLOCK} x {shape[1]}")
    return described


def _vector(length: int) -> ctypes.Array:
    return _tensor(((length,), (1,), np.dtype(np.float32)))


def _described(name: str, *arguments, attributes=None, hint: _Handle | None = None) -> _Handle:
    """Return the descriptor of an operator on this processor."""
    description = ctypes.create_string_buffer(_OPERATOR_BYTES)
    _call(f"{name}_desc_init", description, *arguments)
    return _created("primitive_desc_create", description, attributes, _engine(), hint)


@cache
def _forward_gelu(layout: tuple) -> _Handle:
    """Describe GELU. Kept: the description of its gradient points to this one, also in the cache of oneDNN."""
    data, zero = _tensor(layout), ctypes.c_float(0)
    return _described("eltwise_forward", _INFERENCE, _GELU_TANH, data, zero, zero)


def _gelu(layout: tuple) -> Operator:
    data = _tensor(layout)
    return Operator(_forward_gelu(layout), {_SRC: data, _DST: data})


def _silu(layout: tuple) -> Operator:
    data = _tensor(layout)
    one_and_zero = ctypes.c_float(1), ctypes.c_float(0)
    return Operator(_described("eltwise_forward", _INFERENCE, _SWISH, data, *one_and_zero), {_SRC: data, _DST: data})


def _gelu_gradient(layout: tuple) -> Operator:
    data, zero = _tensor(layout), ctypes.c_float(0)
    description = _described("eltwise_backward", _GELU_TANH, data, data, zero, zero, hint=_forward_gelu(layout))
    return Operator(description, dict.fromkeys((_SRC, _DIFF_DST, _DIFF_SRC), data))


def _layer_norm(layout: tuple, eps: float, scaled: bool) -> Operator:
    data, (rows, columns) = _tensor(layout), layout[0]
    flags = _WITH_SCALE_SHIFT if scaled else 0
    statistics = _vector(rows)
    description = _described("layer_normalization_forward", _TRAINING, data, statistics, ctypes.c_float(eps), flags)
    tensors = {_SRC: data, _DST: data, _MEAN: statistics, _VARIANCE: statistics}
    if scaled:
        tensors[_WEIGHTS] = _tensor(((2, columns), (columns, 1), np.dtype(np.float32)))
    return Operator(description, tensors)


def _softmax(layout: tuple) -> Operator:
    data = _tensor(layout)
    return Operator(_described("softmax_forward", _INFERENCE, data, 1), {_SRC: data, _DST: data})


@cache
def _forward_softmax(layout: tuple) -> _Handle:
    """Describe softmax for its gradient; kept as ``_forward_gelu`` is."""
    return _described("softmax_forward", _TRAINING, _tensor(layout), 1)


def _softmax_gradient(layout: tuple) -> Operator:
    data = _tensor(layout)
    description = _described("softmax_backward", data, data, 1, hint=_forward_softmax(layout))
    return Operator(description, dict.fromkeys((_DST, _DIFF_DST, _DIFF_SRC), data))


def _reorder(source: tuple, target: tuple) -> Operator:
    tensors = {_SRC: _weight_tensor(source), _DST: _weight_tensor(target)}
    pair = [part for tensor in tensors.values() for part in (tensor, _engine())]
    return Operator(_created("reorder_primitive_desc_create", *pair, None), tensors)


def _linear(x: tuple, weight: tuple, out: tuple, biased: bool, with_gelu: bool) -> Operator:
    tensors = {_SRC: _tensor(x), _WEIGHTS: _weight_tensor(weight), _DST: _tensor(out)}
    if biased:
        tensors[_BIAS] = _vector(out[0][1])
    attributes = None
    if with_gelu:
        attributes, steps = _created("primitive_attr_create"), _created("post_ops_create")
        _call("post_ops_append_eltwise", steps, ctypes.c_float(1), _GELU_TANH, ctypes.c_float(0), ctypes.c_float(0))
        _call("primitive_attr_set_post_ops", attributes, steps)
    operands = (tensors[_SRC], tensors[_WEIGHTS], tensors.get(_BIAS), tensors[_DST])
    return Operator(_described("inner_product_forward", _INFERENCE, *operands, attributes=attributes), tensors)


_BUILDERS = {
    "gelu": _gelu,
    "gelu_gradient": _gelu_gradient,
    "silu": _silu,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "softmax_gradient": _softmax_gradient,
    "reorder": _reorder,
    "linear": _linear,
}
