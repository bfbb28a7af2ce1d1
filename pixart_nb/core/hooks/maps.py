"""Attention recomputed from kept queries and keys, a chunk of queries at a time: no N x N matrix exists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import entr

from pixart_nb.core.hooks.packed import Packed

#: Bytes that one chunk of attention rows may take.
CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Kept:
    """What a trace keeps of one layer at one step.

    queries (R, H, N, d), keys (R, H, M, d), mask (R, M) bool (True = token) or None, what is added to the scores of the
    keys, (R, H, M) float32 or None, scale of the scores; ``ratio`` and ``operator`` of the compression that made
    the keys.
    """

    queries: Packed
    keys: Packed
    mask: np.ndarray | None = None
    bias: np.ndarray | None = None
    scale: float = 1.0
    ratio: int = 1
    operator: str | None = None


def softmax_rows(queries: np.ndarray, keys: np.ndarray, scale: float, bias=None) -> np.ndarray:
    """``softmax(scale q k^T + bias)``: (H, Q, d), (H, M, d), bias (H or 1, M) -> (H, Q, M) float32."""
    scores = (queries * np.float32(scale)) @ keys.swapaxes(-1, -2)
    if bias is not None:
        scores += bias[:, None]
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    return scores


def stream(
    kept: Kept, row: int, heads: np.ndarray, queries: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """The rows of ``queries`` (Q,) in chunks: (slice of Q, attention (heads, chunk, M) float32)."""
    keys, bias = kept.keys.unpacked(row, heads), _bias(kept, row, heads)
    size = max(1, CHUNK_BYTES // (4 * len(heads) * keys.shape[1]))
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        yield part, softmax_rows(kept.queries.unpacked(row, heads, queries[part]), keys, kept.scale, bias)


def _bias(kept: Kept, row: int, heads: np.ndarray) -> np.ndarray | None:
    """Mask and bias together: (heads or 1, M) float32, None without either."""
    bias = None if kept.bias is None else kept.bias[row][heads]
    if kept.mask is None:
        return bias
    masked = np.where(kept.mask[row], np.float32(0), np.float32(-np.inf))[None]
    return masked if bias is None else masked + bias


def query_mean(kept: Kept, row: int, heads: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Mean over queries: (heads, M) float64."""
    total = np.zeros((len(heads), kept.keys.count))
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
    count = kept.queries.count
    out = np.empty((len(heads), len(groups), count), np.float32)
    for part, attention in stream(kept, row, heads, np.arange(count)):
        for number, group in enumerate(groups):
            out[:, number, part] = attention[..., list(group)].sum(-1)
    return out
