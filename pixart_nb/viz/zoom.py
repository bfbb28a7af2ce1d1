"""Viewer that zooms into large images, in a notebook or as one HTML file, and a figure of details."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle
from PIL import Image

from pixart_nb.core.data.images import load_image
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import write_text
from pixart_nb.core.sampling.images import to_uint8
from pixart_nb.viz.html_export import page_of
from pixart_nb.viz.style import MARK, SMALL, TEXT, Figure, for_image

#: Pixels a side of the tiles, and up to which the smallest level goes.
TILE = 512
#: WebP quality of the tiles; 100 keeps every pixel as it is.
QUALITY = 95
#: Dots per inch of ``zoom_figure``, at which its details show one pixel as one dot.
DPI = 100
_LABEL = {"color": "white", "fontsize": SMALL, "bbox": {"facecolor": "black", "linewidth": 0, "pad": 1.5}}


class ZoomViewer:
    """Viewer of an image (H, W, 3) uint8, or of an image file, for mouse, touch and keyboard.

    It shows itself in a notebook. ``write`` makes one HTML file that needs neither Python nor a network. ``quality``
    100 keeps the exact pixels in a larger file.
    """

    def __init__(self, image: np.ndarray | str | Path, title: str = "", quality: int = QUALITY):
        if not 1 <= quality <= 100:
            raise PixArtNBError(f"quality is {quality}; expected 1 to 100")
        self.image, self.title, self.quality = as_pixels(image), title, quality

    def levels(self) -> list[dict[str, Any]]:
        """Return the image at every power of two of its size as rows of tiles, full resolution first."""
        image, levels = Image.fromarray(self.image), []
        while True:
            width, height = image.size
            levels.append({"width": width, "height": height, "tiles": self._tiles(image)})
            if max(image.size) <= TILE:
                return levels
            image = image.resize((-(-width // 2), -(-height // 2)), Image.Resampling.BOX)

    def _tiles(self, image: Image.Image) -> list[list[str]]:
        width, height = image.size
        boxes = (
            [(x, y, min(x + TILE, width), min(y + TILE, height)) for x in range(0, width, TILE)]
            for y in range(0, height, TILE)
        )
        return [[self._address(image.crop(box)) for box in row] for row in boxes]

    def _address(self, tile: Image.Image) -> str:
        content = io.BytesIO()
        exact = self.quality == 100
        tile.save(content, "WEBP", quality=80 if exact else self.quality, lossless=exact)
        return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()

    def html(self) -> str:
        """Return the viewer as a page."""
        height, width = self.image.shape[:2]
        data = {"title": self.title or f"{width} x {height}", "tile": TILE, "levels": self.levels()}
        return page_of("zoom.html", data)

    def write(self, path: str | Path) -> Path:
        """Write the page as one file, and return the path."""
        write_text(path, self.html())
        return Path(path)

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        return f"ZoomViewer of {width} x {height} pixels: run this cell to use it"

    def _repr_html_(self) -> str:
        return (
            f'<iframe title="{escape(self.title or "image")}" style="width:100%;height:620px;border:1px solid #999" '
            f'sandbox="allow-scripts" srcdoc="{escape(self.html())}"></iframe>'
        )


def as_pixels(image: np.ndarray | str | Path) -> np.ndarray:
    """Return an image file or array, uint8 or float in [0, 1], as (H, W, 3) uint8."""
    if isinstance(image, str | Path):
        return load_image(image)
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise PixArtNBError(f"an image has shape (H, W, 3), got {pixels.shape}")
    return pixels if pixels.dtype == np.uint8 else to_uint8(pixels)


def zoom_figure(
    image: np.ndarray | str | Path, details: Sequence[tuple[int, int]] | None = None, size: int = 214
) -> Figure:
    """Draw the whole image and four marked details of ``size`` pixels at 100%.

    Args:
        details: Top and left of each detail. Default: the square with the most contrast of each quarter.

    At ``DPI`` dots per inch, a pixel of a detail is one dot.
    """
    pixels = as_pixels(image)
    size = min(size, *pixels.shape[:2])
    details = detailed_places(pixels, size) if details is None else list(details)
    last = pixels.shape[0] - size, pixels.shape[1] - size
    if outside := [(y, x) for y, x in details if not (0 <= y <= last[0] and 0 <= x <= last[1])]:
        raise PixArtNBError(f"details {outside} lie outside of the image; expected top and left of at most {last}")
    inches, gap = size / DPI, 0.05
    columns = -(-len(details) // 2)
    whole = 2 * inches + gap
    wide = whole * pixels.shape[1] / pixels.shape[0]
    width, height = wide + columns * (inches + gap) + gap, whole + 0.3
    figure = Figure(figsize=(width, height), dpi=DPI)
    left = figure.add_axes((0, 0, wide / width, whole / height))
    for_image(left).imshow(_shrunk(pixels, int(whole * DPI)), extent=(0, pixels.shape[1], pixels.shape[0], 0))
    left.set_title(f"{pixels.shape[0]} x {pixels.shape[1]} pixels, and details at 100%", fontsize=TEXT, loc="left")
    for number, (top, start) in enumerate(details):
        x = wide + gap + number // 2 * (inches + gap)
        y = (1 - number % 2) * (inches + gap)
        ax = figure.add_axes((x / width, y / height, inches / width, inches / height))
        for_image(ax).imshow(pixels[top : top + size, start : start + size], interpolation="none")
        left.add_patch(Rectangle((start, top), size, size, fill=False, edgecolor=MARK, linewidth=1.2))
        left.text(start, top, str(number + 1), va="top", **_LABEL)
        ax.text(4, 4, str(number + 1), va="top", **_LABEL)
    return figure


def detailed_places(pixels: np.ndarray, size: int) -> list[tuple[int, int]]:
    """Return top and left of the square of ``size`` pixels with the most contrast in each quarter of (H, W, 3)."""
    height, width = pixels.shape[:2]
    grey = pixels.mean(2)
    corners = []
    for rows in np.array_split(np.arange(0, height - size + 1, max(1, size // 4)), 2):
        for columns in np.array_split(np.arange(0, width - size + 1, max(1, size // 4)), 2):
            squares = [(int(top), int(left)) for top in rows for left in columns]
            if squares:
                corners.append(max(squares, key=lambda p: grey[p[0] : p[0] + size, p[1] : p[1] + size].std()))
    return list(dict.fromkeys(corners))


def _shrunk(pixels: np.ndarray, height: int) -> np.ndarray:
    """Reduce an image to about the resolution that it is shown at."""
    if pixels.shape[0] <= height:
        return pixels
    size = (max(1, round(pixels.shape[1] * height / pixels.shape[0])), height)
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
