"""Operators of the CPU path, several times as fast as MindSpore's own (2.8). Only attention has a gradient.

Group norms: NumPy computes mean and variance from the tensor's memory, batch normalization with given statistics the
rest. Row-wise operators: each thread passes over its part of the rows once; MindSpore passes over the whole memory many
times. Attention: a few heads and queries of one image at a time. Its weights are never stored: the gradient computes
them again, as flash attention does (Dao et al. 2022, algorithm 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from mindspore import ops

from pixart_nb.core import backend, onednn
from pixart_nb.core.backend import ms, to_numpy
from pixart_nb.core.models.attention import MASKED_SCORE
from pixart_nb.core.models.layers import MLP, GroupNorm
from pixart_nb.core.models.low_precision import BFloat16Linear, on_arrays
from pixart_nb.core.onednn import multiply, rounded_bits, softmax, softmax_gradient

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


def modulate(x: np.ndarray, eps: float, shift: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return layer_norm(x) (1 + scale) + shift: x (M, D), shift and scale (D,)."""
    out, gain = np.empty_like(x), 1 + scale
    by_rows(lambda rows: onednn.layer_norm(x[rows], eps, out[rows], gain, shift), len(x))
    return out


def add_gated(x: np.ndarray, gate: np.ndarray | None, change: np.ndarray) -> None:
    """Add gate change to x: x and change (M, D), gate (D,) or None for 1. The change is overwritten."""

    def work(rows: slice) -> None:
        if gate is not None:
            change[rows] *= gate
        x[rows] += change[rows]

    by_rows(work, len(x))


def mlp_on_arrays(mlp: MLP) -> Callable[[np.ndarray], np.ndarray]:
    """Return an MLP as a function of arrays, (M, D) -> (M, D)."""
    fc1, fc2 = on_arrays(mlp.fc1), on_arrays(mlp.fc2)
    if type(mlp.fc1) is type(mlp.fc2) is BFloat16Linear:
        return partial(_bfloat16_mlp, first=fc1.keywords, second=fc2.keywords)
    return lambda x: fc2(_gelu(fc1(x)))


def _gelu(x: np.ndarray) -> np.ndarray:
    by_rows(lambda rows: onednn.gelu(x[rows], x[rows]), len(x))
    return x


def _bfloat16_mlp(x: np.ndarray, first: dict, second: dict) -> np.ndarray:
    """Compute an MLP whose weights are bits of bfloat16; what is between its layers is rounded to bfloat16 once."""
    out = np.empty((len(x), len(second["weight"])), np.float32)

    def work(rows: slice) -> None:
        hidden = np.empty((rows.stop - rows.start, len(first["weight"])), np.uint16)
        onednn.bfloat16_linear(rounded_bits(x[rows]), first["weight"], first["bias"], hidden, True)
        onednn.bfloat16_linear(hidden, second["weight"], second["bias"], out[rows])

    by_rows(work, len(x))
    return out


# ---- attention

#: Scores that are computed at a time by each thread.
SCORES = 2**19
#: Fewest queries of a product that are worth it, if there are as many.
QUERIES = 256


def groups(images: int, heads: int, queries: int, keys: int) -> list[tuple[int, slice]]:
    """Return images with groups of heads that are computed together, at least one for each thread if possible."""
    size = max(1, min(heads, SCORES // (min(queries, QUERIES) * keys)))
    threads = backend.thread_count()
    if images < threads:
        size = min(size, -(-heads * images // threads))
    starts = range(0, heads, size)
    return [(image, slice(start, min(start + size, heads))) for image in range(images) for start in starts]


def _query_parts(heads: int, queries: int, keys: int) -> Iterator[slice]:
    step = max(min(queries, QUERIES), SCORES // (heads * keys))
    return (slice(start, min(start + step, queries)) for start in range(0, queries, step))


def score_bytes(queries: int, keys: int) -> float:
    """Return the bytes of the scores that all threads hold at a time, in ``attention_forward``."""
    return 4.0 * backend.thread_count() * max(SCORES, min(queries, QUERIES) * keys)


def attention_without_gradient(
    q: ms.Tensor,
    k: ms.Tensor,
    v: ms.Tensor,
    mask: ms.Tensor | None = None,
    scale: float | None = None,
    in_bfloat16: bool = False,
) -> ms.Tensor:
    """Compute ``models.attention.attention``, faster; ``in_bfloat16`` with the products of ``attention_forward``."""
    column = None if mask is None else mask_column(mask.asnumpy())
    arrays = [to_numpy(x) for x in (q, k, v)]
    if in_bfloat16:
        arrays = [rounded(x.reshape(1, -1, x.shape[3])).reshape(x.shape) for x in arrays]
    out = np.empty((*q.shape[:3], v.shape[3]), np.float32)
    attention_forward(*arrays, column, out, scale)
    return ms.Tensor.from_numpy(out).astype(v.dtype)


def token_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, column: np.ndarray | None = None) -> np.ndarray:
    """Return the attention as tokens (B N, H d); arguments as for ``attention_forward``."""
    batch, heads, queries, size = q.shape
    out = np.empty((batch, queries, heads, size), np.float32)
    attention_forward(q, k, v, column, out.transpose(0, 2, 1, 3))
    return out.reshape(batch * queries, heads * size)


def split(x: np.ndarray, heads: int) -> np.ndarray:
    """(B, N, H d) -> a view (B, H, N, d)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def rounded(x: np.ndarray) -> np.ndarray:
    """Round tokens (B, N, D) to bfloat16: its bits, uint16."""
    out = np.empty(x.shape, np.uint16)
    jobs = [(image, rows) for image in range(len(x)) for rows in backend.thread_slices(x.shape[1])]

    def work(job: tuple[int, slice]) -> None:
        out[job] = rounded_bits(x[job])

    backend.in_threads(work, jobs)
    return out


def mask_column(mask: np.ndarray) -> np.ndarray:
    """Return what is added to the scores for a mask (B, M) with True = token."""
    return np.where(mask, 0, MASKED_SCORE).astype(np.float32)


def attention_forward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, column: np.ndarray | None, out: np.ndarray, scale: float | None = None
) -> None:
    """Write the attention of q (B, H, N, d) to k and v (B, H, M, d) to ``out``, like q. Arrays may be views.

    ``column`` (B, M) is added to the scores of every query. ``scale`` of the scores is d ** -0.5 by default. If q, k
    and v are bits of bfloat16, both products are of bfloat16, with sums in float32, and softmax and ``out`` float32.
    """

    def work(job: tuple[int, slice]) -> None:
        image, group = job
        for part in _query_parts(group.stop - group.start, q.shape[2], k.shape[2]):
            weights = _weights(q[image, group, part], k[image, group], column, image, scale)
            if q.dtype == np.uint16:
                weights = rounded_bits(_rows(weights)).reshape(weights.shape)
            multiply(weights, v[image, group], out[image, group, part])

    backend.in_threads(work, groups(*q.shape[:3], k.shape[2]))


def attention_gradient(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    column: np.ndarray | None,
    dout: np.ndarray,
    gradients: Sequence[np.ndarray],
) -> None:
    """Write the gradients of q, k and v to ``gradients``, from that of the attention, dout (B, H, N, d)."""
    scale = q.shape[3] ** -0.5

    def work(job: tuple[int, slice]) -> None:
        image, group = job
        keys, values = k[image, group], v[image, group]
        dq, dk, dv = (gradient[image, group] for gradient in gradients)
        for part in _query_parts(group.stop - group.start, q.shape[2], k.shape[2]):
            own, change, later = q[image, group, part], dout[image, group, part], part.start > 0
            weights = _weights(own, keys, column, image, scale)
            multiply(weights.transpose(0, 2, 1), change, dv, add=later)
            scores = np.empty_like(weights)
            multiply(change, values.transpose(0, 2, 1), scores)
            softmax_gradient(_rows(weights), _rows(scores))
            multiply(scores, keys, dq[:, part], scale=scale)
            multiply(scores.transpose(0, 2, 1), own, dk, scale=scale, add=later)

    backend.in_threads(work, groups(*q.shape[:3], k.shape[2]))


def _weights(q: np.ndarray, k: np.ndarray, column: np.ndarray | None, image: int, scale: float | None) -> np.ndarray:
    """Return the softmax over the keys: q (H, N, d), k (H, M, d) -> (H, N, M)."""
    scores = np.empty((len(q), q.shape[1], k.shape[1]), np.float32)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    multiply(q, k.transpose(0, 2, 1), scores, scale=scale)
    if column is not None:
        scores += column[image]
    softmax(_rows(scores), _rows(scores))
    return scores


def _rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(-1, x.shape[-1])
