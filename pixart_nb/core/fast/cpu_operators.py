"""Operators of the CPU path, several times as fast as MindSpore's own (2.8). They have no gradient.

Group norms: NumPy computes mean and variance from the tensor's memory, batch normalization with given statistics the
rest. Row-wise operators: each thread passes over its part of the rows once; MindSpore passes over the whole memory many
times.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from mindspore import ops

from pixart_nb.core import backend, onednn_operators
from pixart_nb.core.backend import ms
from pixart_nb.core.models.layers import GroupNorm, LayerNorm

#: Elements whose squares are summed in float32 at a time; the sums of these parts are added in float64.
PART = 2**15
#: With a mean above this many standard deviations, the mean of squares minus the squared mean is too coarse.
FAR = 30.0


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


def by_rows(work: Callable[[slice], object], count: int) -> None:
    """Call ``work`` for ``count`` rows, each thread for its part of them."""
    backend.in_threads(work, backend.thread_slices(count))


def _array(x: ms.Tensor) -> np.ndarray:
    return (x if x.dtype == ms.float32 else x.astype(ms.float32)).asnumpy()


def _tensor(values: np.ndarray, dtype: ms.Type) -> ms.Tensor:
    tensor = ms.Tensor.from_numpy(values)
    return tensor if dtype == ms.float32 else tensor.astype(dtype)


def gelu_tanh(x: ms.Tensor) -> ms.Tensor:
    """Return the tanh approximation of GELU of x (M, D)."""
    values = _array(x)
    out = np.empty_like(values)
    by_rows(lambda rows: onednn_operators.gelu(values[rows], out[rows]), len(values))
    return _tensor(out, x.dtype)


def modulate(norm: LayerNorm, x: ms.Tensor, shift: ms.Tensor, scale: ms.Tensor) -> ms.Tensor:
    """Return layer_norm(x) (1 + scale) + shift: x (M, D), shift and scale of D elements."""
    values, out = _array(x), np.empty(x.shape, np.float32)
    gain, offset = (_array(v).reshape(-1) for v in (1 + scale, shift))
    by_rows(lambda rows: onednn_operators.layer_norm(values[rows], norm.eps, out[rows], gain, offset), len(values))
    return _tensor(out, x.dtype)


def add_gated(x: ms.Tensor, gate: ms.Tensor, change: ms.Tensor) -> ms.Tensor:
    """Return x + gate change: x and change (M, D), gate of D elements."""
    values, changes, out = _array(x), _array(change), np.empty(x.shape, np.float32)
    factor = _array(gate).reshape(1, -1)

    def work(rows: slice) -> None:
        np.multiply(changes[rows], factor, out=out[rows])
        out[rows] += values[rows]

    by_rows(work, len(values))
    return _tensor(out, x.dtype)
