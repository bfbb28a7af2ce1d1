"""Images: published sizes, from decoded tensors to PIL, and PNG files that carry the parameters that repeat them."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from pixart_nb.config import MOST_SIDE
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import atomic_write, folder_lock

OUTPUT_TYPES = ("pil", "np", "latent")
#: Keyword of the PNG text chunk that holds the parameters, as JSON.
KEYWORD = "parameters"
#: Longest JSON that is written, in bytes: the limit of Pillow and of most readers for one text chunk.
MOST_BYTES = 2**20


class PipelineOutput(NamedTuple):
    """Result of a pipeline: the tuple ``(images,)``, which also has ``.images``.

    ``images`` is a list of PIL images, an array (N, H, W, 3) in [0, 1], or latents (N, C, h, w).
    """

    images: list[Image.Image] | np.ndarray


def to_images(decoded: Any) -> np.ndarray:
    """Convert a tensor (N, 3, H, W), about -1..1, to images (N, H, W, 3) float32, about 0..1, not clipped."""
    values = decoded.float().asnumpy() if hasattr(decoded, "asnumpy") else np.asarray(decoded)
    return np.ascontiguousarray((values / 2 + 0.5).transpose(0, 2, 3, 1))


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Convert images of floats in [0, 1] to the nearest uint8 in 0..255."""
    return (np.clip(images, 0, 1) * 255).round().astype(np.uint8)


def to_output_type(images: np.ndarray, output_type: str) -> list[Image.Image] | np.ndarray:
    """Convert images (N, H, W, 3) of floats, clipped to [0, 1], to ``np`` or ``pil``."""
    if output_type == "np":
        return np.clip(images, 0, 1)
    return [Image.fromarray(image) for image in to_uint8(images)]


def check_output_type(output_type: str) -> None:
    """Raise an error for an ``output_type`` that is not supported."""
    if output_type in ("pt", "ms"):
        raise PixArtNBError(
            f"output_type is {output_type!r}, a tensor; use 'np', an array (N, H, W, 3) in [0, 1], which "
            "torch.from_numpy and mindspore.Tensor take"
        )
    if output_type not in OUTPUT_TYPES:
        raise PixArtNBError(f"output_type is {output_type!r}; expected 'pil', 'np' or 'latent'")


class ImageProcessor:
    """Postprocessing of code that calls the VAE itself, named as in diffusers."""

    @staticmethod
    def postprocess(decoded: Any, output_type: str = "pil"):
        """Convert decoded (N, 3, H, W) to PIL images, or an array (N, H, W, 3); ``latent`` returns it unchanged."""
        check_output_type(output_type)
        if output_type == "latent":
            return decoded
        return to_output_type(to_images(decoded), output_type)


def resize_latents(latents: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize latents (N, C, h, w) to (N, C, height, width) by nearest neighbour.

    Raises an error if the aspect ratio would change by more than a tenth.
    """
    rows, columns = latents.shape[2:]
    check_ratio("the image", (8 * rows, 8 * columns), 8 * height, 8 * width)
    down, across = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in ((height, rows), (width, columns)))
    return latents.take(down, axis=2).take(across, axis=3)


def same_ratio(size: tuple[int, int], height: int, width: int, most: float = 0.1) -> bool:
    """Return True if resizing ``size`` to height x width changes the aspect ratio by less than the share ``most``."""
    return 1 - most < (height / width) / (size[0] / size[1]) < 1 + most


def check_ratio(name: str, size: tuple[int, int], height: int, width: int, most: float = 0.1) -> None:
    """Raise an error unless ``same_ratio``."""
    if not same_ratio(size, height, width, most):
        raise PixArtNBError(
            f"{name} is {size[0]}x{size[1]} (height x width), and {height}x{width} is drawn, which would stretch "
            "it; give a height and width of its ratio"
        )


# ---- sizes


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

    A model of a size that has no published table draws at the requested size.
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
        if side > MOST_SIDE:
            raise PixArtNBError(f"height and width are {height!r} and {width!r}; expected at most {MOST_SIDE} pixels")
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


# ---- PNG files


def file_stem(prompt: str) -> str:
    """Return a prompt as a part of a file name; it may be empty.

    >>> file_stem("A red cup, on snow!")
    'a-red-cup-on-snow'
    """
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]


def write_image(path: str | Path, pixels: np.ndarray, parameters: Mapping[str, Any]) -> None:
    """Write pixels (H, W, 3) uint8 as a PNG, atomically, with its parameters in a text chunk.

    The chunk ``parameters`` is ASCII JSON, which every reader of PNG files shows. Raises an error for pixels of another
    shape or dtype, and for parameters that JSON cannot hold.
    """
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise PixArtNBError(
            f"an image file needs pixels of (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}; "
            "to_uint8 converts floats in [0, 1]"
        )
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(KEYWORD, _as_json(parameters))
    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG", pnginfo=chunks)


def write_new_image(
    path: str | Path, pixels: np.ndarray, parameters: Mapping[str, Any], overwrite: bool = False
) -> Path:
    """Write an image without replacing another one; returns the path that holds it.

    If ``path`` holds another image, names count up: ``cat.png``, ``cat-2.png``. A file with the same pixels and
    parameters is kept as it is. ``overwrite`` replaces the file. Raises ``WriteError``.
    """
    path = Path(path)
    with folder_lock(path.parent, ".image-names.lock", wait=True):
        target, number = path, 1
        while not overwrite and target.exists():
            if _holds(target, pixels, parameters):
                return target
            number += 1
            target = path.with_stem(f"{path.stem}-{number}")
        write_image(target, pixels, parameters)
        return target


def save_elsewhere(name: str, pixels: np.ndarray, parameters: Mapping[str, Any], error: Exception) -> Path:
    """Write an image that could not be saved into the system's temporary folder, with a warning that names it."""
    path = Path(tempfile.mkdtemp(prefix="pixart-nb-")) / name
    write_image(path, pixels, parameters)
    warnings.warn(f"{error} The image was saved as {path} instead", stacklevel=2)
    return path


def _holds(path: Path, pixels: np.ndarray, parameters: Mapping[str, Any]) -> bool:
    try:
        if read_parameters(path) != json.loads(_as_json(parameters)):
            return False
        with Image.open(path, formats=["PNG"]) as image:
            return np.array_equal(np.asarray(image), pixels)
    except (OSError, PixArtNBError, ValueError):
        return False


def read_parameters(path: str | Path) -> dict[str, Any]:
    """Return the parameters of an image that ``write_image`` wrote.

    Raises ``FileNotFoundError``, or an error for a file that is no PNG, is damaged, or carries no parameters.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected an image of this project, a PNG file")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            text = image.text.get(KEYWORD)  # reads to the end, so a file that was cut is noticed
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PixArtNBError(f"{path} cannot be read as a PNG: {error}. Expected a whole PNG file.") from error
    if text is None:
        raise PixArtNBError(
            f"{path} is a PNG without {KEYWORD!r} among its texts; expected an image that this project wrote. "
            "Programs that edit or shrink images often drop such texts."
        )
    try:
        parameters = json.loads(text)
    except (ValueError, RecursionError):
        parameters = None
    if not isinstance(parameters, dict):
        raise PixArtNBError(
            f"{path}: its {KEYWORD!r} are {text[:40]!r}; expected a JSON object, so another program wrote them"
        )
    return parameters


def _as_json(parameters: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(dict(parameters), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PixArtNBError(
            f"parameters of an image must be texts, finite numbers, lists and mappings: {error}"
        ) from error
    if len(text) > MOST_BYTES:
        raise PixArtNBError(f"parameters of an image take {len(text)} bytes as JSON; at most {MOST_BYTES}")
    return text
