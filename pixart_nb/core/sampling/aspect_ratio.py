"""Image sizes that PixArt was trained at, the nearest one to any size, and resizing back."""

from __future__ import annotations

from typing import Any

import numpy as np

from pixart_nb.core.errors import PixArtNBError

#: Height x width, from the widest to the square, in units of a sixteenth of the base size.
_SIXTEENTHS = (
    "8x32 8x31 8x30 8x29 9x28 9x27 9x26 10x25 10x24 11x23 11x22 11x21 12x21 12x20 13x19 13x18 14x18 "
    "14x17 15x17 15x16 16x16"
)
#: Official table of 2880, in units of 64 pixels; some of its ratios are rounded differently.
_OF_2880 = (
    "22x90 22x87 22x84 22x81 25x78 25x75 25x73 28x70 28x67 30x64 30x61 30x59 33x60 33x56 36x53 36x50 "
    "39x50 39x47 42x47 42x45 45x45"
)
_ODD_RATIOS = {(22, 90): 0.25, (22, 87): 0.26, (22, 84): 0.27, (22, 81): 0.28, (90, 22): 4.0}

Bins = dict[float, tuple[int, int]]


def _table(sizes: str, pixels: int, odd: dict | None = None) -> Bins:
    units = [tuple(map(int, size.split("x"))) for size in sizes.split()]
    both = units + [(w, h) for h, w in reversed(units[:-1])]
    return {(odd or {}).get((h, w), round(h / w, 2)): (h * pixels, w * pixels) for h, w in both}


#: Base size -> {height / width: (height, width)} in pixels. 256 to 2048 are those of diffusers and of the official
#: repository; 2880 is the official one; 4096 continues the series, as the official test table for 4K does.
ASPECT_RATIO_BINS: dict[int, Bins] = {
    size: _table(_SIXTEENTHS, size // 16) for size in (256, 512, 1024, 2048, 4096)
} | {2880: _table(_OF_2880, 64, _ODD_RATIOS)}


def bins_for(base_size: int) -> Bins | None:
    """Return the table of a model trained at ``base_size`` pixels, or None if none was published."""
    return ASPECT_RATIO_BINS.get(base_size)


def closest_bin(height: int, width: int, bins: Bins) -> tuple[int, int]:
    """Return the size of the bin whose ratio is nearest to ``height / width``; of two as near, the smaller ratio."""
    return bins[min(bins, key=lambda ratio: abs(ratio - height / width))]


def checked_size(config: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Return height and width in pixels, those of a ``PixArtConfig`` where None. They must be multiples of 16."""
    unit = 8 * config.patch_size
    height, width = _filled(config, height, width)
    if height < unit or width < unit or height % unit or width % unit:
        nearest = tuple(max(unit, round(side / unit) * unit) for side in (height, width))
        raise PixArtNBError(
            f"height and width are {height}x{width}; both must be positive multiples of {unit}, "
            f"for example {nearest[0]}x{nearest[1]}"
        )
    return height, width


def binned_size(config: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Return the published size with the nearest ratio of height to width, if the model's own size has a table.

    A model of another size, such as the bundled one, draws at the requested size.
    """
    bins, (height, width) = bins_for(8 * config.input_size), _filled(config, height, width)
    if not bins or height < 1 or width < 1:
        return checked_size(config, height, width)
    return closest_bin(height, width, bins)


def _filled(config: Any, height: int | None, width: int | None) -> tuple[int, int]:
    sides = [side if side is not None else 8 * config.input_size for side in (height, width)]
    for side in sides:
        if isinstance(side, bool) or not isinstance(side, (int, np.integer)):
            raise PixArtNBError(f"height and width are {height!r} and {width!r}; expected whole numbers of pixels")
    return tuple(sides)


def resize_and_crop(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale images (N, H, W, C) of floats to cover height x width, then crop the centre.

    Bilinear with half-pixel centres and without antialiasing, as in the reference.
    """
    rows, columns = images.shape[1:3]
    if (rows, columns) == (height, width):
        return images
    scale = max(height / rows, width / columns)
    covered = max(height, int(rows * scale)), max(width, int(columns * scale))  # the product may round below
    images = _resize_axis(_resize_axis(images, 1, covered[0]), 2, covered[1])
    top, left = (covered[0] - height) // 2, (covered[1] - width) // 2
    return images[:, top : top + height, left : left + width]


def _resize_axis(images: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Interpolate linearly along one axis."""
    length = images.shape[axis]
    if length == size:
        return images
    positions = np.clip((np.arange(size) + 0.5) * (length / size) - 0.5, 0, length - 1)
    low = np.floor(positions).astype(int)
    high = np.minimum(low + 1, length - 1)
    shape = [-1 if a == axis else 1 for a in range(images.ndim)]
    share = (positions - low).astype(images.dtype).reshape(shape)
    return images.take(low, axis) * (1 - share) + images.take(high, axis) * share
