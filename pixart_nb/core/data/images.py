"""Image files of any format as upright RGB pixels, and pixels as a model trains on them."""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from PIL import Image

from pixart_nb.core.data.files import DataError
from pixart_nb.core.io import is_pointer

#: Formats that Pillow may read. Others are refused: some of them start programs.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM")
Image.init()  # all plugins at once: loading them on demand is not safe when several threads do
#: File name endings of these formats.
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
#: Pixels of the largest image that is read; a larger one is taken for a decompression bomb.
MAX_PIXELS = 89_478_485
#: Bytes of the largest image file that is read.
MAX_BYTES = 256 * 2**20
#: Pixels that a scaled image may have before its middle is cut out.
_MAX_SCALED = 2**24

#: EXIF orientation -> operation that makes the stored pixels upright.
_TRANSPOSE = {
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
Result = TypeVar("Result")


class ImageError(DataError):
    """An image that cannot be read."""


def read_image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return (height, width) in pixels of the upright image, from the file's header alone.

    Raises ``ImageError`` if it is missing, no image, of another format, or too large.
    """
    return _read(path, _upright_size)


def load_image(source: str | os.PathLike[str] | bytes, background: str = "white") -> np.ndarray:
    """Return the upright image of a file, or of the bytes of one, as (height, width, 3) uint8.

    Palettes, greys, CMYK and 16-bit channels become 8-bit RGB; transparency is composed over ``background``; an
    animation gives its first frame. Raises ``ImageError`` as ``read_image_size`` does, and for a file that is cut.
    """
    name, source = ("the image", io.BytesIO(source)) if isinstance(source, bytes) else ("", source)
    return _read(source, lambda image: np.asarray(_upright(image, background)), name)


def check_image(content: bytes, name: str) -> tuple[str, int, int]:
    """Decode an image file and return the ending of its format, its height and its width.

    Raises ``ImageError``, which calls it by ``name``, as ``load_image`` does.
    """

    def check(image: Image.Image) -> tuple[str, int, int]:
        height, width = _upright(image).size[::-1]
        return _ENDING.get(image.format, f".{image.format.lower()}"), height, width

    return _read(io.BytesIO(content), check, name)


def fit(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale an image (H, W, 3) uint8 to cover a size and cut out the middle: (height, width, 3) uint8.

    As the official ``InternalDataMSSigma``: bicubic, or Lanczos for sizes from 2048 x 2048 on, both antialiased.
    """
    rows, columns = pixels.shape[:2]
    if (rows, columns) == (height, width):
        return pixels
    scale = max(height / rows, width / columns)
    covering = max(height, int(rows * scale)), max(width, int(columns * scale))
    top, left = (round((have - want) / 2) for have, want in zip(covering, (height, width), strict=True))
    method = Image.Resampling.LANCZOS if height * width >= 2048**2 else Image.Resampling.BICUBIC
    image = Image.fromarray(pixels)
    if covering[0] * covering[1] <= max(8 * height * width, _MAX_SCALED):
        whole = image.resize(covering[::-1], method)
        return np.asarray(whole.crop((left, top, left + width, top + height)))
    # Of a long strip only the part that is kept is computed, to save memory. It is rounded a little differently, since
    # Pillow may then scale rows before columns.
    step = rows / covering[0], columns / covering[1]
    box = (left * step[1], top * step[0], (left + width) * step[1], (top + height) * step[0])
    inside = tuple(min(value, limit) for value, limit in zip(box, (columns, rows) * 2, strict=True))
    return np.asarray(image.resize((width, height), method, inside))


def to_signed(pixels: np.ndarray) -> np.ndarray:
    """Images (N, H, W, 3) uint8 -> (N, 3, H, W) float32 in -1..1."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) / 127.5 - 1.0


def _read(
    source: str | os.PathLike[str] | io.BytesIO, function: Callable[[Image.Image], Result], name: str = ""
) -> Result:
    """Return ``function`` of the opened image; any failure becomes an ``ImageError``."""
    name = name or (str(source) if str(source).isprintable() else ascii(str(source)))
    try:
        if not isinstance(source, io.BytesIO):
            _check_file(os.stat(source), name)
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(_too_large(name, f"{image.height}x{image.width} pixels"))
            return function(image)
    except ImageError as error:
        raise error if str(error).startswith(name) else ImageError(f"{name}: {error}") from None
    except FileNotFoundError:
        link = " (a link whose target is missing)" if os.path.islink(source) else ""
        raise ImageError(f"{name}: does not exist{link}") from None
    except PermissionError as error:
        raise ImageError(f"{name}: cannot be read ({error.strerror})") from None
    except Image.DecompressionBombError as error:
        raise ImageError(_too_large(name, str(error))) from None
    except Image.UnidentifiedImageError:
        if not isinstance(source, io.BytesIO) and is_pointer(source):
            raise ImageError(f"{name}: is a Git LFS pointer; run `git lfs pull`") from None
        raise ImageError(f"{name}: is no image; expected {', '.join(FORMATS)}") from None
    except Exception as error:  # on damaged files Pillow raises nearly anything
        raise ImageError(
            f"{name}: cut off or damaged ({type(error).__name__}: {error}); copy it again or leave it out"
        ) from error


def _check_file(status: os.stat_result, name: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{name}: is a folder, pipe or device; expected an image file")
    if not status.st_size:
        raise ImageError(f"{name}: is no image but empty, 0 bytes; copy it again or leave it out")
    if status.st_size > MAX_BYTES:
        raise ImageError(f"{name}: has {status.st_size} bytes; expected at most {MAX_BYTES}")


def _too_large(name: str, size: str) -> str:
    return f"{name}: {size}; expected at most {MAX_PIXELS} pixels: shrink it or leave it out"


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 if there is none or it cannot be read."""
    if image.format == "TIFF":  # Pillow turns these by itself
        return 1
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(image.info):
        return 1  # asking would decode the whole image, in search of a mark after the pixels
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1
    return orientation if orientation in _TRANSPOSE else 1


def _upright_size(image: Image.Image) -> tuple[int, int]:
    swapped = _orientation(image) >= 5
    return (image.width, image.height) if swapped else (image.height, image.width)


def _upright(image: Image.Image, background: str = "white") -> Image.Image:
    transpose = _TRANSPOSE.get(_orientation(image))
    image.load()
    rgb = _to_rgb(image, background)
    return rgb if transpose is None else rgb.transpose(transpose)


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # as older Pillow reads it
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ImageError(f"has channels of 32 bits (mode {image.mode}); expected 8 or 16: convert it or leave it out")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")
    return image.convert("RGB")
