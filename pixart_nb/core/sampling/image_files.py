"""PNG files that carry the parameters they were drawn with, so that a picture can be drawn again from its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import atomic_write

#: Keyword of the text chunk that holds the parameters, as JSON.
KEYWORD = "parameters"
#: Longest JSON that is written, in bytes: the limit of Pillow and of most readers for one text chunk.
MOST_BYTES = 2**20


def write_picture(path: str | Path, pixels: np.ndarray, parameters: Mapping[str, Any]) -> None:
    """Write a PNG whole, with its parameters in a text chunk ``parameters``.

    The chunk is ASCII (other letters are escaped as JSON escapes them), which every reader of PNG files shows.

    Args:
        path: the file; its folder is made if needed.
        pixels: (H, W, 3) uint8.
        parameters: values that JSON knows, by name.

    Raises:
        ValueError: pixels of another shape or dtype, or parameters that JSON cannot hold.
    """
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise PixArtNBError(
            f"a picture file needs pixels of (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}; "
            "to_uint8 turns floats in [0, 1] into it"
        )
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(KEYWORD, _as_json(parameters))
    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=chunks)


def read_parameters(path: str | Path) -> dict[str, Any]:
    """The parameters of a picture that ``write_picture`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no PNG, is damaged, or carries no parameters.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a picture of this project, a PNG file")
    text = _text_of(path)
    if text is None:
        raise PixArtNBError(
            f"{path} is a PNG without {KEYWORD!r} among its texts; expected a picture that this project wrote. "
            "Programs that edit or shrink pictures often drop such texts."
        )
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise PixArtNBError(
            f"{path}: its {KEYWORD!r} are {text[:40]!r}; expected a JSON object, so another program wrote them"
        )
    return found


def _as_json(parameters: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(dict(parameters), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PixArtNBError(
            f"parameters of a picture must be texts, finite numbers, lists and mappings: {error}"
        ) from error
    if len(text) > MOST_BYTES:
        raise PixArtNBError(f"parameters of a picture take {len(text)} bytes as JSON; at most {MOST_BYTES}")
    return text


def _text_of(path: Path) -> str | None:
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return image.text.get(KEYWORD)  # reads to the end, so a file that was cut is noticed
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PixArtNBError(f"{path} cannot be read as a PNG: {error}. Expected a whole PNG file.") from error
