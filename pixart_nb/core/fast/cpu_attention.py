"""Attention of a training step on the CPU, and its gradient, for a few heads and queries of one image at a time.

The weights P of the attention are never stored: the gradient computes them again from the logarithms of their sums, as
flash attention does (Dao et al. 2022, algorithm 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from pixart_nb.core import backend
from pixart_nb.core.backend import in_threads
from pixart_nb.core.onednn import multiply

#: Scores that are computed at a time by each thread.
SCORES = 2**18
#: Fewest queries of a product that are worth it, if there are as many.
QUERIES = 128


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


def attention_forward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, column: np.ndarray | None, out: np.ndarray
) -> np.ndarray:
    """Write the attention of q (B, H, N, d) to k and v (B, H, M, d) to ``out``, like q.

    ``column`` (B, M) is added to the scores of every query. Returns the logarithms of the sums of their exponentials,
    (B, H, N), from which ``attention_gradient`` computes the weights.
    """
    images, heads, queries, _ = q.shape
    log_sums = np.empty((images, heads, queries), np.float32)

    def work(job: tuple[int, slice]) -> None:
        image, group = job
        for part in _query_parts(group.stop - group.start, queries, k.shape[2]):
            scores = _scores(q[image, group, part], k[image, group], column, image)
            largest = scores.max(2, keepdims=True)
            scores -= largest
            np.exp(scores, out=scores)
            sums = scores.sum(2, keepdims=True)
            target = out[image, group, part]
            multiply(scores, v[image, group], target)
            target /= sums
            log_sums[image, group, part] = (largest + np.log(sums))[..., 0]

    in_threads(work, groups(images, heads, queries, k.shape[2]))
    return log_sums


def attention_gradient(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    column: np.ndarray | None,
    out: np.ndarray,
    dout: np.ndarray,
    log_sums: np.ndarray,
    gradients: Sequence[np.ndarray],
) -> None:
    """Write the gradients of q, k and v to ``gradients``, from that of ``out``, dout (B, H, N, d)."""
    images, heads, queries, size = q.shape
    scale = np.float32(size**-0.5)

    def work(job: tuple[int, slice]) -> None:
        image, group = job
        keys, values = k[image, group], v[image, group]
        dq, dk, dv = (gradient[image, group] for gradient in gradients)
        for part in _query_parts(group.stop - group.start, queries, k.shape[2]):
            own, change = q[image, group, part], dout[image, group, part]
            weights = _scores(own, keys, column, image)
            weights -= log_sums[image, group, part, None]
            np.exp(weights, out=weights)
            later = part.start > 0
            multiply(weights.transpose(0, 2, 1), change, dv, add=later)
            scores = np.empty_like(weights)
            multiply(change, values.transpose(0, 2, 1), scores)
            scores -= np.einsum("hnd,hnd->hn", out[image, group, part], change)[..., None]
            scores *= weights
            scores *= scale
            multiply(scores, keys, dq[:, part])
            multiply(scores.transpose(0, 2, 1), own, dk, add=later)

    in_threads(work, groups(images, heads, queries, k.shape[2]))


def _scores(q: np.ndarray, k: np.ndarray, column: np.ndarray | None, image: int) -> np.ndarray:
    scores = np.empty((len(q), q.shape[1], k.shape[1]), np.float32)
    multiply(q, k.transpose(0, 2, 1), scores, scale=q.shape[2] ** -0.5)
    if column is not None:
        scores += column[image]
    return scores
