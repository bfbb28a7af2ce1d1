"""Scenes of one or two coloured objects in a setting: placed by a seed, and drawn at any size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.pixelart.scenes import RAMPS
from pixart_nb.pixelart.world.objects import MIRRORED, OBJECTS
from pixart_nb.pixelart.world.render import Rendered, render
from pixart_nb.pixelart.world.settings import SETTINGS, draw_setting

COLOURS = tuple(RAMPS)
RELATIONS = ("left of", "right of", "above", "in front of")
MIN_CELLS, MAX_CELLS = 16, 512
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
class WorldScene:
    """One thing, or two in a relation (the first is ``relation`` the second), in a setting."""

    things: tuple[Thing, ...]
    setting: str
    relation: str = ""

    def __post_init__(self) -> None:
        pair = len(self.things) == 2
        if len(self.things) not in (1, 2) or (self.relation in RELATIONS) is not pair:
            raise PixArtNBError(
                f"a scene has one object, or two and a relation of {', '.join(RELATIONS)}; got {len(self.things)} and "
                f"{self.relation!r}"
            )
        valid = {"object": tuple(OBJECTS), "colour": COLOURS}
        values = [(key, getattr(thing, key), names) for thing in self.things for key, names in valid.items()]
        for key, value, names in (*values, ("setting", self.setting, tuple(SETTINGS))):
            if value not in names:
                raise PixArtNBError(f"unknown {key} {value!r}; valid ones: {', '.join(names)}")


@dataclass(frozen=True)
class ThingPlacement:
    """Square of an object: its centre and its side, as shares of the shorter side of the image."""

    x: float
    y: float
    size: float
    mirrored: bool


@dataclass(frozen=True)
class WorldDrawing:
    """A drawn scene: ``pixels`` (H, W, 3) uint8, a visible mask (H, W) bool of each thing, and their placements."""

    pixels: np.ndarray
    masks: tuple[np.ndarray, ...]
    placements: tuple[ThingPlacement, ...]


def place_things(scene: WorldScene, rng: np.random.Generator, aspect: float = 1.0) -> tuple[ThingPlacement, ...]:
    """Place the things of a scene; x and y run to 1, along the longer side further."""
    wide, high = max(aspect, 1.0), max(1 / aspect, 1.0)
    flips = [bool(rng.random() < 0.5) and thing.object in MIRRORED for thing in scene.things]
    if len(scene.things) == 1:
        size = rng.uniform(0.38, 0.66)
        x = rng.uniform(size / 2 + 0.02, wide - size / 2 - 0.02)
        y = rng.uniform(max(size / 2 + 0.02, 0.3 * high), high - size / 2 - 0.02)
        return (ThingPlacement(x, y, size, flips[0]),)
    first, second = rng.uniform(0.38, 0.46, 2)
    if scene.relation in ("left of", "right of"):
        x1, x2 = rng.uniform(0.23, 0.29) * wide, rng.uniform(0.71, 0.77) * wide
        y1, y2 = rng.uniform(0.5, 0.72, 2) * high
        (x1, x2) = (x1, x2) if scene.relation == "left of" else (x2, x1)
    elif scene.relation == "above":
        x1, x2 = (rng.uniform(0.34, 0.66) * wide for _ in range(2))
        y1, y2 = rng.uniform(0.23, 0.28) * high, rng.uniform(0.72, 0.77) * high
    else:  # the first hides a part of the second, which is larger and higher
        second = rng.uniform(0.5, 0.6)
        x2, y2 = rng.uniform(0.4, 0.6) * wide, rng.uniform(0.36, 0.44) * high
        x1, y1 = (
            x2 + rng.choice((-1, 1)) * rng.uniform(0.14, 0.22),
            min(y2 + rng.uniform(0.24, 0.3), high - first / 2),
        )
    return ThingPlacement(x1, y1, first, flips[0]), ThingPlacement(x2, y2, second, flips[1])


def draw_cells(scene: WorldScene, rng: np.random.Generator, height: int, width: int) -> WorldDrawing:
    """Draw a scene with one value per cell; the same state of ``rng`` gives the same image at every size."""
    if not (min(height, width) >= MIN_CELLS and max(height, width) <= MAX_CELLS):
        raise PixArtNBError(f"{height}x{width} cells; expected {MIN_CELLS} to {MAX_CELLS} a side")
    seed = int(rng.integers(2**31))
    placements = place_things(scene, np.random.default_rng((seed, 0)), width / height)
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
    return WorldDrawing(np.clip(grid, 0, 255).astype(np.uint8), tuple(masks), placements)


def _render(thing: Thing, at: ThingPlacement, side: int, height: int, width: int) -> tuple[slice, slice, Rendered]:
    """Draw a thing on the part of the grid that holds it; return its rows and columns too."""
    size = at.size * side
    x, y = at.x * side - size / 2, at.y * side - size / 2
    first, left = (max(0, int(v) // 4 * 4 - 4) for v in (y, x))  # dithering has a period of 4
    last, right = min(height, int(y + size) + 3), min(width, int(x + size) + 3)
    rendered = render(OBJECTS[thing.object], last - first, right - left, x - left, y - first, size, at.mirrored)
    return slice(first, last), slice(left, right), rendered


def _cast_shadow(grid: np.ndarray, at: ThingPlacement, side: int) -> None:
    """Darken the ground below an object that stands on it."""
    foot = at.y + 0.47 * at.size
    if foot * side / grid.shape[0] < GROUND:
        return
    y, x = (np.arange(n, dtype=np.float32) + 0.5 for n in grid.shape[:2])
    distance = ((x / side - at.x) / (0.42 * at.size)) ** 2 + ((y[:, None] / side - foot) / (0.07 * at.size)) ** 2
    grid[distance < 1] *= SHADOW
