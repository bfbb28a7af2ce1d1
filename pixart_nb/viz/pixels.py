"""Pixels of images for widgets and pages: enlarged, side by side, with the cells of compressed keys, as PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from pixart_nb.core.sampling.images import to_uint8
from pixart_nb.viz.overlay import as_float


def enlarged(pixels: np.ndarray, least: int = 384) -> np.ndarray:
    """Repeat pixels a whole number of times until the larger side has at least ``least`` pixels."""
    times = max(1, -(-least // max(pixels.shape[:2])))
    return pixels.repeat(times, 0).repeat(times, 1)


def with_cells(
    image: np.ndarray, grid: tuple[int, int], ratio: int, least: int = 256, shown: int | None = None
) -> np.ndarray:
    """Return the enlarged image with white lines around cells of R x R tokens, uint8. Ratio 1 draws none.

    Lines are as thick as stay visible when the larger side is shown with ``shown`` pixels, by default ``least``.
    """
    pixels = enlarged(to_uint8(as_float(image)), least)
    if ratio == 1 or max(grid) // ratio > 64:
        return pixels
    for axis, (side, tokens) in enumerate(zip(pixels.shape[:2], grid, strict=True)):
        lines = np.arange(tokens // ratio + 1) * ratio * side // tokens
        for offset in range(-(-max(pixels.shape[:2]) // (shown or least))):
            pixels[(slice(None),) * axis + (np.minimum(lines + offset, side - 1),)] = 255
    return pixels


def tiled(rows: Sequence[Sequence[np.ndarray]], gap: int) -> np.ndarray:
    """Return images (H, W, 3) uint8 of one size in rows and columns, each followed by a transparent gap: (h, w, 4)."""
    height, width = (side + gap for side in rows[0][0].shape[:2])
    sheet = np.zeros((len(rows) * height, len(rows[0]) * width, 4), np.uint8)
    for top, row in enumerate(rows):
        for left, image in enumerate(row):
            part = sheet[top * height :, left * width :][: image.shape[0], : image.shape[1]]
            part[..., :3], part[..., 3] = image, 255
    return sheet


def tiles(images: np.ndarray | Sequence[np.ndarray], columns: int | None = None, gap: int | None = None) -> np.ndarray:
    """Tile images (N, H, W, 3) uint8 with transparent gaps, in about as many rows as columns: (h, w, 4) uint8."""
    columns = columns or int(np.ceil(np.sqrt(len(images))))
    gap = (0 if len(images) == 1 else max(images[0].shape[:2]) // 32) if gap is None else gap
    sheet = tiled([images[start : start + columns] for start in range(0, len(images), columns)], gap)
    return sheet[: len(sheet) - gap, : sheet.shape[1] - gap]


def png_bytes(pixels: np.ndarray, most: int | None = None) -> bytes:
    """Return a PNG of pixels (H, W, 3 or 4) uint8, reduced until no side has more than ``most`` pixels."""
    image = Image.fromarray(pixels)
    if most is not None:
        image.thumbnail((most, most))
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def image_url(pixels: np.ndarray) -> str:
    """Return pixels (H, W, 3) uint8 as a data URL."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(pixels)).decode()
