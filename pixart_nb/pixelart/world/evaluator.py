"""Reads the things, their colours, their relation and the setting of an image of a drawn scene, at any size.

Analysis by synthesis: the image is averaged to a grid of 16 to 32 cells. The setting is the one whose colours explain
the cells best. Then every object, in every colour, size, orientation and position, competes with the background: the
best explains the most squared colour error of the cells that it covers. A second thing is found in what the first
leaves unexplained, and both are fitted again with either in front. Nothing is learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.pixelart.scenes import RAMPS, resize_nearest
from pixart_nb.pixelart.world.objects import MIRRORED, OBJECTS
from pixart_nb.pixelart.world.render import Rendered, render
from pixart_nb.pixelart.world.scenes import COLOURS, GROUND, LIGHTS, SHADOW, Thing, ThingPlacement, WorldScene
from pixart_nb.pixelart.world.settings import SETTINGS, draw_setting

#: Pixels of a cell of images of 128 to 1024 pixels, and the most cells of the grid on which images are read.
CELL, MOST_CELLS = 8, 32
#: Sides of objects as shares of the image.
LEAST_SIZE, MOST_SIZE = 0.36, 0.68
#: Largest squared error per channel of a cell.
STRAY = 60.0**2
#: Scale of the squared error at which a colour counts as another, in the density of a setting's colours.
KERNEL = 70.0
#: A second thing explains at least this share of the error of the cells that it covers, and at least this share of what
#: the first one explains.
LEAST_SCORE, LEAST_SHARE = 0.55, 0.2
#: Distances, in shares of the image, from which two things are beside or above each other.
BESIDE, ABOVE = 0.32, 0.36
#: Squared error per channel that a coarse fit may have in every cell, since it is off by up to half a cell.
BONUS = 900.0
#: Coarse fits that are compared more finely, by halves or, on small grids, quarters of a cell.
CANDIDATES = 32
_SEEDS, _COLOURS_PER_ROW = 24, 256


@dataclass(frozen=True)
class Reading:
    """Content of an image: the scene, where its things are, how well each fits (0 to 1), and visible masks (H, W)."""

    scene: WorldScene
    placements: tuple[ThingPlacement, ...]
    scores: tuple[float, ...]
    masks: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class _Templates:
    """All objects at one size on the grid: S drawings of ``size`` x ``size`` cells."""

    size: int
    names: list[tuple[str, bool]]
    masks: np.ndarray  # (S, size * size) float32
    colours: np.ndarray  # (S, colours, size * size * 3) float32, 0 outside of the mask


@dataclass(frozen=True)
class _Fit:
    """A drawing placed on the grid: visible part of its mask and colours, and the squared error that it explains."""

    name: str
    colour: int
    placement: ThingPlacement
    window: tuple[slice, slice]
    mask: np.ndarray
    colours: np.ndarray
    gain: float


@lru_cache(maxsize=2**15)
def _drawn(
    name: str, mirrored: bool, size: int, phase: tuple[int, int], steps: int, detail: int
) -> tuple[Rendered, int]:
    """Draw an object of ``size`` / ``steps`` cells, moved down and right by ``phase`` / ``steps``, at ``detail``."""
    side = -(-size // steps) + 1
    x, y = (p / steps * detail for p in phase[::-1])
    return render(OBJECTS[name], side * detail, side * detail, x, y, size / steps * detail, mirrored), side


@lru_cache(maxsize=2**14)
def _sprite(
    name: str, mirrored: bool, size: int, phase: tuple[int, int], steps: int, detail: int, colour: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mask (n, n) bool and the colours (n, n, 3) of a drawing of ``_drawn``, reduced to the grid."""
    drawn, side = _drawn(name, mirrored, size, phase, steps, detail)
    share = _reduced(drawn.mask, side, detail)
    colours = _reduced(drawn.colours(np.array(RAMPS[COLOURS[colour]], float)) * drawn.mask[..., None], side, detail)
    return share[..., 0] >= 0.5, (colours / np.maximum(share, 1e-6)).astype(np.float32)


def _reduced(grid: np.ndarray, side: int, detail: int) -> np.ndarray:
    return grid.reshape(side, detail, side, detail, -1).mean((1, 3))


@lru_cache(maxsize=128)
def _templates(size: int, detail: int) -> _Templates:
    """Draw every object at ``detail`` times ``size`` cells, and reduce it."""
    names = [(name, side) for name in OBJECTS for side in ((False, True) if name in MIRRORED else (False,))]
    masks, colours = [], []
    for name in names:
        sprites = [_sprite(*name, size, (0, 0), 1, detail, colour) for colour in range(len(COLOURS))]
        mask = sprites[0][0][:size, :size]
        masks.append(mask.ravel())
        colours.append([(row[:size, :size] * mask[..., None]).ravel() for _, row in sprites])
    return _Templates(size, names, np.array(masks, np.float32), np.array(colours, np.float32))


@lru_cache(maxsize=16)
def _palettes(height: int, width: int, detail: int) -> np.ndarray:
    """Colours that each row of each setting may have: (settings, height, P, 3) float32."""
    rng, palettes = np.random.default_rng(0), []
    for setting in SETTINGS:
        drawn = [draw_setting(setting, height * detail, width * detail, seed) for seed in range(_SEEDS)]
        cells = [d.reshape(height, detail, width, detail, 3).mean((1, 3)) for d in drawn]
        rows = np.concatenate(cells, 1)
        ground = rows[int(GROUND * height) :]
        rows = np.concatenate([rows, np.concatenate([rows[: -len(ground)], SHADOW * ground])], 1)
        palettes.append(rows[:, rng.permutation(rows.shape[1])[:_COLOURS_PER_ROW]])
    return np.array(palettes, np.float32)


def to_cells(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Average an image (H, W, 3) uint8 to a grid (height, width, 3) float32 in 0..255."""
    if (image.shape[0] % height, image.shape[1] % width) == (0, 0):
        blocks = image.reshape(height, image.shape[0] // height, width, image.shape[1] // width, 3)
        return blocks.mean((1, 3), dtype=np.float32)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX), np.float32)


class WorldEvaluator:
    """Reads images of the drawn world, of any size from 16 cells.

    ``cell``: pixels of a cell; larger images than ``MOST_CELLS`` cells are read reduced.
    """

    def __init__(self, cell: int = CELL):
        self.cell = cell

    def read(self, image: np.ndarray, things: int | None = None) -> Reading:
        """Read one image, (H, W, 3) uint8, with one thing, two, or as many as are found."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape[:2]) < 16 * self.cell:
            raise PixArtNBError(
                f"image is {image.shape} {image.dtype}; expected (H, W, 3) uint8 of {16 * self.cell} pixels and more"
            )
        if things not in (None, 1, 2):
            raise PixArtNBError(f"things is {things}; expected 1, 2 or None")
        shorter = min(image.shape[:2])
        detail = max(1, min(4, shorter // self.cell // MOST_CELLS))
        side = min(MOST_CELLS, shorter // self.cell)
        height, width = (round(n * side / shorter) for n in image.shape[:2])
        cells = to_cells(image, height, width)
        setting, ground = _setting(cells, detail)
        lit = cells / np.array(LIGHTS.get(setting, (1.0, 1.0, 1.0)), np.float32)
        search = _Search(lit, ground, side, detail)
        fits = search.fit(things)
        return _reading(fits, setting, search, image.shape[:2])

    def accuracy(self, images: Sequence[np.ndarray], scenes: Sequence[WorldScene]) -> dict[str, float]:
        """Return the shares of images in which each part of their scene is right, and in which all are.

        ``object``, ``colour`` and, for pairs, ``relation`` are those of both things; the number of things is given.
        """
        if len(images) != len(scenes) or not len(scenes):
            raise PixArtNBError(f"need one scene per image and at least one, got {len(images)} and {len(scenes)}")
        rows = [
            compare(self.read(image, len(scene.things)).scene, scene)
            for image, scene in zip(images, scenes, strict=True)
        ]
        keys = dict.fromkeys(key for row in rows for key in row)
        return {key: float(np.mean([row[key] for row in rows if key in row])) for key in keys}


def compare(read: WorldScene, scene: WorldScene) -> dict[str, bool]:
    """Return which parts of a scene are right, where ``read`` was read."""
    result = _ordered(read, scene)
    pairs = list(zip(result.things, scene.things, strict=False))
    row = {
        "object": len(result.things) == len(scene.things) and all(a.object == b.object for a, b in pairs),
        "colour": len(result.things) == len(scene.things) and all(a.colour == b.colour for a, b in pairs),
        "setting": result.setting == scene.setting,
    }
    if scene.relation:
        row["relation"] = result.relation == scene.relation
    return row | {"all": all(row.values())}


def _ordered(read: WorldScene, scene: WorldScene) -> WorldScene:
    """Return the reading with its things in the order that agrees best with ``scene``."""
    swapped = _swapped(read)
    if swapped is None:
        return read
    agreement = [
        sum((a.object == b.object) + (a.colour == b.colour) for a, b in zip(r.things, scene.things, strict=False))
        + 0.5 * (r.relation == scene.relation)
        for r in (read, swapped)
    ]
    return swapped if agreement[1] > agreement[0] else read


def _swapped(scene: WorldScene) -> WorldScene | None:
    """Return the same scene told from its second thing, if its relation has an inverse that is a relation."""
    inverse = {"left of": "right of", "right of": "left of"}.get(scene.relation)
    return WorldScene(scene.things[::-1], scene.setting, inverse) if inverse else None


def _setting(cells: np.ndarray, detail: int) -> tuple[str, np.ndarray]:
    """Return the setting that explains the cells best, and the squared error per channel of each cell."""
    palettes = _palettes(*cells.shape[:2], min(2, detail))
    norms = np.square(palettes).sum(-1)  # (settings, H, P)
    correlations = np.einsum("hwc,shpc->shwp", cells, palettes, optimize=True)
    squares = np.maximum(np.square(cells).sum(-1)[..., None] - 2 * correlations + norms[:, :, None], 0) / 3
    least = squares.min(-1, keepdims=True)
    errors = least[..., 0] - KERNEL * np.log(np.exp((least - squares) / KERNEL).mean(-1))
    best = int(np.minimum(errors, STRAY).mean((1, 2)).argmin())
    return list(SETTINGS)[best], errors[best]


class _Search:
    """Fits drawings to the cells of one image; ``ground`` is each cell's error without any thing."""

    def __init__(self, cells: np.ndarray, ground: np.ndarray, side: int, detail: int):
        self.cells, self.ground, self.side, self.detail = cells, ground, side, detail
        self.steps = 2 if side >= MOST_CELLS * 3 // 4 else 4
        sizes = range(round(LEAST_SIZE * side), round(MOST_SIZE * side) + 1)
        self.templates = [_templates(size, detail) for size in sizes]

    def fit(self, things: int | None) -> list[_Fit]:
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

    def refined(self, front: _Fit, back: _Fit) -> tuple[_Fit, _Fit]:
        """Fit both again: the one in front against what is behind it, the other where it is visible."""
        whole = np.ones_like(self.ground)
        front = self.best(self.explained(self.ground, back), whole)
        return front, self.best(self.ground, self.without(whole, front))

    def has_second(self, front: _Fit, back: _Fit) -> bool:
        """Return True if both fits explain enough to be things."""
        gains = sorted((front.gain, back.gain))
        return min(self.score(front), self.score(back)) >= LEAST_SCORE and gains[0] >= LEAST_SHARE * gains[1]

    def score(self, fit: _Fit) -> float:
        """Return the share of the error of the covered cells that a fit explains."""
        covered = np.minimum(self.ground[fit.window], STRAY)[fit.mask].sum()
        return float(np.clip(fit.gain / max(covered, 1e-6), 0, 1))

    def error(self, front: _Fit, back: _Fit) -> float:
        """Return the squared error of the cells that both fits leave."""
        return float(np.minimum(self.explained(self.explained(self.ground, back), front), STRAY).sum())

    def explained(self, errors: np.ndarray, fit: _Fit) -> np.ndarray:
        """Return the errors of the cells with a fit in front."""
        errors = errors.copy()
        errors[fit.window][fit.mask] = _error(self.cells[fit.window], fit.colours)[fit.mask]
        return errors

    @staticmethod
    def without(weights: np.ndarray, fit: _Fit) -> np.ndarray:
        """Return the weights of the cells with 0 where a fit covers them."""
        weights = weights.copy()
        weights[fit.window][fit.mask] = 0
        return weights

    def best(self, errors: np.ndarray, weights: np.ndarray) -> _Fit:
        """Return the drawing that reduces the weighted ``errors`` most."""
        coarse = [c for t in self.templates for c in self._coarse(t, errors, weights)]
        coarse.sort(key=lambda candidate: -candidate[0])
        fits = [fit for _, *candidate in coarse[:CANDIDATES] for fit in self._fine(candidate, errors, weights)]
        return max(fits, key=lambda fit: fit.gain)

    def _coarse(self, t: _Templates, errors: np.ndarray, weights: np.ndarray) -> list[tuple]:
        """Return (gain, name, mirrored, colour, row, column, size) of the best place of every template."""
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
            (float(gain), *name, *(int(v) for v in cell), t.size)
            for gain, name, cell in zip(best, t.names, cells_of_best, strict=True)
        ]

    def _fine(self, candidate: list, errors: np.ndarray, weights: np.ndarray) -> list[_Fit]:
        """Return the fits around a coarse candidate, by fractions of a cell of place and size, with limited errors."""
        name, mirrored, colour, row, column, size = candidate
        (height, width), steps = errors.shape, self.steps
        changes, fits = range(-(steps // 2), steps // 2 + 1), []
        for more, down, right in product(changes, repeat=3):
            top, start = (steps * corner + move - more // 2 for corner, move in ((row, down), (column, right)))
            phase = top % steps, start % steps
            mask, colours = _sprite(name, mirrored, steps * size + more, phase, steps, self.detail, colour)
            y, x = top // steps, start // steps
            rows, columns = slice(max(y, 0), min(y + len(mask), height)), slice(max(x, 0), min(x + len(mask), width))
            inner = slice(rows.start - y, rows.stop - y), slice(columns.start - x, columns.stop - x)
            visible = mask[inner] & (weights[rows, columns] > 0)
            own = _error(self.cells[rows, columns], colours[inner])
            gain = float((np.minimum(errors[rows, columns], STRAY) - own)[visible].sum())
            side = (size + more / steps) / self.side
            x, y = (corner / steps / self.side + side / 2 for corner in (start, top))
            placement = ThingPlacement(x, y, side, mirrored)
            fits.append(_Fit(name, colour, placement, (rows, columns), mask[inner], colours[inner], gain))
        return fits


def _error(cells: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Return the squared error per channel of each cell, at most ``STRAY``."""
    return np.minimum(np.square(cells - colours).mean(-1), STRAY)


def _windows(cells: np.ndarray, size: int) -> np.ndarray:
    """All windows of ``size`` x ``size`` cells: (H, W, ...) -> (rows, columns, size * size * ...)."""
    views = np.lib.stride_tricks.sliding_window_view(cells, (size, size), axis=(0, 1))
    views = np.moveaxis(views, (-2, -1), (2, 3))
    return views.reshape(*views.shape[:2], -1).astype(np.float32)


def _reading(fits: list[_Fit], setting: str, search: _Search, size: tuple[int, int]) -> Reading:
    """Return the reading of one fit, or of two from front to back."""
    placements, masks = [fit.placement for fit in fits], []
    hidden = np.zeros(search.ground.shape, bool)
    for fit in fits:
        mask = np.zeros_like(hidden)
        mask[fit.window] = fit.mask
        masks.append(mask & ~hidden)
        hidden |= mask
    things = tuple(Thing(fit.name, COLOURS[fit.colour]) for fit in fits)
    order, relation = _relation(placements)
    scene = WorldScene(tuple(things[k] for k in order), setting, relation)
    return Reading(
        scene,
        tuple(placements[k] for k in order),
        tuple(search.score(fits[k]) for k in order),
        tuple(resize_nearest(masks[k], *size) for k in order),
    )


def _relation(placements: Sequence[ThingPlacement]) -> tuple[tuple[int, ...], str]:
    """Return the order in which the things are named, and the relation of the first to the second."""
    if len(placements) == 1:
        return (0,), ""
    front, back = placements
    across, down = back.x - front.x, back.y - front.y
    if abs(across) > BESIDE:
        return (0, 1), "left of" if across > 0 else "right of"
    if abs(down) > ABOVE:
        return ((0, 1) if down > 0 else (1, 0)), "above"
    return ((0, 1) if front.y >= back.y else (1, 0)), "in front of"
