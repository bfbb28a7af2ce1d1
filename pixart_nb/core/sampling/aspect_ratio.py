"""The sizes that PixArt was trained at, the nearest of them to any other size, and the way back."""

from __future__ import annotations

from typing import Any

import numpy as np

from pixart_nb.core.errors import PixArtNBError

#: Height and width, from the widest to the square, in units of a sixteenth of the base size.
_SIXTEENTHS = [(8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23)]
_SIXTEENTHS += [(11, 22), (11, 21), (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17)]
_SIXTEENTHS += [(15, 16), (16, 16)]

#: The official table of 2880, in units of 64 pixels; its first four ratios are rounded in a way of their own.
_OF_2880 = [
    (22, 90),
    (22, 87),
    (22, 84),
    (22, 81),
    (25, 78),
    (25, 75),
    (25, 73),
    (28, 70),
    (28, 67),
    (30, 64),
]
_OF_2880 += [(30, 61), (30, 59), (33, 60), (33, 56), (36, 53), (36, 50), (39, 50), (39, 47), (42, 47)]
_OF_2880 += [(42, 45), (45, 45)]
_ODD_RATIOS = {(22, 90): 0.25, (22, 87): 0.26, (22, 84): 0.27, (22, 81): 0.28, (90, 22): 4.0}

Bins = dict[float, tuple[int, int]]


def _table(units: list[tuple[int, int]], pixels: int, odd: dict | None = None) -> Bins:
    both = units + [(w, h) for h, w in reversed(units[:-1])]
    return {(odd or {}).get((h, w), round(h / w, 2)): (h * pixels, w * pixels) for h, w in both}


#: Base size -> {height / width: (height, width)} in pixels. 256 to 2048 are those of diffusers and of the official
#: repository; 2880 is the official one; 4096 continues the series, as the official test table for 4K does.
ASPECT_RATIO_BINS: dict[int, Bins] = {
    size: _table(_SIXTEENTHS, size // 16) for size in (256, 512, 1024, 2048, 4096)
} | {2880: _table(_OF_2880, 64, _ODD_RATIOS)}


def bins_for(base_size: int) -> Bins | None:
    """The table of a model trained at ``base_size`` pixels; None if none was published."""
    return ASPECT_RATIO_BINS.get(base_size)


def closest_bin(height: int, width: int, bins: Bins) -> tuple[int, int]:
    """Height and width of the bin whose ratio is nearest to ``height / width``; of two as near, the smaller ratio."""
    return bins[min(bins, key=lambda ratio: abs(ratio - height / width))]


def checked_size(config: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, those of a model (its ``PixArtConfig``) where None, if they are multiples of 16."""
    unit = 8 * config.patch_size
    height, width = (side if side is not None else 8 * config.input_size for side in (height, width))
    if height < unit or width < unit or height % unit or width % unit:
        nearest = tuple(max(unit, round(side / unit) * unit) for side in (height, width))
        raise PixArtNBError(
            f"height and width are {height}x{width}; both must be positive multiples of {unit}, "
            f"for example {nearest[0]}x{nearest[1]}"
        )
    return height, width


def binned_size(config: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """The published size with the nearest ratio of height to width, where the model's own size has a table.

    A model of another size, such as a small one, draws at the size that is asked for.
    """
    bins = bins_for(8 * config.input_size)
    if not bins or height is None or width is None or height < 1 or width < 1:
        return checked_size(config, height, width)
    return closest_bin(height, width, bins)


def resize_and_crop(pictures: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pictures (N, H, W, C) of floats -> (N, height, width, C): scaled to cover the size, then the middle cut out.

    Bilinear with half-pixel centres and without smoothing, as the reference resizes.
    """
    rows, columns = pictures.shape[1:3]
    if (rows, columns) == (height, width):
        return pictures
    scale = max(height / rows, width / columns)
    covered = (
        max(height, int(rows * scale)),
        max(width, int(columns * scale)),
    )  # the product may round below
    pictures = _resize_axis(_resize_axis(pictures, 1, covered[0]), 2, covered[1])
    top, left = (covered[0] - height) // 2, (covered[1] - width) // 2
    return pictures[:, top : top + height, left : left + width]


def _resize_axis(pictures: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Linear interpolation along one axis."""
    length = pictures.shape[axis]
    if length == size:
        return pictures
    place = np.clip((np.arange(size) + 0.5) * (length / size) - 0.5, 0, length - 1)
    low = np.floor(place).astype(int)
    high = np.minimum(low + 1, length - 1)
    shape = [-1 if a == axis else 1 for a in range(pictures.ndim)]
    share = (place - low).astype(pictures.dtype).reshape(shape)
    return pictures.take(low, axis) * (1 - share) + pictures.take(high, axis) * share
