"""Images: from decoded tensors to PIL, and PNG files that carry the parameters that repeat them."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

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
    if not 0.9 < (height / width) / (rows / columns) < 1.1:
        raise PixArtNBError(
            f"an image of {8 * rows}x{8 * columns} cannot be upscaled to {8 * height}x{8 * width}, which would stretch "
            "it; give a size of the same ratio"
        )
    down, across = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in ((height, rows), (width, columns)))
    return latents.take(down, axis=2).take(across, axis=3)


# ---- PNG files


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
