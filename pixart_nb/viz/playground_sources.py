"""Image, mask and adapters of a run of the playground: decoding, arguments of the pipeline, saved files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.images import write_new_image
from pixart_nb.viz.pixels import as_bytes
from pixart_nb.viz.playground_parameters import Parameters


def source(parameters: Parameters) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the image (1, H, W, 3) float32 in [0, 1] and the mask (1, H, W) bool, or None, of the drawn size.

    Raises an error for bytes that are no image.
    """
    from pixart_nb.core.sampling.editing import image_array, resized  # imports MindSpore, as the pipeline has

    pixels = resized(image_array(_opened(parameters.image, "RGB")), parameters.height, parameters.width)
    if not parameters.mask:
        return pixels, None
    mask = np.asarray(_opened(parameters.mask, "L").resize((parameters.width, parameters.height)))[None] >= 128
    return pixels, mask if mask.any() else None


def _opened(content: bytes, mode: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.convert(mode)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise PixArtNBError(f"the image cannot be read ({error}); expected a PNG, JPEG or WebP file") from error


def arguments(pipe: Any, parameters: Parameters) -> dict[str, Any]:
    """Return the arguments of ``pipe.sample`` that begin with the image; activate the adapters with their weights."""
    loaded, weights = adapters_of(pipe), dict(parameters.adapters)
    if unknown := weights.keys() - set(loaded):
        raise PixArtNBError(f"the pipeline has no adapter {', '.join(sorted(unknown))}; it has {loaded or 'none'}")
    if loaded:
        pipe.set_adapters(loaded, [weights.get(name, 0.0) for name in loaded])
    if not parameters.image:
        return {}
    from pixart_nb.core.sampling.editing import starting_point

    pixels, mask = source(parameters)
    return starting_point(pipe.vae, pixels, parameters.strength, mask)


def adapters_of(pipe: Any) -> list[str]:
    """Return the names of the LoRAs that a pipeline has loaded."""
    return pipe.get_list_adapters().get("transformer", []) if hasattr(pipe, "get_list_adapters") else []


def kept_outside(images: np.ndarray, parameters: Parameters) -> np.ndarray:
    """Return images (N, H, W, 3) uint8 with exactly the pixels of the given image outside of the mask, if any."""
    if not parameters.mask:
        return images
    from pixart_nb.core.sampling.editing import painted

    pixels, mask = source(parameters)
    return images if mask is None else painted(as_bytes(pixels), images, mask)


def write_source(path: Path, parameters: Parameters) -> dict[str, Any]:
    """Write the image and the mask beside the result at ``path``; return the keys of a configuration for them."""
    if not parameters.image:
        return {}
    pixels, mask = source(parameters)
    files = {"image": as_bytes(pixels[0])}
    if mask is not None:
        files["mask"] = np.repeat(as_bytes(mask[0, ..., None]), 3, 2)
    written = {n: str(write_new_image(path.with_stem(f"{path.stem}_{n}"), f, {})) for n, f in files.items()}
    return written | {"strength": parameters.strength}
