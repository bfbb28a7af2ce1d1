"""Operators of the oneDNN library that MindSpore ships, on rows of NumPy arrays: one pass over the memory for each.

They run in the thread that calls them, but for ``linear``, and release the GIL. Without oneDNN 2, NumPy computes the
same in many passes. Rows are contiguous matrices (M, D) of float32, those of ``rounded_bits`` any.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Mapping
from functools import cache, lru_cache

import numpy as np

from pixart_nb.core import backend, onednn
from pixart_nb.core.errors import PixArtNBError

_GELU_LINEAR, _GELU_CUBE = np.float32(1.5957691216057308), np.float32(0.07135481627260025)
#: Elements that NumPy rounds at a time: they stay in the cache.
_PART = 2**15
#: Rows of x from which on each thread of ``linear`` takes a part of them, rather than of the weight.
ROWS, ROWS_BFLOAT16 = 1024, 256
#: Rows or columns below which a product is not split further among the threads.
SMALLEST_PART = 16

# Numbers of oneDNN 2's header dnnl_types.h.
_CPU, _IN_ORDER, _TRAINING, _INFERENCE, _GELU_TANH, _SWISH, _WITH_SCALE_SHIFT = 1, 1, 64, 96, 0xCF, 0xDF, 2
_DTYPES = {np.dtype(np.uint16): 2, np.dtype(np.float32): 3}
_SRC, _DST, _WEIGHTS, _BIAS, _MEAN, _VARIANCE, _DIFF_SRC, _DIFF_DST = 1, 17, 33, 41, 49, 50, 129, 145
#: Bytes that hold any descriptor of a tensor, and of an operator.
_TENSOR_BYTES, _OPERATOR_BYTES = 2048, 16384


def gelu(x: np.ndarray, out: np.ndarray) -> None:
    """Write the tanh approximation of GELU of x (M, D) to ``out``, which may be x."""
    if library() is None:
        np.divide(x, _gelu_divisor(x), out=out)
        return
    _operator("gelu", _layout(x, out))({_SRC: x, _DST: out})


def silu(x: np.ndarray) -> None:
    """Replace x (M, D) by x sigmoid(x)."""
    if library() is None:
        with np.errstate(over="ignore"):
            x /= 1 + np.exp(-x)
        return
    _operator("silu", _layout(x))({_SRC: x, _DST: x})


def gelu_gradient(x: np.ndarray, dout: np.ndarray) -> None:
    """Multiply dout (M, D) by the derivative of ``gelu`` at x: g + u' x g (1 - g), with u' = a + 3 b x^2."""
    if library() is None:
        gate = 1 / _gelu_divisor(x)
        dout *= gate + (_GELU_LINEAR + 3 * _GELU_CUBE * x * x) * x * gate * (1 - gate)
        return
    _operator("gelu_gradient", _layout(x, dout))({_SRC: x, _DIFF_DST: dout, _DIFF_SRC: dout})


def layer_norm(
    x: np.ndarray, eps: float, out: np.ndarray, gain: np.ndarray | None = None, offset: np.ndarray | None = None
) -> np.ndarray:
    """Write ``(x - mean) / sqrt(variance + eps)``, times gain (D,) plus offset (D,), to ``out``. Returns the variances.

    x and out (M, D), which may be the same -> (M,).
    """
    if library() is None:
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
    _operator("layer_norm", _layout(x, out), float(eps), gain is not None)(arrays)
    return variance


def softmax(x: np.ndarray, out: np.ndarray) -> None:
    """Write the softmax of every row of x (M, D) to ``out``, which may be x."""
    if library() is None:
        np.subtract(x, x.max(1, keepdims=True), out=out)
        np.exp(out, out=out)
        out /= out.sum(1, keepdims=True)
        return
    _operator("softmax", _layout(x, out))({_SRC: x, _DST: out})


def softmax_gradient(y: np.ndarray, dout: np.ndarray) -> None:
    """Replace the gradient dout (M, D) of y = softmax(x) by that of x: y (dout - sum(y dout))."""
    if library() is None:
        dout -= np.einsum("md,md->m", y, dout)[:, None]
        dout *= y
        return
    _operator("softmax_gradient", _layout(y, dout))({_DST: y, _DIFF_DST: dout, _DIFF_SRC: dout})


def rounded_bits(x: np.ndarray) -> np.ndarray:
    """Round float32 (M, D) to the nearest bfloat16, halves to even: its bits, uint16."""
    out = np.empty(x.shape, np.uint16)
    if library() is not None:
        _operator("round", _strided(x), _layout(out))({_SRC: x, _DST: out})
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

    x (M, K) and weight (N, K) are bits of bfloat16, bias (N,) and sums float32. ``out`` is float32, or uint16 for the
    bits of bfloat16. Needs oneDNN.
    """
    operator = _operator("linear", _layout(x), _layout(weight), _layout(out), bias is not None, with_gelu)
    operator({_SRC: x, _WEIGHTS: weight, _DST: out} | ({} if bias is None else {_BIAS: bias}))


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """Return ``x @ weight.T + bias``, (M, N) float32, computed by all threads.

    x (M, K) float32, weight (N, K) float32 or bits of bfloat16, bias (N,).
    """
    out, half = np.empty((len(x), len(weight)), np.float32), weight.dtype == np.uint16
    by_rows = len(x) >= min(len(weight), ROWS_BFLOAT16 if half else ROWS)
    whole = rounded_bits(x) if half and not by_rows else x

    def work(part: slice) -> None:
        if not by_rows:  # each thread reads its part of the weight only
            onednn.write_linear(whole, weight[part], None if bias is None else bias[part], out[:, part])
        elif half:
            bfloat16_linear(rounded_bits(x[part]), weight, bias, out[part])
        else:
            onednn.write_linear(x[part], weight, bias, out[part])

    backend.in_threads(work, backend.thread_slices(len(x) if by_rows else len(weight), SMALLEST_PART))
    return out


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
def library() -> ctypes.CDLL | None:
    """Return oneDNN, or None where it is missing or not version 2, whose numbers are above."""
    found = onednn.library()
    if found is None:
        return None
    found.dnnl_version.restype = ctypes.POINTER(ctypes.c_int)  # major, minor, patch, and more
    return found if found.dnnl_version()[0] == 2 else None


def _layout(*arrays: np.ndarray) -> tuple:
    """Return shape, strides in elements and dtype of arrays that are alike, with all rows side by side in memory."""
    layouts = {_strided(x) for x in arrays}
    if len(layouts) > 1 or not arrays[0].flags.c_contiguous:
        raise PixArtNBError(f"expected contiguous arrays of one shape and dtype, got {sorted(map(str, layouts))}")
    return layouts.pop()


def _strided(x: np.ndarray) -> tuple:
    return x.shape, tuple(stride // x.itemsize for stride in x.strides), x.dtype


def _operator(kind: str, *options) -> Operator:
    """Return an operator of this thread: two threads cannot share the memory it works in."""
    return _operator_of_thread(threading.get_ident(), kind, *options)


@lru_cache(maxsize=1024)
def _operator_of_thread(thread: int, kind: str, *options) -> Operator:
    return _BUILDERS[kind](*options)


class Operator:
    """A primitive of oneDNN; ``operator({argument: array})`` runs it on arrays of the layouts it was made for."""

    def __init__(self, description: ctypes.c_void_p, tensors: Mapping[int, ctypes.Array]):
        self.primitive = self._created("primitive", description)
        self.stream = self._created("stream", _engine(), _IN_ORDER)
        memory = {number: self._created("memory", tensor, _engine(), None) for number, tensor in tensors.items()}
        self.memory = memory
        self.arguments = (_Argument * len(memory))(*memory.items())

    def __call__(self, arrays: Mapping[int, np.ndarray]) -> None:
        for number, x in arrays.items():
            library().dnnl_memory_set_data_handle(
                self.memory[number], ctypes.c_void_p(x.__array_interface__["data"][0])
            )
        _call("primitive_execute", self.primitive, self.stream, len(self.arguments), self.arguments)

    def _created(self, kind: str, *arguments) -> ctypes.c_void_p:
        handle = _created(f"{kind}_create", *arguments)
        weakref.finalize(self, getattr(library(), f"dnnl_{kind}_destroy"), handle).atexit = False
        return handle


class _Argument(ctypes.Structure):
    _fields_ = (("number", ctypes.c_int), ("memory", ctypes.c_void_p))


def _call(name: str, *arguments) -> None:
    status = getattr(library(), f"dnnl_{name}")(*arguments)
    if status:
        raise PixArtNBError(f"oneDNN refused {name} (status {status})")


def _created(name: str, *arguments) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    _call(name, ctypes.byref(handle), *arguments)
    return handle


@cache
def _engine() -> ctypes.c_void_p:
    return _created("engine_create", _CPU, ctypes.c_size_t(0))


def _tensor(layout: tuple) -> ctypes.Array:
    """Return the descriptor of a tensor."""
    shape, strides, dtype = layout
    sizes, description = ctypes.c_int64 * len(shape), ctypes.create_string_buffer(_TENSOR_BYTES)
    _call("memory_desc_init_by_strides", description, len(shape), sizes(*shape), _DTYPES[dtype], sizes(*strides))
    return description


def _vector(length: int) -> ctypes.Array:
    return _tensor(((length,), (1,), np.dtype(np.float32)))


def _described(kind: str, *arguments, attributes=None, hint: ctypes.c_void_p | None = None) -> ctypes.c_void_p:
    """Return the descriptor of an operator on this processor."""
    description = ctypes.create_string_buffer(_OPERATOR_BYTES)
    _call(f"{kind}_desc_init", description, *arguments)
    return _created("primitive_desc_create", description, attributes, _engine(), hint)


def _forward_gelu(data: ctypes.Array) -> ctypes.c_void_p:
    return _described("eltwise_forward", _INFERENCE, _GELU_TANH, data, ctypes.c_float(0), ctypes.c_float(0))


def _gelu(layout: tuple) -> Operator:
    data = _tensor(layout)
    return Operator(_forward_gelu(data), {_SRC: data, _DST: data})


def _silu(layout: tuple) -> Operator:
    data = _tensor(layout)
    one_and_zero = ctypes.c_float(1), ctypes.c_float(0)
    return Operator(_described("eltwise_forward", _INFERENCE, _SWISH, data, *one_and_zero), {_SRC: data, _DST: data})


def _gelu_gradient(layout: tuple) -> Operator:
    data, zero = _tensor(layout), ctypes.c_float(0)
    description = _described("eltwise_backward", _GELU_TANH, data, data, zero, zero, hint=_forward_gelu(data))
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


def _softmax_gradient(layout: tuple) -> Operator:
    data = _tensor(layout)
    forward = _described("softmax_forward", _TRAINING, data, 1)
    description = _described("softmax_backward", data, data, 1, hint=forward)
    return Operator(description, dict.fromkeys((_DST, _DIFF_DST, _DIFF_SRC), data))


def _round(source: tuple, target: tuple) -> Operator:
    tensors = {_SRC: _tensor(source), _DST: _tensor(target)}
    pair = [part for tensor in tensors.values() for part in (tensor, _engine())]
    return Operator(_created("reorder_primitive_desc_create", *pair, None), tensors)


def _linear(x: tuple, weight: tuple, out: tuple, biased: bool, with_gelu: bool) -> Operator:
    tensors = {_SRC: _tensor(x), _WEIGHTS: _tensor(weight), _DST: _tensor(out)}
    if biased:
        tensors[_BIAS] = _vector(weight[0][0])
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
    "round": _round,
    "linear": _linear,
}
