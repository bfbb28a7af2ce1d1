"""Operators written for the CPU: the same functions as MindSpore's, without its slow broadcasts and reductions.

What is slow on the CPU (MindSpore 2.8): broadcasting arithmetic, reductions over any but the last axis of a matrix,
the gradients of softmax and LayerNorm, and a bias that is broadcast. Each operator here has its gradient beside it,
where the automatic one is slow; a test compares both with a float64 reference.
"""

from __future__ import annotations

from mindspore import nn, ops

from pixart_nb.core import backend
from pixart_nb.core.backend import ms

_by_rows = ops.MatMul(transpose_b=True)
_scores = ops.BatchMatMul(transpose_b=True)
_weighted = ops.BatchMatMul()
_back = ops.BatchMatMul(transpose_a=True)
_softmax = ops.Softmax(-1)
_append = ops.Concat(-1)
_ones = ops.Ones()
_tile = ops.Tile()
_row_mean = ops.ReduceMean(keep_dims=True)
_column_sum = ops.ReduceSum()
_row_sum = ops.ReduceSum(keep_dims=True)


#: Up to so many rows a product with a weight of at least so many numbers is computed as its transpose.
FEW_ROWS, LARGE_WEIGHT = 64, 2**22


def linear(x: ms.Tensor, weight: ms.Tensor, bias: ms.Tensor | None = None) -> ms.Tensor:
    """``x @ weight.T + bias``. x (..., in), weight (out, in), bias (out,) -> (..., out).

    A matrix product and ``bias_add``: on the CPU three times as fast as ``ops.dense``, whose bias is broadcast.
    """
    rows = x.reshape(-1, x.shape[-1])
    few = 1 < rows.shape[0] <= FEW_ROWS and weight.size >= LARGE_WEIGHT and not backend.on_ascend()
    rows = _transposed_product(rows, weight) if few else _by_rows(rows, weight)
    if bias is not None:
        rows = _add_bias(rows, bias)
    return rows.reshape(*x.shape[:-1], weight.shape[0])


def _transposed_product(rows: ms.Tensor, weight: ms.Tensor) -> ms.Tensor:
    """``rows @ weight.T`` as the transpose of ``weight @ rows.T``.

    For 20 rows and a large weight three to four times as fast on the CPU, which would else turn the weight first.
    """
    return transpose(_by_rows(weight, rows), 1, 0)


class _AddBias(nn.Cell):
    """(M, D) + (D,); the bias' gradient is a sum over rows."""

    def construct(self, x, bias):
        return ops.bias_add(x, bias)

    def bprop(self, x, bias, out, dout):
        return dout, _column_sum(dout, 0)


_add_bias = _AddBias()


def gelu_tanh(x: ms.Tensor) -> ms.Tensor:
    """GELU with the tanh approximation, any shape.

    ``0.5 x (1 + tanh(u))`` is ``x sigmoid(2u)``, which the CPU computes several times faster than its own GELU.
    """
    wide = widened(x)
    gate = ops.sigmoid(wide * (1.5957691216057308 + 0.07135481627260025 * (wide * wide)))
    return (wide * gate).astype(x.dtype)


def silu(x: ms.Tensor) -> ms.Tensor:
    """``x sigmoid(x)``, any shape."""
    return ops.silu(widened(x)).astype(x.dtype)


def widened(x: ms.Tensor) -> ms.Tensor:
    """Half precision as float32 on the CPU, which would compute functions of it, and softmax, up to 15 times slower."""
    return x.astype(ms.float32) if x.dtype == ms.float16 and not backend.on_ascend() else x


def transpose(x: ms.Tensor, *axes: int) -> ms.Tensor:
    """``x.transpose(axes)``, copied. Reshaping a transposed view can corrupt the heap on the CPU (MindSpore 2.8)."""
    return x.transpose(*axes).contiguous()


class _RepeatRows(nn.Cell):
    """(B, 1, D) -> (B, count, D); the gradient is a product with ones, ten times as fast as the sum over an axis."""

    def construct(self, x, count):
        return _tile(x, (1, count, 1))

    def bprop(self, x, count, out, dout):
        ones = _ones((dout.shape[0], 1, dout.shape[1]), dout.dtype)
        return _weighted(ones, dout), 0


_repeat_rows = _RepeatRows()


def repeat_rows(x: ms.Tensor, count: int) -> ms.Tensor:
    """(B, 1, D) -> (B, count, D). Written out: broadcasting arithmetic is 20 times slower on the CPU."""
    return _repeat_rows(x, count)


def rows_like(vector: ms.Tensor, x: ms.Tensor) -> ms.Tensor:
    """A vector of D numbers, written out as every row of a matrix (M, D) of the shape of x."""
    return _tile(vector.reshape(1, -1), (x.shape[0], 1))


class _Standardise(nn.Cell):
    """Rows (M, D) to mean 0 and variance 1."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def construct(self, x):
        size = x.shape[1]
        centred = x - _tile(_row_mean(x, 1), (1, size))
        return centred * self.inverse_deviation(centred)

    def inverse_deviation(self, centred):
        size = centred.shape[1]
        return _tile(ops.rsqrt(_row_mean(centred * centred, 1) + self.eps), (1, size))

    def bprop(self, x, out, dout):
        size = x.shape[1]
        centred = x - _tile(_row_mean(x, 1), (1, size))
        along = _tile(_row_mean(dout * out, 1), (1, size))
        mean = _tile(_row_mean(dout, 1), (1, size))
        return (self.inverse_deviation(centred) * (dout - mean - out * along),)


class _FusedStandardise(nn.Cell):
    """The same by Ascend's own operator. **Not run on Ascend.**"""

    def __init__(self, eps: float):
        super().__init__()
        self.norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)

    def construct(self, x):
        size = x.shape[1]
        return self.norm(x, _ones((size,), x.dtype), ops.zeros_like(x[0]))[0]


def standardise(eps: float) -> nn.Cell:
    """A cell that brings rows (M, D) to mean 0 and variance 1: layer normalisation without weights."""
    return _FusedStandardise(eps) if backend.on_ascend() else _Standardise(eps)


class _Attend(nn.Cell):
    """softmax(q k^T) v for q (B, H, N, d), k and v (B, H, M, d), softmax in float32.

    The gradient computes the weights again instead of keeping them. With D = sum(dout out) of each query,
    the gradient of the scores is P (dout v^T - D); D is subtracted inside the product, as one more column.
    """

    def construct(self, q, k, v):
        return _weighted(self.weights(q, k).astype(v.dtype), v)

    def weights(self, q, k):
        return _softmax(_scores(q, k).astype(ms.float32))

    def bprop(self, q, k, v, out, dout):
        weights = self.weights(q, k).astype(v.dtype)
        batch, heads, queries, size = dout.shape
        delta = _row_sum((dout * out).reshape(-1, size), 1).reshape(batch, heads, queries, 1)
        ones = _ones((batch, heads, v.shape[2], 1), v.dtype)
        scores = weights * _scores(_append((dout, -delta)), _append((v, ones)))
        return _weighted(scores, k), _back(scores, q), _back(weights, dout)


attend = _Attend()
