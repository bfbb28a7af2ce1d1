"""Operators of the CPU path, several times as fast as MindSpore's own (2.8). They have no gradient.

Norms: NumPy computes mean and variance from the tensor's memory, batch normalization with given statistics the rest.
Heads are split and merged by gathering rows, which is ten times as fast as transposing. A matrix (B N, parts D) holds
``parts`` vectors for each token, such as query, key and value.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from mindspore import mint, ops

from pixart_nb.core.backend import ms
from pixart_nb.core.models.layers import GroupNorm, LayerNorm
from pixart_nb.core.models.operators import row_numbers

gather = ops.Gather()
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
