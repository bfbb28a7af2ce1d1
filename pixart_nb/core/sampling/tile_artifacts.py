"""Measure whether an image that was decoded in tiles shows the edges of the tiles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pixart_nb.core.models.tiling import tile_starts

#: Pixels of a latent cell: only lines at the same offset in their cell are compared.
CELL = 8


@dataclass(frozen=True, eq=False)
class TileArtifacts:
    """Jumps of brightness across the edges of tiles, and across all other lines between latent cells.

    ``edges``: pixels at which tiles begin or end, by axis (rows, columns). ``jumps`` at the edges and ``others`` at the
    other lines are mean absolute differences of the pixels on both sides, 0..255. Images that were upscaled by twos
    change more at coarse cells, so an edge is compared with the lines that the same power of two divides: ``ratios`` is
    its jump over their mean, ``ranks`` the share of them that jump more. Edges without such lines have none.
    """

    edges: tuple[list[int], list[int]]
    jumps: np.ndarray
    others: np.ndarray
    ratios: np.ndarray
    ranks: np.ndarray

    @property
    def ratio(self) -> float:
        """Median over the edges: about 1 without visible edges."""
        return float(np.median(self.ratios)) if len(self.ratios) else 1.0

    @property
    def rank(self) -> float:
        """Mean over the edges: about 0.5 without visible edges, near 0 with them."""
        return float(np.mean(self.ranks)) if len(self.ranks) else 0.5


def measure_tile_artifacts(image: np.ndarray, tile: int, overlap_factor: float = 0.25) -> TileArtifacts:
    """Measure an image (H, W, 3) uint8 that was decoded in tiles of ``tile`` pixels.

    The image's own lines count too, so small artifacts show only in smooth images or with many tiles.
    """
    edges = tuple(tile_edges(side, tile, overlap_factor) for side in image.shape[:2])
    jumps, others, ratios, ranks = [], [], [], []
    for axis, lines in enumerate(edges):
        differences = np.abs(np.diff(image.astype(np.int16), axis=axis)).mean((1 - axis, 2))
        by_line = {line: float(differences[line - 1]) for line in range(CELL, image.shape[axis], CELL)}
        rest = {line: jump for line, jump in by_line.items() if line not in lines}
        others += rest.values()
        for line in lines:
            alike = np.array([jump for other, jump in rest.items() if other & -other == line & -line])
            jumps.append(by_line[line])
            if len(alike) >= 4:
                ratios.append(by_line[line] / max(alike.mean(), 1e-9))
                ranks.append(float((alike > by_line[line]).mean()))
    return TileArtifacts(edges, *map(np.array, (jumps, others, ratios, ranks)))


def tile_edges(length: int, tile: int, overlap_factor: float = 0.25) -> list[int]:
    """Return the pixels at which tiles begin or end within an axis of ``length`` pixels.

    >>> tile_edges(128, 64, 0.25)
    [32, 64, 96]
    """
    cells, size = length // CELL, tile // CELL
    starts = tile_starts(cells, size, int(size * overlap_factor))
    edges = {edge for start in starts for edge in (start, start + size)}
    return [CELL * edge for edge in sorted(edges) if 0 < edge < cells]
