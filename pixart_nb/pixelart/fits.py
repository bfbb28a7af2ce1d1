"""Fits drawings of objects to the cells of an image: object, colour, size and position that explain it best."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from pixart_nb.pixelart.objects import DRAWINGS
from pixart_nb.pixelart.render import Rendered, render
from pixart_nb.pixelart.scenes import COLOURS, RAMPS, Placement

#: Most cells of the grid on which images are read.
MOST_CELLS = 32
#: Sides of objects as shares of the image.
LEAST_SIZE, MOST_SIZE = 0.36, 0.68
#: Largest squared error per channel of a cell.
STRAY = 60.0**2
#: A second thing explains at least this share of the error of the cells that it covers, and at least this share of what
#: the first one explains.
LEAST_SCORE, LEAST_SHARE = 0.55, 0.2
#: Squared error per channel that a coarse fit may have in every cell, since it is off by up to half a cell.
BONUS = 900.0
#: Coarse fits that are compared more finely, by halves or, on small grids, quarters of a cell.
CANDIDATES = 32


@dataclass(frozen=True)
class _Templates:
    """All objects at one size on the grid: S drawings of ``size`` x ``size`` cells."""

    size: int
    names: tuple[str, ...]
    masks: np.ndarray  # (S, size * size) float32
    colours: np.ndarray  # (S, colours, size * size * 3) float32, 0 outside of the mask


@dataclass(frozen=True)
class Fit:
    """A drawing placed on the grid: visible part of its mask and colours, and the squared error that it explains."""

    name: str
    colour: int
    placement: Placement
    window: tuple[slice, slice]
    mask: np.ndarray
    colours: np.ndarray
    gain: float


@lru_cache(maxsize=2**15)
def _drawn(name: str, size: int, phase: tuple[int, int], steps: int, detail: int) -> tuple[Rendered, int]:
    """Draw an object of ``size`` / ``steps`` cells, moved down and right by ``phase`` / ``steps``, at ``detail``."""
    side = -(-size // steps) + 1
    x, y = (p / steps * detail for p in phase[::-1])
    return render(DRAWINGS[name], side * detail, side * detail, x, y, size / steps * detail), side


@lru_cache(maxsize=2**14)
def _sprite(
    name: str, size: int, phase: tuple[int, int], steps: int, detail: int, colour: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mask (n, n) bool and the colours (n, n, 3) of a drawing of ``_drawn``, reduced to the grid."""
    drawn, side = _drawn(name, size, phase, steps, detail)
    share = _reduced(drawn.mask, side, detail)
    colours = _reduced(drawn.colours(np.array(RAMPS[COLOURS[colour]], float)) * drawn.mask[..., None], side, detail)
    return share[..., 0] >= 0.5, (colours / np.maximum(share, 1e-6)).astype(np.float32)


def _reduced(grid: np.ndarray, side: int, detail: int) -> np.ndarray:
    return grid.reshape(side, detail, side, detail, -1).mean((1, 3))


@lru_cache(maxsize=128)
def _templates(objects: tuple[str, ...], size: int, detail: int) -> _Templates:
    """Draw every object at ``detail`` times ``size`` cells, and reduce it."""
    masks, colours = [], []
    for name in objects:
        sprites = [_sprite(name, size, (0, 0), 1, detail, colour) for colour in range(len(COLOURS))]
        mask = sprites[0][0][:size, :size]
        masks.append(mask.ravel())
        colours.append([(row[:size, :size] * mask[..., None]).ravel() for _, row in sprites])
    return _Templates(size, objects, np.array(masks, np.float32), np.array(colours, np.float32))


class Search:
    """Fits drawings to the cells of one image; ``ground`` is each cell's error without any thing."""

    def __init__(self, cells: np.ndarray, ground: np.ndarray, side: int, detail: int, objects: tuple[str, ...]):
        self.cells, self.ground, self.side, self.detail = cells, ground, side, detail
        self.steps = 2 if side >= MOST_CELLS * 3 // 4 else 4
        sizes = range(round(LEAST_SIZE * side), round(MOST_SIZE * side) + 1)
        self.templates = [_templates(objects, size, detail) for size in sizes]

    def fit(self, things: int | None) -> list[Fit]:
        """Return one fit, or two from front to back."""
        whole = np.ones_like(self.ground)
        first = self.best(self.ground, whole)
        if things == 1:
            return [first]
        second = self.best(self.ground, self.without(whole, first))
        pairs = [self.refined(first, second), self.refined(second, first)]
        best = min(pairs, key=lambda pair: self.error(*pair))
        if things is None and not self.has_second(*best):
            return [first]
        return list(best)

    def refined(self, front: Fit, back: Fit) -> tuple[Fit, Fit]:
        """Fit both again: the one in front against what is behind it, the other where it is visible."""
        whole = np.ones_like(self.ground)
        front = self.best(self.explained(self.ground, back), whole)
        return front, self.best(self.ground, self.without(whole, front))

    def has_second(self, front: Fit, back: Fit) -> bool:
        """Return True if both fits explain enough to be things."""
        gains = sorted((front.gain, back.gain))
        return min(self.score(front), self.score(back)) >= LEAST_SCORE and gains[0] >= LEAST_SHARE * gains[1]

    def score(self, fit: Fit) -> float:
        """Return the share of the error of the covered cells that a fit explains."""
        covered = np.minimum(self.ground[fit.window], STRAY)[fit.mask].sum()
        return float(np.clip(fit.gain / max(covered, 1e-6), 0, 1))

    def error(self, front: Fit, back: Fit) -> float:
        """Return the squared error of the cells that both fits leave."""
        return float(np.minimum(self.explained(self.explained(self.ground, back), front), STRAY).sum())

    def explained(self, errors: np.ndarray, fit: Fit) -> np.ndarray:
        """Return the errors of the cells with a fit in front."""
        errors = errors.copy()
        errors[fit.window][fit.mask] = _error(self.cells[fit.window], fit.colours)[fit.mask]
        return errors

    @staticmethod
    def without(weights: np.ndarray, fit: Fit) -> np.ndarray:
        """Return the weights of the cells with 0 where a fit covers them."""
        weights = weights.copy()
        weights[fit.window][fit.mask] = 0
        return weights

    def best(self, errors: np.ndarray, weights: np.ndarray) -> Fit:
        """Return the drawing that reduces the weighted ``errors`` most."""
        coarse = [c for t in self.templates for c in self._coarse(t, errors, weights)]
        coarse.sort(key=lambda candidate: -candidate[0])
        fits = [fit for _, *candidate in coarse[:CANDIDATES] for fit in self._fine(candidate, errors, weights)]
        return max(fits, key=lambda fit: fit.gain)

    def _coarse(self, t: _Templates, errors: np.ndarray, weights: np.ndarray) -> list[tuple]:
        """Return (gain, name, colour, row, column, size) of the best position of every template."""
        shape = (len(t.names), len(COLOURS))
        weighted = weights[..., None] * self.cells
        energy = (errors + BONUS) * weights - (weighted * self.cells).sum(-1) / 3
        covered = _windows(energy, t.size) @ t.masks.T  # (rows, columns, S)
        correlations = _windows(weighted, t.size) @ t.colours.reshape(-1, t.colours.shape[-1]).T
        gains = covered[..., None] + 2 / 3 * correlations.reshape(*covered.shape, shape[1])
        squares = np.square(t.colours)
        if weights.all():
            gains -= squares.sum(-1) / 3
        else:
            per_cell = squares.reshape(*shape, t.size**2, 3).sum(-1) / 3
            norms = _windows(weights, t.size) @ per_cell.reshape(-1, t.size**2).T
            gains -= norms.reshape(gains.shape)
        flat = gains.transpose(2, 3, 0, 1).reshape(shape[0], -1)
        cells_of_best = [np.unravel_index(k, (shape[1], *gains.shape[:2])) for k in flat.argmax(1)]
        best = flat.max(1)
        return [
            (float(gain), name, *(int(v) for v in cell), t.size)
            for gain, name, cell in zip(best, t.names, cells_of_best, strict=True)
        ]

    def _fine(self, candidate: list, errors: np.ndarray, weights: np.ndarray) -> list[Fit]:
        """Return the fits around a coarse candidate, by fractions of a cell, with limited errors."""
        name, colour, row, column, size = candidate
        (height, width), steps = errors.shape, self.steps
        changes, fits = range(-(steps // 2), steps // 2 + 1), []
        for more, down, right in product(changes, repeat=3):
            top, start = (steps * corner + move - more // 2 for corner, move in ((row, down), (column, right)))
            phase = top % steps, start % steps
            mask, colours = _sprite(name, steps * size + more, phase, steps, self.detail, colour)
            y, x = top // steps, start // steps
            rows, columns = slice(max(y, 0), min(y + len(mask), height)), slice(max(x, 0), min(x + len(mask), width))
            inner = slice(rows.start - y, rows.stop - y), slice(columns.start - x, columns.stop - x)
            visible = mask[inner] & (weights[rows, columns] > 0)
            own = _error(self.cells[rows, columns], colours[inner])
            gain = float((np.minimum(errors[rows, columns], STRAY) - own)[visible].sum())
            side = (size + more / steps) / self.side
            x, y = (corner / steps / self.side + side / 2 for corner in (start, top))
            placement = Placement(x, y, side)
            fits.append(Fit(name, colour, placement, (rows, columns), mask[inner], colours[inner], gain))
        return fits


def _error(cells: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Return the squared error per channel of each cell, at most ``STRAY``."""
    return np.minimum(np.square(cells - colours).mean(-1), STRAY)


def _windows(cells: np.ndarray, size: int) -> np.ndarray:
    """All windows of ``size`` x ``size`` cells: (H, W, ...) -> (rows, columns, size * size * ...)."""
    views = np.lib.stride_tricks.sliding_window_view(cells, (size, size), axis=(0, 1))
    views = np.moveaxis(views, (-2, -1), (2, 3))
    return views.reshape(*views.shape[:2], -1).astype(np.float32)
