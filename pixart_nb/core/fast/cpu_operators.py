"""Operators of the CPU path, several times as fast as MindSpore's own (2.8). They have no gradient.

Group norms: NumPy computes mean and variance from the tensor's memory, batch normalization with given statistics the
rest. Row-wise operators: NumPy computes them by several threads, a part of the rows at a time, which stays in the cache
until it is done; MindSpore passes over the whole memory many times. NumPy releases the lock of Python meanwhile.
Heads are split and merged by gathering rows, which is ten times as fast as transposing. A matrix (B N, parts D) holds
``parts`` vectors for each token, such as query, key and value.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from mindspore import ops

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.models.layers import GroupNorm, LayerNorm
from pixart_nb.core.models.operators import row_numbers

gather = ops.Gather()
#: Elements whose squares are summed in float32 at a time; the sums of these parts are added in float64.
PART = 2**15
#: With a mean above this many standard deviations, the mean of squares minus the squared mean is too coarse.
FAR = 30.0
#: Elements of a part of the rows.
_ROWS_PART = 2**16
_GELU_LINEAR, _GELU_CUBE = np.float32(1.5957691216057308), np.float32(0.07135481627260025)


class ImageStatistics:
    """Mean and variance of each image of a batch, for ``GroupNorm.statistics``."""

    def normalize(self, norm: GroupNorm, x: ms.Tensor) -> ms.Tensor:
        """Group normalization of x (N, C, H, W)."""
        n, c, height, width = x.shape
        wide = x.astype(ms.float32)
        mean, variance = (
            ms.Tensor(np.repeat(values, c // norm.groups).astype(np.float32))
            for values in moments(wide.asnumpy().reshape(n * norm.groups, -1))
        )
        weight, bias = (ops.tile(vector.astype(ms.float32), (n,)) for vector in (norm.weight, norm.bias))
        batch_norm = ops.BatchNorm(is_training=False, epsilon=norm.eps)
        rows = wide.reshape(1, n * c, height, width)
        return batch_norm(rows, weight, bias, mean, variance)[0].reshape(x.shape).astype(x.dtype)


def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of every row of (G, K) float32, each (G,) float64.

    >>> [values.tolist() for values in moments(np.array([[1, 3], [5, 5]], np.float32))]
    [[2.0, 5.0], [1.0, 0.0]]
    """
    mean = rows.mean(1).astype(np.float64)
    short = rows.shape[1] <= PART
    square = np.einsum("gk,gk->g", rows, rows) if short else np.array([_square_sum(row) for row in rows])
    square = square.astype(np.float64) / rows.shape[1]
    variance = np.maximum(square - mean**2, 0)
    for number in np.flatnonzero(FAR**2 * variance < mean**2):
        variance[number] = rows[number].astype(np.float64).var()
    return mean, variance


def _square_sum(row: np.ndarray) -> float:
    parts = (row[start : start + PART] for start in range(0, len(row), PART))
    return sum(float(part @ part) for part in parts)


def _indices(rows: np.ndarray) -> ms.Tensor:
    return ms.Tensor(np.ascontiguousarray(rows).reshape(-1).astype(np.int32))


def head_rows(batch: int, tokens: int, heads: int, parts: int = 1, part: int = 0) -> ms.Tensor:
    """Return the rows of (batch * tokens * parts * heads, d) that make one part as (batch, heads, tokens, d)."""
    return row_numbers((batch, tokens, parts, heads), (2, 0, 3, 1), part)


def merge_heads(x: ms.Tensor) -> ms.Tensor:
    """Heads (B, H, N, d) -> tokens (B N, H d)."""
    batch, heads, tokens, size = x.shape
    rows = gather(x.reshape(-1, size), row_numbers((batch, heads, tokens), (0, 2, 1)), 0)
    return rows.reshape(batch * tokens, heads * size)


@lru_cache(maxsize=12)
def cell_rows(
    batch: int, height: int, width: int, ratio: int, count: int, parts: int = 1, part: int = 0
) -> list[ms.Tensor]:
    """Return, for each of the first ``count`` positions of the R x R cells, its rows of (B N parts, D) of one part."""
    grid = np.arange(batch * height * width).reshape(batch, height, width) * parts + part
    grid = grid[:, : height // ratio * ratio, : width // ratio * ratio]
    return [_indices(grid[:, n // ratio :: ratio, n % ratio :: ratio]) for n in range(count)]


def _parts(shape: tuple[int, int]) -> list[slice]:
    """Split the rows of a matrix into parts of about ``_ROWS_PART`` elements."""
    step = max(1, _ROWS_PART // shape[1])
    return [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def _array(x: ms.Tensor) -> np.ndarray:
    return (x if x.dtype == ms.float32 else x.astype(ms.float32)).asnumpy()


def _tensor(values: np.ndarray, dtype: ms.Type) -> ms.Tensor:
    tensor = ms.Tensor.from_numpy(values)
    return tensor if dtype == ms.float32 else tensor.astype(dtype)


def _gelu_divisor(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Write ``1 + exp(-x (a + b x^2))`` to ``out``: x divided by it is the tanh approximation of GELU."""
    np.multiply(x, x, out=out)
    out *= -_GELU_CUBE
    out -= _GELU_LINEAR
    out *= x
    with np.errstate(over="ignore"):
        np.exp(out, out=out)
    out += np.float32(1)
    return out


def gelu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the tanh approximation of GELU, x g, and g = sigmoid(x (a + b x^2))."""
    gate = _gelu_divisor(x, np.empty_like(x))
    np.reciprocal(gate, out=gate)
    return x * gate, gate


def gelu_gradient(x: np.ndarray, dout: np.ndarray) -> np.ndarray:
    """Return GELU of x, and multiply dout by its derivative: g + u' x g (1 - g), with u' = a + 3 b x^2."""
    out, gate = gelu(x)
    slope = x * x
    slope *= 3 * _GELU_CUBE
    slope += _GELU_LINEAR
    slope *= out
    slope *= 1 - gate
    slope += gate
    dout *= slope
    return out


def gelu_tanh(x: ms.Tensor) -> ms.Tensor:
    """Return the tanh approximation of GELU of x (M, D)."""
    values = _array(x)
    out = np.empty_like(values)

    def work(rows: slice) -> None:
        np.divide(values[rows], _gelu_divisor(values[rows], out[rows]), out=out[rows])

    backend.in_threads(work, _parts(values.shape))
    return _tensor(out, x.dtype)


def modulate(norm: LayerNorm, x: ms.Tensor, shift: ms.Tensor, scale: ms.Tensor) -> ms.Tensor:
    """Return layer_norm(x) (1 + scale) + shift: x (M, D), shift and scale of D elements."""
    values, out = _array(x), np.empty(x.shape, np.float32)
    gain, offset = (_array(v).reshape(1, -1) for v in (1 + scale, shift))

    def work(rows: slice) -> None:
        part, result = values[rows], out[rows]
        mean, variance = moments(part)
        np.subtract(part, mean.astype(np.float32)[:, None], out=result)
        result *= (1 / np.sqrt(variance + norm.eps)).astype(np.float32)[:, None]
        result *= gain
        result += offset

    backend.in_threads(work, _parts(values.shape))
    return _tensor(out, x.dtype)


def add_gated(x: ms.Tensor, gate: ms.Tensor, change: ms.Tensor) -> ms.Tensor:
    """Return x + gate change: x and change (M, D), gate of D elements."""
    values, changes, out = _array(x), _array(change), np.empty(x.shape, np.float32)
    factor = _array(gate).reshape(1, -1)

    def work(rows: slice) -> None:
        np.multiply(changes[rows], factor, out=out[rows])
        out[rows] += values[rows]

    backend.in_threads(work, _parts(values.shape))
    return _tensor(out, x.dtype)
