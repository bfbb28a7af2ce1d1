"""Pixel-art scenes drawn by code: one coloured object in a setting, seeded and free of rights (CC0).

An image is a coarse grid of 16 cells along its shorter side, whose cells are enlarged to pixels. At 128 x 128 a cell
has 8 x 8 pixels, as many as a latent cell of an autoencoder of factor 8.
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations, product

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.pixelart.backgrounds import BACKGROUNDS
from pixart_nb.pixelart.shapes import LETTERS, MIRRORED, RAMP_LETTERS, SECONDARY, SHAPE_SIZE, SHAPES, UNSEEN_SHAPES

GRID = 16
JITTER = 1
COLOUR_VARIATION = 0.03

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

OBJECTS: tuple[str, ...] = tuple(SHAPES)
#: Objects that can be drawn but are in no training set of the bundled model.
UNSEEN_OBJECTS: tuple[str, ...] = tuple(UNSEEN_SHAPES)
_ALL_SHAPES = SHAPES | UNSEEN_SHAPES
COLOURS: tuple[str, ...] = tuple(RAMPS)
SETTINGS: tuple[str, ...] = tuple(BACKGROUNDS)


@dataclass(frozen=True)
class Scene:
    """Content of an image: an object, its colour and the setting behind it."""

    object: str
    colour: str
    setting: str

    def __post_init__(self) -> None:
        valid = {"object": OBJECTS + UNSEEN_OBJECTS, "colour": COLOURS, "setting": SETTINGS}
        for field, names in valid.items():
            if getattr(self, field) not in names:
                raise PixArtNBError(f"unknown {field} {getattr(self, field)!r}; valid ones: {', '.join(names)}")


@dataclass(frozen=True)
class Placement:
    """Position of a 12 x 12 shape in the grid: its top row and left column in cells, and whether it is mirrored."""

    row: int
    column: int
    mirrored: bool


@dataclass(frozen=True)
class Drawing:
    """A drawn scene: pixels (H, W, 3) uint8, mask (H, W) bool of the object's pixels, and its placement."""

    pixels: np.ndarray
    mask: np.ndarray
    placement: Placement


@cache
def sprite_colours(name: str, colour: str, mirrored: bool = False) -> np.ndarray:
    """Return the colours of an object's cells as (12, 12, 3) float32 in 0..255; black where it is empty."""
    by_letter = dict(zip(RAMP_LETTERS, RAMPS[colour], strict=True)) | SECONDARY | {".": (0, 0, 0)}
    palette = np.array([by_letter[letter] for letter in LETTERS], dtype=np.float32)
    shape = _ALL_SHAPES[name]
    return _read_only(palette[shape[:, ::-1] if mirrored else shape])


@cache
def sprite_mask(name: str, mirrored: bool = False) -> np.ndarray:
    """Return the cells that an object covers as (12, 12) bool."""
    shape = _ALL_SHAPES[name]
    return _read_only((shape[:, ::-1] if mirrored else shape) > 0)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def grid_size(height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of the cell grid of an image of ``height`` x ``width`` pixels."""
    shorter = min(height, width)
    if shorter < GRID:
        raise PixArtNBError(f"height and width must be at least {GRID} pixels, got {height}x{width}")
    return round(height * GRID / shorter), round(width * GRID / shorter)


def _random_placement(scene: Scene, rng: np.random.Generator, grid_height: int, grid_width: int) -> Placement:
    down, right = rng.integers(-JITTER, JITTER + 1, size=2)
    mirrored = bool(rng.random() < 0.5) and scene.object in MIRRORED
    top, left = (grid_height - SHAPE_SIZE) // 2, (grid_width - SHAPE_SIZE) // 2
    return Placement(int(top + down), int(left + right), mirrored)


def _compose(scene: Scene, rng: np.random.Generator, grid_height: int, grid_width: int) -> tuple[np.ndarray, Placement]:
    """Return the (gh, gw, 3) uint8 grid of a scene, and the placement of its object."""
    if min(grid_height, grid_width) < GRID:
        raise PixArtNBError(f"a grid needs at least {GRID}x{GRID} cells, got {grid_height}x{grid_width}")
    placement = _random_placement(scene, rng, grid_height, grid_width)
    shade = 1 + rng.uniform(-COLOUR_VARIATION, COLOUR_VARIATION, size=(2, 3)).astype(np.float32)
    grid = BACKGROUNDS[scene.setting](rng, grid_height, grid_width) * shade[0]
    sprite = sprite_colours(scene.object, scene.colour, placement.mirrored) * shade[1]
    np.copyto(_window(grid, placement), sprite, where=sprite_mask(scene.object, placement.mirrored)[..., None])
    return np.clip(grid, 0, 255).astype(np.uint8), placement


def _window(grid: np.ndarray, placement: Placement) -> np.ndarray:
    """Return a view of the cells that a placed shape occupies."""
    rows = slice(placement.row, placement.row + SHAPE_SIZE)
    return grid[rows, placement.column : placement.column + SHAPE_SIZE]


def grid_mask(name: str, placement: Placement, grid_height: int, grid_width: int) -> np.ndarray:
    """Return the cells (gh, gw) bool that a placed object covers."""
    mask = np.zeros((grid_height, grid_width), dtype=bool)
    _window(mask, placement)[:] = sprite_mask(name, placement.mirrored)
    return mask


def resize_nearest(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """Sample a (gh, gw, ...) grid at the centres of ``height`` x ``width`` pixels."""
    rows = (np.arange(height) * 2 + 1) * grid.shape[0] // (2 * height)
    columns = (np.arange(width) * 2 + 1) * grid.shape[1] // (2 * width)
    return grid.take(columns, axis=1).take(rows, axis=0)


def draw_grid(scene: Scene, rng: np.random.Generator, grid_height: int = GRID, grid_width: int = GRID) -> np.ndarray:
    """Draw a scene with one value per cell: (grid_height, grid_width, 3) uint8."""
    return _compose(scene, rng, grid_height, grid_width)[0]


def draw(scene: Scene, rng: np.random.Generator, height: int = 128, width: int = 128) -> np.ndarray:
    """Draw a scene as (height, width, 3) uint8; the same state of the generator gives the same bytes."""
    return resize_nearest(draw_grid(scene, rng, *grid_size(height, width)), height, width)


def draw_with_mask(scene: Scene, rng: np.random.Generator, height: int = 128, width: int = 128) -> Drawing:
    """Draw the same pixels as ``draw``, with the object's mask and placement."""
    cells = grid_size(height, width)
    grid, placement = _compose(scene, rng, *cells)
    mask = grid_mask(scene.object, placement, *cells)
    return Drawing(resize_nearest(grid, height, width), resize_nearest(mask, height, width), placement)


def all_scenes() -> list[Scene]:
    """Return every combination of object, colour and setting, in a fixed order."""
    return [Scene(*names) for names in product(OBJECTS, COLOURS, SETTINGS)]


def _pairs(scene: Scene) -> list[tuple[str, str]]:
    return list(combinations((scene.object, scene.colour, scene.setting), 2))


def split_scenes(seed: int = 0, held_out: int = 240) -> tuple[list[Scene], list[Scene]]:
    """Return the scenes to train on and the held-out scenes, the same for the same arguments.

    Every pair (object, colour), (object, setting) and (colour, setting) occurs in training, so that a held-out scene
    asks for a new combination of known pairs.
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
            f"held_out is {held_out}; expected at most {len(chosen)}, so that every pair is in training"
        )
    return [s for s in scenes if s not in chosen], [s for s in scenes if s in chosen]
