"""Condition images of a ControlNet: the edges of an image, or files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from pixart_nb.config.keys import EDGE_SIGMA, EDGE_THRESHOLD, EDGE_WIDTH
from pixart_nb.core.data.buckets import Size
from pixart_nb.core.data.files import DataError
from pixart_nb.core.data.images import ENDINGS, ImageError, fit, load_image, read_image_size
from pixart_nb.core.data.labels import Label

#: Difference between the ratios of an image and its condition that rounding explains.
_RATIO = 0.03
#: Neighbours (row, column) across an edge whose gradient points to 0, 45, 90 and 135 degrees.
_ACROSS = ((0, 1), (1, 1), (1, 0), (1, -1))


@dataclass(frozen=True)
class EdgeOptions:
    """Options of finding and drawing the edges of an image.

    ``sigma`` is the standard deviation in pixels of the Gaussian filter: smaller details have no edge. ``threshold`` is
    the difference in brightness, 0 to 1, from which an edge begins; it is followed down to half of that. Lines are
    ``width`` pixels wide, an odd number: some VAEs encode a line of one pixel as almost black.
    """

    sigma: float = EDGE_SIGMA
    threshold: float = EDGE_THRESHOLD
    width: int = EDGE_WIDTH

    def __post_init__(self) -> None:
        if not (0 < self.sigma <= 100 and 0 < self.threshold <= 1 and self.width in range(1, 32, 2)):
            raise ImageError(
                f"{self}: expected sigma above 0, threshold from 0 to 1, and width odd, from 1 to 31 pixels"
            )

    @property
    def thin(self) -> EdgeOptions:
        """Options of these edges as lines of one pixel."""
        return replace(self, width=1)


def edges(image: np.ndarray, options: EdgeOptions = EdgeOptions()) -> np.ndarray:
    """Return the edges of an image, white lines on black (Canny 1986): (H, W, 3) uint8 -> (H, W, 3) uint8."""
    sigma = options.sigma
    filters = (
        ndimage.gaussian_filter1d(image / np.float32(255), sigma, axis, order=1, mode="nearest") for axis in (0, 1)
    )
    gradient = [ndimage.gaussian_filter1d(part, sigma, 1 - axis, mode="nearest") for axis, part in enumerate(filters)]
    slopes = np.hypot(*gradient)
    channel = slopes.argmax(-1)[..., None]  # the one with the largest slope
    slope = np.take_along_axis(slopes, channel, -1)[..., 0]
    down, right = (np.take_along_axis(part, channel, -1)[..., 0] for part in gradient)
    sector = np.round(np.arctan2(down, right) / (np.pi / 4)).astype(int) % 4
    strong = options.threshold / (math.sqrt(2 * math.pi) * sigma)  # the largest slope of a filtered step
    lines = _ridges(slope, sector) & (slope >= strong / 2)
    numbers, _ = ndimage.label(lines, np.ones((3, 3)))
    kept = np.isin(numbers, np.unique(numbers[lines & (slope >= strong)])) & lines
    kept = ndimage.maximum_filter(kept, options.width)
    return np.repeat(kept[..., None], 3, -1).astype(np.uint8) * 255


def _ridges(slope: np.ndarray, sector: np.ndarray) -> np.ndarray:
    """Return where the slope (H, W) is the largest across its edge; of two equal neighbours, one."""
    height, width = slope.shape
    around, ridges = np.pad(slope, 1), np.zeros(slope.shape, bool)
    for number, (row, column) in enumerate(_ACROSS):
        ahead = around[1 + row : 1 + row + height, 1 + column : 1 + column + width]
        behind = around[1 - row : 1 - row + height, 1 - column : 1 - column + width]
        ridges |= (sector == number) & (slope > ahead) & (slope >= behind)
    return ridges


def edge_f1(first: np.ndarray, second: np.ndarray, tolerance: int = 1) -> float:
    """Return the F1 score of two images of edges (H, W, 3), 0 to 1; without any edge in both it is 1.

    An edge pixel is right if the other image has one at most ``tolerance`` pixels away, diagonals included.
    """
    lines = [image[..., 0] > 0 for image in (first, second)]
    if lines[0].shape != lines[1].shape:
        raise ImageError(f"the edges are of {lines[0].shape} and {lines[1].shape} pixels; expected one size")
    total = sum(int(line.sum()) for line in lines)
    if not all(line.any() for line in lines):
        return float(total == 0)
    near = [ndimage.maximum_filter(line, 2 * tolerance + 1) for line in lines]
    precision, recall = (float(near[1 - k][lines[k]].mean()) for k in (0, 1))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@dataclass(frozen=True)
class ControlImages:
    """Condition images of labels: files of the same names in ``folder`` (any image ending), or edges without one."""

    folder: Path | None = None
    edges: EdgeOptions = EdgeOptions()

    @property
    def settings(self) -> list[object]:
        """Everything that the conditions depend on besides the files."""
        return ["edges", *astuple(self.edges)] if self.folder is None else []

    def condition(self, image: np.ndarray) -> np.ndarray:
        """Return the condition that an image file given for it stands for: its edges, or the image itself."""
        return edges(image, self.edges) if self.folder is None else image

    def pixels(self, label: Label, size: Size) -> np.ndarray:
        """Return the condition of an image at its training size: (height, width, 3) uint8."""
        return self.condition(fit(load_image(self.file(label)), *size))

    def file(self, label: Label) -> Path:
        """Return the file that the condition of a label is made from."""
        if self.folder is None:
            return label.file
        path = self.folder / label.path
        others = (path.with_suffix(ending) for ending in ENDINGS)
        return next((other for other in (path, *others) if other.is_file()), path)

    def check(self, labels: Sequence[Label]) -> None:
        """Raise ``DataError`` if a file is missing, is no image, or has another ratio than its image."""
        problems = [problem for label in labels if self.folder and (problem := self._problem(label))]
        if problems:
            more = f", and {len(problems) - 4} more" if len(problems) > 4 else ""
            raise DataError(
                f"control_dir {self.folder}: {'; '.join(problems[:4])}{more}. Expected an image for each of image_dir, "
                "of its name and ratio; without control_dir the edges of the images are taken"
            )

    def _problem(self, label: Label) -> str:
        try:
            height, width = read_image_size(self.file(label))
        except ImageError as error:
            return str(error)
        if abs(height / width / label.ratio - 1) <= _RATIO:
            return ""
        return f"{label.path} is {height}x{width}, its image {label.height}x{label.width}"
