"""Sums and products over chunks of tokens, which stay in the cache of a core, by as many threads as there are cores."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pixart_nb.core import backend
from pixart_nb.core.onednn import layer_norm, multiply

#: Tokens of a chunk.
CHUNK = 512


class Chunk(NamedTuple):
    """Tokens that are processed together: all tokens of some images, or some tokens of one image.

    ``number`` counts the chunks of an image.
    """

    images: slice
    tokens: slice
    number: int


def chunks_of(images: int, tokens: int) -> list[Chunk]:
    """Split a batch into chunks of at most ``CHUNK`` tokens, at least as many as threads."""
    most = min(CHUNK, max(1, images * tokens // backend.thread_count()))
    if tokens <= most:
        step = most // tokens
        starts = range(0, images, step)
        return [Chunk(slice(s, min(s + step, images)), slice(0, tokens), 0) for s in starts]
    count = -(-tokens // most)
    ends = [tokens * i // count for i in range(count + 1)]
    pieces = [(image, piece) for image in range(images) for piece in range(count)]
    return [Chunk(slice(i, i + 1), slice(ends[p], ends[p + 1]), p) for i, p in pieces]


def rows_of(x: np.ndarray, chunk: Chunk) -> np.ndarray:
    """Return the tokens of a chunk as rows (M, D) of the same memory."""
    return x[chunk.images, chunk.tokens].reshape(-1, x.shape[2])


def images_of(rows: np.ndarray, chunk: Chunk) -> np.ndarray:
    """Rows (M, D) of a chunk -> (images, tokens, D)."""
    return rows.reshape(chunk.images.stop - chunk.images.start, -1, rows.shape[1])


class Sums:
    """Sums over tokens: those of the chunks are added in their order, whichever thread came first.

    ``rows`` (B, count, D) has a sum for each image, as the gradient of a modulation, and ``total`` (D,) one for all.
    """

    def __init__(self, chunks: list[Chunk], images: int, count: int, size: int):
        self.by_piece = np.zeros((1 + max(p.number for p in chunks), images, count, size), np.float32)
        self.chunks = chunks

    def add(self, chunk: Chunk, row: int, values: np.ndarray) -> None:
        """Add up values (M, D) of a chunk over the tokens of each image."""
        np.add.reduce(images_of(values, chunk), 1, out=self.by_piece[chunk.number, chunk.images, row])

    @property
    def rows(self) -> np.ndarray:
        """Return the sums of each image, (B, count, D)."""
        return self.by_piece.sum(0)

    @property
    def total(self) -> np.ndarray:
        """Return the sums of all images, (D,)."""
        return self.by_piece.sum((0, 1, 2))


def weight_gradient(dout: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Return the gradient of a weight, (out, in), from dout (B, N, out) and inputs (B, N, in) of its product."""
    dout, inputs = dout.reshape(-1, dout.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
    gradient = np.empty((dout.shape[1], inputs.shape[1]), np.float32)
    backend.in_threads(lambda s: multiply(dout[:, s].T, inputs, gradient[s]), backend.thread_slices(len(gradient)))
    return gradient


class ModulatedNorm:
    """m = norm(x) (1 + scale) + shift, chunk by chunk; shift and scale are rows of the modulation (B, count, D).

    Keeps the normalized tokens and their inverse standard deviations for the gradient.
    """

    def __init__(self, x: np.ndarray, modulation: np.ndarray, rows: tuple[int, int], eps: float):
        self.x, self.eps = x, np.float32(eps)
        self.shift, self.scale = (modulation[:, None, row] for row in rows)
        self.normal, self.inverse = np.empty_like(x), np.empty(x.shape[:2], np.float32)

    def forward(self, chunk: Chunk) -> np.ndarray:
        """Return m of a chunk: (M, D)."""
        x, normal = rows_of(self.x, chunk), rows_of(self.normal, chunk)
        inverse = 1 / np.sqrt(layer_norm(x, self.eps, normal) + self.eps)
        self.inverse[chunk.images, chunk.tokens] = inverse.reshape(-1, chunk.tokens.stop - chunk.tokens.start)
        return self.modulated(chunk)

    def modulated(self, chunk: Chunk) -> np.ndarray:
        """Return m of a chunk from the normalized tokens."""
        normal = images_of(rows_of(self.normal, chunk), chunk)
        out = normal * (1 + self.scale[chunk.images])
        out += self.shift[chunk.images]
        return out.reshape(-1, out.shape[2])

    def backward(self, chunk: Chunk, dm: np.ndarray, dx: np.ndarray, sums: Sums, rows: tuple[int, int]) -> None:
        """Add the gradient of x to dx (M, D), and those of shift and scale to ``sums``; dm (M, D) is overwritten."""
        normal = rows_of(self.normal, chunk)
        sums.add(chunk, rows[0], dm)
        product = dm * normal
        sums.add(chunk, rows[1], product)
        images = images_of(dm, chunk)
        images *= 1 + self.scale[chunk.images]
        along = np.einsum("md,md->m", dm, normal) / np.float32(dm.shape[1])
        dm -= dm.mean(1, keepdims=True)
        dm -= np.multiply(normal, along[:, None], out=product)
        dm *= self.inverse[chunk.images, chunk.tokens].reshape(-1, 1)
        dx += dm
