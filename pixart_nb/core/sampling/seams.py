"""Whether a picture that was decoded by tiles shows where they meet, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pixart_nb.core.models.tiling import tile_starts

#: Pixels of a latent cell: only columns at the same place in their cell are compared.
CELL = 8


@dataclass(frozen=True, eq=False)
class Seams:
    """Jumps of brightness across the edges of tiles, and across all other lines between cells.

    ``edges`` of tiles, in pixels, by axis (rows, columns); ``jumps``: at those, mean absolute difference of the pixels
    on both sides, 0..255; ``others``: at the comparable lines.
    """

    edges: tuple[list[int], list[int]]
    jumps: np.ndarray
    others: np.ndarray

    @property
    def ratio(self) -> float:
        """Mean jump at the edges over the mean jump elsewhere: about 1 where nothing is to be seen of the tiles."""
        return float(self.jumps.mean() / max(self.others.mean(), 1e-9)) if len(self.jumps) else 1.0

    @property
    def rank(self) -> float:
        """Share of the other lines whose jump is larger than the median edge's: about a half without seams."""
        return float((self.others >= np.median(self.jumps)).mean()) if len(self.jumps) else 0.5


def measure_seams(picture: np.ndarray, tile: int, overlap_factor: float = 0.25) -> Seams:
    """Seams of a picture (H, W, 3) uint8 that was decoded by tiles of ``tile`` pixels, as the autoencoder cuts them.

    The picture's own lines count on both sides; only a picture with few of them, or many tiles, tells small seams.
    """
    edges = tuple(tile_edges(side, tile, overlap_factor) for side in picture.shape[:2])
    at, elsewhere = [], []
    for axis, places in enumerate(edges):
        jumps = np.abs(np.diff(picture.astype(np.int16), axis=axis)).mean(
            (1 - axis, 2)
        )  # of line p: p + 1 pixels on
        lines = np.arange(CELL, picture.shape[axis], CELL)
        is_edge = np.isin(lines, places)
        at.append(jumps[lines[is_edge] - 1])
        elsewhere.append(jumps[lines[~is_edge] - 1])
    return Seams(edges, np.concatenate(at), np.concatenate(elsewhere))


def tile_edges(length: int, tile: int, overlap_factor: float = 0.25) -> list[int]:
    """Where tiles begin or end within an axis of ``length`` pixels.

    >>> tile_edges(128, 64, 0.25)
    [32, 64, 96]
    """
    cells, size = length // CELL, tile // CELL
    starts = tile_starts(cells, size, int(size * overlap_factor))
    edges = {edge for start in starts for edge in (start, start + size)}
    return [CELL * edge for edge in sorted(edges) if 0 < edge < cells]
