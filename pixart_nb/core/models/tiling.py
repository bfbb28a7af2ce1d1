"""Tiled computation on large images: overlapping tiles, linear blending, and norms that all tiles share.

Tiles that each normalize by their own statistics differ in tone from their neighbours. So the statistics of every
group norm are measured first, on windows from all over the image, and then used for every tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from mindspore import mint, ops

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models import ascend_operators
from pixart_nb.core.models.layers import GroupNorm, norm_statistics
from pixart_nb.core.models.operators import check_finite

#: Cells, at the finer resolution, of all windows that statistics are measured on at once. It bounds the memory.
SAMPLE_CELLS = 2**18
#: Largest side of these windows: many small windows represent an image better than few large ones.
SAMPLE_SIDE = 128


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles start on an axis: all of one size, evenly spread, overlapping by at least ``overlap``.

    >>> tile_starts(100, 40, 10)
    [0, 30, 60]
    """
    if not 0 <= overlap < tile:
        raise PixArtNBError(f"tiles of {tile} overlap by {overlap}; expected 0 <= overlap < tile")
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(k * (length - tile) / (count - 1)) for k in range(count)]


def _tile_slices(length: int, tile: int, overlap: int) -> list[slice]:
    return [slice(start, min(start + tile, length)) for start in tile_starts(length, tile, overlap)]


def axis_tiles(length: int, tile: int, overlap: int, factor: int = 1) -> list[tuple[slice, np.ndarray]]:
    """Return the tiles of an axis: the cells that each covers, and its weights at ``factor`` times the resolution.

    Weights fall linearly towards a neighbour and sum to one everywhere.
    """
    tiles = _tile_slices(length, tile, overlap)
    centres = np.arange(length * factor) + 0.5
    weights = np.ones((len(tiles), length * factor), np.float32)
    for index, cells in enumerate(tiles):
        weights[index] = (centres > cells.start * factor) & (centres < cells.stop * factor)
    for index, (before, after) in enumerate(itertools.pairwise(tiles)):
        first, last = after.start * factor, before.stop * factor  # the overlap
        ramp = np.clip((centres - first) / max(last - first, 1), 0, 1)
        weights[index] *= 1 - ramp
        weights[index + 1] *= ramp
    weights /= weights.sum(0)
    return [(cells, weights[i][_scaled(cells, factor)]) for i, cells in enumerate(tiles)]


@dataclass(frozen=True)
class TileRow:
    """Finished rows of a tiled result.

    ``number`` of the row of tiles; ``rows`` of the result that are finished; their ``values`` (1, C', rows, W');
    ``carry`` (1, C', n, W'), the contribution of the tiles so far to the rows after these.
    """

    number: int
    rows: slice
    values: np.ndarray
    carry: np.ndarray


@dataclass(frozen=True)
class TileMap:
    """A function of an image, computed by overlapping tiles.

    ``function`` maps (N, C, h, w) to (N, C', h upscale / downscale, w upscale / downscale); ``norms`` are its group
    norms. ``tile`` and ``overlap`` count cells of the coarser side, so that tiles contain whole cells of both sides.
    ``channels`` divides ``SAMPLE_CELLS`` for a function whose cells take that many times the memory.
    """

    function: Callable[[ms.Tensor], ms.Tensor]
    norms: Sequence[GroupNorm]
    tile: int
    overlap: int
    upscale: int = 1
    downscale: int = 1
    channels: int = 1

    def count(self, height: int) -> int:
        """Return the number of rows of tiles of an image (1, C, height, W)."""
        return len(tile_starts(height // self.downscale, self.tile, self.overlap))

    def measure(self, x: np.ndarray) -> list[np.ndarray | None]:
        """Return mean and variance, (2, channels), of each norm for the tiles of x (1, C, H, W); None if unused."""
        windows, cores = self._windows(x)
        statistics = [SharedStatistics(cores) for _ in self.norms]
        with norm_statistics(self.norms, statistics):
            self.function(ms.Tensor(np.concatenate([self._cut(x, *window) for window in windows])))
        used = [shared.values() for shared in statistics if shared.mean is not None]
        ends = np.cumsum([values.shape[1] for values in used])[:-1]
        arrays = iter(np.split(mint.cat(used, 1).asnumpy(), ends, 1))  # one read from the device
        return [None if shared.mean is None else np.ascontiguousarray(next(arrays)) for shared in statistics]

    def _windows(self, x: np.ndarray) -> tuple[list[tuple[slice, slice]], tuple[tuple, ...]]:
        """Return windows from all over x for measuring statistics, and the core of each, in fractions of it."""
        fine = max(self.upscale, self.downscale)
        side, limit = sample_windows(self.tile, fine, self.channels)
        overlap = side * self.overlap // self.tile
        down, across = (_tile_slices(n // self.downscale, side, overlap) for n in x.shape[2:])
        chosen = spread(limit, len(down), len(across))
        down_cores, across_cores = axis_cores(down), axis_cores(across)
        return (
            [(down[row], across[column]) for row, column in chosen],
            tuple((down_cores[row], across_cores[column]) for row, column in chosen),
        )

    def _cut(self, x: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        return np.ascontiguousarray(x[:, :, _scaled(rows, self.downscale), _scaled(columns, self.downscale)])

    def rows(
        self, x: np.ndarray, statistics: Sequence[np.ndarray | None], after: int = -1, carry=None
    ) -> Iterator[TileRow]:
        """Yield the result for x (1, C, H, W) by rows of tiles, with the statistics of ``measure``.

        To resume after a row of tiles, give its number and its ``carry``: the rest is the same, bit for bit.
        """
        down, across = (
            axis_tiles(side // self.downscale, self.tile, self.overlap, self.upscale) for side in x.shape[2:]
        )
        with norm_statistics(self.norms, [SharedStatistics((), values) for values in statistics]):
            for number in range(after + 1, len(down)):
                rows, weight = down[number]
                strip = self._strip(x, rows, weight, across, carry)
                end = down[number + 1][0].start if number + 1 < len(down) else rows.stop
                finished = (end - rows.start) * self.upscale
                carry = strip[:, :, finished:].copy()
                done = _scaled(slice(rows.start, end), self.upscale)
                yield TileRow(number, done, strip[:, :, :finished], carry)

    def _strip(self, x, rows: slice, weight: np.ndarray, across, carry) -> np.ndarray:
        """Return the weighted sum of a row of tiles and of the ``carry`` from the row above."""
        strip = None
        for columns, weight_across in across:
            result = self.function(ms.Tensor(self._cut(x, rows, columns))).astype(ms.float32).asnumpy()
            check_finite(result, "a tile of the VAE")
            if strip is None:
                width = across[-1][0].stop * self.upscale
                strip = np.zeros((1, result.shape[1], result.shape[2], width), np.float32)
                if carry is not None:
                    strip[:, :, : carry.shape[2]] = carry
            strip[..., _scaled(columns, self.upscale)] += result * np.outer(weight, weight_across)
        return strip

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the whole result for x (1, C, H, W), float32."""
        out = None
        for row in self.rows(x, self.measure(x)):
            if out is None:
                height = x.shape[2] // self.downscale * self.upscale
                out = np.empty((1, row.values.shape[1], height, row.values.shape[3]), np.float32)
            out[:, :, row.rows] = row.values
        return out


def _scaled(cells: slice, factor: int) -> slice:
    return slice(cells.start * factor, cells.stop * factor)


def sample_windows(tile: int, fine: int, channels: int = 1) -> tuple[int, int]:
    """Return the side, in coarse cells of ``fine`` fine cells a side, and the number of the windows for statistics.

    >>> sample_windows(64, 8), sample_windows(128, 1, 8)
    ((16, 16), (128, 2))
    """
    side = min(tile, max(1, SAMPLE_SIDE // fine))
    return side, max(1, SAMPLE_CELLS // channels // (side * fine) ** 2)


def spread(count: int, rows: int, columns: int) -> list[tuple[int, int]]:
    """Return at most ``count`` cells of a grid, spread all over it by the golden ratio, or all cells if they fit.

    >>> spread(4, 2, 1), spread(3, 3, 3)
    ([(0, 0), (1, 0)], [(0, 0), (1, 2), (2, 1)])
    """
    if count >= rows * columns:
        return list(itertools.product(range(rows), range(columns)))
    golden = (5**0.5 - 1) / 2
    cells = [(k * rows // count, int((k + 0.5) * golden % 1 * columns)) for k in range(count)]
    return list(dict.fromkeys(cells))


def axis_cores(tiles: Sequence[slice]) -> list[tuple[float, float]]:
    """Return the core of each tile of an axis, in fractions of the tile: together the cores cover the axis once."""
    ends = [(before.stop + after.start) / 2 for before, after in itertools.pairwise(tiles)]
    edges = itertools.pairwise([tiles[0].start, *ends, tiles[-1].stop])
    return [
        tuple((edge - cells.start) / (cells.stop - cells.start) for edge in core)
        for cells, core in zip(tiles, edges, strict=True)
    ]


class SharedStatistics:
    """Mean and variance of every group over a whole batch: given, (2, channels), or those of the first batch.

    ``cores`` are, for every image of that batch, the fractions of its rows and columns that count.
    """

    def __init__(self, cores: tuple[tuple, ...], values: np.ndarray | None = None):
        self.cores = cores
        self.mean, self.variance = (None, None) if values is None else map(ms.Tensor, values)
        self.scale = self.shift = None  # of the normalization on Ascend

    def values(self) -> ms.Tensor:
        """Return mean and variance of every channel, (2, C) float32."""
        return mint.cat((self.mean, self.variance)).reshape(2, -1)

    def normalize(self, norm: GroupNorm, x: ms.Tensor) -> ms.Tensor:
        """Group normalization of x (N, C, H, W) by the shared statistics."""
        wide = x if x.dtype == ms.float32 else x.astype(ms.float32)
        if self.mean is None:
            measure = _measured_on_device if backend.on_ascend() else _measured
            self.mean, self.variance = measure(wide, norm.groups, self.cores)
        if backend.on_ascend():  # its batch normalization has no aclnn kernel
            if self.scale is None:
                scale = norm.weight.astype(ms.float32) * mint.rsqrt(self.variance + norm.eps)
                shift = norm.bias.astype(ms.float32) - self.mean * scale
                self.scale, self.shift = (values.reshape(1, -1, 1, 1) for values in (scale, shift))
            normalized = ascend_operators.addcmul(self.shift, wide, self.scale)
        else:
            weight, bias = norm.weight.astype(ms.float32), norm.bias.astype(ms.float32)
            batch_norm = ops.BatchNorm(is_training=False, epsilon=norm.eps)
            normalized = batch_norm(wide, weight, bias, self.mean, self.variance)[0]
        return normalized if x.dtype == ms.float32 else normalized.astype(x.dtype)


def _core_slices(core: tuple, height: int, width: int) -> tuple[slice, slice]:
    """Return the rows and columns of an image that count."""
    rows, columns = (slice(*(round(f * n) for f in span)) for span, n in zip(core, (height, width), strict=True))
    return rows, columns


def _measured(x: ms.Tensor, groups: int, cores: tuple[tuple, ...]) -> tuple[ms.Tensor, ms.Tensor]:
    """Return mean and variance of every channel of x (N, C, H, W), over the groups and cores, summed in float64."""
    sums, squares, count = np.zeros(groups), np.zeros(groups), 0
    for image, core in zip(x.asnumpy(), cores, strict=True):
        cells = image[(..., *_core_slices(core, *x.shape[2:]))].reshape(groups, -1)
        sums += cells.sum(1, dtype=np.float64)
        squares += np.einsum("gi,gi->g", cells, cells, dtype=np.float64)
        count += cells.shape[1]
    mean = sums / count
    variance = np.maximum(squares / count - mean**2, 0)
    repeats = x.shape[1] // groups
    return tuple(ms.Tensor(np.repeat(value, repeats).astype(np.float32)) for value in (mean, variance))


def _measured_on_device(x: ms.Tensor, groups: int, cores: tuple[tuple, ...]) -> tuple[ms.Tensor, ms.Tensor]:
    """Compute ``_measured`` without reading the activations, in float32. **Not run on Ascend.**"""
    count, channels, height, width = x.shape
    cells, weights = x.reshape(count, groups, -1, height, width), _core_weights(cores, height, width)
    weights = weights * (groups / channels)
    mean = mint.sum(cells * weights, (0, 2, 3, 4), True)
    distance = cells - mean
    variance = mint.sum(distance * distance * weights, (0, 2, 3, 4), True)
    return tuple(mint.tile(v.reshape(groups, 1), (1, channels // groups)).reshape(-1) for v in (mean, variance))


@lru_cache(maxsize=8)
def _core_weights(cores: tuple[tuple, ...], height: int, width: int) -> ms.Tensor:
    """Return the weight of every cell in a mean over the cores: (N, 1, 1, H, W)."""
    weights = np.zeros((len(cores), 1, 1, height, width), np.float32)
    for image, core in zip(weights, cores, strict=True):
        image[(..., *_core_slices(core, height, width))] = 1
    return ms.Tensor(weights / weights.sum())
