"""Picture files of any kind as upright RGB pixels, and pixels as a model trains on them."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image

from pixart_nb.core.data.errors import DataError
from pixart_nb.core.errors import PixArtNBError

#: What Pillow may read a picture as. Others are refused: some of them start programs.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")
Image.init()  # all plugins at once: loading them on demand is not safe when several threads do
#: Endings of such files.
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
#: Pixels of the largest picture that is read: more are taken for a file made to fill the memory.
MOST_PIXELS = 89_478_485
#: Pixels that a scaled picture may always have before its middle is cut out.
_WHOLE = 2**24

#: EXIF orientation -> what turns the stored pixels upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
#: Format -> ending, where the two have different names.
_ENDING = {"JPEG": ".jpg", "MPO": ".jpg"}
Taken = TypeVar("Taken")


class ImageError(DataError):
    """A picture that cannot be read."""


def read_image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(height, width) in pixels of the upright picture, from the file's header alone.

    Raises:
        ImageError: it is missing, no picture, of a kind that is not read, or too large.
    """
    return _read(path, _upright_size)


def load_image(path: str | os.PathLike[str]) -> np.ndarray:
    """The upright picture as (height, width, 3) uint8.

    Palettes, greys, CMYK and 16-bit channels become 8-bit RGB; what is transparent is laid over white; an animation
    gives its first frame. Raises ``ImageError`` as ``read_image_size`` does, and for a file that is cut or damaged.
    """
    return _read(path, lambda image: np.asarray(_upright(image)))


def check_image(content: bytes, name: str) -> tuple[str, int, int]:
    """Ending of the file format, height and width of the picture that ``content`` holds, decoded whole.

    Raises ``ImageError``, which calls it by ``name``, as ``load_image`` does.
    """

    def check(image: Image.Image) -> tuple[str, int, int]:
        height, width = _upright(image).size[::-1]
        return _ENDING.get(image.format, f".{image.format.lower()}"), height, width

    return _read(io.BytesIO(content), check, name)


def fit(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale a picture (H, W, 3) uint8 to cover a size and cut out the middle: (height, width, 3) uint8.

    As the official ``InternalDataMSSigma`` does: bicubic, or Lanczos for sizes from 2048 x 2048 on, both smoothed
    when shrinking.
    """
    rows, columns = pixels.shape[:2]
    if (rows, columns) == (height, width):
        return pixels
    scale = max(height / rows, width / columns)
    covering = max(height, int(rows * scale)), max(width, int(columns * scale))
    top, left = (round((have - want) / 2) for have, want in zip(covering, (height, width), strict=True))
    method = Image.Resampling.LANCZOS if height * width >= 2048**2 else Image.Resampling.BICUBIC
    image = Image.fromarray(pixels)
    if covering[0] * covering[1] <= max(8 * height * width, _WHOLE):
        whole = image.resize(covering[::-1], method)
        return np.asarray(whole.crop((left, top, left + width, top + height)))
    # Of a long strip only the part that is kept is computed, in memory that is there: rounded a little differently,
    # since Pillow may then scale rows before columns.
    step = rows / covering[0], columns / covering[1]
    box = (left * step[1], top * step[0], (left + width) * step[1], (top + height) * step[0])
    inside = tuple(min(value, limit) for value, limit in zip(box, (columns, rows) * 2, strict=True))
    return np.asarray(image.resize((width, height), method, inside))


def to_signed(pixels: np.ndarray) -> np.ndarray:
    """Pictures (N, H, W, 3) uint8 -> (N, 3, H, W) float32 in -1..1."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) / 127.5 - 1.0


def _read(
    source: str | os.PathLike[str] | io.BytesIO, take: Callable[[Image.Image], Taken], name: str = ""
) -> Taken:
    path = name or source
    try:
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ImageError(_too_large(path, f"{image.height}x{image.width} pixels"))
            return take(image)
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: there is no such file") from None
    except Image.DecompressionBombError as error:
        raise ImageError(_too_large(path, str(error))) from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"{path}: is no picture; expected {', '.join(FORMATS)}") from None
    except Exception as error:  # on damaged files Pillow raises nearly anything
        raise ImageError(
            f"{path}: cut or damaged ({type(error).__name__}: {error}); copy it again or leave it out"
        ) from error


def _too_large(path: str | os.PathLike[str], what: str) -> str:
    return f"{path}: {what}; at most {MOST_PIXELS} pixels are read, so shrink it or leave it out"


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none or it cannot be read."""
    if image.format == "TIFF":  # Pillow turns these by itself
        return 1
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(image.info):
        return 1  # asking would decode the whole picture, in search of a mark after the pixels
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1
    return found if found in _TURNS else 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    swapped = _orientation(image) >= 5
    return (image.width, image.height) if swapped else (image.height, image.width)


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    image.load()
    rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise PixArtNBError(f"channels of 32 bits (mode {image.mode}); expected 8 or 16")
    if image.has_transparency_data:
        seen = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen).convert("RGB")
    return image.convert("RGB")
