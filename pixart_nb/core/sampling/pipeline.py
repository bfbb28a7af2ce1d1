"""``PixArtSigmaPipeline``: prompts in, pictures out, with the interface of diffusers and mindone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from pixart_nb.config import GUIDANCE_SCALE, SAMPLING_STEPS
from pixart_nb.core.backend import ms, supported_dtype
from pixart_nb.core.checkpoints.components import load_components
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.lora.pipeline import LoraLoaderMixin
from pixart_nb.core.models.t5 import T5Encoder
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.models.vae import AutoencoderKL
from pixart_nb.core.sampling.aspect_ratio import binned_size, checked_size, resize_and_crop
from pixart_nb.core.sampling.conditioning import (
    Conditioning,
    as_list,
    check_embeddings,
    embed,
    given_conditioning,
    per_prompt,
    repeat_rows,
)
from pixart_nb.core.sampling.guidance import guided_prediction
from pixart_nb.core.sampling.images import (
    ImageProcessor,
    PipelineOutput,
    check_output_type,
    finished,
    to_pictures,
)
from pixart_nb.core.sampling.scheduler import Scheduler, check_eta
from pixart_nb.core.sampling.schedulers import as_scheduler
from pixart_nb.core.sampling.step import Generators, Plan, Predict, Step, check_generators, draw_noise
from pixart_nb.core.sampling.text import TextTokenizer, prepare_prompt

_LOAD = object()


class PixArtSigmaPipeline(LoraLoaderMixin):
    """PixArt-Sigma. ``from_pretrained(folder)``, then ``pipe("a red mushroom on grass")[0][0]`` is a PIL image."""

    max_sequence_length = 300
    image_processor = ImageProcessor()

    def __init__(
        self,
        tokenizer: TextTokenizer | None,
        text_encoder: T5Encoder | None,
        vae: AutoencoderKL | None,
        transformer: PixArt | None,
        scheduler: Scheduler | str | None,
    ):
        self.tokenizer, self.text_encoder, self.vae = tokenizer, text_encoder, vae
        self.transformer, self._scheduler = transformer, as_scheduler(scheduler)

    @property
    def scheduler(self) -> Scheduler | None:
        """How steps are taken. Set it to a scheduler, or to a short name, which keeps the noise schedule."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, value: Scheduler | str | None) -> None:
        self._scheduler = as_scheduler(value, self._scheduler)

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
        scheduler: Scheduler | str | None = _LOAD,
    ) -> PixArtSigmaPipeline:
        """Load a pipeline in the layout in which diffusers publishes it, or in that of mindone's example: a folder with
        a checkpoint and the folders vae, text_encoder and tokenizer (of several checkpoints, give one's own path).

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
        loaded = load_components(folder_or_hub_id, wanted, supported_dtype(mindspore_dtype)) if wanted else {}
        if "scheduler" in wanted:
            loaded.setdefault("scheduler", "dpm++")  # mindone's layout has none
        return cls(**given | loaded)

    # ---- text

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = "",
        num_images_per_prompt: int = 1,
        prompt_embeds: ms.Tensor | None = None,
        negative_prompt_embeds: ms.Tensor | None = None,
        prompt_attention_mask: ms.Tensor | None = None,
        negative_prompt_attention_mask: ms.Tensor | None = None,
        clean_caption: bool = False,
        max_sequence_length: int | None = None,
    ) -> tuple[ms.Tensor, ms.Tensor, ms.Tensor | None, ms.Tensor | None]:
        """Embeddings and masks as the reference gives them.

        -> prompt_embeds (N, max_sequence_length, C), prompt_attention_mask (N, max_sequence_length) int64, and the
        same two of the negative prompts (None without guidance). N is prompts times ``num_images_per_prompt``. What is
        given is not encoded, only repeated.
        """
        given = (prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask)
        length = max_sequence_length or self.max_sequence_length
        if prompt_embeds is None:
            prompts = self._checked_prompts(prompt, given)
            negatives = per_prompt(negative_prompt, len(prompts)) if do_classifier_free_guidance else None
            out = self._encoded(prompts, negatives, num_images_per_prompt, clean_caption, length, trim=False)
        else:
            check_embeddings(given, do_classifier_free_guidance, prompt_embeds.shape[-1])
            out = given_conditioning(given, do_classifier_free_guidance, num_images_per_prompt)
        masks = (out.prompt_attention_mask, out.negative_mask)
        mask, negative_mask = (part if part is None else ms.Tensor(part.astype(np.int64)) for part in masks)
        return out.prompt_embeds, mask, out.negative_embeds, negative_mask

    @staticmethod
    def _checked_prompts(prompt: str | Sequence[str] | None, given: tuple) -> list[str]:
        """The prompts, of which no embeddings may be given beside them."""
        if any(part is not None for part in given):
            raise PixArtNBError(
                "embeddings or masks were given without prompt_embeds; give a prompt, or all of prompt_embeds and "
                "prompt_attention_mask and, for guidance, the two of the negative prompt"
            )
        return as_list(prompt)

    def _encoded(self, prompts, negatives, copies: int, clean: bool, length: int, trim: bool) -> Conditioning:
        pairs = [
            repeat_rows(*embed(self.tokenizer, self.text_encoder, texts, clean, length, trim), copies)
            for texts in (prompts, negatives)
            if texts is not None
        ]
        texts = tuple(prepare_prompt(text, clean) for text in prompts for _ in range(copies))
        return Conditioning(*pairs[0], *(pairs[1] if len(pairs) > 1 else (None, None)), texts)

    # ---- sampling

    def sample(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = "",
        num_inference_steps: int = SAMPLING_STEPS,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = GUIDANCE_SCALE,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: Generators = None,
        latents: np.ndarray | ms.Tensor | None = None,
        prompt_embeds: ms.Tensor | None = None,
        prompt_attention_mask: ms.Tensor | None = None,
        negative_prompt_embeds: ms.Tensor | None = None,
        negative_prompt_attention_mask: ms.Tensor | None = None,
        clean_caption: bool = True,
        max_sequence_length: int | None = None,
        around_model: Callable[[Predict], Predict] | None = None,
        start: np.ndarray | None = None,
        strength: float = 0.6,
    ) -> Iterator[Conditioning | Step]:
        """The generator underneath: yields the ``Conditioning``, then a ``Step`` per timestep.

        Parameters as those of ``__call__``; height and width are drawn as they are, in image pixels. What is wrong
        with them is said at once, before anything is computed. The generators draw the first noise now, and the noise
        of the steps, if the scheduler adds any, as they are taken. ``around_model`` is given what the scheduler calls
        and returns what it shall call instead. ``start``, latents (N, C, height / 8, width / 8) of pictures as steps
        yield them, makes it image-to-image: noise is added to them, and the last ``strength`` of the steps are taken.
        """
        height, width = self.check_size(height, width)
        plan, scheduler = self.plan(num_inference_steps, timesteps, sigmas, eta), self.scheduler
        guided = guidance_scale > 1.0
        given = (prompt_embeds, prompt_attention_mask, negative_prompt_embeds, negative_prompt_attention_mask)
        if num_images_per_prompt < 1:
            raise PixArtNBError(f"num_images_per_prompt is {num_images_per_prompt}; expected at least 1")
        if prompt_embeds is None:
            prompts = self._checked_prompts(prompt, given)
            negatives = per_prompt(negative_prompt, len(prompts)) if guided else None
        elif prompt is not None:
            raise PixArtNBError("both prompt and prompt_embeds were given; give one of them")
        else:
            check_embeddings(given, guided, self.transformer.config.caption_channels)
        rows = (len(prompts) if prompt_embeds is None else prompt_embeds.shape[0]) * num_images_per_prompt
        begin = self.initial_latents(rows, height, width, generator, latents)
        if start is not None:
            plan = plan.last(strength)
            begin = scheduler.noised(self.initial_latents(rows, height, width, None, start), begin, plan)
        length = max_sequence_length or self.max_sequence_length
        if self.transformer.hook_manager is not None:
            self.transformer.hook_manager.on_plan(
                plan.timesteps, rows, guided, height // 8, width // 8, length
            )

        def steps() -> Iterator[Conditioning | Step]:
            if prompt_embeds is None:
                condition = self._encoded(
                    prompts, negatives, num_images_per_prompt, clean_caption, length, trim=True
                )
            else:
                condition = given_conditioning(given, guided, num_images_per_prompt)
            yield condition
            predict = guided_prediction(self.transformer, condition, guidance_scale, height, width)
            if around_model is not None:
                predict = around_model(predict)
            yield from scheduler.steps(predict, begin, plan, generator, eta)

        return steps()

    def plan(self, num_inference_steps=None, timesteps=None, sigmas=None, eta: float = 0.0) -> Plan:
        """The scheduler's plan of a run (see ``Scheduler.plan``); its length is the number of steps."""
        if self.scheduler is None:
            raise PixArtNBError("this pipeline has no scheduler; set pipe.scheduler, for example to 'dpm++'")
        check_eta(eta)
        return self.scheduler.plan(num_inference_steps, timesteps=timesteps, sigmas=sigmas)

    def check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels, the model's own where None; both must be multiples of 16 (VAE x patch)."""
        if self.transformer is None:
            raise PixArtNBError(
                "this pipeline has no transformer, so it cannot sample; it can encode prompts"
            )
        return checked_size(self.transformer.config, height, width)

    def binned_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """The published size with the nearest ratio of height to width, where the model's own size has a table.

        A model of another size, such as a small one, draws at the size that is asked for.
        """
        if self.transformer is None:
            return self.check_size(height, width)
        return binned_size(self.transformer.config, height, width)

    def initial_latents(self, rows, height, width, generator=None, latents=None) -> np.ndarray:
        """Unit noise (rows, C, height / 8, width / 8) float32, from one generator or one for each row, or as given."""
        check_generators(generator, rows)
        shape = (rows, self.transformer.config.in_channels, height // 8, width // 8)
        if latents is not None:
            latents = np.asarray(latents.asnumpy() if isinstance(latents, ms.Tensor) else latents, np.float32)
            if latents.shape != shape:
                raise PixArtNBError(
                    f"latents have shape {latents.shape}; expected {shape} for {height}x{width} pixels"
                )
            return latents
        return draw_noise(shape, generator)

    def decode_latents(self, latents: np.ndarray | ms.Tensor) -> np.ndarray:
        """Latents (N, C, h, w) -> pictures (N, 8h, 8w, 3) float32 in [0, 1]."""
        return finished(self._decoded(latents), "np")

    def _decoded(self, latents: np.ndarray | ms.Tensor) -> np.ndarray:
        if self.vae is None:
            raise PixArtNBError("this pipeline has no VAE; ask for output_type='latent'")
        return to_pictures(self.vae.decode(latents / self.vae.config.scaling_factor)[0])

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = "",
        num_inference_steps: int = SAMPLING_STEPS,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = GUIDANCE_SCALE,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: Generators = None,
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
    ) -> PipelineOutput:
        """Draw pictures of the prompts: the tuple ``(images,)``, which is also an object with ``.images``.

        Conditional and unconditional rows go through one forward pass. ``output_type`` is "pil", "np" ((N, H, W, 3)
        in [0, 1]) or "latent"; ``callback(step, timestep, latents)`` is called every ``callback_steps`` steps.
        With ``use_resolution_binning`` and a model of a published size, the picture is drawn at the published size of
        the nearest ratio, then scaled and cut to the one that was asked for (not for latents). timesteps or sigmas
        replace ``num_inference_steps`` (see ``Scheduler.plan``); ``eta`` is DDIM's share of noise. Given latents
        are unit noise, whatever the scheduler. ``return_dict`` is there for calls written for diffusers.
        """
        check_output_type(output_type)
        if callback_steps < 1:
            raise PixArtNBError(f"callback_steps is {callback_steps}; expected at least 1")
        drawn = (self.binned_size if use_resolution_binning else self.check_size)(height, width)
        steps = self.sample(
            prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            height=drawn[0],
            width=drawn[1],
            eta=eta,
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
        if output_type == "latent":
            return PipelineOutput(step.latents)
        pictures = resize_and_crop(self._decoded(step.latents), height or drawn[0], width or drawn[1])
        return PipelineOutput(finished(pictures, output_type))


class PixArtAlphaPipeline(PixArtSigmaPipeline):
    """PixArt-alpha: the same calls, over prompts of 120 tokens."""

    max_sequence_length = 120
