"""Pipelines that change an image: image-to-image (SDEdit) and inpainting, with the interface of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from pixart_nb.core.backend import ms, to_numpy
from pixart_nb.core.errors import PixArtNBError, check_number
from pixart_nb.core.models.vae import AutoencoderKL
from pixart_nb.core.sampling.images import PipelineOutput, check_output_type, to_output_type, to_uint8
from pixart_nb.core.sampling.pipeline import PixArtSigmaPipeline, repeated

#: A PIL image, an array (H, W, 3) or (N, H, W, 3) of uint8 or of floats in [0, 1], or a list of these.
ImageInput = Image.Image | np.ndarray | Sequence[Image.Image | np.ndarray]


class PixArtSigmaImg2ImgPipeline(PixArtSigmaPipeline):
    """PixArt-Sigma from an image: noise is added to it, and the last steps are taken (SDEdit, Meng et al. 2022)."""

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: ImageInput | None = None,
        strength: float = 0.8,
        *,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        use_resolution_binning: bool = True,
        **call: Any,
    ) -> PipelineOutput:
        """Draw images that begin with ``image``; returns the tuple ``(images,)``, which also has ``.images``.

        ``strength`` is the share of the steps that are taken: little keeps the image, 1 takes all steps. The image is
        resized to height x width, by default its own size, for drawing to the nearest size that the model takes. Other
        arguments are those of ``PixArtSigmaPipeline``.
        """
        check_output_type(output_type)
        pixels = image_array(image)
        size = _size(pixels, height, width)
        images = self._redrawn(prompt, pixels, strength, size, use_resolution_binning, output_type == "latent", call)
        if output_type == "latent":
            return PipelineOutput(images)
        return PipelineOutput(to_output_type(resized(images, *size), output_type))

    def _redrawn(
        self,
        prompt,
        pixels: np.ndarray,
        strength: float,
        size: tuple[int, int],
        binning: bool,
        latents: bool,
        call: dict[str, Any],
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return images (N, H, W, 3) of the drawn size, or latents, from pixels and a mask (1 or N, H, W) or None."""
        if self.vae is None:
            raise PixArtNBError("this pipeline has no VAE, which the image needs")
        check_number("strength", strength)
        steps = call.get("num_inference_steps", self.sampling_defaults["num_inference_steps"])
        if steps is not None:
            check_number("num_inference_steps", steps, 1, whole=True)
        if steps and 0 < strength <= 1 and call.get("timesteps") is None and int(steps * strength) < 1:
            raise PixArtNBError(
                f"strength {strength} of {steps} steps leaves no step; give more steps, or a strength of at least "
                f"{1 / steps:.3g}"
            )
        unit = 8 * self.transformer.config.patch_size if self.transformer else 1
        whole = tuple(max(unit, round(side / unit) * unit) for side in size)
        height, width = (self.binned_size if binning else self.check_size)(*whole)
        call = call | starting_point(self.vae, resized(pixels, height, width), strength, mask)
        size = {"height": height, "width": width, "use_resolution_binning": False}
        return super().__call__(prompt, output_type="latent" if latents else "np", **size, **call)[0]


class PixArtSigmaInpaintPipeline(PixArtSigmaImg2ImgPipeline):
    """PixArt-Sigma inside a mask. The pixels outside of it are kept exactly."""

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: ImageInput | None = None,
        mask_image: Any = None,
        strength: float = 1.0,
        *,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        output_type: str = "pil",
        use_resolution_binning: bool = True,
        **call: Any,
    ) -> PipelineOutput:
        """Draw the white part of ``mask_image`` anew; returns the tuple ``(images,)``, which also has ``.images``.

        The result has the size of the image. ``mask_image``: PIL, or an array (H, W) or (N, H, W) of bool, uint8 or
        floats in [0, 1], of the image's size. The model draws at height x width. With ``padding_mask_crop`` it draws
        the part of the image around the mask alone, with so many pixels around it.
        """
        check_output_type(output_type)
        pixels = image_array(image)
        mask = mask_array(mask_image, pixels.shape[1:3])
        size = _size(pixels, height, width)
        box = (0, 0, *pixels.shape[1:3])
        if padding_mask_crop is not None:
            box = crop_box(mask.any(0), padding_mask_crop, size[0] / size[1])
        top, left, bottom, right = box
        part, region = pixels[:, top:bottom, left:right], mask[:, top:bottom, left:right]
        latents = output_type == "latent"
        images = self._redrawn(prompt, part, strength, size, use_resolution_binning, latents, call, region)
        if latents:
            return PipelineOutput(images)
        result = repeated(pixels, len(images)).copy()
        inside = result[:, top:bottom, left:right]
        inside[...] = painted(inside, resized(images, *inside.shape[1:3]), region)
        return PipelineOutput(to_output_type(result, output_type))


# ---- images and masks


def _size(pixels: np.ndarray, height: int | None, width: int | None) -> tuple[int, int]:
    """Return the size that was asked for, by default that of the images (N, H, W, 3)."""
    for name, side in (("height", height), ("width", width)):
        if side is not None:
            check_number(name, side, 1, whole=True)
    return tuple(
        own if side is None else int(side) for side, own in zip((height, width), pixels.shape[1:], strict=False)
    )


def starting_point(
    vae: AutoencoderKL, pixels: np.ndarray, strength: float, mask: np.ndarray | None = None
) -> dict[str, Any]:
    """Return the arguments of ``pipe.sample`` that begin with an image.

    ``pixels`` (N, H, W, 3) in [0, 1], of the size that is drawn; ``mask`` (N, h, w) bool of any size, or None.
    """
    arguments = {"image_latents": encode_image(vae, pixels), "strength": strength}
    return arguments if mask is None else arguments | {"mask": latent_mask(mask, *pixels.shape[1:3])}


def painted(pixels: np.ndarray, images: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return images (N, H, W, 3) inside the mask (1 or N, H, W), and exactly the pixels outside of it."""
    return np.where(repeated(mask, len(images))[..., None], images, pixels)


def encode_image(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Encode images (N, H, W, 3) in [0, 1] to the latents (N, C, H / 8, W / 8) that the transformer works on."""
    x = ms.Tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2) * 2 - 1, np.float32))
    z = vae.encode(x.astype(next(iter(vae.get_parameters())).dtype))[0].mode()
    return vae.config.to_model(to_numpy(z))


def image_array(image: ImageInput | None) -> np.ndarray:
    """Return images as (N, H, W, 3) float32 in [0, 1]. Raises an error for other inputs."""
    expected = "a PIL image, an array (H, W, 3) or (N, H, W, 3) of uint8 or of floats in [0, 1], or a list of these"
    if image is None or (isinstance(image, list | tuple) and not image):
        raise PixArtNBError(f"image is {image!r}; expected {expected}")
    parts = []
    for part in image if isinstance(image, list | tuple) else [image]:
        array = np.asarray(part.convert("RGB") if isinstance(part, Image.Image) else part)
        array = array[None] if array.ndim == 3 else array
        if array.ndim != 4 or array.shape[3] != 3 or not array.size or array.dtype.kind not in "uf":
            raise PixArtNBError(f"image is of {type(part).__name__} {array.shape} {array.dtype}; expected {expected}")
        array = array.astype(np.float32) / 255 if array.dtype.kind == "u" else array.astype(np.float32)
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise PixArtNBError(f"image goes from {array.min():g} to {array.max():g}; expected {expected}")
        parts.append(array)
    sizes = {part.shape[1:3] for part in parts}
    if len(sizes) > 1:
        raise PixArtNBError(f"the images have sizes {sorted(sizes)}; expected one size")
    return np.concatenate(parts)


def mask_array(mask: Any, size: tuple[int, int]) -> np.ndarray:
    """Return masks as (N, H, W) bool, True where to paint. Raises an error for another size, and for an empty mask."""
    if mask is None:
        raise PixArtNBError("mask_image is None; expected an image of the image's size, white where to paint")
    parts = mask if isinstance(mask, list | tuple) else [mask]
    arrays = [np.asarray(part.convert("L") if isinstance(part, Image.Image) else part) for part in parts]
    arrays = [part[..., 0] if part.ndim in (3, 4) and part.shape[-1] == 1 else part for part in arrays]
    coloured = ((*size, 3), (*size, 4))
    arrays = [part[..., :3].max(-1) if part.shape in coloured else part for part in arrays]
    if not arrays or not all(part.ndim in (2, 3) and part.dtype.kind in "buif" for part in arrays):
        shapes = ", ".join(f"{part.shape} {part.dtype}" for part in arrays) or "an empty list"
        raise PixArtNBError(f"mask_image is {shapes}; expected a PIL image, or numbers (H, W) or (N, H, W)")
    array = np.concatenate([part[None] if part.ndim == 2 else part for part in arrays])
    if array.shape[1:] != size:
        raise PixArtNBError(f"mask_image is {array.shape[1:]} pixels, the image {size}; expected the same size")
    white = array >= {"u": 128, "i": 128}.get(array.dtype.kind, 0.5)
    if not white.any((1, 2)).all():
        integers = f". Integers are read as 0 to 255; its largest is {array.max()}" if array.dtype.kind in "ui" else ""
        raise PixArtNBError(f"mask_image has nothing to paint: it is black; white is painted{integers}")
    return white


def latent_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the cells (N, 1, height / 8, width / 8) float32 of which any pixel is to be painted."""
    masks = [Image.fromarray(part).convert("L").resize((width, height), Image.Resampling.BILINEAR) for part in mask]
    pixels = np.stack([np.asarray(part) for part in masks]) > 0
    return pixels.reshape(len(mask), 1, height // 8, 8, width // 8, 8).any((3, 5)).astype(np.float32)


def resized(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize images (N, H, W, 3) of floats in [0, 1] by Lanczos's filter; of the same size they are not changed."""
    if images.shape[1:3] == (height, width):
        return images
    sized = [Image.fromarray(part).resize((width, height), Image.Resampling.LANCZOS) for part in to_uint8(images)]
    return np.stack([np.asarray(part) for part in sized]).astype(np.float32) / 255


def crop_box(mask: np.ndarray, padding: int, ratio: float) -> tuple[int, int, int, int]:
    """Return top, left, bottom, right of the part around a mask (H, W), of this ratio of height to width if it fits."""
    check_number("padding_mask_crop", padding, 0, whole=True)
    spans = []
    for axis in (1, 0):
        lines = np.flatnonzero(mask.any(axis))
        spans.append((max(0, lines[0] - padding), min(mask.shape[1 - axis], lines[-1] + 1 + padding)))
    (top, bottom), (left, right) = spans
    height, width = bottom - top, right - left
    sides = max(height, round(width * ratio)), max(width, round(height / ratio))
    box = []
    for (first, last), side, whole in zip(spans, sides, mask.shape, strict=True):
        side = min(side, whole)
        first = min(max(0, (first + last - side) // 2), whole - side)
        box.append((int(first), int(first + side)))
    return box[0][0], box[1][0], box[0][1], box[1][1]
