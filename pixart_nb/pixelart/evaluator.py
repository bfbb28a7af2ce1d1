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

import numpy as np
from PIL import Image

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.pixelart.fits import MOST_CELLS, STRAY, Fit, Search
from pixart_nb.pixelart.objects import DRAWINGS, OBJECTS
from pixart_nb.pixelart.scenes import (
    CELL,
    COLOURS,
    GROUND,
    LIGHTS,
    MIN_CELLS,
    POSITIONS,
    SHADOW,
    SIZES,
    Placement,
    Scene,
    Thing,
    resize_nearest,
)
from pixart_nb.pixelart.settings import SETTINGS, draw_setting

#: Scale of the squared error at which a colour counts as another, in the density of a setting's colours.
KERNEL = 70.0
#: Distances, in shares of the image, from which two things are beside or above each other.
BESIDE, ABOVE = 0.32, 0.36
#: Pixels of the shorter side of the smallest image that can be read.
SMALLEST = MIN_CELLS * CELL
_SEEDS, _COLOURS_PER_ROW = 24, 256


@dataclass(frozen=True)
class Reading:
    """Content of an image: the scene, where its things are, how well each fits (0 to 1), and visible masks (H, W)."""

    scene: Scene
    placements: tuple[Placement, ...]
    scores: tuple[float, ...]
    masks: tuple[np.ndarray, ...]


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


class SceneEvaluator:
    """Reads images of the drawn world, of any size from 16 cells.

    ``objects``: names to choose from, by default those that the bundled model knows. ``cell``: pixels of a cell; larger
    images than ``MOST_CELLS`` cells are read reduced.
    """

    def __init__(self, objects: Sequence[str] = tuple(OBJECTS), cell: int = CELL):
        unknown = [name for name in objects if name not in DRAWINGS]
        if unknown or not objects:
            raise PixArtNBError(f"objects are {list(objects)}; expected some of {list(DRAWINGS)}")
        self.objects, self.cell = tuple(objects), cell

    def read(self, image: np.ndarray, things: int | None = None) -> Reading:
        """Read one image, (H, W, 3) uint8, with one thing, two, or as many as are found."""
        smallest = MIN_CELLS * self.cell
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or min(image.shape[:2]) < smallest:
            raise PixArtNBError(
                f"image is {image.shape} {image.dtype}; expected (H, W, 3) uint8 of {smallest} pixels and more"
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
        search = Search(lit, ground, side, detail, self.objects)
        fits = search.fit(things)
        return _reading(fits, setting, search, image.shape[:2])

    def read_for(self, image: np.ndarray, scene: Scene) -> Reading:
        """Read an image that should show ``scene``: as many things, in the order of those that they agree with.

        The scene of the reading is described from its first thing if its relation can be, else as it was read.
        """
        reading = self.read(image, len(scene.things))
        things = reading.scene.things
        if _agreement(things[::-1], scene.things) <= _agreement(things, scene.things):
            return reading
        parts = (reading.placements[::-1], reading.scores[::-1], reading.masks[::-1])
        return Reading(_swapped(reading.scene) or reading.scene, *parts)

    def accuracy(self, images: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, float]:
        """Return the shares of images in which each part of their scene is right, and in which all are.

        ``object``, ``colour`` and, for pairs, ``relation`` are those of both things; the number of things is given.
        ``size`` and ``position`` count where a scene names them.
        """
        return accuracy_of(self.scenes(images, scenes), scenes)

    def scenes(self, images: Sequence[np.ndarray], scenes: Sequence[Scene]) -> list[Scene]:
        """Return the scene that each image shows, with as many things as the one that it should show."""
        if len(images) != len(scenes) or not len(scenes):
            raise PixArtNBError(f"need one scene per image and at least one, got {len(images)} and {len(scenes)}")
        return [self.read(image, len(scene.things)).scene for image, scene in zip(images, scenes, strict=True)]


def accuracy_of(read: Sequence[Scene], scenes: Sequence[Scene]) -> dict[str, float]:
    """Return the shares of scenes in which each part, and everything, was read as it should be."""
    rows = [compare(result, scene) for result, scene in zip(read, scenes, strict=True)]
    keys = sorted(dict.fromkeys(key for row in rows for key in row), key=lambda key: key == "all")
    return {key: float(np.mean([row[key] for row in rows if key in row])) for key in keys}


def compare(read: Scene, scene: Scene) -> dict[str, bool]:
    """Return which parts of a scene are right, where ``read`` was read."""
    result = _ordered(read, scene)
    pairs = list(zip(result.things, scene.things, strict=False))
    row = {
        "object": len(result.things) == len(scene.things) and all(a.object == b.object for a, b in pairs),
        "colour": len(result.things) == len(scene.things) and all(a.colour == b.colour for a, b in pairs),
        "setting": result.setting == scene.setting,
    }
    for part in ("relation", "size", "position"):
        if getattr(scene, part):
            row[part] = getattr(result, part) == getattr(scene, part)
    return row | {"all": all(row.values())}


def _ordered(read: Scene, scene: Scene) -> Scene:
    """Return the reading with its things in the order that agrees best with ``scene``."""
    swapped = _swapped(read)
    if swapped is None:
        return read
    agreement = [
        _agreement(order.things, scene.things) + 0.5 * (order.relation == scene.relation) for order in (read, swapped)
    ]
    return swapped if agreement[1] > agreement[0] else read


def _agreement(things: Sequence[Thing], others: Sequence[Thing]) -> int:
    """Return how many objects and colours are the same, in order."""
    return sum((a.object == b.object) + (a.colour == b.colour) for a, b in zip(things, others, strict=False))


def _swapped(scene: Scene) -> Scene | None:
    """Return the same scene described from its second thing, if its relation has an inverse that is a relation."""
    inverse = {"left of": "right of", "right of": "left of"}.get(scene.relation)
    return Scene(scene.things[::-1], scene.setting, inverse) if inverse else None


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


def _reading(fits: list[Fit], setting: str, search: Search, size: tuple[int, int]) -> Reading:
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
    where = _size_and_place(placements[0], size[1] / min(size)) if len(things) == 1 else ()
    scene = Scene(tuple(things[k] for k in order), setting, relation, *where)
    return Reading(
        scene,
        tuple(placements[k] for k in order),
        tuple(search.score(fits[k]) for k in order),
        tuple(resize_nearest(masks[k], *size) for k in order),
    )


def _size_and_place(at: Placement, wide: float) -> tuple[str, str]:
    """Return the nearest size and position of a thing in an image that is ``wide`` times its shorter side."""
    size = min(SIZES, key=lambda name: abs(SIZES[name] - at.size))
    share = (at.x - at.size / 2) / max(wide - at.size, 1e-6)
    return size, min(POSITIONS, key=lambda name: abs(POSITIONS[name] - share))


def _relation(placements: Sequence[Placement]) -> tuple[tuple[int, ...], str]:
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
