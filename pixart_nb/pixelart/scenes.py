"""Scenes of one or two coloured objects in a setting, drawn at any size; the seed decides what the setting shows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.pixelart.objects import DRAWINGS
from pixart_nb.pixelart.render import Rendered, render
from pixart_nb.pixelart.settings import SETTINGS, draw_setting

#: Outline, dark, middle, light and highlight shade of each colour. The middle shades are far apart.
RAMPS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((66, 8, 20), (150, 20, 36), (212, 40, 46), (238, 88, 80), (255, 214, 204)),
    "orange": ((84, 34, 6), (196, 92, 14), (244, 134, 28), (252, 170, 74), (255, 232, 204)),
    "yellow": ((84, 62, 4), (204, 160, 20), (248, 214, 48), (254, 234, 114), (255, 252, 224)),
    "green": ((10, 52, 18), (38, 122, 40), (66, 176, 58), (124, 212, 98), (226, 255, 214)),
    "teal": ((2, 48, 54), (8, 112, 118), (18, 162, 162), (84, 206, 200), (214, 255, 250)),
    "blue": ((12, 20, 76), (30, 58, 158), (48, 94, 220), (104, 150, 244), (214, 230, 255)),
    "purple": ((38, 10, 66), (90, 34, 136), (138, 60, 194), (182, 118, 228), (240, 220, 255)),
    "pink": ((96, 20, 62), (208, 82, 146), (246, 132, 188), (254, 178, 214), (255, 236, 246)),
    "brown": ((42, 22, 10), (96, 56, 28), (140, 86, 46), (178, 124, 78), (238, 214, 184)),
    "white": ((58, 62, 82), (170, 176, 196), (224, 228, 236), (242, 244, 248), (255, 255, 255)),
}
COLOURS: tuple[str, ...] = tuple(RAMPS)
RELATIONS = ("left of", "right of", "above", "in front of")
#: Sides of one thing, as shares of the shorter side of the image, and how far right of the left edge it stands.
SIZES = {"small": 0.375, "medium-sized": 0.5, "large": 0.625}
POSITIONS = {"left": 0.0, "middle": 0.5, "right": 1.0}
#: Size and position of one thing whose caption names none.
USUAL_SIZE, USUAL_POSITION = "large", "middle"
#: Corners of things stand on multiples of a share of the image: a transformer learns a few positions sooner than all.
STEPS = 8
#: Height on which things stand, and sides of two things: beside or above each other, or the one behind.
FLOOR, PAIR_SIZE, BACK_SIZE = 7, 0.5, 0.625
#: Pixels of a cell of images of 128 to 4096 pixels: a scene has more detail, not larger cells, in a larger image.
CELL, MIN_CELLS, MAX_CELLS = 8, 16, 512
#: Share of each colour channel of the objects that a dark setting leaves.
LIGHTS = {"night": (0.8, 0.82, 0.95), "cave": (0.9, 0.88, 0.92), "forest": (0.93, 0.95, 0.9), "lava": (1.0, 0.91, 0.87)}
#: Height from which on every setting is ground, and how much of it a shadow leaves.
GROUND, SHADOW = 0.72, 0.7


@dataclass(frozen=True)
class Thing:
    """An object and its colour."""

    object: str
    colour: str


@dataclass(frozen=True)
class Scene:
    """One thing, or two in a relation (the first is ``relation`` the second), in a setting.

    ``size`` and ``position`` are those of one thing; "" is the usual one.
    """

    things: tuple[Thing, ...]
    setting: str
    relation: str = ""
    size: str = ""
    position: str = ""

    def __post_init__(self) -> None:
        pair = len(self.things) == 2
        if len(self.things) not in (1, 2) or (self.relation in RELATIONS) is not pair:
            raise PixArtNBError(
                f"a scene has one object, or two and a relation of {', '.join(RELATIONS)}; got {len(self.things)} and "
                f"{self.relation!r}"
            )
        valid = {"object": tuple(DRAWINGS), "colour": COLOURS}
        values = [(key, getattr(thing, key), names) for thing in self.things for key, names in valid.items()]
        values.append(("setting", self.setting, tuple(SETTINGS)))
        values += [("size", self.size, ("", *SIZES)[: 1 if pair else None])]
        values += [("position", self.position, ("", *POSITIONS)[: 1 if pair else None])]
        for key, value, names in values:
            if value not in names:
                raise PixArtNBError(f"unknown {key} {value!r}; valid ones: {', '.join(names)}")


@dataclass(frozen=True)
class Placement:
    """Square of an object: its centre and its side, as shares of the shorter side of the image."""

    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Drawing:
    """A drawn scene: ``pixels`` (H, W, 3) uint8, the visible mask (H, W) bool of each thing, and their placements."""

    pixels: np.ndarray
    masks: tuple[np.ndarray, ...]
    placements: tuple[Placement, ...]


def one(object: str, colour: str, setting: str, size: str = "", position: str = "") -> Scene:
    """Return the scene of one thing."""
    return Scene((Thing(object, colour),), setting, "", size, position)


def grid_size(height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of the grid of cells of an image of ``height`` x ``width`` pixels."""
    return round(height / CELL), round(width / CELL)


def resize_nearest(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Sample a (gh, gw, ...) grid at the centres of ``height`` x ``width`` pixels."""
    rows = (np.arange(height) * 2 + 1) * grid.shape[0] // (2 * height)
    columns = (np.arange(width) * 2 + 1) * grid.shape[1] // (2 * width)
    return grid.take(columns, axis=1).take(rows, axis=0)


def draw(scene: Scene, rng: np.random.Generator, height: int = 256, width: int = 256) -> np.ndarray:
    """Draw a scene as (height, width, 3) uint8; the same state of the generator gives the same bytes."""
    return draw_with_masks(scene, rng, height, width).pixels


def draw_with_masks(scene: Scene, rng: np.random.Generator, height: int = 256, width: int = 256) -> Drawing:
    """Draw the same pixels as ``draw``, with the masks and placements of the things."""
    drawing = draw_cells(scene, rng, *grid_size(height, width))
    pixels, *masks = (resize_nearest(grid, height, width) for grid in (drawing.pixels, *drawing.masks))
    return Drawing(pixels, tuple(masks), drawing.placements)


def place_things(scene: Scene, aspect: float = 1.0) -> tuple[Placement, ...]:
    """Place the things of a scene; x and y run to 1, along the longer side further."""
    wide, high = round(STEPS * max(aspect, 1.0)), round(STEPS * max(1 / aspect, 1.0))
    floor = (high - STEPS) // 2 + FLOOR  # in the square in the middle of a high image
    if not scene.relation:
        size, share = SIZES[scene.size or USUAL_SIZE], POSITIONS[scene.position or USUAL_POSITION]
        return (_placement(share * (wide - STEPS * size), floor - STEPS * size, size),)
    first = second = PAIR_SIZE
    middle = (wide - STEPS * PAIR_SIZE) / 2
    below = floor - STEPS * PAIR_SIZE
    if scene.relation in ("left of", "right of"):
        sides = (0, wide - STEPS * PAIR_SIZE)
        corners = [(x, below) for x in (sides if scene.relation == "left of" else sides[::-1])]
    elif scene.relation == "above":
        corners = [(middle, floor - FLOOR), (middle, floor + 1 - STEPS * PAIR_SIZE)]
    else:  # the first hides a part of the second, which is larger, higher and further right
        first, second = SIZES["small"], BACK_SIZE
        x = (wide - STEPS * BACK_SIZE) / 2
        corners = [(x - 1, floor - STEPS * first), (x, floor - 1 - STEPS * BACK_SIZE)]
    (x1, y1), (x2, y2) = corners
    return _placement(x1, y1, first), _placement(x2, y2, second)


def _placement(left: float, top: float, size: float) -> Placement:
    """Return the placement whose corner is nearest to ``left`` and ``top``, in steps."""
    x, y = (math.floor(corner + 0.5) / STEPS + size / 2 for corner in (left, top))
    return Placement(x, y, size)


def draw_cells(scene: Scene, rng: np.random.Generator, height: int, width: int) -> Drawing:
    """Draw a scene with one value per cell; the same state of ``rng`` gives the same image at every size."""
    if not (min(height, width) >= MIN_CELLS and max(height, width) <= MAX_CELLS):
        raise PixArtNBError(
            f"a drawn scene of {CELL * height}x{CELL * width} pixels has {height}x{width} cells; expected {MIN_CELLS} "
            f"to {MAX_CELLS} a side: choose a height and a width from {CELL * MIN_CELLS} to {CELL * MAX_CELLS}"
        )
    seed = int(rng.integers(2**31))
    placements = place_things(scene, width / height)
    side = min(height, width)
    grid = draw_setting(scene.setting, height, width, seed)
    masks = [np.zeros((height, width), bool) for _ in scene.things]
    light = np.array(LIGHTS.get(scene.setting, (1.0, 1.0, 1.0)), np.float32)
    for at in placements:
        _cast_shadow(grid, at, side)
    for number in reversed(range(len(scene.things))):  # the first is in front
        thing, at = scene.things[number], placements[number]
        rows, columns, rendered = _render(thing, at, side, height, width)
        view = grid[rows, columns]
        colours = rendered.colours(np.array(RAMPS[thing.colour], float))
        view[rendered.mask] = colours[rendered.mask] * light
        for mask in masks:
            mask[rows, columns] &= ~rendered.mask
        masks[number][rows, columns] = rendered.mask
    return Drawing(np.clip(grid, 0, 255).astype(np.uint8), tuple(masks), placements)


def _render(thing: Thing, at: Placement, side: int, height: int, width: int) -> tuple[slice, slice, Rendered]:
    """Draw a thing on the part of the grid that holds it; return its rows and columns too."""
    size = at.size * side
    x, y = at.x * side - size / 2, at.y * side - size / 2
    first, left = (max(0, int(v) // 4 * 4 - 4) for v in (y, x))  # dithering has a period of 4
    last, right = min(height, int(y + size) + 3), min(width, int(x + size) + 3)
    rendered = render(DRAWINGS[thing.object], last - first, right - left, x - left, y - first, size)
    return slice(first, last), slice(left, right), rendered


def _cast_shadow(grid: np.ndarray, at: Placement, side: int) -> None:
    """Darken the ground below an object that stands on it."""
    foot = at.y + 0.47 * at.size
    if foot * side / grid.shape[0] < GROUND:
        return
    y, x = (np.arange(n, dtype=np.float32) + 0.5 for n in grid.shape[:2])
    distance = ((x / side - at.x) / (0.42 * at.size)) ** 2 + ((y[:, None] / side - foot) / (0.07 * at.size)) ** 2
    grid[distance < 1] *= SHADOW
