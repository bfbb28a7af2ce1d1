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
    on both sides, 0..255; ``others``: at the other lines. Pictures that were enlarged by twos change more where the
    coarse cells met, so an edge is compared with other lines that as high a power of two divides: ``ratios``, jump over
    their mean, and ``ranks``, the share of them that jump more. Edges without such lines have none.
    """

    edges: tuple[list[int], list[int]]
    jumps: np.ndarray
    others: np.ndarray
    ratios: np.ndarray
    ranks: np.ndarray

    @property
    def ratio(self) -> float:
        """Median over the edges: about 1 where nothing is to be seen of the tiles."""
        return float(np.median(self.ratios)) if len(self.ratios) else 1.0

    @property
    def rank(self) -> float:
        """Mean over the edges: about a half without seams, near 0 with."""
        return float(np.mean(self.ranks)) if len(self.ranks) else 0.5


def measure_seams(picture: np.ndarray, tile: int, overlap_factor: float = 0.25) -> Seams:
    """Seams of a picture (H, W, 3) uint8 that was decoded by tiles of ``tile`` pixels, as the autoencoder cuts them.

    The picture's own lines count on both sides; only a picture with few of them, or many tiles, tells small seams.
    """
    edges = tuple(tile_edges(side, tile, overlap_factor) for side in picture.shape[:2])
    found: dict[str, list[float]] = {"jumps": [], "others": [], "ratios": [], "ranks": []}
    for axis, places in enumerate(edges):
        differences = np.abs(np.diff(picture.astype(np.int16), axis=axis)).mean((1 - axis, 2))
        jumps = {line: float(differences[line - 1]) for line in range(CELL, picture.shape[axis], CELL)}
        others = {line: jump for line, jump in jumps.items() if line not in places}
        found["others"] += others.values()
        for line in places:
            alike = np.array([jump for other, jump in others.items() if other & -other == line & -line])
            found["jumps"].append(jumps[line])
            if len(alike) >= 4:
                found["ratios"].append(jumps[line] / max(alike.mean(), 1e-9))
                found["ranks"].append(float((alike > jumps[line]).mean()))
    return Seams(edges, **{name: np.array(values) for name, values in found.items()})


def tile_edges(length: int, tile: int, overlap_factor: float = 0.25) -> list[int]:
    """Where tiles begin or end within an axis of ``length`` pixels.

    >>> tile_edges(128, 64, 0.25)
    [32, 64, 96]
    """
    cells, size = length // CELL, tile // CELL
    starts = tile_starts(cells, size, int(size * overlap_factor))
    edges = {edge for start in starts for edge in (start, start + size)}
    return [CELL * edge for edge in sorted(edges) if 0 < edge < cells]
