"""Pixels of attention maps laid over an image, for figures and widgets alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import cm
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz import style
from pixart_nb.viz.figures import as_share
from pixart_nb.viz.style import DIFFERENCE, HEAT, heat_colours

#: How much of a pixel is heat, where it is least and where it is most, and how bright the grey image below it is.
COVER, DIMMED = (0.05, 0.85), 0.8
#: Pixels of a side that a figure or a widget shows at most.
SHOWN = 1024


def overlay(
    image: np.ndarray,
    heat: np.ndarray,
    limits: tuple[float, float] | None = None,
    threshold: float | None = None,
    ratio: int = 1,
    grid: tuple[int, int] | None = None,
) -> np.ndarray:
    """Blend heat (kh, kw) with the grey image (H, W, 3) and return (H, W, 3) float in [0, 1]. Nothing is smoothed.

    Args:
        image: Float in [0, 1] or uint8.
        heat: One value per cell of ``ratio`` x ``ratio`` tokens.
        limits: Values of the darkest and the brightest colour. Default: 0 and the maximum.
        threshold: Share of ``limits``, 0 to 1. Cells above it keep their colours and get heat; others stay grey.
        ratio, grid: Tokens per side of a cell, and (height, width) of the image in tokens, where cells do not fill it.
    """
    pixels = as_float(image)
    lowest, highest = limits or (0.0, float(np.max(heat)))
    rows, columns = cell_of_pixels(pixels.shape[:2], heat.shape, ratio, grid)
    share = np.clip((np.asarray(heat, float) - lowest) / ((highest - lowest) or 1), 0, 1)
    hot = np.ones(share.shape, bool) if threshold is None else share >= threshold
    cover = np.where(hot, COVER[0] + (COVER[1] - COVER[0]) * share, 0.0)[..., None]
    at = np.ix_(np.maximum(rows, 0), np.maximum(columns, 0))
    grey = np.repeat(DIMMED * pixels.mean(2, keepdims=True), 3, 2)
    below = grey if threshold is None else np.where(hot[at][..., None], pixels, grey)
    coloured = (1 - cover)[at] * below + (cover * heat_colours(share, 0, 1, HEAT))[at]
    coloured[rows < 0] = grey[rows < 0]
    coloured[:, columns < 0] = grey[:, columns < 0]
    return coloured


def overlay_differences(image: np.ndarray, difference: np.ndarray, most: float) -> np.ndarray:
    """Blend differences (h, w) of -most .. most with the grey image (H, W, 3): (H, W, 3) float in [0, 1]."""
    pixels = as_float(image)
    at = np.ix_(*cell_of_pixels(pixels.shape[:2], difference.shape))
    cover = COVER[0] + (COVER[1] - COVER[0]) * np.abs(difference) / (most or 1)
    grey = np.repeat(DIMMED * pixels.mean(2, keepdims=True), 3, 2)
    coloured = cover[..., None] * heat_colours(difference, -(most or 1), most or 1, DIFFERENCE)
    return (1 - cover)[at][..., None] * grey + coloured[at]


def bar_colours(image: np.ndarray, signed: bool = False) -> np.ndarray:
    """Return 256 colours of a colour bar that matches maps (or signed differences) over this image: (256, 3).

    They are those of the map over the image's mean grey.
    """
    grey = np.full((1, 256, 3), as_float(image).mean())
    if signed:
        return overlay_differences(grey, np.linspace(-1, 1, 256)[None], 1.0)[0]
    return overlay(grey, np.linspace(0, 1, 256)[None])[0]


def heat_bar(figure: Any, axes: Axes | Sequence[Axes], highest: float, label: str, image: np.ndarray) -> None:
    """Add the colour bar of maps from 0 to ``highest`` over an image."""
    colours = cm.ScalarMappable(Normalize(0, highest), ListedColormap(bar_colours(image)))
    style.colour_bar(figure, colours, axes, label)


def shrunk(image: np.ndarray, most: int = SHOWN) -> np.ndarray:
    """Subsample the image until no side has more than ``most`` pixels, so that figures of 4K images stay fast."""
    every = -(-max(image.shape[:2]) // most)
    return image[::every, ::every]


def as_float(image: np.ndarray) -> np.ndarray:
    """Return an image (H, W, 3) or (H, W) as (H, W, 3) float in [0, 1]."""
    pixels = as_share(image)
    return np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels


def cell_of_pixels(
    size: tuple[int, int], cells: tuple[int, int], ratio: int = 1, grid: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the cell row of each pixel row (H,) and the cell column of each pixel column (W,), -1 for none."""
    grid = check_cells(cells, ratio, grid)
    indices = []
    for pixels, count, tokens in zip(size, cells, grid, strict=True):
        cell = np.arange(pixels) * tokens // pixels // ratio
        indices.append(np.where(cell < count, cell, -1))
    return indices[0], indices[1]


def check_cells(cells: tuple[int, int], ratio: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    """Return the grid of tokens.

    Raises:
        PixArtNBError: the grid does not hold these cells.
    """
    grid = grid or (cells[0] * ratio, cells[1] * ratio)
    if (grid[0] // ratio, grid[1] // ratio) != tuple(cells):
        raise PixArtNBError(
            f"a map of {cells[0]}x{cells[1]} cells does not belong to {grid[0]}x{grid[1]} tokens at ratio {ratio}, "
            f"which make {grid[0] // ratio}x{grid[1] // ratio}"
        )
    return grid


def spread_cells(weights: np.ndarray, ratio: int, grid: tuple[int, int] | None = None) -> np.ndarray:
    """Convert attention to cells (..., kh, kw) into attention to tokens (..., h, w) by dividing each share evenly.

    Tokens in no cell get 0, so sums are kept.
    """
    height, width = check_cells(weights.shape[-2:], ratio, grid)
    out = np.zeros((*weights.shape[:-2], height, width), np.result_type(weights, np.float32))
    rows, columns = (side * ratio for side in weights.shape[-2:])
    out[..., :rows, :columns] = weights.repeat(ratio, -2).repeat(ratio, -1) / ratio**2
    return out
