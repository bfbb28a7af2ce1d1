"""A picture worked on piece by piece: overlapping tiles, ramps that join them, norms that all tiles share.

Tiles that each normalise by their own statistics differ in tone from their neighbours. So the statistics of every
group norm are measured first, on tiles taken together from all over the picture, and then used for every tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from mindspore import ops

from pixart_nb.core.backend import ms
from pixart_nb.core.models.layers import GroupNorm

#: Cells of the finer side in the tiles from which statistics are measured, all at once. It bounds the memory.
SAMPLE_CELLS = 1024**2


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin on an axis: all of one size, evenly spread, overlapping by at least ``overlap``.

    >>> tile_starts(100, 40, 10)
    [0, 30, 60]
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} overlap by {overlap}; expected 0 <= overlap < tile")
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


def map_tiles(
    function: Callable[[ms.Tensor], ms.Tensor],
    norms: Sequence[GroupNorm],
    x: np.ndarray,
    tile: int,
    overlap: int,
    grow: int = 1,
    shrink: int = 1,
) -> np.ndarray:
    """``function`` of one picture x (1, C, H, W) by overlapping tiles: (1, C', H grow / shrink, W grow / shrink).

    ``function`` maps (N, C, h, w) to (N, C', h grow / shrink, w grow / shrink); ``norms`` are the group norms in it.
    ``tile`` and ``overlap`` count the cells of the coarser of the two sides, so that tiles lie on whole cells of both.
    """
    height, width = (side // shrink for side in x.shape[2:])
    down, across = axis_tiles(height, tile, overlap, grow), axis_tiles(width, tile, overlap, grow)
    places = [(r, c, np.outer(v, w)) for r, v in down for c, w in across]
    cut = [np.ascontiguousarray(x[:, :, _times(r, shrink), _times(c, shrink)]) for r, c, _ in places]
    count = max(1, SAMPLE_CELLS // (cut[0][0, 0].size * grow**2))
    sample = np.linspace(0, len(cut) - 1, min(count, len(cut))).round().astype(int)
    out = None
    cores = list(itertools.product(axis_cores([r for r, _ in down]), axis_cores([c for c, _ in across])))
    with shared_statistics(norms, [cores[i] for i in sample]):
        function(ms.Tensor(np.concatenate([cut[i] for i in sample])))
        for piece, (rows, columns, weight) in zip(cut, places, strict=True):
            result = function(ms.Tensor(piece)).astype(ms.float32).asnumpy()
            if out is None:
                out = np.zeros((1, result.shape[1], height * grow, width * grow), np.float32)
            out[:, :, _times(rows, grow), _times(columns, grow)] += result * weight
    return out


def _times(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)


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
def shared_statistics(norms: Sequence[GroupNorm], cores: Sequence[tuple]) -> Iterator[None]:
    """Within it, every norm measures mean and variance on the first batch that it sees and uses them from then on.

    ``cores`` are, for every picture of that batch, the shares of its rows and columns that count.
    """
    for norm in norms:
        norm.shared = SharedStatistics(cores)
    try:
        yield
    finally:
        for norm in norms:
            norm.shared = None


class SharedStatistics:
    """Mean and variance of every group over a whole batch, measured once."""

    def __init__(self, cores: Sequence[tuple]):
        self.cores = cores
        self.mean = self.variance = None

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
