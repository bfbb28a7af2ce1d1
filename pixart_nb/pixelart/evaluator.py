"""Reads object, colour and setting back from a picture of a drawn scene, with a score for how sure it is.

The picture is averaged to its cells. The setting is the one whose colours explain the border best. Then every
object, in every colour, side and place, competes with "there is only background here": the winner explains
the most squared colour error of the cells it covers. Nothing is learned, and no generated picture is needed.
"""

from collections.abc import Iterator, Sequence
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
    enlarge,
    grid_size,
    sprite_colours,
    sprite_mask,
)
from pixart_nb.pixelart.shapes import MIRRORED, SHAPE_SIZE

# Samples inside a cell, as fractions of its side: its edges may be blurred into the neighbours.
SAMPLES = np.array([0.3, 0.43, 0.57, 0.7])

# A picture shows a scene when its object explains at least this share of the covered cells' deviation from
# the background, and border and object fit with at most these root mean square errors (0..255 per channel).
LEAST_SCORE = 0.5
MOST_SETTING_ERROR = 40.0
MOST_OBJECT_ERROR = 40.0

# One stray border cell counts at most this much squared error per channel when the setting is chosen.
STRAY = 80.0**2

BATCH = 32

Pictures = Sequence[np.ndarray] | np.ndarray


@dataclass(frozen=True)
class Verdict:
    """What a picture shows.

    ``object_score`` is the share, 0 to 1, of the covered cells' deviation from the background that the object
    explains, and ``runner_up_score`` that of the next best object on the same scale. The errors are root
    mean squares in 0..255 per channel. ``mask`` is (H, W) bool. ``confident`` is False for a picture that
    shows no scene, whatever names the nearest scene has.
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
        """The named scene."""
        return Scene(self.object, self.colour, self.setting)


def cell_means(pictures: np.ndarray) -> np.ndarray:
    """Mean colours of the middles of the cells: (N, H, W, 3) uint8 to (N, gh, gw, 3) float32 in 0..255."""
    count, height, width, _ = pictures.shape
    grid_height, grid_width = grid_size(height, width)
    rows = _sample_positions(grid_height, height)
    columns = _sample_positions(grid_width, width)
    samples = pictures[:, rows][:, :, columns].astype(np.float32)
    return samples.reshape(count, grid_height, SAMPLES.size, grid_width, SAMPLES.size, 3).mean(axis=(2, 4))


def _sample_positions(cells: int, pixels: int) -> np.ndarray:
    return ((np.arange(cells)[:, None] + SAMPLES) * pixels / cells).astype(int).ravel()


@lru_cache(maxsize=32)
def _row_palettes(grid_height: int) -> np.ndarray:
    """The colours every row of every setting may have: (settings, gh, P, 3) float32, short lists repeated."""
    palettes = [_rows_of(setting, grid_height) for setting in SETTINGS]
    longest = max(len(row) for rows in palettes for row in rows)
    return np.array([[np.resize(row, (longest, 3)) for row in rows] for rows in palettes], dtype=np.float32)


def _rows_of(setting: str, grid_height: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    drawn = np.concatenate([BACKGROUNDS[setting](rng, grid_height, 16) for _ in range(64)], axis=1)
    return [np.unique(row, axis=0) for row in drawn]


def _background_errors(cells: np.ndarray) -> np.ndarray:
    """Squared error of each cell under each setting: (N, gh, gw, 3) to (N, settings, gh, gw), per channel."""
    palettes = _row_palettes(cells.shape[1])
    off = cells[:, None, :, :, None] - palettes[None, :, :, None]
    return np.square(off).mean(axis=-1).min(axis=-1)


def _border(grid_height: int, grid_width: int) -> np.ndarray:
    """The cells no object ever covers: (gh, gw) bool."""
    reach = SHAPE_SIZE // 2 + JITTER
    border = np.ones((grid_height, grid_width), dtype=bool)
    middle, centre = grid_height // 2, grid_width // 2
    border[middle - reach : middle + reach + 1, centre - reach : centre + reach + 1] = False
    return border


@lru_cache(maxsize=8)
def _templates(objects: tuple[str, ...]) -> tuple[list[tuple[str, bool]], np.ndarray, np.ndarray]:
    """Shapes with their sides, their masks (S, 144) and their colours (S, colours, 144 * 3), float32."""
    shapes = [(name, side) for name in objects for side in ((False, True) if name in MIRRORED else (False,))]
    masks = np.array([sprite_mask(*shape).ravel() for shape in shapes], dtype=np.float32)
    colours = np.array([[sprite_colours(n, colour, m).ravel() for colour in COLOURS] for n, m in shapes])
    return shapes, masks, colours


def _windows(cells: np.ndarray) -> np.ndarray:
    """Every 12x12 window: (N, gh, gw, ...) to (N, rows, columns, 144 * ...)."""
    views = np.lib.stride_tricks.sliding_window_view(cells, (SHAPE_SIZE, SHAPE_SIZE), axis=(1, 2))
    views = np.moveaxis(views, (-2, -1), (3, 4))
    return views.reshape(*views.shape[:3], -1)


def _object_errors(cells: np.ndarray, objects: tuple[str, ...]) -> np.ndarray:
    """Squared error over its mask of every candidate: (N, gh, gw, 3) to (N, rows, columns, S, colours)."""
    _, masks, colours = _templates(objects)
    energy = _windows(np.square(cells).sum(axis=-1)) @ masks.T
    products = _windows(cells) @ colours.reshape(-1, colours.shape[-1]).T
    products = products.reshape(*energy.shape, len(COLOURS))
    return (energy[..., None] - 2 * products + np.square(colours).sum(axis=-1)) / 3


def _whole_mask(place: Placement, name: str, grid_height: int, grid_width: int) -> np.ndarray:
    mask = np.zeros((grid_height, grid_width), dtype=bool)
    shape = sprite_mask(name, place.mirrored)
    mask[place.row : place.row + SHAPE_SIZE, place.column : place.column + SHAPE_SIZE] = shape
    return mask


class SpriteEvaluator:
    """Tells which scene a picture of any size of at least 16x16 image pixels shows.

    ``objects`` are those among which it chooses: the ones the embedded model knows, unless told.
    """

    def __init__(self, objects: Sequence[str] = OBJECTS):
        unknown = [name for name in objects if name not in OBJECTS + UNSEEN_OBJECTS]
        if unknown or not objects:
            raise PixArtNBError(f"objects are {list(objects)}; expected some of {OBJECTS + UNSEEN_OBJECTS}")
        self.objects = tuple(objects)

    def evaluate(self, picture: np.ndarray) -> Verdict:
        """Read one picture, (H, W, 3) uint8."""
        return self.evaluate_many([picture])[0]

    def evaluate_many(self, pictures: Pictures) -> list[Verdict]:
        """Read pictures of (H, W, 3) uint8, of one size or of several; one verdict each, in order."""
        for picture in pictures:
            _require_picture(picture)
        verdicts: list[Verdict | None] = [None] * len(pictures)
        for places in _batches_of_one_size(pictures):
            for place, verdict in zip(
                places, _judge(np.stack([pictures[k] for k in places]), self.objects), strict=True
            ):
                verdicts[place] = verdict
        return [verdict for verdict in verdicts if verdict is not None]

    def accuracy(self, pictures: Pictures, scenes: Sequence[Scene]) -> dict[str, float]:
        """Fractions of pictures whose object, colour, setting and all three are those of ``scenes``."""
        if len(pictures) != len(scenes) or not len(scenes):
            raise PixArtNBError(
                f"need one scene per picture and at least one, got {len(pictures)}, {len(scenes)}"
            )
        found = [verdict.scene for verdict in self.evaluate_many(pictures)]
        pairs = list(zip(found, scenes, strict=True))
        shares = {
            part: float(np.mean([getattr(a, part) == getattr(b, part) for a, b in pairs]))
            for part in ("object", "colour", "setting")
        }
        return shares | {"all": float(np.mean([a == b for a, b in pairs]))}


def _require_picture(picture: np.ndarray) -> None:
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise PixArtNBError(f"a picture must be (H, W, 3) uint8, got {picture.shape} {picture.dtype}")


def _batches_of_one_size(pictures: Pictures) -> Iterator[list[int]]:
    """Positions of at most ``BATCH`` pictures of one size each."""
    by_size: dict[tuple[int, ...], list[int]] = {}
    for place, picture in enumerate(pictures):
        by_size.setdefault(picture.shape, []).append(place)
    for places in by_size.values():
        yield from (places[first : first + BATCH] for first in range(0, len(places), BATCH))


def _judge(pictures: np.ndarray, objects: tuple[str, ...]) -> list[Verdict]:
    """Verdicts of (N, H, W, 3) uint8 pictures, over these objects."""
    cells = cell_means(pictures)
    errors = _background_errors(cells)
    outside = np.minimum(errors[..., _border(*cells.shape[1:3])], STRAY).mean(axis=-1)
    settings = outside.argmin(axis=1)
    ground = errors[np.arange(len(cells)), settings]
    covered = (_windows(ground) @ _templates(objects)[1].T)[..., None]
    misfits = _object_errors(cells, objects)
    setting_errors = np.sqrt(outside.min(axis=1))
    size = pictures.shape[1:3]
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
    """Pick the best candidate, from errors of (rows, columns, S, 1) and (rows, columns, S, colours)."""
    shapes, masks, _ = _templates(objects)
    gains = covered - misfits
    row, column, shape, colour = np.unravel_index(gains.argmax(), gains.shape)
    name, mirrored = shapes[shape]
    scale = max(float(covered[row, column, shape, 0]), 1e-6)
    score = max(float(gains[row, column, shape, colour]) / scale, 0.0)
    others = gains[:, :, [other != name for other, _ in shapes]].max()
    error = float(np.sqrt(max(misfits[row, column, shape, colour], 0) / masks[shape].sum()))
    place = Placement(int(row), int(column), mirrored)
    return Verdict(
        object=name,
        colour=COLOURS[colour],
        setting=setting,
        object_score=score,
        runner_up_score=max(float(others) / scale, 0.0),
        object_error=error,
        setting_error=setting_error,
        confident=score >= LEAST_SCORE and error <= MOST_OBJECT_ERROR and setting_error <= MOST_SETTING_ERROR,
        placement=place,
        mask=enlarge(_whole_mask(place, name, *grid_size(*size)), *size),
    )
