"""Images of the playground: tiled, as PNG bytes, as files, and the history as a figure."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.images import write_new_image
from pixart_nb.viz.figures import image_grid
from pixart_nb.viz.playground_run import Entry


def tiles(images: np.ndarray) -> np.ndarray:
    """Tile images (N, H, W, 3) uint8 with transparent gaps, in about as many rows as columns: (h, w, 4) uint8.

    >>> tiles(np.zeros((3, 64, 64, 3), np.uint8)).shape
    (130, 130, 4)
    """
    count, height, width, _ = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    gap = 0 if count == 1 else max(height, width) // 32
    sheet = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        sheet[top : top + height, left : left + width, :3] = image
        sheet[top : top + height, left : left + width, 3] = 255
    return sheet


def png_bytes(pixels: np.ndarray, most: int | None = None) -> bytes:
    """Return a PNG of pixels (H, W, 3 or 4) uint8, reduced until no side has more than ``most`` pixels."""
    image = Image.fromarray(pixels)
    if most is not None:
        image.thumbnail((most, most))
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def save_entry(entry: Entry, folder: str | Path, others: Mapping[str, Any] | None = None) -> list[Path]:
    """Write each image of an entry as a PNG that carries the configuration that repeats it, with ``others``.

    A file that exists is never replaced by another image.
    """
    words = re.sub(r"[^a-z0-9]+", "-", entry.parameters.prompt.lower()).strip("-")[:60] or "image"
    paths = []
    for number, pixels in enumerate(entry.images):
        parameters = dict(others or {}) | entry.parameters.configuration(number)
        path = Path(folder) / f"{words}_seed-{entry.parameters.seed}_{number}.png"
        paths.append(write_new_image(path, pixels, parameters))
    return paths


def history_figure(history: Sequence[Entry], columns: int = 4) -> Figure:
    """Draw the history: the images of each entry with its parameters above.

    >>> from pixart_nb.viz.playground_run import Parameters
    >>> entry = Entry(1, Parameters("a cup", 64, 64), np.zeros((3, 64, 64, 3), np.uint8), 0.5)
    >>> history_figure([entry]).axes[0].images[0].get_array().shape
    (130, 130, 3)
    """
    if not history:
        raise PixArtNBError("the history is empty; sample something first")
    sheets = [_on_white(tiles(entry.images)) for entry in history]
    titles = [f"{entry.number}: {entry.parameters.summary}" for entry in history]
    return image_grid(sheets, titles, columns=columns, cell=2.6)


def _on_white(sheet: np.ndarray) -> np.ndarray:
    return np.where(sheet[..., 3:] > 0, sheet[..., :3], np.uint8(255))
