"""Validation: images of fixed prompts, the loss on held-out images, and the reconstruction error of the VAE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from pixart_nb.config import TrainConfig
from pixart_nb.core.backend import as_tensor, ms, to_numpy
from pixart_nb.core.data.control import ControlImages
from pixart_nb.core.data.features import Embed
from pixart_nb.core.data.files import DataError
from pixart_nb.core.data.images import fit, load_image, to_signed
from pixart_nb.core.data.labels import Label
from pixart_nb.core.data.reader import padded
from pixart_nb.core.models.controlnet import PixArtControlNet
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.models.vae import AutoencoderKL
from pixart_nb.core.sampling.controlnet import PixArtSigmaControlNetPipeline
from pixart_nb.core.sampling.images import file_stem, to_uint8, write_image
from pixart_nb.core.sampling.pipeline import PixArtSigmaPipeline
from pixart_nb.core.sampling.samplers import image_generators
from pixart_nb.core.sampling.schedulers import Scheduler

#: Held-out images that are measured at most; each measurement is a forward pass of all of them.
MAX_HELD_OUT = 128


class Validation:
    """Images of the validation prompts of a configuration, ``side`` pixels wide, from the same noise every time.

    ``control`` makes the conditions of a ControlNet from ``validation_control_images``.
    """

    def __init__(self, config: TrainConfig, embed: Embed, side: int, control: ControlImages | None = None):
        self.config, self.side, self.prompts = config, side, tuple(config.validation_prompts)
        rows = []
        # one at a time: the longest of them must not change the others
        for text in (*self.prompts, *(config.validation_negative_prompts or [""] * len(self.prompts))):
            embeds, mask = embed([text])
            rows.append(embeds[0][mask[0]])
        self.embeds, self.mask = padded(rows)
        images = [load_image(path) for path in config.validation_control_images] if control else []
        self.conditions = [control.condition(fit(image, side, side)) for image in images]

    def sample(
        self, net: PixArt | PixArtControlNet, vae: AutoencoderKL, scheduler: Scheduler | None = None
    ) -> np.ndarray:
        """Return one image per prompt, (N, side, side, 3) uint8, with the present weights of ``net``.

        ``scheduler``: in place of ``sampling_method``.
        """
        config, count = self.config, len(self.prompts)
        scheduler = scheduler or config.sampling_method
        if self.conditions:
            pipe = PixArtSigmaControlNetPipeline(None, None, vae, net.base_model, scheduler, controlnet=net)
        else:
            pipe = PixArtSigmaPipeline(None, None, vae, net, scheduler)
        pipe.set_progress_bar_config(disable=True)
        total = count * config.sampling_steps
        with tqdm(total=total, desc="validation images", unit="step", leave=False) as bar:
            images = [
                pipe(
                    prompt_embeds=ms.Tensor(self.embeds[i : i + 1]),
                    prompt_attention_mask=self.mask[i : i + 1],
                    negative_prompt_embeds=ms.Tensor(self.embeds[count + i : count + i + 1]),
                    negative_prompt_attention_mask=self.mask[count + i : count + i + 1],
                    num_inference_steps=config.sampling_steps,
                    guidance_scale=config.guidance_scale,
                    height=self.side,
                    width=self.side,
                    generator=image_generators(config.seed, [i]),
                    use_resolution_binning=False,
                    output_type="np",
                    callback=lambda *_: bar.update(),
                    **({"image": self.conditions[i]} if self.conditions else {}),
                )[0]
                for i in range(count)  # one at a time, to save memory
            ]
        return to_uint8(np.concatenate(images))

    def paths(self, folder: Path, step: int) -> list[Path]:
        """Return the files of the images of a step, such as ``step-00000100/000_a-red-cup.png``."""
        names = [f"{n:03d}_{file_stem(prompt)}.png" for n, prompt in enumerate(self.prompts)]
        return [folder / f"step-{step:08d}" / name for name in names]

    def write(self, folder: Path, step: int, images: np.ndarray) -> list[Path]:
        """Write the images of a step and return their paths."""
        paths = self.paths(folder, step)
        common = {"step": step} | {key: getattr(self.config, key) for key in ("sampling_steps", "guidance_scale")}
        for path, prompt, pixels in zip(paths, self.prompts, images, strict=True):
            write_image(path, pixels, {"prompt": prompt, **common})
        return paths


def mean_loss(loss: Callable, batches: Sequence[Sequence[np.ndarray | ms.Tensor]]) -> float:
    """Return the mean of ``loss(*tensors)[0]`` over batches."""
    tensors = (map(as_tensor, batch) for batch in batches)
    return float(np.mean([loss(*batch)[0].asnumpy() for batch in tensors]))


def require_disjoint(training: Sequence[Label], held_out: Sequence[Label]) -> None:
    """Raise ``DataError`` if a held-out image is also trained on."""
    trained = {label.file for label in training}
    both = [label.path for label in held_out if label.file in trained]
    if both:
        raise DataError(
            f"validation_json_path: {len(both)} of its {len(held_out)} images are trained on too, such as {both[0]}; "
            "expected images that json_path does not name"
        )


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of two uint8 images, or batches, of one shape."""
    error = np.mean(np.square(image.astype(np.float64) - other.astype(np.float64)))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def reconstruct(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Encode images (N, H, W, 3) uint8 and decode the mode of their latents: (N, H, W, 3) uint8.

    A model cannot draw details better than its VAE reconstructs them.
    """
    decoded = vae.decode(vae.encode(ms.Tensor(to_signed(images)))[0].mode())[0]
    return to_uint8(to_numpy(decoded).transpose(0, 2, 3, 1) / 2 + 0.5)
