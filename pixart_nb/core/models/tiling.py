"""A picture worked on piece by piece: overlapping tiles, ramps that join them, norms that all tiles share.

Tiles that each normalise by their own statistics differ in tone from their neighbours. So the statistics of every
group norm are measured first, on tiles taken together from all over the picture, and then used for every tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from mindspore import ops

from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.layers import GroupNorm

#: Cells of the finer side from which statistics are measured, all at once. It bounds the memory.
SAMPLE_CELLS = 2**18
#: Cells a side, at most, of the windows that they are taken from: many small ones know a picture better than few large.
SAMPLE_SIDE = 128


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin on an axis: all of one size, evenly spread, overlapping by at least ``overlap``.

    >>> tile_starts(100, 40, 10)
    [0, 30, 60]
    """
    if not 0 <= overlap < tile:
        raise PixArtNBError(f"tiles of {tile} overlap by {overlap}; expected 0 <= overlap < tile")
    if length <= tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(k * (length - tile) / (count - 1)) for k in range(count)]


def axis_tiles(length: int, tile: int, overlap: int, factor: int = 1) -> list[tuple[slice, np.ndarray]]:
    """The tiles of an axis: cells that each covers, and its weight at ``factor`` times their resolution.

    Weights fall linearly towards a neighbour and sum to one everywhere.
    """
    parts = [slice(start, min(start + tile, length)) for start in tile_starts(length, tile, overlap)]
    place = np.arange(length * factor) + 0.5
    weights = np.ones((len(parts), length * factor), np.float32)
    for index, part in enumerate(parts):
        weights[index] = (place > part.start * factor) & (place < part.stop * factor)
    for index, (before, after) in enumerate(itertools.pairwise(parts)):
        first, last = after.start * factor, before.stop * factor  # their overlap
        rise = np.clip((place - first) / max(last - first, 1), 0, 1)
        weights[index] *= 1 - rise
        weights[index + 1] *= rise
    weights /= weights.sum(0)
    cut = [weights[i, p.start * factor : p.stop * factor] for i, p in enumerate(parts)]
    return list(zip(parts, cut, strict=True))


@dataclass(frozen=True)
class TileRow:
    """Finished rows of a result that is made tile by tile.

    ``number`` of the row of tiles; ``rows`` of the result that are finished; their ``values`` (1, C', rows, W');
    ``carry`` (1, C', n, W'), what the tiles so far have put into the rows after these.
    """

    number: int
    rows: slice
    values: np.ndarray
    carry: np.ndarray


@dataclass(frozen=True)
class TileMap:
    """A function of a picture, computed by overlapping tiles.

    ``function`` maps (N, C, h, w) to (N, C', h grow / shrink, w grow / shrink); ``norms`` are the group norms in it.
    ``tile`` and ``overlap`` count the cells of the coarser of the two sides, so that tiles lie on whole cells of both.
    ``channels`` is how many times as many channels a cell has as those that ``SAMPLE_CELLS`` are meant for.
    """

    function: Callable[[ms.Tensor], ms.Tensor]
    norms: Sequence[GroupNorm]
    tile: int
    overlap: int
    grow: int = 1
    shrink: int = 1
    channels: int = 1

    def count(self, height: int) -> int:
        """Rows of tiles of a picture (1, C, height, W)."""
        return len(tile_starts(height // self.shrink, self.tile, self.overlap))

    def _axes(self, x: np.ndarray) -> list[list[tuple[slice, np.ndarray]]]:
        return [axis_tiles(side // self.shrink, self.tile, self.overlap, self.grow) for side in x.shape[2:]]

    def _windows(self, x: np.ndarray) -> tuple[list[tuple[slice, slice]], list[tuple]]:
        """Windows all over x from which statistics are measured, and the shares of them that count."""
        fine = max(self.grow, self.shrink)
        side, limit = sample_windows(self.tile, fine, self.channels)
        down, across = (
            [part for part, _ in axis_tiles(n // self.shrink, side, side * self.overlap // self.tile)]
            for n in x.shape[2:]
        )
        chosen = spread(limit, len(down), len(across))
        cores = list(itertools.product(axis_cores(down), axis_cores(across)))
        return [(down[r], across[c]) for r, c in chosen], [cores[r * len(across) + c] for r, c in chosen]

    def _cut(self, x: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
        return np.ascontiguousarray(x[:, :, _times(rows, self.shrink), _times(columns, self.shrink)])

    def measure(self, x: np.ndarray) -> list[np.ndarray | None]:
        """Statistics for the tiles of x (1, C, H, W): of each norm mean and variance, (2, channels); None if unused."""
        windows, cores = self._windows(x)
        with shared_statistics(self.norms, cores):
            self.function(ms.Tensor(np.concatenate([self._cut(x, *window) for window in windows])))
            return [norm.shared.values() for norm in self.norms]

    def rows(
        self, x: np.ndarray, statistics: Sequence[np.ndarray | None], after: int = -1, carry=None
    ) -> Iterator[TileRow]:
        """The result for x (1, C, H, W), one row of tiles after another, with the statistics of ``measure``.

        To go on after a row of tiles, give its number and its ``carry``: the rest is the same, bit for bit.
        """
        down, across = self._axes(x)
        with shared_statistics(self.norms, (), statistics):
            for number, (rows, weight) in enumerate(down):
                if number <= after:
                    continue
                strip = self._strip(x, rows, weight, across, carry)
                end = down[number + 1][0].start if number + 1 < len(down) else rows.stop
                finished = (end - rows.start) * self.grow
                carry = strip[:, :, finished:].copy()
                done = _times(slice(rows.start, end), self.grow)
                yield TileRow(number, done, strip[:, :, :finished], carry)

    def _strip(self, x, rows: slice, weight: np.ndarray, across, carry) -> np.ndarray:
        """The sum of a row of tiles, each by its weight, and of the ``carry`` from the row above."""
        strip = None
        for columns, weight_across in across:
            piece = ms.Tensor(self._cut(x, rows, columns))
            result = self.function(piece).astype(ms.float32).asnumpy()
            if strip is None:
                width = across[-1][0].stop * self.grow
                strip = np.zeros((1, result.shape[1], result.shape[2], width), np.float32)
                if carry is not None:
                    strip[:, :, : carry.shape[2]] = carry
            strip[..., _times(columns, self.grow)] += result * np.outer(weight, weight_across)
        return strip

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The whole result for x (1, C, H, W): (1, C', H grow / shrink, W grow / shrink) float32."""
        out = None
        for row in self.rows(x, self.measure(x)):
            if out is None:
                height = x.shape[2] // self.shrink * self.grow
                out = np.empty((1, row.values.shape[1], height, row.values.shape[3]), np.float32)
            out[:, :, row.rows] = row.values
        return out


def _times(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)


def sample_windows(tile: int, fine: int, channels: int = 1) -> tuple[int, int]:
    """Side of the windows of statistics, in cells of which each is ``fine`` a side on the finer side, and how many.

    >>> sample_windows(64, 8), sample_windows(128, 1, 8)
    ((16, 16), (128, 2))
    """
    side = min(tile, max(1, SAMPLE_SIDE // fine))
    return side, max(1, SAMPLE_CELLS // channels // (side * fine) ** 2)


def spread(count: int, rows: int, columns: int) -> list[tuple[int, int]]:
    """At most ``count`` places of a grid, all over it: all of them, or row by row a golden section further on.

    >>> spread(4, 2, 1), spread(3, 3, 3)
    ([(0, 0), (1, 0)], [(0, 0), (1, 2), (2, 1)])
    """
    if count >= rows * columns:
        return list(itertools.product(range(rows), range(columns)))
    golden = (5**0.5 - 1) / 2
    places = [(k * rows // count, int((k + 0.5) * golden % 1 * columns)) for k in range(count)]
    return list(dict.fromkeys(places))


def axis_cores(parts: Sequence[slice]) -> list[tuple[float, float]]:
    """From where to where each tile of an axis is nearer to its own middle, as shares of the tile.

    Together they cover the axis once.
    """
    ends = [(before.stop + after.start) / 2 for before, after in itertools.pairwise(parts)]
    edges = itertools.pairwise([parts[0].start, *ends, parts[-1].stop])
    return [
        ((low - part.start) / (part.stop - part.start), (high - part.start) / (part.stop - part.start))
        for part, (low, high) in zip(parts, edges, strict=True)
    ]


@contextmanager
def shared_statistics(
    norms: Sequence[GroupNorm], cores: Sequence[tuple], known: Sequence[np.ndarray | None] = ()
) -> Iterator[None]:
    """Within it, every norm uses one mean and variance: those ``known``, or of the first batch that it sees.

    ``cores`` are, for every picture of that batch, the shares of its rows and columns that count.
    """
    for norm, values in itertools.zip_longest(norms, known):
        norm.shared = SharedStatistics(cores, values)
    try:
        yield
    finally:
        for norm in norms:
            norm.shared = None


class SharedStatistics:
    """Mean and variance of every group over a whole batch, measured once, or given as (2, channels)."""

    def __init__(self, cores: Sequence[tuple], known: np.ndarray | None = None):
        self.cores = cores
        self.mean, self.variance = (None, None) if known is None else map(ms.Tensor, known)

    def values(self) -> np.ndarray | None:
        """Mean and variance of every channel, (2, C) float32; None if nothing was normalised."""
        return None if self.mean is None else np.stack([self.mean.asnumpy(), self.variance.asnumpy()])

    def normalise(self, norm: GroupNorm, x: ms.Tensor) -> ms.Tensor:
        """Group normalisation of x (N, C, H, W) by the shared statistics."""
        wide = x.astype(ms.float32)
        if self.mean is None:
            self._measure(wide.asnumpy(), norm.groups)
        weight, bias = norm.weight.astype(ms.float32), norm.bias.astype(ms.float32)
        batch_norm = ops.BatchNorm(is_training=False, epsilon=norm.eps)
        return batch_norm(wide, weight, bias, self.mean, self.variance)[0].astype(x.dtype)

    def _measure(self, x: np.ndarray, groups: int) -> None:
        _, c, height, width = x.shape
        sums, squares, count = np.zeros(groups), np.zeros(groups), 0
        for picture, (down, across) in zip(x, self.cores, strict=True):
            rows, columns = _share(down, height), _share(across, width)
            cells = picture[:, rows, columns].reshape(groups, -1)
            sums += cells.sum(1, dtype=np.float64)
            squares += np.einsum("gi,gi->g", cells, cells, dtype=np.float64)
            count += cells.shape[1]
        mean = sums / count
        variance = np.maximum(squares / count - mean**2, 0)
        self.mean, self.variance = (
            ms.Tensor(np.repeat(value, c // groups).astype(np.float32)) for value in (mean, variance)
        )


def _share(part: tuple[float, float], length: int) -> slice:
    return slice(round(part[0] * length), round(part[1] * length))
