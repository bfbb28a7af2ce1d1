"""``PixArtSigmaPipeline`` and ``PixArtAlphaPipeline``: prompts in, images out, with the interface of diffusers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from pixart_nb.config import GUIDANCE_SCALE, SAMPLING_STEPS
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.lora.pipeline import LoraLoaderMixin
from pixart_nb.core.sampling import aspect_ratio
from pixart_nb.core.sampling.conditioning import Conditioning, as_list, check_embeddings, embed, per_prompt, repeat_rows
from pixart_nb.core.sampling.guidance import classifier_free_guidance
from pixart_nb.core.sampling.images import PipelineOutput, check_output_type, to_images, to_output_type
from pixart_nb.core.sampling.pipeline_base import PipelineBase, ignore_options, parameters_of
from pixart_nb.core.sampling.samplers import Generators, Predict, Step, StepSchedule, check_generators, draw_noise
from pixart_nb.core.sampling.scheduler import check_eta
from pixart_nb.core.sampling.text import prepare_prompt, warn_of_lost_words

Array = np.ndarray | ms.Tensor
#: Prompts, or embeddings (N, T, C) with their mask (N, T).
TextInput = list[str] | tuple[ms.Tensor, np.ndarray]


class PixArtSigmaPipeline(PipelineBase, LoraLoaderMixin):
    """PixArt-Sigma. ``from_pretrained(folder)``, then ``pipe("a red mushroom on grass")[0][0]`` is a PIL image."""

    max_sequence_length = 300

    # ---- text

    def encode_prompt(
        self,
        prompt: str | Sequence[str] | None,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | Sequence[str] | None = "",
        num_images_per_prompt: int = 1,
        prompt_embeds: Array | None = None,
        negative_prompt_embeds: Array | None = None,
        prompt_attention_mask: Array | None = None,
        negative_prompt_attention_mask: Array | None = None,
        clean_caption: bool = False,
        max_sequence_length: int | None = None,
        **options: Any,
    ) -> tuple[ms.Tensor, ms.Tensor, ms.Tensor | None, ms.Tensor | None]:
        """Return embeddings and masks as the reference does.

        -> prompt_embeds (N, max_sequence_length, C), prompt_attention_mask (N, max_sequence_length) int64, and the
        two of the negative prompts (None without guidance). N is prompts times ``num_images_per_prompt``. Given
        embeddings are not encoded, only repeated.
        """
        ignore_options("encode_prompt", options, parameters_of(self.encode_prompt))
        embeddings = (prompt_embeds, prompt_attention_mask)
        negatives = (negative_prompt_embeds, negative_prompt_attention_mask)
        guided = do_classifier_free_guidance
        inputs = self._text_inputs(
            None if prompt_embeds is not None else prompt, negative_prompt, embeddings, negatives, guided
        )
        length = max_sequence_length or self.max_sequence_length
        out = self._encoded(*inputs, num_images_per_prompt, clean_caption, length, trim=False)
        masks = (out.prompt_attention_mask, out.negative_mask)
        mask, negative_mask = (part if part is None else ms.Tensor(part.astype(np.int64)) for part in masks)
        return out.prompt_embeds, mask, out.negative_embeds, negative_mask

    def _text_inputs(
        self, prompt, negative_prompt, embeddings, negatives, guided
    ) -> tuple[TextInput, TextInput | None]:
        """Validate prompts and embeddings; return those of the prompts and, with guidance, of the negative prompts."""
        for name, (embeds, mask) in (("prompt", embeddings), ("negative_prompt", negatives)):
            if embeds is None and mask is not None:
                raise PixArtNBError(f"{name}_attention_mask was given without {name}_embeds; give both")
        if prompt is not None and embeddings[0] is not None:
            raise PixArtNBError("both prompt and prompt_embeds were given; give one of them")
        channels = self.transformer.config.caption_channels if self.transformer else None
        positive = as_list(prompt) if embeddings[0] is None else check_embeddings(*embeddings, None, channels)
        rows, negative = _rows(positive), None
        if guided and negatives[0] is not None:
            if negative_prompt:
                warnings.warn("negative_prompt is ignored beside negative_prompt_embeds", stacklevel=3)
            negative = check_embeddings(*negatives, rows, channels, "negative_prompt")
        elif guided:
            negative = per_prompt(negative_prompt, rows)
        if (self.tokenizer is None or self.text_encoder is None) and list in (type(positive), type(negative)):
            missing = "prompt" if isinstance(positive, list) else "negative_prompt"
            raise PixArtNBError(
                f"this pipeline has no text encoder or no tokenizer; give {missing}_embeds and {missing}_attention_mask"
            )
        return positive, negative

    def _encoded(
        self, positive: TextInput, negative: TextInput | None, copies: int, clean: bool, length: int, trim: bool
    ) -> Conditioning:
        """Encode the prompts among the inputs, and repeat every row ``copies`` times."""
        parts = []
        for part in (positive, negative):
            if isinstance(part, list):
                warn_of_lost_words(self.tokenizer, part, clean)
                part = embed(self.tokenizer, self.text_encoder, part, clean, length, trim)
            parts += (None, None) if part is None else repeat_rows(*part, copies)
        texts = None
        if isinstance(positive, list):
            texts = tuple(prepare_prompt(text, clean) for text in positive for _ in range(copies))
        return Conditioning(*parts, texts)

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
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Array | None = None,
        prompt_embeds: Array | None = None,
        prompt_attention_mask: Array | None = None,
        negative_prompt_embeds: Array | None = None,
        negative_prompt_attention_mask: Array | None = None,
        clean_caption: bool = True,
        max_sequence_length: int | None = None,
        wrap_predict: Callable[[Predict], Predict] = lambda predict: predict,
        image_latents: np.ndarray | None = None,
        strength: float = 0.6,
    ) -> Iterator[Conditioning | Step]:
        """Return the generator of steps: it yields the ``Conditioning``, then a ``Step`` per timestep.

        Parameters are those of ``__call__``, but height and width are not binned. Wrong arguments raise an error at
        once, and the initial noise is drawn. ``wrap_predict`` receives the guided model, and returns what the sampler
        calls instead. ``image_latents`` (N, C, height / 8, width / 8) start image-to-image: noise is added to them, and
        the last ``strength`` of the steps are taken.
        """
        height, width = self.check_size(height, width)
        schedule, scheduler = self.plan(num_inference_steps, timesteps, sigmas, eta), self.scheduler
        guided = guidance_scale > 1.0
        embeddings = (prompt_embeds, prompt_attention_mask)
        negatives = (negative_prompt_embeds, negative_prompt_attention_mask)
        inputs = self._text_inputs(prompt, negative_prompt, embeddings, negatives, guided)
        rows = _rows(inputs[0]) * _checked_copies(num_images_per_prompt)
        start = self.initial_latents(rows, height, width, generator, latents)
        if image_latents is not None:
            schedule = schedule.last(strength)
            clean = self.initial_latents(rows, height, width, None, image_latents)
            start = scheduler.noised(clean, start, schedule)
        length = max_sequence_length or self.max_sequence_length
        hooks = self.transformer.hook_manager
        if hooks is not None:
            hooks.on_plan(schedule.timesteps, rows, guided, height // 8, width // 8, length)

        def steps() -> Iterator[Conditioning | Step]:
            condition = self._encoded(*inputs, num_images_per_prompt, clean_caption, length, trim=True)
            yield condition
            predict = classifier_free_guidance(
                self.transformer, condition, guidance_scale, height, width, guidance_rescale
            )
            yield from scheduler.steps(wrap_predict(predict), start, schedule, generator, eta)

        return steps()

    def plan(self, num_inference_steps=None, timesteps=None, sigmas=None, eta: float = 0.0) -> StepSchedule:
        """Return the scheduler's steps of a run (see ``Scheduler.plan``)."""
        if self.scheduler is None:
            raise PixArtNBError("this pipeline has no scheduler; set pipe.scheduler, for example to 'dpm++'")
        check_eta(eta)
        return self.scheduler.plan(num_inference_steps, timesteps=timesteps, sigmas=sigmas)

    def check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return height and width in pixels, the model's own where None. Both must be multiples of 16 (VAE x patch)."""
        if self.transformer is None:
            raise PixArtNBError("this pipeline has no transformer, so it cannot sample; it can encode prompts")
        return aspect_ratio.checked_size(self.transformer.config, height, width)

    def binned_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the published size of the nearest ratio, or the requested one if the model's size has no table."""
        if self.transformer is None:
            return self.check_size(height, width)
        return aspect_ratio.binned_size(self.transformer.config, height, width)

    def initial_latents(self, rows, height, width, generator=None, latents=None) -> np.ndarray:
        """Return unit noise (rows, C, height / 8, width / 8) float32, drawn from ``generator`` or as given."""
        check_generators(generator, rows)
        shape = (rows, self.transformer.config.in_channels, height // 8, width // 8)
        if latents is None:
            return draw_noise(shape, generator)
        latents = np.asarray(latents.asnumpy() if isinstance(latents, ms.Tensor) else latents, np.float32)
        if latents.shape != shape:
            raise PixArtNBError(f"latents have shape {latents.shape}; expected {shape} for {height}x{width} pixels")
        return latents

    def decode_latents(self, latents: Array) -> np.ndarray:
        """Decode latents (N, C, h, w) to images (N, 8h, 8w, 3) float32 in [0, 1]."""
        return to_output_type(self._decoded(latents), "np")

    def _decoded(self, latents: Array) -> np.ndarray:
        if self.vae is None:
            raise PixArtNBError("this pipeline has no VAE; ask for output_type='latent'")
        return to_images(self.vae.decode(self.vae.config.from_model(latents))[0])

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
        latents: Array | None = None,
        prompt_embeds: Array | None = None,
        prompt_attention_mask: Array | None = None,
        negative_prompt_embeds: Array | None = None,
        negative_prompt_attention_mask: Array | None = None,
        output_type: str = "pil",
        return_dict: bool = False,
        callback: Callable[[int, float, np.ndarray], None] | None = None,
        callback_steps: int = 1,
        clean_caption: bool = True,
        use_resolution_binning: bool = True,
        max_sequence_length: int | None = None,
        guidance_rescale: float = 0.0,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **options: Any,
    ) -> PipelineOutput:
        """Draw images of the prompts; returns the tuple ``(images,)``, which also has ``.images``.

        ``output_type`` is "pil", "np" ((N, H, W, 3) in [0, 1]) or "latent". With ``use_resolution_binning`` and a model
        of a published size, the image is drawn at the published size of the nearest ratio, then resized and cropped to
        the requested one (not for latents). timesteps or sigmas replace ``num_inference_steps`` (see
        ``Scheduler.plan``); ``eta`` is DDIM's share of noise; given latents are unit noise for every scheduler.

        ``callback(step, timestep, latents)`` is called every ``callback_steps`` steps, ``callback_on_step_end(pipe,
        step, timestep, {"latents": latents})`` after each: latents that it returns replace those of the step, and
        ``pipe._interrupt = True`` ends the run. Options of diffusers without a meaning here are named in one warning.
        """
        call = {name: value for name, value in locals().items() if name in parameters_of(self.sample)}
        check_output_type(output_type)
        if callback_steps is not None and callback_steps < 1:
            raise PixArtNBError(f"callback_steps is {callback_steps}; expected at least 1")
        if list(callback_on_step_end_tensor_inputs) != ["latents"]:
            raise PixArtNBError(
                f"callback_on_step_end_tensor_inputs is {callback_on_step_end_tensor_inputs!r}; expected ['latents']"
            )
        ignore_options("the pipeline", options, parameters_of(self.__call__))
        size = (self.binned_size if use_resolution_binning else self.check_size)(height, width)
        steps = self.sample(**call | {"height": size[0], "width": size[1]})
        count = len(self.plan(num_inference_steps, timesteps, sigmas))
        latents = self._last_latents(steps, count, callback, callback_steps or 1, callback_on_step_end)
        if output_type == "latent":
            return PipelineOutput(latents)
        images = aspect_ratio.resize_and_crop(self._decoded(latents), height or size[0], width or size[1])
        return PipelineOutput(to_output_type(images, output_type))

    def _last_latents(self, steps, count: int, callback, callback_steps: int, on_step_end) -> np.ndarray:
        """Take the steps, with progress bar and callbacks, and return the latents of the last one."""
        self._interrupt = False
        next(steps)
        with self.progress_bar(count) as bar:
            for step in steps:
                if callback is not None and step.index % callback_steps == 0:
                    callback(step.index, step.timestep, step.latents)
                if on_step_end is not None:
                    changed = on_step_end(self, step.index, step.timestep, {"latents": step.latents}) or {}
                    # in place: the sampler continues with this array
                    step.latents[...] = changed.get("latents", step.latents)
                bar.update()
                if self._interrupt:
                    break
        return step.latents


def _rows(texts: TextInput) -> int:
    return len(texts) if isinstance(texts, list) else texts[0].shape[0]


def _checked_copies(copies: int) -> int:
    if copies < 1:
        raise PixArtNBError(f"num_images_per_prompt is {copies}; expected at least 1")
    return copies


class PixArtAlphaPipeline(PixArtSigmaPipeline):
    """PixArt-alpha: prompts of 120 tokens."""

    max_sequence_length = 120
