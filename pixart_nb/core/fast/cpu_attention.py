"""Attention on the CPU, and its gradient, for a few heads and queries of one image at a time.

The weights of the attention are never stored: the gradient computes them again, as flash attention does (Dao et al.
2022, algorithm 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pixart_nb.core import backend
from pixart_nb.core.backend import in_threads, ms, to_numpy
from pixart_nb.core.models.attention import MASKED_SCORE
from pixart_nb.core.onednn import multiply
from pixart_nb.core.onednn_operators import rounded_bits, softmax, softmax_gradient

#: Scores that are computed at a time by each thread.
SCORES = 2**19
#: Fewest queries of a product that are worth it, if there are as many.
QUERIES = 256


def groups(images: int, heads: int, queries: int, keys: int) -> list[tuple[int, slice]]:
    """Return images with groups of heads that are computed together, at least one for each thread if possible."""
    size = max(1, min(heads, SCORES // (min(queries, QUERIES) * keys)))
    threads = backend.numpy_threads()._max_workers
    if images < threads:
        size = min(size, -(-heads * images // threads))
    starts = range(0, heads, size)
    return [(image, slice(start, min(start + size, heads))) for image in range(images) for start in starts]


def _query_parts(heads: int, queries: int, keys: int) -> Iterator[slice]:
    step = max(min(queries, QUERIES), SCORES // (heads * keys))
    return (slice(start, min(start + step, queries)) for start in range(0, queries, step))


def score_bytes(queries: int, keys: int) -> float:
    """Return the bytes of the scores that all threads hold at a time, in ``attention_forward``."""
    return 4.0 * backend.numpy_threads()._max_workers * max(SCORES, min(queries, QUERIES) * keys)


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

    in_threads(work, jobs)
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

    in_threads(work, groups(*q.shape[:3], k.shape[2]))


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

    in_threads(work, groups(*q.shape[:3], k.shape[2]))


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
