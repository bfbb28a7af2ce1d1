"""Group and layer normalization on the CPU, several times as fast as by MindSpore's own operators (2.8).

NumPy computes mean and variance from the tensor's memory; batch normalization with given statistics does the rest. It
has no gradient, so it is for sampling, decoding and encoding, not for training.
"""

from __future__ import annotations

import numpy as np
from mindspore import mint, ops

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


def layer_norm(norm: LayerNorm, x: ms.Tensor) -> ms.Tensor:
    """Layer normalization of x (M, D) without weights."""
    wide = x.astype(ms.float32)
    mean, variance = (ms.Tensor(values.astype(np.float32)) for values in moments(wide.asnumpy()))
    batch_norm = ops.BatchNorm(is_training=False, epsilon=norm.eps)
    rows = wide.reshape(1, x.shape[0], 1, x.shape[1])
    ones, zeros = mint.ones(x.shape[:1], dtype=ms.float32), mint.zeros(x.shape[:1], dtype=ms.float32)
    return batch_norm(rows, ones, zeros, mean, variance)[0].reshape(x.shape).astype(x.dtype)


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
