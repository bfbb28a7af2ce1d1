"""Queries and keys of a trace in 16 bits, and attention maps that are computed from them a chunk at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import entr

from pixart_nb.core.errors import PixArtNBError

#: Bytes that one chunk of attention rows may take.
CHUNK_BYTES = 64 * 2**20
LARGEST = 32767


@dataclass(frozen=True)
class Packed:
    """Vectors (R, H, N, d): values int16, scale (R, H, N, 1) and offset (R, H, 1, d) float32.

    A number is its value times the scale of its vector plus the offset of its channel. Half precision has 11 bits,
    which moves attention weights by 0.002 if scores reach 50; in the same memory this keeps 15 bits of each vector.
    """

    values: np.ndarray
    scale: np.ndarray
    offset: np.ndarray

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.values.nbytes + self.scale.nbytes + self.offset.nbytes

    @property
    def count(self) -> int:
        """Number N of vectors of each row and head."""
        return self.values.shape[2]

    def unpacked(self, row: int, heads: np.ndarray, vectors=slice(None)) -> np.ndarray:
        """Return vectors of one row and some heads, (heads, vectors, d) float32."""
        part = self.values[row][heads][:, vectors] * self.scale[row][heads][:, vectors]
        return part + self.offset[row][heads]


def pack(array: np.ndarray, rows: Sequence[int], heads: Sequence[int], folder: Path | None = None) -> Packed:
    """Pack some rows and heads of (B, H, N, d). With ``folder`` the values are in an unnamed file there."""
    shape = (len(rows), len(heads), *array.shape[2:])
    if folder is None:
        values = np.empty(shape, np.int16)
    else:
        with tempfile.TemporaryFile(dir=folder) as file:  # lives as long as the array that is mapped from it
            values = np.memmap(file, np.int16, "w+", shape=shape)
    scale, offset = np.empty((*shape[:3], 1), np.float32), np.empty((*shape[:2], 1, shape[3]), np.float32)
    for i, row in enumerate(rows):
        for j, head in enumerate(heads):
            vectors = array[row, head].astype(np.float32)
            offset[i, j] = vectors.mean(0)
            vectors -= offset[i, j]
            largest = np.abs(vectors).max(-1, keepdims=True)
            if not (np.isfinite(largest).all() and np.isfinite(offset[i, j]).all()):
                raise PixArtNBError(f"row {row}, head {head}: queries or keys are not finite")
            scale[i, j] = np.where(largest > 0, largest / LARGEST, 1)
            values[i, j] = np.rint(vectors / scale[i, j])
    return Packed(values, scale, offset)


@dataclass(frozen=True)
class LayerRecord:
    """Attention inputs of one layer at one step, as a trace keeps them.

    queries (R, H, N, d), keys (R, H, M, d), mask (R, M) bool (True = token) or None, bias of the scores of each key
    (R, H, M) float32 or None, scale of the scores; ratio and operator of the compression of the keys.
    """

    queries: Packed
    keys: Packed
    mask: np.ndarray | None = None
    bias: np.ndarray | None = None
    scale: float = 1.0
    ratio: int = 1
    operator: str | None = None


def softmax_rows(queries: np.ndarray, keys: np.ndarray, scale: float, bias=None) -> np.ndarray:
    """Return ``softmax(scale q k^T + bias)``: (H, Q, d), (H, M, d), bias (H or 1, M) -> (H, Q, M) float32."""
    scores = (queries * np.float32(scale)) @ keys.swapaxes(-1, -2)
    if bias is not None:
        scores += bias[:, None]
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(-1, keepdims=True)
    return scores


def attention_chunks(
    record: LayerRecord, row: int, heads: np.ndarray, queries: np.ndarray
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the attention of ``queries`` (Q,) in chunks: (slice of Q, attention (heads, chunk, M) float32)."""
    keys, bias = record.keys.unpacked(row, heads), _bias(record, row, heads)
    size = max(1, CHUNK_BYTES // (4 * len(heads) * keys.shape[1]))
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        yield part, softmax_rows(record.queries.unpacked(row, heads, queries[part]), keys, record.scale, bias)


def _bias(record: LayerRecord, row: int, heads: np.ndarray) -> np.ndarray | None:
    """Return mask and bias together, (heads or 1, M) float32; None without either."""
    bias = None if record.bias is None else record.bias[row][heads]
    if record.mask is None:
        return bias
    masked = np.where(record.mask[row], np.float32(0), np.float32(-np.inf))[None]
    return masked if bias is None else masked + bias


def query_mean(record: LayerRecord, row: int, heads: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the mean attention over queries, (heads, M) float64."""
    chunks = attention_chunks(record, row, heads, queries)
    return sum(attention.sum(1, dtype=np.float64) for _, attention in chunks) / len(queries)


def entropy(record: LayerRecord, row: int, heads: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Return the mean entropy of the attention rows in nats, 0 .. log M: (heads,) float64."""
    chunks = attention_chunks(record, row, heads, queries)
    return sum(entr(attention).sum((1, 2), dtype=np.float64) for _, attention in chunks) / len(queries)


def mean_distance(
    record: LayerRecord, row: int, heads: np.ndarray, queries: np.ndarray, grid: tuple[int, int]
) -> np.ndarray:
    """Return the mean distance in tokens from a query to its keys, weighted by attention: (heads,) float64."""
    total, centres = np.zeros(len(heads)), key_positions(grid, record.ratio, record.operator)
    positions = np.stack(np.divmod(queries, grid[1]), 1).astype(np.float32)
    for part, attention in attention_chunks(record, row, heads, queries):
        distance = np.sqrt(np.square(positions[part][:, None] - centres).sum(-1))
        total += np.einsum("hqm,qm->h", attention, distance, dtype=np.float64)
    return total / len(queries)


def key_positions(grid: tuple[int, int], ratio: int, operator: str | None) -> np.ndarray:
    """Return (row, column) in tokens of each key, (M, 2) float32: the centre of its cell or the picked token."""
    offset = 0.0 if operator in ("ave", "uniform") else (ratio - 1) / 2
    rows, columns = (np.arange(side // ratio, dtype=np.float32) * ratio + offset for side in grid)
    return np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)


def token_maps(record: LayerRecord, row: int, heads: np.ndarray, groups: list[tuple[int, ...]]) -> np.ndarray:
    """Return the attention of every query to groups of keys, each summed: (heads, groups, N) float32."""
    count = record.queries.count
    out = np.empty((len(heads), len(groups), count), np.float32)
    for part, attention in attention_chunks(record, row, heads, np.arange(count)):
        for number, group in enumerate(groups):
            out[:, number, part] = attention[..., list(group)].sum(-1)
    return out
