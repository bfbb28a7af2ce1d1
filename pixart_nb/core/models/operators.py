"""Operators that are fast on the device. They compute what MindSpore's own operators compute.

Slow on the CPU (MindSpore 2.8): broadcasting arithmetic, reductions over any but the last axis of a matrix, transposes,
slices of the last axis and their gradients, and the gradients of softmax and LayerNorm. An operator whose automatic
gradient is slow defines its own.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from mindspore import mint, nn, ops
from mindspore.ops.operations._grad_ops import SigmoidGrad

from pixart_nb.core import backend
from pixart_nb.core.backend import ms, to_numpy
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models import ascend_operators

_matmul = ops.MatMul(transpose_b=True)
_dense = ops.Dense()
_scores = ops.BatchMatMul(transpose_b=True)
_weighted_sum = ops.BatchMatMul()
_batch_matmul_transposed = ops.BatchMatMul(transpose_a=True)
_softmax = ops.Softmax(-1)
_concat, _concat_rows = ops.Concat(-1), ops.Concat(0)
_gather = ops.Gather()
_matmul_plain = ops.MatMul()
_sigmoid_grad = SigmoidGrad()
_ones = ops.Ones()
_tile = ops.Tile()
_row_mean = ops.ReduceMean(keep_dims=True)
_column_sum = ops.ReduceSum()

#: A product of at most FEW_ROWS rows with a weight of at least LARGE_WEIGHT elements is computed as its transpose.
FEW_ROWS, LARGE_WEIGHT = 64, 2**22
#: Columns from which on the rows of a matrix are added by a product with ones.
WIDE = 512


def linear(x: ms.Tensor, weight: ms.Tensor, bias: ms.Tensor | None = None) -> ms.Tensor:
    """Return ``x @ weight.T + bias``: x (..., in), weight (out, in), bias (out,) -> (..., out).

    A matrix product and ``bias_add`` are three times as fast on the CPU as ``ops.dense``, which broadcasts its bias.
    With few rows and a large weight, ``weight @ x.T`` is another three to four times as fast.
    """
    if backend.on_ascend():
        return _dense(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if 1 < rows.shape[0] <= FEW_ROWS and weight.size >= LARGE_WEIGHT:
        rows = transpose(_matmul(weight, rows), 1, 0)
    else:
        rows = _matmul(rows, weight)
    if bias is not None:
        rows = _add_bias(rows, bias)
    return rows.reshape(*x.shape[:-1], weight.shape[0])


def assign(parameter: ms.Parameter, value: ms.Tensor) -> None:
    """Set a parameter to a tensor, in its own dtype.

    ``Assign`` has no aclnn kernel. On the CPU, ``copy_`` refuses a part of another tensor (MindSpore 2.8).
    """
    if backend.on_ascend():
        ascend_operators.copy_into(parameter, value)
    else:
        ops.assign(parameter, value.astype(parameter.dtype))


def check_finite(x: ms.Tensor | np.ndarray, stage: str) -> None:
    """Refuse a result with NaN or infinite values; ``stage`` names what computed it."""
    values = to_numpy(x) if isinstance(x, ms.Tensor) else x
    if not np.isfinite(values).all():
        raise PixArtNBError(
            f"the output of {stage} is not finite: {values.size - np.isfinite(values).sum()} of {values.size} values. "
            "Compute in float32 (mindspore_dtype=float32; dtype: fp32). If it does already, the weights or the inputs "
            "are damaged or do not belong together"
        )


class _AddBias(nn.Cell):
    """(M, D) + (D,), with the sum over rows as the gradient of the bias."""

    def construct(self, x, bias):
        return ops.bias_add(x, bias)

    def bprop(self, x, bias, out, dout):
        if dout.shape[1] < WIDE:
            return dout, _column_sum(dout, 0)
        return dout, _matmul_plain(_ones((1, dout.shape[0]), dout.dtype), dout).reshape(-1)


_add_bias = _AddBias()


def gelu_tanh(x: ms.Tensor) -> ms.Tensor:
    """Return the tanh approximation of GELU, any shape.

    ``0.5 x (1 + tanh(u))`` equals ``x sigmoid(2u)``, which is several times faster on the CPU than ``ops.gelu``.
    """
    if backend.on_ascend():
        return ascend_operators.gelu_tanh(x)
    return _gelu(upcast(x))[0].astype(x.dtype)


class _Gelu(nn.Cell):
    """x g with g = sigmoid(u), u = x (a + b x^2). The gradient is g + (3 u - 2 a x) g (1 - g), from stored u and g."""

    def construct(self, x):
        inner = x * (1.5957691216057308 + 0.07135481627260025 * (x * x))
        gate = ops.sigmoid(inner)
        return x * gate, inner, gate

    def bprop(self, x, out, dout):
        _, inner, gate = out
        slope = inner * 3.0 - x * 3.1915382432114616
        return (dout[0] * gate + _sigmoid_grad(gate, dout[0]) * slope,)


_gelu = _Gelu()


def silu(x: ms.Tensor) -> ms.Tensor:
    """Return ``x sigmoid(x)``, any shape."""
    if backend.on_ascend():
        return ops.silu(x)
    return ops.silu(upcast(x)).astype(x.dtype)


def upcast(x: ms.Tensor) -> ms.Tensor:
    """Return half precision as float32 on the CPU, where functions of it and softmax are up to 15 times slower."""
    return x.astype(ms.float32) if x.dtype == ms.float16 and not backend.on_ascend() else x


def transpose(x: ms.Tensor, *axes: int) -> ms.Tensor:
    """Return a contiguous transpose. Reshaping a transposed view can corrupt the heap on the CPU (MindSpore 2.8)."""
    return x.transpose(*axes).contiguous()


class _RepeatTokens(nn.Cell):
    """(B, 1, D) -> (B, count, D). The gradient, a product with ones, is ten times as fast as a sum over an axis."""

    def construct(self, x, count):
        return _tile(x, (1, count, 1))

    def bprop(self, x, count, out, dout):
        ones = _ones((dout.shape[0], 1, dout.shape[1]), dout.dtype)
        return _weighted_sum(ones, dout), 0


_repeat_tokens = _RepeatTokens()


def repeat_tokens(x: ms.Tensor, count: int) -> ms.Tensor:
    """Repeat (B, 1, D) to (B, count, D) in memory: broadcasting arithmetic is 20 times slower on the CPU.

    On Ascend x is returned as it is, to be broadcast.
    """
    return x if backend.on_ascend() else _repeat_tokens(x, count)


class _Normalize(nn.Cell):
    """Rows (M, D) with mean 0 and variance 1, and their inverse standard deviations (M, 1) for the gradient."""

    def construct(self, x, eps):
        size = x.shape[1]
        centred = x - _tile(_row_mean(x, 1), (1, size))
        inverse = ops.rsqrt(_row_mean(centred * centred, 1) + eps)
        return centred * _tile(inverse, (1, size)), inverse

    def bprop(self, x, eps, out, dout):
        rows, inverse = out
        size = x.shape[1]
        along = _tile(_row_mean(dout[0] * rows, 1), (1, size))
        mean = _tile(_row_mean(dout[0], 1), (1, size))
        return _tile(inverse, (1, size)) * (dout[0] - mean - rows * along), 0.0


_normalize = _Normalize()


def normalize(x: ms.Tensor, eps: float) -> ms.Tensor:
    """Bring rows (M, D) to mean 0 and variance 1: layer normalization without weights."""
    return _normalize(x, eps)[0]


class _ScaledDotProductAttention(nn.Cell):
    """softmax(q k^T) v for q (B, H, N, d), k and v (B, H, M, d), softmax in float32. The scale is already in q.

    The gradient recomputes the weights P instead of storing them. With D = sum(dout out) of each query, the gradient
    of the scores is P (dout v^T - D); D is subtracted inside the product, as one more column.
    """

    def construct(self, q, k, v):
        return _weighted_sum(_weights(q, k).astype(v.dtype), v)

    def bprop(self, q, k, v, out, dout):
        return _attention_gradient(_weights(q, k), q, k, v, out, dout)


class _MaskedAttention(nn.Cell):
    """Attention with ``column`` (B, H, M, 1) added to the scores of each key, as one more column of k."""

    def construct(self, q, k, v, column):
        return _weighted_sum(self.weights(q, k, column).astype(v.dtype), v)

    def weights(self, q, k, column):
        ones = _ones((q.shape[0], q.shape[1], q.shape[2], 1), q.dtype)
        return _weights(_concat((q, ones)), _concat((k, column)))

    def bprop(self, q, k, v, column, out, dout):
        zeros = mint.zeros(column.shape, dtype=column.dtype)
        return *_attention_gradient(self.weights(q, k, column), q, k, v, out, dout), zeros


def _weights(q, k):
    return _softmax(_scores(q, k).astype(ms.float32))


def _attention_gradient(weights, q, k, v, out, dout):
    weights = weights.astype(v.dtype)
    batch, heads, queries, size = dout.shape
    delta = mint.sum((dout * out).reshape(-1, size), 1).reshape(batch, heads, queries, 1)
    ones = _ones((batch, heads, v.shape[2], 1), v.dtype)
    scores = weights * _scores(_concat((dout, -delta)), _concat((v, ones)))
    return _weighted_sum(scores, k), _batch_matmul_transposed(scores, q), _batch_matmul_transposed(weights, dout)


scaled_dot_product_attention, masked_attention = _ScaledDotProductAttention(), _MaskedAttention()


@lru_cache(maxsize=16)
def row_numbers(shape: tuple[int, ...], axes: tuple[int, ...], part: int = -1) -> ms.Tensor:
    """Return the numbers of the rows of a tensor (*shape, size) in the order of its permuted axes.

    With ``part``, those at that index of the first permuted axis.
    """
    rows = np.arange(np.prod(shape), dtype=np.int32).reshape(shape).transpose(axes)
    return ms.Tensor(np.ascontiguousarray(rows[part] if part >= 0 else rows).reshape(-1))


@ops.constexpr
def _row_numbers(shape: tuple[int, ...], axes: tuple[int, ...], part: int = -1) -> ms.Tensor:
    """Return ``row_numbers``, as a constant in a compiled graph."""
    return row_numbers(tuple(shape), tuple(axes), part)


class _SplitHeads(nn.Cell):
    """(B, N, parts H d) -> for each part (B, H, N, d), by gathering rows of d numbers; a single part is no tuple."""

    def construct(self, x, parts, heads):
        batch, tokens, width = x.shape
        shape, size = (batch, tokens, parts, heads), width // (parts * heads)
        rows, outputs = x.reshape(-1, size), ()
        for part in range(parts):
            numbers = _row_numbers(shape, (2, 0, 3, 1), part)
            outputs += (_gather(rows, numbers, 0).reshape(batch, heads, tokens, size),)
        return outputs[0] if parts == 1 else outputs

    def bprop(self, x, parts, heads, out, dout):
        batch, tokens, width = x.shape
        rows = dout if parts == 1 else _concat_rows(dout)
        rows = rows.reshape(-1, width // (parts * heads))
        return _gather(rows, _row_numbers((parts, batch, heads, tokens), (1, 3, 0, 2)), 0).reshape(x.shape), 0, 0


class _MergeHeads(nn.Cell):
    """(B, H, N, d) -> (B, N, H d), by gathering rows of d numbers."""

    def construct(self, x):
        batch, heads, tokens, size = x.shape
        rows = _gather(x.reshape(-1, size), _row_numbers((batch, heads, tokens), (0, 2, 1)), 0)
        return rows.reshape(batch, tokens, heads * size)

    def bprop(self, x, out, dout):
        batch, heads, tokens, size = x.shape
        rows = _gather(dout.reshape(-1, size), _row_numbers((batch, tokens, heads), (0, 2, 1)), 0)
        return (rows.reshape(x.shape),)


_split_heads, _merge_heads = _SplitHeads(), _MergeHeads()


def split_parts(x: ms.Tensor, parts: int, heads: int) -> tuple[ms.Tensor, ...]:
    """Return the heads of each of ``parts`` vectors, such as query, key and value: (B, N, parts H d) -> (B, H, N, d).

    Gathering rows is ten times as fast on the CPU as slicing and transposing, as is its gradient.
    """
    if backend.on_ascend():
        batch, tokens, width = x.shape
        x = transpose(x.reshape(batch, tokens, parts, heads, width // (parts * heads)), 2, 0, 3, 1, 4)
        return tuple(x[part] for part in range(parts))
    return _split_heads(x, parts, heads)


def split_heads(x: ms.Tensor, heads: int) -> ms.Tensor:
    """(B, N, D) -> (B, heads, N, D / heads)."""
    return split_parts(x, 1, heads)[0] if backend.on_ascend() else _split_heads(x, 1, heads)


def merge_heads(x: ms.Tensor) -> ms.Tensor:
    """(B, heads, N, d) -> (B, N, heads d)."""
    if backend.on_ascend():
        batch, heads, tokens, size = x.shape
        return transpose(x, 0, 2, 1, 3).reshape(batch, tokens, heads * size)
    return _merge_heads(x)
