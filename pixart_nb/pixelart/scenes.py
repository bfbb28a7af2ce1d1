"""Pixel-art scenes drawn by code: one coloured object on a setting, seeded and free of rights (CC0).

A picture is a coarse grid, 16 cells along its shorter side, whose cells are blown up to image pixels.
At 128x128 a cell is 8x8 image pixels, the reach of one latent cell of an autoencoder of factor 8.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.pixelart.backgrounds import BACKGROUNDS
from pixart_nb.pixelart.shapes import (
    LETTERS,
    MIRRORED,
    RAMP_LETTERS,
    SECONDARY,
    SHAPE_SIZE,
    SHAPES,
    UNSEEN_SHAPES,
)

GRID = 16
JITTER = 1
COLOUR_VARIATION = 0.03

# Outline, dark, middle, light, highlight. The ten middles are far apart; the outlines are all near black.
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

OBJECTS: tuple[str, ...] = tuple(SHAPES)
#: Objects that can be drawn but are in no training set of the embedded model.
UNSEEN_OBJECTS: tuple[str, ...] = tuple(UNSEEN_SHAPES)
_ALL_SHAPES = SHAPES | UNSEEN_SHAPES
COLOURS: tuple[str, ...] = tuple(RAMPS)
SETTINGS: tuple[str, ...] = tuple(BACKGROUNDS)


@dataclass(frozen=True)
class Scene:
    """What a picture shows: an object, its colour and the setting behind it."""

    object: str
    colour: str
    setting: str

    def __post_init__(self) -> None:
        _require_name("object", self.object, OBJECTS + UNSEEN_OBJECTS)
        _require_name("colour", self.colour, COLOURS)
        _require_name("setting", self.setting, SETTINGS)


@dataclass(frozen=True)
class Placement:
    """Where a 12x12 shape lies in the grid: its top row and left column in cells, and its side."""

    row: int
    column: int
    mirrored: bool


@dataclass(frozen=True)
class Picture:
    """A drawn scene: pixels (H, W, 3) uint8, mask (H, W) bool of the object's pixels, and its placement."""

    pixels: np.ndarray
    mask: np.ndarray
    placement: Placement


def _require_name(kind: str, name: str, valid: tuple[str, ...]) -> None:
    if name not in valid:
        raise PixArtNBError(f"unknown {kind} {name!r}; valid ones: {', '.join(valid)}")


def _sprite(name: str, colour: str, mirrored: bool) -> np.ndarray:
    """(12, 12, 3) float32 colours in 0..255, black where the shape is empty."""
    by_letter = dict(zip(RAMP_LETTERS, RAMPS[colour], strict=True)) | SECONDARY | {".": (0, 0, 0)}
    palette = np.array([by_letter[letter] for letter in LETTERS], dtype=np.float32)
    shape = _ALL_SHAPES[name]
    return palette[shape[:, ::-1] if mirrored else shape]


def _per_sprite(make: Callable[[str, str, bool], np.ndarray]) -> dict[tuple[str, str, bool], np.ndarray]:
    return {
        (name, colour, mirrored): make(name, colour, mirrored)
        for name, colour in product(_ALL_SHAPES, COLOURS)
        for mirrored in ((False, True) if name in MIRRORED else (False,))
    }


_SPRITES = _per_sprite(_sprite)
_MASKS = {
    (name, side): (shape[:, ::-1] if side else shape) > 0
    for name, shape in _ALL_SHAPES.items()
    for side in (False, True)
}


def sprite_colours(name: str, colour: str, mirrored: bool = False) -> np.ndarray:
    """Colours of an object's cells as (12, 12, 3) float32 in 0..255; black where it is empty."""
    return _SPRITES[name, colour, mirrored].copy()


def sprite_mask(name: str, mirrored: bool = False) -> np.ndarray:
    """Cells an object covers, as (12, 12) bool."""
    return _MASKS[name, mirrored].copy()


def grid_size(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the cell grid of a picture of ``height`` x ``width`` image pixels."""
    shorter = min(height, width)
    if shorter < GRID:
        raise PixArtNBError(f"height and width must be at least {GRID} pixels, got {height}x{width}")
    return round(height * GRID / shorter), round(width * GRID / shorter)


def _place(scene: Scene, rng: np.random.Generator, grid_height: int, grid_width: int) -> Placement:
    down, right = rng.integers(-JITTER, JITTER + 1, size=2)
    mirrored = bool(rng.random() < 0.5) and scene.object in MIRRORED
    top, left = (grid_height - SHAPE_SIZE) // 2, (grid_width - SHAPE_SIZE) // 2
    return Placement(int(top + down), int(left + right), mirrored)


def _compose(
    scene: Scene, rng: np.random.Generator, grid_height: int, grid_width: int
) -> tuple[np.ndarray, Placement]:
    """The (gh, gw, 3) uint8 grid of a scene, and where its object lies."""
    if min(grid_height, grid_width) < GRID:
        raise PixArtNBError(f"a grid needs at least {GRID}x{GRID} cells, got {grid_height}x{grid_width}")
    place = _place(scene, rng, grid_height, grid_width)
    shade = 1 + rng.uniform(-COLOUR_VARIATION, COLOUR_VARIATION, size=(2, 3)).astype(np.float32)
    grid = BACKGROUNDS[scene.setting](rng, grid_height, grid_width) * shade[0]
    window = grid[place.row : place.row + SHAPE_SIZE, place.column : place.column + SHAPE_SIZE]
    sprite = _SPRITES[scene.object, scene.colour, place.mirrored] * shade[1]
    np.copyto(window, sprite, where=_MASKS[scene.object, place.mirrored][..., None])
    return np.clip(grid, 0, 255).astype(np.uint8), place


def _grid_mask(scene: Scene, place: Placement, grid_height: int, grid_width: int) -> np.ndarray:
    mask = np.zeros((grid_height, grid_width), dtype=bool)
    window = mask[place.row : place.row + SHAPE_SIZE, place.column : place.column + SHAPE_SIZE]
    window[:] = _MASKS[scene.object, place.mirrored]
    return mask


def enlarge(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest sampling of a (gh, gw, ...) grid at the centres of ``height`` x ``width`` image pixels."""
    rows = (np.arange(height) * 2 + 1) * grid.shape[0] // (2 * height)
    columns = (np.arange(width) * 2 + 1) * grid.shape[1] // (2 * width)
    return grid.take(columns, axis=1).take(rows, axis=0)


def draw_grid(
    scene: Scene, rng: np.random.Generator, grid_height: int = GRID, grid_width: int = GRID
) -> np.ndarray:
    """The scene at one value per cell: (grid_height, grid_width, 3) uint8."""
    return _compose(scene, rng, grid_height, grid_width)[0]


def draw(scene: Scene, rng: np.random.Generator, height: int = 128, width: int = 128) -> np.ndarray:
    """The scene as (height, width, 3) uint8; the same generator state gives the same bytes."""
    return enlarge(draw_grid(scene, rng, *grid_size(height, width)), height, width)


def draw_with_mask(scene: Scene, rng: np.random.Generator, height: int = 128, width: int = 128) -> Picture:
    """As ``draw``, the same pixels from the same generator state, with the object's mask and placement."""
    cells = grid_size(height, width)
    grid, place = _compose(scene, rng, *cells)
    mask = _grid_mask(scene, place, *cells)
    return Picture(enlarge(grid, height, width), enlarge(mask, height, width), place)


def all_scenes() -> list[Scene]:
    """Every combination of object, colour and setting, in a fixed order."""
    return [Scene(*names) for names in product(OBJECTS, COLOURS, SETTINGS)]


def _pairs(scene: Scene) -> list[tuple[str, str]]:
    return list(combinations((scene.object, scene.colour, scene.setting), 2))


def split_scenes(seed: int = 0, held_out: int = 240) -> tuple[list[Scene], list[Scene]]:
    """Combinations to train on and combinations never trained on, the same for the same arguments.

    Every pair (object, colour), (object, setting) and (colour, setting) still occurs in training, so that
    a held-out scene asks for a new combination of known pairs and not for something unseen.
    """
    scenes = all_scenes()
    remaining: dict[tuple[str, str], int] = {}
    for pair in (pair for scene in scenes for pair in _pairs(scene)):
        remaining[pair] = remaining.get(pair, 0) + 1
    chosen: set[Scene] = set()
    for index in np.random.default_rng(seed).permutation(len(scenes)):
        pairs = _pairs(scenes[index])
        if len(chosen) < held_out and all(remaining[pair] > 1 for pair in pairs):
            chosen.add(scenes[index])
            remaining.update({pair: remaining[pair] - 1 for pair in pairs})
    if len(chosen) < held_out:
        raise PixArtNBError(
            f"at most {len(chosen)} scenes can be held out with every pair in training, not {held_out}"
        )
    return [s for s in scenes if s not in chosen], [s for s in scenes if s in chosen]
