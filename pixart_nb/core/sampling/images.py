"""From what the autoencoder decodes to pictures, and what a call of the pipeline returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError

OUTPUT_TYPES = ("pil", "np", "latent")


class PipelineOutput(NamedTuple):
    """What a call returns: the tuple ``(images,)``, whose one field also has a name.

    ``images`` is a list of PIL images, an array (N, H, W, 3) in [0, 1], or latents (N, C, h, w).
    """

    images: list[Image.Image] | np.ndarray


def to_pictures(decoded: ms.Tensor | np.ndarray) -> np.ndarray:
    """Decoded (N, 3, H, W), about -1..1 -> pictures (N, H, W, 3) float32, about 0..1, not yet clipped."""
    values = decoded.astype(ms.float32).asnumpy() if isinstance(decoded, ms.Tensor) else np.asarray(decoded)
    return np.ascontiguousarray((values / 2 + 0.5).transpose(0, 2, 3, 1))


def to_uint8(pictures: np.ndarray) -> np.ndarray:
    """Pictures of floats in [0, 1] as uint8 in 0..255, the nearest value."""
    return (np.clip(pictures, 0, 1) * 255).round().astype(np.uint8)


class ImageProcessor:
    """The last step of calls that decode by themselves, as diffusers names it."""

    @staticmethod
    def postprocess(decoded: ms.Tensor | np.ndarray, output_type: str = "pil"):
        """Decoded (N, 3, H, W) -> a list of PIL images, or an array (N, H, W, 3) in [0, 1]; ``latent`` as it came."""
        check_output_type(output_type)
        if output_type == "latent":
            return decoded
        return finished(to_pictures(decoded), output_type)


def finished(pictures: np.ndarray, output_type: str) -> list[Image.Image] | np.ndarray:
    """Pictures (N, H, W, 3) of floats, clipped to [0, 1], as ``np`` or ``pil``."""
    if output_type == "np":
        return np.clip(pictures, 0, 1)
    return [Image.fromarray(picture) for picture in to_uint8(pictures)]


def check_output_type(output_type: str) -> None:
    """Refuse an ``output_type`` that is not known."""
    if output_type not in OUTPUT_TYPES:
        raise PixArtNBError(f"output_type is {output_type!r}; expected 'pil', 'np' or 'latent'")


def enlarged(latents: np.ndarray, height: int, width: int) -> np.ndarray:
    """Latents (N, C, h, w) -> (N, C, height, width), each cell repeated: what is nearest to the middle of the new one.

    Raises ValueError for another shape of picture, which would be stretched.
    """
    rows, columns = latents.shape[2:]
    if not 0.9 < (height / width) / (rows / columns) < 1.1:
        raise PixArtNBError(
            f"a picture of {8 * rows}x{8 * columns} is to be enlarged to {8 * height}x{8 * width}, which would stretch "
            "it; give a size of the same ratio"
        )
    down, across = (
        (2 * np.arange(new) + 1) * old // (2 * new) for new, old in ((height, rows), (width, columns))
    )
    return latents.take(down, axis=2).take(across, axis=3)


def downscaled(pictures: np.ndarray | Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Pictures (N, H, W, C) by the mean of whole blocks of pixels: (N, height, width, C) float32.

    The evaluator of the embedded model reads pictures of 128 x 128. H and W must be multiples of height and width.
    """
    pictures = np.asarray(pictures)
    n, rows, columns, channels = pictures.shape
    if rows % height or columns % width:
        raise PixArtNBError(f"pictures of {rows}x{columns} are no whole multiple of {height}x{width}")
    blocks = pictures.reshape(n, height, rows // height, width, columns // width, channels)
    return blocks.mean((2, 4), dtype=np.float32)
