"""Images, mask, adapters and ControlNet of a run of the playground: decoding, arguments of the pipeline, files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixart_nb.config.keys import CONTROL_KEYS
from pixart_nb.core.data.images import ImageError, fit, load_image
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.images import check_ratio, same_ratio, to_uint8, write_new_image
from pixart_nb.viz.pixels import png_bytes
from pixart_nb.viz.playground_parameters import CONTROL, Parameters


def source(parameters: Parameters) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the image (1, H, W, 3) float32 in [0, 1] and the mask (1, H, W) bool, or None, of the drawn size.

    Raises an error for bytes that are no image.
    """
    pixels = _sized("the image", parameters.image, parameters)
    if not parameters.mask:
        return pixels, None
    mask = np.asarray(opened(parameters.mask, "L").resize((parameters.width, parameters.height)))[None] >= 128
    return pixels, mask if mask.any() else None


def opened(content: bytes, mode: str = "RGB") -> Image.Image:
    """Return the image in the bytes of a file. Raises an error for bytes that are no image."""
    try:
        return Image.fromarray(load_image(content, "black" if mode == "L" else "white")).convert(mode)
    except ImageError as error:
        raise PixArtNBError(f"the image cannot be read ({error}); expected a PNG, JPEG or WebP file") from error


def fitted(content: bytes, parameters: Parameters) -> bytes:
    """Return an image file as it is, or, if its ratio is not that of the drawn size, its middle of that size as PNG."""
    pixels, size = np.asarray(opened(content)), (parameters.height, parameters.width)
    return content if same_ratio(pixels.shape[:2], *size) else png_bytes(fit(pixels, *size))


def arguments(pipe: Any, parameters: Parameters) -> dict[str, Any]:
    """Return the arguments of ``pipe.sample`` that begin with the image."""
    if not parameters.image:
        return {}
    from pixart_nb.core.sampling.editing import starting_point

    pixels, mask = source(parameters)
    return starting_point(pipe.vae, pixels, parameters.strength, mask)


def adapters_of(pipe: Any) -> dict[str, float]:
    """Return the weights of the LoRAs that a pipeline has loaded, 0 of those that are not active; none if fused."""
    adapters = getattr(getattr(pipe, "transformer", None), "adapters", None)
    if adapters is None or adapters.originals:
        return {}
    return {name: adapters.weights[name] if name in adapters.active else 0.0 for name in adapters.adapters}


def load_beside(pipe: Any, path: str | Path, name: str) -> None:
    """Load a LoRA into a pipeline, whose active adapters stay as they are."""
    before = getattr(pipe.transformer, "adapters", None)
    state = (before.weights, before.enabled) if before else ({}, True)
    pipe.load_lora_weights(path, adapter_name=name)
    adapters = pipe.transformer.adapters
    adapters.weights, enabled = state
    adapters.enable(enabled)


def is_from(pipe: Any, name: str, path: str | Path) -> bool:
    """Return whether a pipeline has an adapter of this name, read from this file or folder of a LoRA."""
    from pixart_nb.core.lora.files import lora_path

    if name not in adapters_of(pipe):
        return False
    source = Path(pipe.transformer.adapters.adapters[name].source)
    return lora_path(path) in (source, source.parent)


def with_adapters(pipe: Any, parameters: Parameters) -> AbstractContextManager[None]:
    """Return a block in which the adapters have the weights of a run; the pipeline keeps its own."""
    loaded, weights = adapters_of(pipe), dict(parameters.adapters)
    if unknown := weights.keys() - loaded.keys():
        raise PixArtNBError(
            f"the pipeline has no adapter {', '.join(sorted(unknown))}; it has {list(loaded) or 'none'}"
        )
    return pipe.transformer.adapters.chosen(weights) if loaded else nullcontext()


def each_with_adapters(pipe: Any, parameters: Parameters, records: Iterator[Any]) -> Iterator[Any]:
    """Yield the records of a generator; each is computed ``with_adapters``: other cells see those of the pipeline."""
    try:
        while True:
            with with_adapters(pipe, parameters):
                record = next(records, None)
            if record is None:
                return
            yield record
    finally:
        if hasattr(records, "close"):
            records.close()


# ---- control


def edges_of(pixels: np.ndarray, parameters: Parameters) -> np.ndarray:
    """Return the edges of an image (H, W, 3) uint8, cut to the drawn size, as a condition: (height, width, 3) uint8.

    Their options are those that the ControlNet was trained with, if there is one.
    """
    from pixart_nb.core.checkpoints.controlnet import edge_options
    from pixart_nb.core.data.control import EdgeOptions, edges

    path = parameters.controlnet.strip()
    options = edge_options(path) if path else EdgeOptions()
    return edges(fit(pixels, parameters.height, parameters.width), options)


def condition(parameters: Parameters) -> np.ndarray:
    """Return the condition image of the drawn size, (1, H, W, 3) float32 in [0, 1]."""
    return _sized("the condition image", parameters.control_image, parameters)


def _sized(name: str, content: bytes, parameters: Parameters) -> np.ndarray:
    from pixart_nb.core.sampling.editing import image_array, resized  # imports MindSpore, as the pipeline has

    pixels, size = image_array(opened(content)), (parameters.height, parameters.width)
    check_ratio(name, pixels.shape[1:3], *size)
    return resized(pixels, *size)


@dataclass
class ControlNets:
    """ControlNet of the last run, which the next ones use again while its file and the transformer are the same."""

    key: tuple = ()
    net: Any = None

    def pipeline(self, pipe: Any, parameters: Parameters) -> Any:
        """Return a pipeline with the ControlNet and the condition of a run, or ``pipe`` for a run without."""
        if not parameters.control_image:
            return pipe
        from pixart_nb.core.sampling.controlnet import PixArtSigmaControlNetPipeline

        image = condition(parameters)
        net = self._loaded(Path(parameters.controlnet.strip()).expanduser(), pipe)
        if parameters.adapters and net.base_model is not pipe.transformer:
            raise PixArtNBError(
                f"{parameters.controlnet} holds a base model of its own, which has no adapters; set their weights to 0"
            )
        controlled = PixArtSigmaControlNetPipeline.from_pipe(pipe, controlnet=net)
        controlled.max_sequence_length = pipe.max_sequence_length
        controlled.set_control(image, *(getattr(parameters, name) for name in CONTROL_KEYS))
        return controlled

    def _loaded(self, path: Path, pipe: Any) -> Any:
        from pixart_nb.core.checkpoints.controlnet import holds_base_model, load_controlnet

        key = path, path.stat().st_mtime_ns if path.exists() else 0, pipe.transformer
        if self.key != key:
            self.key, self.net = (), None  # one at a time in memory
            base = None if holds_base_model(path) else pipe.transformer
            self.key, self.net = key, load_controlnet(path, None, pipe.dtype, base)
        return self.net


# ---- results


def kept_outside(images: np.ndarray, parameters: Parameters) -> np.ndarray:
    """Return images (N, H, W, 3) uint8 with exactly the pixels of the given image outside of the mask, if any."""
    if not parameters.mask:
        return images
    from pixart_nb.core.sampling.editing import painted

    pixels, mask = source(parameters)
    return images if mask is None else painted(to_uint8(pixels), images, mask)


def write_source(path: Path, parameters: Parameters) -> dict[str, Any]:
    """Write the images and the mask beside the result at ``path``; return the keys of a configuration for them."""
    files, keys = {}, {}
    if parameters.image:
        pixels, mask = source(parameters)
        files, keys = {"image": to_uint8(pixels[0])}, {"strength": parameters.strength}
        if mask is not None:
            files["mask"] = np.repeat(to_uint8(mask[0, ..., None]), 3, 2)
    if parameters.control_image:
        files["control_image"] = to_uint8(condition(parameters)[0])
        keys |= {name: getattr(parameters, name) for name in CONTROL}
    written = {n: str(write_new_image(path.with_stem(f"{path.stem}_{n}"), f, {})) for n, f in files.items()}
    return written | keys
