"""Attention recomputed from kept queries and keys, a chunk of queries at a time: no N x N matrix exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import entr

#: Bytes that one chunk of attention rows may take.
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Kept:
    """What a trace keeps of one layer at one step.

    queries (R, H, N, d) and keys (R, H, M, d) float16, mask (R, M) bool (True = token) or None, scale of the scores;
    ``ratio`` and ``operator`` of the compression that made the keys.
    """

    queries: np.ndarray
    keys: np.ndarray
    mask: np.ndarray | None
    scale: float
    ratio: int = 1
    operator: str | None = None


def softmax_rows(queries: np.ndarray, keys: np.ndarray, scale: float, mask=None) -> np.ndarray:
    """``softmax(scale q k^T)`` over the keys that mask (M,) allows: (H, Q, d), (H, M, d) -> (H, Q, M) float32."""
    scores = (queries.astype(np.float32) * np.float32(scale)) @ keys.astype(np.float32).swapaxes(-1, -2)
    if mask is not None:
        scores[..., ~mask] = -np.inf
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    return scores


def stream(
    kept: Kept, row: int, heads: np.ndarray, queries: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """The rows of ``queries`` (Q,) in chunks: (slice of Q, attention (heads, chunk, M) float32)."""
    q, keys = kept.queries[row], kept.keys[row][heads].astype(np.float32)
    mask = None if kept.mask is None else kept.mask[row]
    size = max(1, CHUNK_BYTES // (4 * len(heads) * keys.shape[1]))
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        yield part, softmax_rows(q[heads][:, queries[part]], keys, kept.scale, mask)


def query_mean(kept: Kept, row: int, heads: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Mean over queries: (heads, M) float64."""
    total = np.zeros((len(heads), kept.keys.shape[2]))
    for _, attention in stream(kept, row, heads, queries):
        total += attention.sum(1, dtype=np.float64)
    return total / len(queries)


def entropy(kept: Kept, row: int, heads: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Mean over queries of the rows' entropy in nats, 0 .. log M: (heads,) float64."""
    total = np.zeros(len(heads))
    for _, attention in stream(kept, row, heads, queries):
        total += entr(attention).sum((1, 2), dtype=np.float64)
    return total / len(queries)


def mean_distance(
    kept: Kept, row: int, heads: np.ndarray, queries: np.ndarray, grid: tuple[int, int]
) -> np.ndarray:
    """Mean over queries of the distance, in tokens, to where they look: (heads,) float64."""
    total, centres = np.zeros(len(heads)), key_positions(grid, kept.ratio, kept.operator)
    places = np.stack(np.divmod(queries, grid[1]), 1).astype(np.float32)
    for part, attention in stream(kept, row, heads, queries):
        distance = np.sqrt(np.square(places[part][:, None] - centres).sum(-1))
        total += np.einsum("hqm,qm->h", attention, distance, dtype=np.float64)
    return total / len(queries)


def key_positions(grid: tuple[int, int], ratio: int, operator: str | None) -> np.ndarray:
    """(row, column) in tokens of what each key stands for, (M, 2) float32: a cell's centre, or the token picked."""
    offset = 0.0 if operator in ("ave", "uniform") else (ratio - 1) / 2
    rows, columns = (np.arange(side // ratio, dtype=np.float32) * ratio + offset for side in grid)
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)


def token_maps(kept: Kept, row: int, heads: np.ndarray, groups: list[tuple[int, ...]]) -> np.ndarray:
    """Attention of every query to groups of keys, each summed: (heads, groups, N) float32."""
    count = kept.queries.shape[2]
    out = np.empty((len(heads), len(groups), count), np.float32)
    for part, attention in stream(kept, row, heads, np.arange(count)):
        for number, group in enumerate(groups):
            out[:, number, part] = attention[..., list(group)].sum(-1)
    return out
