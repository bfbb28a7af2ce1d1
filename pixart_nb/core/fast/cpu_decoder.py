"""The second part of the autoencoder's decoder on the CPU, for large images: less time, and a third of the memory.

An image is an array (H, W, C). A 3x3 convolution is a sum of nine products of oneDNN, of one band of rows at a time,
whose norm and SiLU are computed in the cache just before. Nothing else is as large as an image than the input, the
hidden layer and the output of one residual block. The products are of float32, or of bfloat16 with sums in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import local

import numpy as np

from pixart_nb.core import backend
from pixart_nb.core.backend import in_threads, ms
from pixart_nb.core.fast.cpu_operators import FAR
from pixart_nb.core.models.layers import Conv2d, GroupNorm
from pixart_nb.core.models.vae_blocks import Decoder, ResnetBlock
from pixart_nb.core.onednn import multiply, rounded_bits, silu

#: Elements of the rows that a convolution of a band reads.
BAND = 2**21
#: Pixels whose values and squares are summed in float32 at a time; these sums are added in float64.
PART = 256
#: Source rows (or columns) and rows of the kernel that are added for them, by the parity of the output row: without
#: upsampling, and after doubling every row.
_TAPS = {1: [[(0, [0]), (1, [1]), (2, [2])]], 2: [[(0, [0]), (1, [1, 2])], [(1, [0, 1]), (2, [2])]]}


@dataclass
class Image:
    """``values`` (H, W, C) float32, and the ``sums`` of every channel and of its squares, (2, C) float64."""

    values: np.ndarray
    sums: np.ndarray


def decode_fine(decoder: Decoder, x: ms.Tensor, in_bfloat16: bool = False) -> ms.Tensor:
    """Compute ``decoder.fine`` of x (N, C, h, w): images (N, C', H, W). ``in_bfloat16``: the products."""
    images = [_decoded(decoder, np.ascontiguousarray(values.transpose(1, 2, 0)), in_bfloat16) for values in x.asnumpy()]
    return ms.Tensor.from_numpy(np.stack(images))


def _decoded(decoder: Decoder, values: np.ndarray, in_bfloat16: bool) -> np.ndarray:
    image = Image(values, sum(_sums(row) for row in values))
    for stage in decoder.up_blocks:
        for block in stage.resnets:
            image = _residual(block, image, in_bfloat16)
        for layer in stage.upsamplers:
            image = Convolution(layer.conv, image, in_bfloat16, upscale=2)()
    out = Convolution(decoder.conv_out, image, in_bfloat16, decoder.conv_norm_out)().values
    return np.ascontiguousarray(out.transpose(2, 0, 1))


def _residual(block: ResnetBlock, image: Image, in_bfloat16: bool) -> Image:
    """Compute a residual block. ``image`` is overwritten if the number of channels stays."""
    hidden = Convolution(block.conv1, image, in_bfloat16, block.norm1)()
    return Convolution(block.conv2, hidden, in_bfloat16, block.norm2)(image.values, block.conv_shortcut)


class Convolution:
    """A 3x3 convolution of an image, after norm and SiLU if there is a norm, or after doubling rows and columns."""

    def __init__(self, conv: Conv2d, image: Image, in_bfloat16: bool, norm: GroupNorm | None = None, upscale: int = 1):
        self.image, self.in_bfloat16, self.upscale, self.memory = image, in_bfloat16, upscale, local()
        weight, self.bias = conv.weight.asnumpy(), conv.bias.asnumpy()
        self.phases = {
            (a, b): [
                (dy, dx, self._operand(np.ascontiguousarray(weight[:, :, ky][..., kx].sum((2, 3)).T)))
                for dy, ky in rows
                for dx, kx in columns
            ]
            for a, rows in enumerate(_TAPS[upscale])
            for b, columns in enumerate(_TAPS[upscale])
        }
        self.affine = None if norm is None else _affine(norm, image)

    def __call__(self, source: np.ndarray | None = None, shortcut: Conv2d | None = None) -> Image:
        """Return the result, to which ``source``, or its ``shortcut``, is added; without a shortcut in its memory."""
        height, width, channels = self.image.values.shape
        if source is not None and shortcut is None:
            self.out = source
        else:
            self.out = np.empty((height * self.upscale, width * self.upscale, len(self.bias)), np.float32)
        self.source = source
        self.shortcut = None if shortcut is None else (shortcut.weight.asnumpy()[:, :, 0, 0].T, shortcut.bias.asnumpy())
        rows = max(4, BAND // (channels * (width + 2)) - 2)
        threads = backend.thread_count()
        rows = max(1, min(rows, -(-height // threads)))
        bands = [slice(start, min(start + rows, height)) for start in range(0, height, rows)]
        sums = np.empty((len(bands), 2, len(self.bias)))
        in_threads(lambda number: self._band(bands[number], sums[number]), range(len(bands)))
        return Image(self.out, sums.sum(0))

    def _band(self, band: slice, sums: np.ndarray) -> None:
        """Compute the rows of a band, and the sums of the result."""
        count, (_, width, channels) = band.stop - band.start, self.image.values.shape
        pitch, scale = width + 2, self.upscale
        padded = self._buffer("padded", (count + 2, pitch, channels), np.uint16 if self.in_bfloat16 else np.float32)
        self._fill(padded, band)
        flat, out = padded.reshape(-1, channels), self.out[band.start * scale : band.stop * scale]
        accumulated = self._buffer("accumulated", (count * pitch, len(self.bias)))
        for (a, b), taps in self.phases.items():
            for number, (dy, dx, matrix) in enumerate(taps):
                first = dy * pitch + dx
                own = slice(first, first + count * pitch - 2)  # the last two columns of a row are beyond the image
                multiply(flat[own], matrix, accumulated[: count * pitch - 2], add=number > 0)
            result = accumulated.reshape(count, pitch, -1)[:, :width]
            result += self.bias
            if self.out is self.source:
                out += result
            else:
                out[a::scale, b::scale] = result
        rows = out.reshape(-1, len(self.bias))
        if self.shortcut is not None:
            matrix, bias = self.shortcut
            rows += bias
            multiply(self.source[band].reshape(-1, matrix.shape[0]), matrix, rows, add=True)
        sums[...] = _sums(rows)

    def _fill(self, padded: np.ndarray, band: slice) -> None:
        """Write the rows around a band to ``padded`` (rows + 2, W + 2, C), after norm and SiLU, with zeros outside."""
        values = self.image.values
        padded[:, [0, -1]] = 0
        for target, row in zip(padded[:, 1:-1], range(band.start - 1, band.stop + 1), strict=True):
            if not 0 <= row < len(values):
                target[...] = 0
            else:
                target[...] = self._operand(values[row] if self.affine is None else self._activated(values[row]))

    def _activated(self, row: np.ndarray) -> np.ndarray:
        """Return a row (W, C) after norm and SiLU."""
        x = self._buffer("row", row.shape)
        np.multiply(row, self.affine[0], out=x)
        x += self.affine[1]
        silu(x)
        return x

    def _operand(self, x: np.ndarray) -> np.ndarray:
        """Return a matrix as it is multiplied."""
        return rounded_bits(x) if self.in_bfloat16 else x

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: type[np.number] = np.float32) -> np.ndarray:
        """Return memory of this thread, which keeps it from band to band."""
        size, held = int(np.prod(shape)), getattr(self.memory, name, None)
        if held is None or held.size < size:
            held = np.empty(size, dtype)
            setattr(self.memory, name, held)
        return held[:size].reshape(shape)


def _sums(rows: np.ndarray) -> np.ndarray:
    """Return the sums of the columns of rows (M, C), and of their squares: (2, C) float64."""
    total, whole = np.zeros((2, rows.shape[1])), len(rows) // PART * PART
    for part in (rows[:whole].reshape(-1, PART, rows.shape[1]), rows[None, whole:]):
        total[0] += part.sum(1).sum(0, dtype=np.float64)
        total[1] += np.einsum("kmc,kmc->kc", part, part).sum(0, dtype=np.float64)
    return total


def _affine(norm: GroupNorm, image: Image) -> tuple[np.ndarray, np.ndarray]:
    """Return the factor and the sum of every channel that normalize an image by groups, float32."""
    channels = image.values.shape[2]
    count = image.values.size / norm.groups
    mean, square = image.sums.reshape(2, norm.groups, -1).sum(2) / count
    variance = np.maximum(square - mean**2, 0)
    size = channels // norm.groups
    for group in np.flatnonzero(FAR**2 * variance < mean**2):  # the difference of two large numbers
        own = image.values[:, :, group * size : (group + 1) * size]
        variance[group] = np.mean([((row - mean[group]) ** 2).mean() for row in own])
    gain = norm.weight.asnumpy() * np.repeat(1 / np.sqrt(variance + norm.eps), size)
    return gain.astype(np.float32), (norm.bias.asnumpy() - np.repeat(mean, size) * gain).astype(np.float32)
