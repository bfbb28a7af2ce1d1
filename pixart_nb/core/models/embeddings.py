"""Embeddings of the transformer's inputs: patches, positions, timestep, image size and caption."""

from __future__ import annotations

import math

import numpy as np
from mindspore import mint, nn, ops

from pixart_nb.core.backend import ms
from pixart_nb.core.models.layers import MLP, Linear, parameter
from pixart_nb.core.models.operators import linear, silu, transpose

FREQUENCIES = 256


def sincos_positions(size: int, height: int, width: int, base_size: int, pe_interpolation: float) -> np.ndarray:
    """Return the sine-cosine positions of a token grid, (height * width, size) float32.

    A grid of any size spans the coordinates 0 .. base_size / pe_interpolation, so a larger image interpolates. As in
    the official code the first half of the channels belongs to the column, the second to the row.
    """
    rows = np.arange(height, dtype=np.float32) / (height / base_size) / pe_interpolation
    columns = np.arange(width, dtype=np.float32) / (width / base_size) / pe_interpolation
    grid = np.empty((height, width, size), np.float32)
    grid[:, :, : size // 2] = _sincos(size // 2, columns)
    grid[:, :, size // 2 :] = _sincos(size // 2, rows)[:, None]
    return grid.reshape(height * width, size)


def _sincos(size: int, position: np.ndarray) -> np.ndarray:
    omega = 1.0 / 10000 ** (np.arange(size // 2, dtype=np.float64) / (size / 2.0))
    angle = position.astype(np.float64)[:, None] * omega[None]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def sincos_frequencies(value: ms.Tensor) -> ms.Tensor:
    """Return cosines, then sines of ``value`` at 128 frequencies: (N,) float -> (N, 256) float32."""
    half = FREQUENCIES // 2
    rates = ms.Tensor(np.exp(-math.log(10000) * np.arange(half, dtype=np.float32) / half).astype(np.float32))
    angle = value.astype(ms.float32).reshape(-1, 1) * rates.reshape(1, half)
    return mint.cat((ops.cos(angle), ops.sin(angle)), -1)


class PatchEmbed(nn.Cell):
    """Latents (N, C, H, W) -> tokens (N, (H/p)(W/p), D): a convolution of stride p, computed as a matrix product."""

    def __init__(self, patch: int, channels: int, size: int):
        super().__init__()
        self.patch = patch
        self.proj = PatchProjection(patch, channels, size)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return self.proj(self.patches(x))

    def patches(self, x: ms.Tensor) -> ms.Tensor:
        """Latents (N, C, H, W) -> (N, (H/p)(W/p), p p C)."""
        n, c, height, width = x.shape
        p = self.patch
        rows = transpose(x, 0, 2, 3, 1).reshape(n * (height // p), p, width // p, p * c)
        return transpose(rows, 0, 2, 1, 3).reshape(n, (height // p) * (width // p), p * p * c)


class PatchProjection(nn.Cell):
    """Weight (D, C, p, p) and bias of the convolution, applied to flattened patches (..., p p C)."""

    def __init__(self, patch: int, channels: int, size: int):
        super().__init__()
        self.weight, self.bias = parameter((size, channels, patch, patch)), parameter((size,), name="bias")

    def construct(self, patches: ms.Tensor) -> ms.Tensor:
        return linear(patches, self.matrix(), self.bias)

    def matrix(self) -> ms.Tensor:
        """Return the matrix that multiplies a patch, (D, p p C)."""
        return transpose(self.weight, 0, 2, 3, 1).reshape(self.weight.shape[0], -1)


class FrequencyMLP(nn.Cell):
    """Embed a number: sines and cosines, Linear, SiLU, Linear (names ``mlp.0``, ``mlp.2``), (N,) -> (N, D).

    An input (N, k), such as the micro conditions of alpha-1024, gives the embeddings of its k numbers, (N, k D).
    """

    def __init__(self, size: int):
        super().__init__()
        self.mlp = nn.CellList([Linear(FREQUENCIES, size), nn.SiLU(), Linear(size, size)])

    def construct(self, value: ms.Tensor) -> ms.Tensor:
        embedded = sincos_frequencies(value.reshape(-1)).astype(self.mlp[0].weight.dtype)
        return self.mlp[2](silu(self.mlp[0](embedded))).reshape(value.shape[0], -1)


class CaptionEmbedder(nn.Cell):
    """Project captions. ``y_embedding`` (T, caption_channels), the official code's dropped caption, is only stored."""

    def __init__(self, channels: int, size: int, max_length: int):
        super().__init__()
        self.y_proj = MLP(channels, size, size)
        self.y_embedding = parameter((max_length, channels), name="y_embedding")

    def construct(self, caption: ms.Tensor) -> ms.Tensor:
        """caption (N, T, C) -> (N, T, D)."""
        return self.y_proj(caption)
