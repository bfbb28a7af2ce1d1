"""``PixArtSigmaPipeline``: prompts in, pictures out, with the interface of diffusers and mindone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pixart_nb.core.backend import ms, supported_dtype
from pixart_nb.core.checkpoints.components import load_component, pipeline_folder
from pixart_nb.core.models.t5 import T5Encoder
from pixart_nb.core.models.transformer import PixArt, trim_caption
from pixart_nb.core.models.vae import AutoencoderKL
from pixart_nb.core.sampling.conditioning import (
    Conditioning,
    as_list,
    both_rows,
    check_embeddings,
    given_conditioning,
    per_prompt,
)
from pixart_nb.core.sampling.schedule import NoiseSchedule
from pixart_nb.core.sampling.solvers import Step, dpm_solver_2m, linspace_timesteps
from pixart_nb.core.sampling.text import TextTokenizer, prepare_prompt

_LOAD = object()


@dataclass(frozen=True)
class PipelineOutput:
    """``images``: a list of PIL images, or an array (N, H, W, 3) in [0, 1], or latents."""

    images: list[Image.Image] | np.ndarray


class PixArtSigmaPipeline:
    """PixArt-Sigma. ``from_pretrained(folder)``, then ``pipe("a red mushroom on grass")[0][0]`` is a PIL image."""

    max_sequence_length = 300

    def __init__(
        self,
        tokenizer: TextTokenizer | None,
        text_encoder: T5Encoder | None,
        vae: AutoencoderKL | None,
        transformer: PixArt | None,
        scheduler: NoiseSchedule,
    ):
        self.tokenizer, self.text_encoder, self.vae = tokenizer, text_encoder, vae
        self.transformer, self.scheduler = transformer, scheduler

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        mindspore_dtype: ms.Type = ms.float32,
        *,
        transformer: PixArt | None = _LOAD,
        text_encoder: T5Encoder | None = _LOAD,
        tokenizer: TextTokenizer | None = _LOAD,
        vae: AutoencoderKL | None = _LOAD,
        scheduler: NoiseSchedule | None = _LOAD,
    ) -> PixArtSigmaPipeline:
        """Load a pipeline in the layout in which diffusers publishes it.

        A component that is given is used as it is; None leaves it out (a pipeline without a text encoder takes
        embeddings, one without a transformer only encodes, one without a VAE gives latents). Weights are cast to
        ``mindspore_dtype`` (bfloat16 becomes float32 on the CPU). Raises ``CheckpointError`` for a folder that is
        missing or incomplete and for a hub that cannot be reached.
        """
        given = dict(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
        )
        wanted = [name for name, part in given.items() if part is _LOAD]
        folder = pipeline_folder(folder_or_hub_id, wanted) if wanted else None
        dtype = supported_dtype(mindspore_dtype)
        return cls(**given | {name: load_component(name, folder, dtype) for name in wanted})

    # ---- text

    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] = "",
        num_images_per_prompt: int = 1,
        clean_caption: bool = False,
        max_sequence_length: int | None = None,
    ) -> tuple[ms.Tensor, ms.Tensor, ms.Tensor | None, ms.Tensor | None]:
        """Embeddings and masks as the reference gives them.

        -> prompt_embeds (N, max_sequence_length, C), prompt_attention_mask (N, max_sequence_length) int64, and the
        same two of the negative prompts (None without guidance). N is prompts times ``num_images_per_prompt``.
        """
        prompts = as_list(prompt)
        length = max_sequence_length or self.max_sequence_length
        out = [self._embed(prompts, num_images_per_prompt, clean_caption, length)]
        if do_classifier_free_guidance:
            negatives = per_prompt(negative_prompt, len(prompts))
            out.append(self._embed(negatives, num_images_per_prompt, clean_caption, length))
        (embeds, mask), (negative, negative_mask) = [*out, (None, None)][:2]
        masks = [part if part is None else ms.Tensor(part.astype(np.int64)) for part in (mask, negative_mask)]
        return embeds, masks[0], negative, masks[1]

    def _embed(self, prompts, copies: int, clean: bool, length: int, trim: bool = False):
        """Embeddings (N, T, C) and mask (N, T); with ``trim`` T is the longest prompt's, else ``length``."""
        if self.tokenizer is None or self.text_encoder is None:
            raise ValueError(
                "this pipeline has no text encoder or no tokenizer; give prompt_embeds and prompt_attention_mask, "
                "and the same two for the negative prompt"
            )
        ids, mask = self.tokenizer.tokenize([prepare_prompt(text, clean) for text in prompts], length)
        if trim:
            longest = int(mask.sum(1).max())
            ids, mask = ids[:, :longest], mask[:, :longest]
        embeds = self.text_encoder(ids, mask)
        return (embeds.repeat_interleave(copies, 0), mask.repeat(copies, 0)) if copies > 1 else (embeds, mask)

    # ---- sampling

    def sample(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int = 20,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: np.random.Generator | Sequence[np.random.Generator] | None = None,
        latents: np.ndarray | ms.Tensor | None = None,
        prompt_embeds: ms.Tensor | None = None,
        prompt_attention_mask: ms.Tensor | None = None,
        negative_prompt_embeds: ms.Tensor | None = None,
        negative_prompt_attention_mask: ms.Tensor | None = None,
        clean_caption: bool = True,
        max_sequence_length: int | None = None,
    ) -> Iterator[Conditioning | Step]:
        """The generator underneath: yields the ``Conditioning``, then a ``Step`` per timestep.

        Parameters as those of ``__call__``; height and width are drawn as they are, in image pixels. What is wrong
        with them is said at once, before anything is computed.
        """
        height, width = self.check_size(height, width)
        timesteps = linspace_timesteps(num_inference_steps, self.scheduler.steps)
        guided = guidance_scale > 1.0
        given = (prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask)
        if prompt_embeds is None:
            prompts = as_list(prompt)
            negatives = per_prompt(negative_prompt, len(prompts)) if guided else None
        elif prompt is not None:
            raise ValueError("both prompt and prompt_embeds were given; give one of them")
        else:
            check_embeddings(given, guided, self.transformer.config.caption_channels)
        rows = len(prompts) * num_images_per_prompt if prompt_embeds is None else prompt_embeds.shape[0]
        start = self.initial_latents(rows, height, width, generator, latents)

        def steps() -> Iterator[Conditioning | Step]:
            length = max_sequence_length or self.max_sequence_length
            if prompt_embeds is None:
                texts = [prompts, negatives] if guided else [prompts]
                parts = [
                    self._embed(t, num_images_per_prompt, clean_caption, length, trim=True) for t in texts
                ]
                condition = Conditioning(*(part for pair in [*parts, (None, None)][:2] for part in pair))
            else:
                condition = given_conditioning(given, guided)
            yield condition
            predict = self._predictor(condition, guidance_scale, height, width)
            yield from dpm_solver_2m(predict, start, timesteps, self.scheduler)

        return steps()

    def check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, the model's own where None; both must be multiples of 16 (VAE x patch)."""
        if self.transformer is None:
            raise ValueError("this pipeline has no transformer, so it cannot sample; it can encode prompts")
        config = self.transformer.config
        unit = 8 * config.patch_size
        height, width = (side if side is not None else 8 * config.input_size for side in (height, width))
        if height < unit or width < unit or height % unit or width % unit:
            nearest = tuple(max(unit, round(side / unit) * unit) for side in (height, width))
            raise ValueError(
                f"height and width are {height}x{width}; both must be positive multiples of {unit}, "
                f"for example {nearest[0]}x{nearest[1]}"
            )
        return height, width

    def initial_latents(self, rows, height, width, generator=None, latents=None) -> np.ndarray:
        """Unit noise (rows, C, height / 8, width / 8) float32, from one generator or one for each row, or as given."""
        shape = (rows, self.transformer.config.in_channels, height // 8, width // 8)
        if latents is not None:
            latents = np.asarray(latents.asnumpy() if isinstance(latents, ms.Tensor) else latents, np.float32)
            if latents.shape != shape:
                raise ValueError(
                    f"latents have shape {latents.shape}; expected {shape} for {height}x{width} pixels"
                )
            return latents
        if generator is None or isinstance(generator, np.random.Generator):
            return (generator or np.random.default_rng()).standard_normal(shape, dtype=np.float32)
        if len(generator) != rows:
            raise ValueError(f"{len(generator)} generators for {rows} pictures; give one, or one for each")
        return np.stack([rng.standard_normal(shape[1:], dtype=np.float32) for rng in generator])

    def _predictor(self, condition: Conditioning, guidance_scale: float, height: int, width: int):
        """``predict(latents, timestep)``: the noise, guided; everything that all steps share is computed here."""
        net = self.transformer
        guided = condition.negative_embeds is not None
        caption, mask = (
            both_rows(condition) if guided else (condition.prompt_embeds, condition.prompt_attention_mask)
        )
        caption, mask = trim_caption(caption, mask)
        keys_values = net.caption_keys_values(caption)
        positions = net.positions(height // 8, width // 8)
        rows, channels = caption.shape[0], net.config.in_channels

        def predict(latents: np.ndarray, timestep: float) -> np.ndarray:
            x = ms.Tensor(np.concatenate([latents, latents]) if guided else latents)
            t = ms.Tensor(np.full(rows, timestep, np.float32))
            out = net.denoise(x, t, keys_values, mask, positions, net.micro_conditions(x))
            noise = out[:, :channels].astype(ms.float32).asnumpy()
            if not guided:
                return noise
            unconditional, conditional = np.split(noise, 2)
            return unconditional + np.float32(guidance_scale) * (conditional - unconditional)

        return predict

    def decode_latents(self, latents: np.ndarray | ms.Tensor) -> np.ndarray:
        """Latents (N, C, h, w) -> pictures (N, 8h, 8w, 3) float32 in [0, 1]."""
        if self.vae is None:
            raise ValueError("this pipeline has no VAE; ask for output_type='latent'")
        latents = latents if isinstance(latents, ms.Tensor) else ms.Tensor(latents)
        pictures = self.vae.decode(latents / self.vae.config.scaling_factor)[0].astype(ms.float32).asnumpy()
        return np.ascontiguousarray(np.clip(pictures / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1))

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        num_inference_steps: int = 20,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: np.random.Generator | Sequence[np.random.Generator] | None = None,
        latents: np.ndarray | ms.Tensor | None = None,
        prompt_embeds: ms.Tensor | None = None,
        prompt_attention_mask: ms.Tensor | None = None,
        negative_prompt_embeds: ms.Tensor | None = None,
        negative_prompt_attention_mask: ms.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = False,
        callback: Callable[[int, float, np.ndarray], None] | None = None,
        callback_steps: int = 1,
        clean_caption: bool = True,
        use_resolution_binning: bool = True,
        max_sequence_length: int | None = None,
    ) -> tuple | PipelineOutput:
        """Draw pictures of the prompts: ``(images,)``, or with ``return_dict`` an object with ``.images``.

        Conditional and unconditional rows go through one forward pass. ``output_type`` is "pil", "np" ((N, H, W, 3)
        in [0, 1]) or "latent"; ``callback(step, timestep, latents)`` is called every ``callback_steps`` steps.
        ``use_resolution_binning`` applies to the sizes that have published tables (see ``aspect_ratio``).
        """
        if output_type not in ("pil", "np", "latent"):
            raise ValueError(f"output_type is {output_type!r}; expected 'pil', 'np' or 'latent'")
        if callback_steps < 1:
            raise ValueError(f"callback_steps is {callback_steps}; expected at least 1")
        steps = self.sample(
            prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            height=height,
            width=width,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            clean_caption=clean_caption,
            max_sequence_length=max_sequence_length,
        )
        next(steps)
        for step in steps:
            if callback is not None and step.index % callback_steps == 0:
                callback(step.index, step.timestep, step.latents)
        images = self._output(step.latents, output_type)
        return PipelineOutput(images) if return_dict else (images,)

    def _output(self, latents: np.ndarray, output_type: str):
        if output_type == "latent":
            return latents
        pictures = self.decode_latents(latents)
        if output_type == "np":
            return pictures
        return [Image.fromarray(picture) for picture in (pictures * 255).round().astype(np.uint8)]
