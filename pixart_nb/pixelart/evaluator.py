"""Reads object, colour and setting from an image of a drawn scene, with a score of how certain that is.

The image is averaged to its cells. The setting is the one whose colours explain the border best. Then every object, in
every colour, orientation and position, competes with the background alone: the best explains the most squared colour
error of the cells that it covers. Nothing is learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.pixelart.backgrounds import BACKGROUNDS
from pixart_nb.pixelart.scenes import (
    COLOURS,
    JITTER,
    OBJECTS,
    SETTINGS,
    UNSEEN_OBJECTS,
    Placement,
    Scene,
    grid_mask,
    grid_size,
    resize_nearest,
    sprite_colours,
    sprite_mask,
)
from pixart_nb.pixelart.shapes import MIRRORED, SHAPE_SIZE

#: Sample points inside a cell, as fractions of its side: its edges may be blurred into the neighbours.
SAMPLES = np.array([0.3, 0.43, 0.57, 0.7])

#: An image shows a scene when its object explains at least this share of the covered cells' deviation from the
#: background, and border and object fit with at most these root mean square errors (0..255 per channel).
LEAST_SCORE = 0.5
MOST_SETTING_ERROR = 40.0
MOST_OBJECT_ERROR = 40.0

#: Largest squared error per channel of one border cell when the setting is chosen.
STRAY = 80.0**2

BATCH = 32

Images = Sequence[np.ndarray] | np.ndarray


@dataclass(frozen=True)
class Verdict:
    """Content of an image.

    ``object_score`` is the share, 0 to 1, of the covered cells' deviation from the background that the object
    explains, and ``runner_up_score`` that of the next best object. The errors are root mean squares in 0..255 per
    channel. ``mask`` is (H, W) bool. ``confident`` is False for an image that shows no scene; the names are then those
    of the nearest scene.
    """

    object: str
    colour: str
    setting: str
    object_score: float
    runner_up_score: float
    object_error: float
    setting_error: float
    confident: bool
    placement: Placement
    mask: np.ndarray

    @property
    def scene(self) -> Scene:
        """Scene of these names."""
        return Scene(self.object, self.colour, self.setting)


def cell_means(images: np.ndarray) -> np.ndarray:
    """Average the middles of the cells: (N, H, W, 3) uint8 -> (N, gh, gw, 3) float32 in 0..255."""
    count, height, width, _ = images.shape
    grid_height, grid_width = grid_size(height, width)
    rows = _sample_positions(grid_height, height)
    columns = _sample_positions(grid_width, width)
    samples = images[:, rows][:, :, columns].astype(np.float32)
    return samples.reshape(count, grid_height, SAMPLES.size, grid_width, SAMPLES.size, 3).mean(axis=(2, 4))


def _sample_positions(cells: int, pixels: int) -> np.ndarray:
    return ((np.arange(cells)[:, None] + SAMPLES) * pixels / cells).astype(int).ravel()


@lru_cache(maxsize=32)
def _row_palettes(grid_height: int) -> np.ndarray:
    """Colours that each row of each setting may have: (settings, gh, P, 3) float32, short lists repeated."""
    palettes = [_rows_of(setting, grid_height) for setting in SETTINGS]
    longest = max(len(row) for rows in palettes for row in rows)
    return np.array([[np.resize(row, (longest, 3)) for row in rows] for rows in palettes], dtype=np.float32)


def _rows_of(setting: str, grid_height: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    drawn = np.concatenate([BACKGROUNDS[setting](rng, grid_height, 16) for _ in range(64)], axis=1)
    return [np.unique(row, axis=0) for row in drawn]


def _background_errors(cells: np.ndarray) -> np.ndarray:
    """Squared error per channel of each cell under each setting: (N, gh, gw, 3) -> (N, settings, gh, gw)."""
    palettes = _row_palettes(cells.shape[1])
    off = cells[:, None, :, :, None] - palettes[None, :, :, None]
    return np.square(off).mean(axis=-1).min(axis=-1)


def _border(grid_height: int, grid_width: int) -> np.ndarray:
    """Cells that no object ever covers: (gh, gw) bool."""
    reach = SHAPE_SIZE // 2 + JITTER
    border = np.ones((grid_height, grid_width), dtype=bool)
    middle, centre = grid_height // 2, grid_width // 2
    border[middle - reach : middle + reach + 1, centre - reach : centre + reach + 1] = False
    return border


@lru_cache(maxsize=8)
def _templates(objects: tuple[str, ...]) -> tuple[list[tuple[str, bool]], np.ndarray, np.ndarray]:
    """Shapes and whether they are mirrored, their masks (S, 144) and colours (S, colours, 144 * 3), float32."""
    shapes = [(name, side) for name in objects for side in ((False, True) if name in MIRRORED else (False,))]
    masks = np.array([sprite_mask(*shape).ravel() for shape in shapes], dtype=np.float32)
    colours = np.array([[sprite_colours(n, colour, m).ravel() for colour in COLOURS] for n, m in shapes])
    return shapes, masks, colours


def _windows(cells: np.ndarray) -> np.ndarray:
    """All 12 x 12 windows: (N, gh, gw, ...) -> (N, rows, columns, 144 * ...)."""
    views = np.lib.stride_tricks.sliding_window_view(cells, (SHAPE_SIZE, SHAPE_SIZE), axis=(1, 2))
    views = np.moveaxis(views, (-2, -1), (3, 4))
    return views.reshape(*views.shape[:3], -1)


def _object_errors(cells: np.ndarray, objects: tuple[str, ...]) -> np.ndarray:
    """Squared error of every candidate over its mask: (N, gh, gw, 3) -> (N, rows, columns, S, colours)."""
    _, masks, colours = _templates(objects)
    energy = _windows(np.square(cells).sum(axis=-1)) @ masks.T
    correlations = _windows(cells) @ colours.reshape(-1, colours.shape[-1]).T
    correlations = correlations.reshape(*energy.shape, len(COLOURS))
    return (energy[..., None] - 2 * correlations + np.square(colours).sum(axis=-1)) / 3


class SpriteEvaluator:
    """Reads the scene of images of any size from 16 x 16 pixels.

    ``objects``: names to choose from, by default those that the bundled model knows.
    """

    def __init__(self, objects: Sequence[str] = OBJECTS):
        unknown = [name for name in objects if name not in OBJECTS + UNSEEN_OBJECTS]
        if unknown or not objects:
            raise PixArtNBError(f"objects are {list(objects)}; expected some of {OBJECTS + UNSEEN_OBJECTS}")
        self.objects = tuple(objects)

    def evaluate(self, image: np.ndarray) -> Verdict:
        """Read one image, (H, W, 3) uint8."""
        return self.evaluate_many([image])[0]

    def evaluate_many(self, images: Images) -> list[Verdict]:
        """Read images of (H, W, 3) uint8, of one size or of several; return a verdict for each, in order."""
        by_size: dict[tuple[int, ...], list[int]] = {}
        for number, image in enumerate(images):
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise PixArtNBError(f"an image must be (H, W, 3) uint8, got {image.shape} {image.dtype}")
            by_size.setdefault(image.shape, []).append(number)
        verdicts: dict[int, Verdict] = {}
        for numbers in by_size.values():
            for first in range(0, len(numbers), BATCH):
                part = numbers[first : first + BATCH]
                verdicts |= zip(part, _judge(np.stack([images[k] for k in part]), self.objects), strict=True)
        return [verdicts[number] for number in range(len(images))]

    def accuracy(self, images: Images, scenes: Sequence[Scene]) -> dict[str, float]:
        """Return the shares of images whose object, colour, setting and all three are those of ``scenes``."""
        if len(images) != len(scenes) or not len(scenes):
            raise PixArtNBError(
                f"need one scene per image and at least one, got {len(images)} images and {len(scenes)} scenes"
            )
        read = [verdict.scene for verdict in self.evaluate_many(images)]
        pairs = list(zip(read, scenes, strict=True))
        shares = {
            part: float(np.mean([getattr(a, part) == getattr(b, part) for a, b in pairs]))
            for part in ("object", "colour", "setting")
        }
        return shares | {"all": float(np.mean([a == b for a, b in pairs]))}


def _judge(images: np.ndarray, objects: tuple[str, ...]) -> list[Verdict]:
    """Return the verdicts of (N, H, W, 3) uint8 images, over these objects."""
    cells = cell_means(images)
    errors = _background_errors(cells)
    outside = np.minimum(errors[..., _border(*cells.shape[1:3])], STRAY).mean(axis=-1)
    settings = outside.argmin(axis=1)
    ground = errors[np.arange(len(cells)), settings]
    covered = (_windows(ground) @ _templates(objects)[1].T)[..., None]
    misfits = _object_errors(cells, objects)
    setting_errors = np.sqrt(outside.min(axis=1))
    size = images.shape[1:3]
    return [
        _verdict(size, SETTINGS[setting], float(error), *candidates, objects)
        for setting, error, *candidates in zip(settings, setting_errors, covered, misfits, strict=True)
    ]


def _verdict(
    size: tuple[int, int],
    setting: str,
    setting_error: float,
    covered: np.ndarray,
    misfits: np.ndarray,
    objects: tuple[str, ...],
) -> Verdict:
    """Choose the best candidate by errors of (rows, columns, S, 1) and (rows, columns, S, colours)."""
    shapes, masks, _ = _templates(objects)
    gains = covered - misfits
    row, column, shape, colour = np.unravel_index(gains.argmax(), gains.shape)
    name, mirrored = shapes[shape]
    scale = max(float(covered[row, column, shape, 0]), 1e-6)
    score = max(float(gains[row, column, shape, colour]) / scale, 0.0)
    others = gains[:, :, [other != name for other, _ in shapes]].max()
    error = float(np.sqrt(max(misfits[row, column, shape, colour], 0) / masks[shape].sum()))
    placement = Placement(int(row), int(column), mirrored)
    return Verdict(
        object=name,
        colour=COLOURS[colour],
        setting=setting,
        object_score=score,
        runner_up_score=max(float(others) / scale, 0.0),
        object_error=error,
        setting_error=setting_error,
        confident=score >= LEAST_SCORE and error <= MOST_OBJECT_ERROR and setting_error <= MOST_SETTING_ERROR,
        placement=placement,
        mask=resize_nearest(grid_mask(name, placement, *grid_size(*size)), *size),
    )
