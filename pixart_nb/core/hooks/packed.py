"""Vectors in 16 bits each number: a whole number times a scale of the vector, plus an offset of the channel.

Half precision has 11 bits, which is too coarse here: with the scores of the embedded model (up to 50) it moves
attention weights by 0.002. In as much memory this keeps 15 bits of each vector, ten to twenty times as close.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pixart_nb.core.errors import PixArtNBError

LARGEST = 32767


@dataclass(frozen=True)
class Packed:
    """Vectors (R, H, N, d): values int16, scale (R, H, N, 1) and offset (R, H, 1, d) float32."""

    values: np.ndarray
    scale: np.ndarray
    offset: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes in all."""
        return self.values.nbytes + self.scale.nbytes + self.offset.nbytes

    @property
    def count(self) -> int:
        """N, the vectors of each row and head."""
        return self.values.shape[2]

    def unpacked(self, row: int, heads: np.ndarray, vectors=slice(None)) -> np.ndarray:
        """Vectors of one row and some heads: (heads, vectors, d) float32."""
        part = self.values[row][heads][:, vectors] * self.scale[row][heads][:, vectors]
        return part + self.offset[row][heads]


def pack(array: np.ndarray, rows: Sequence[int], heads: Sequence[int], folder: Path | None = None) -> Packed:
    """Some rows and heads of (B, H, N, d); ``folder`` puts the values in an unnamed file there.

    Raises ValueError for numbers that are not finite.
    """
    shape = (len(rows), len(heads), *array.shape[2:])
    values = _empty(shape, folder)
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


def packed_bytes(vectors: int, size: int, sets: int) -> int:
    """Bytes of ``vectors`` of ``size`` numbers, in ``sets`` of one row and head."""
    return vectors * (2 * size + 4) + sets * 4 * size


def _empty(shape: tuple[int, ...], folder: Path | None) -> np.ndarray:
    if folder is None:
        return np.empty(shape, np.int16)
    with tempfile.TemporaryFile(
        dir=folder
    ) as file:  # it has no name, and lives as long as what is mapped from it
        return np.memmap(file, np.int16, "w+", shape=shape)
