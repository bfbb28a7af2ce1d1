"""``PixArtSigmaPipeline`` and ``PixArtAlphaPipeline``: prompts in, images out, with the interface of diffusers."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from pixart_nb.config import GUIDANCE_SCALE, SAMPLING_STEPS
from pixart_nb.core.backend import as_array, ms
from pixart_nb.core.errors import PixArtNBError, check_number, ignore_options, parameters_of, pluralized
from pixart_nb.core.sampling.guidance import Perturbation, guided_model, perturbed_layers
from pixart_nb.core.sampling.images import (
    PipelineOutput,
    binned_size,
    check_output_type,
    checked_size,
    resize_and_crop,
    to_images,
    to_output_type,
)
from pixart_nb.core.sampling.pipeline_base import PipelineBase
from pixart_nb.core.sampling.samplers import Generators, Predict, Step, StepSchedule, check_generators, draw_noise
from pixart_nb.core.sampling.schedulers import check_eta
from pixart_nb.core.sampling.text import (
    Conditioning,
    as_list,
    check_embeddings,
    embed,
    per_prompt,
    prepare_prompt,
    repeat_rows,
    warn_of_lost_words,
)

Array = np.ndarray | ms.Tensor
#: Prompts, or embeddings (N, T, C) with their mask (N, T).
TextInput = list[str] | tuple[ms.Tensor, np.ndarray]


class PixArtSigmaPipeline(PipelineBase):
    """PixArt-Sigma. ``from_pretrained(folder)``, then ``pipe("a red mushroom on grass")[0][0]`` is a PIL image."""

    sampling_defaults: ClassVar[dict[str, Any]]
    #: Names of the layers that perturbed-attention guidance perturbs.
    pag_applied_layers: Sequence[str] = ("blocks.1",)

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
        check_number("num_images_per_prompt", num_images_per_prompt, 1, whole=True)
        embeddings = (prompt_embeds, prompt_attention_mask)
        negatives = (negative_prompt_embeds, negative_prompt_attention_mask)
        prompt = None if prompt_embeds is not None else prompt
        inputs = self._text_inputs(prompt, negative_prompt, embeddings, negatives, do_classifier_free_guidance)
        out = self._encode(*inputs, num_images_per_prompt, clean_caption, max_sequence_length, trim=False)
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

    def _encode(
        self, positive: TextInput, negative: TextInput | None, copies: int, clean: bool, length: int | None, trim: bool
    ) -> Conditioning:
        """Encode the prompts among the inputs, and repeat every row ``copies`` times."""
        parts, texts = [], None
        for part in (positive, negative):
            if isinstance(part, list):
                adapters = getattr(self.transformer, "adapters", None)
                warn_of_lost_words(self.tokenizer, part, clean, adapters is not None and bool(adapters.active))
                length = self.max_sequence_length if length is None else length
                part = embed(self.tokenizer, self.text_encoder, part, clean, length, trim)
                width = part[0].shape[-1]
                if self.transformer is not None and width != self.transformer.config.caption_channels:
                    raise PixArtNBError(
                        f"the text encoder is {width} wide; this transformer takes "
                        f"{self.transformer.config.caption_channels}. They belong to different models."
                    )
            parts += (None, None) if part is None else repeat_rows(*part, copies)
        if isinstance(positive, list):
            texts = tuple(prepare_prompt(text, clean) for text in positive for _ in range(copies))
        return Conditioning(*parts, texts)

    # ---- sampling

    def sample(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        wrap_predict: Callable[[Predict], Predict] = lambda predict: predict,
        **arguments: Any,
    ) -> Iterator[Conditioning | Step]:
        """Return the iterator of steps: it yields the ``Conditioning``, then a ``Step`` per timestep.

        ``arguments`` are those of ``__call__`` that shape the latents, but height and width are not binned. Wrong
        arguments raise an error at once, and the initial noise is drawn. ``wrap_predict`` receives the guided model,
        and returns what the sampler calls instead. ``image_latents`` (N, C, height / 8, width / 8) start
        image-to-image: noise is added to them, and the last ``strength`` of the steps are taken. With ``mask`` (N or 1,
        1, height / 8, width / 8), 1 where to paint, the latents elsewhere stay those of the image.
        """
        defaults = self.sampling_defaults
        if unknown := sorted(arguments.keys() - defaults.keys()):
            raise TypeError(f"sample() got unexpected arguments: {', '.join(unknown)}; it takes {', '.join(defaults)}")
        call = SimpleNamespace(**defaults | arguments)
        check_number("guidance_scale", call.guidance_scale)
        check_number("guidance_rescale", call.guidance_rescale)
        check_number("num_images_per_prompt", call.num_images_per_prompt, 1, whole=True)
        perturbation = self._perturbation(call.pag_scale, call.pag_adaptive_scale)
        height, width = self.check_size(call.height, call.width)
        schedule, scheduler = self.plan(call.num_inference_steps, call.timesteps, call.sigmas, call.eta), self.scheduler
        guided = call.guidance_scale > 1.0
        embeddings = (call.prompt_embeds, call.prompt_attention_mask)
        negatives = (call.negative_prompt_embeds, call.negative_prompt_attention_mask)
        inputs = self._text_inputs(prompt, call.negative_prompt, embeddings, negatives, guided)
        copies = call.num_images_per_prompt
        rows = _rows(inputs[0]) * copies
        _check_images(call.image_latents, call.mask, rows)
        start = noise = self.initial_latents(rows, height, width, call.generator, call.latents)
        if call.image_latents is not None:
            schedule = schedule.last(call.strength)
            clean = self.initial_latents(rows, height, width, None, repeated(call.image_latents, rows))
            start = scheduler.noised(clean, noise, schedule)
        hooks = self.transformer.hook_manager
        if hooks is not None:
            length = self.max_sequence_length if call.max_sequence_length is None else call.max_sequence_length
            hooks.on_plan(schedule.timesteps, rows, guided, height // 8, width // 8, length)

        network = self._network(schedule, rows, height, width)

        def parts() -> Iterator[Iterator[Conditioning | Step] | tuple[Conditioning]]:
            condition = self._encode(*inputs, copies, call.clean_caption, call.max_sequence_length, trim=True)
            yield (condition,)
            predict = guided_model(
                network, condition, call.guidance_scale, height, width, call.guidance_rescale, perturbation
            )
            steps = scheduler.steps(wrap_predict(predict), start, schedule, call.generator, call.eta)
            if call.mask is not None:
                steps = _unmasked_kept(steps, scheduler, clean, noise, schedule, repeated(call.mask, rows))
            yield steps if hooks is None else hooks.numbered(steps)

        return itertools.chain.from_iterable(parts())

    def set_pag_applied_layers(self, pag_applied_layers: str | Sequence[str]) -> None:
        """Choose the self-attention layers that perturbed-attention guidance perturbs: names such as ``blocks.14``.

        As in diffusers, a part of a name is enough, and ``blocks.1`` also names the blocks 10 to 19; ``blocks.1.`` does
        not. Raises an error for a name without a layer.
        """
        names = [pag_applied_layers] if isinstance(pag_applied_layers, str) else pag_applied_layers
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise PixArtNBError(f"pag_applied_layers is {names!r}; expected names such as blocks.1")
        names = list(names)
        if self.transformer is not None:
            perturbed_layers(self.transformer.config.depth, names)
        self.pag_applied_layers = names

    def _count(self, call: dict[str, Any]) -> int:
        """Return the number of steps of a call."""
        call = self.sampling_defaults | call
        schedule = self.plan(call["num_inference_steps"], call["timesteps"], call["sigmas"])
        return len(schedule if call["image_latents"] is None else schedule.last(call["strength"]))

    def _network(self, schedule: StepSchedule, rows: int, height: int, width: int) -> Any:
        """Return what predicts the noise of a run."""
        return self.transformer

    def _perturbation(self, scale: float, adaptive: float) -> Perturbation | None:
        for name, value in (("pag_scale", scale), ("pag_adaptive_scale", adaptive)):
            check_number(name, value, 0)
        if not scale or not self.pag_applied_layers:
            return None
        layers = perturbed_layers(self.transformer.config.depth, self.pag_applied_layers)
        return Perturbation(layers, scale, adaptive)

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
        return checked_size(self.transformer.config, height, width)

    def binned_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the published size of the nearest ratio, or the requested one if the model's size has no table."""
        if self.transformer is None:
            return self.check_size(height, width)
        return binned_size(self.transformer.config, height, width)

    def initial_latents(self, rows, height, width, generator=None, latents=None) -> np.ndarray:
        """Return unit noise (rows, C, height / 8, width / 8) float32, drawn from ``generator`` or as given."""
        check_generators(generator, rows)
        shape = (rows, self.transformer.config.in_channels, height // 8, width // 8)
        if latents is None:
            return draw_noise(shape, generator)
        latents = _as_array(latents, "latents")
        if latents.shape != shape:
            raise PixArtNBError(f"latents have shape {latents.shape}; expected {shape} for {height}x{width} pixels")
        if not np.isfinite(latents).all():
            raise PixArtNBError("latents hold values that are not finite; expected unit noise")
        return latents

    def decode_latents(self, latents: Array) -> np.ndarray:
        """Decode latents (N, C, h, w) to images (N, 8h, 8w, 3) float32 in [0, 1]."""
        return to_output_type(self._decode(latents), "np")

    def _decode(self, latents: Array) -> np.ndarray:
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
        callback_steps: int | None = 1,
        clean_caption: bool = True,
        use_resolution_binning: bool = True,
        max_sequence_length: int | None = None,
        guidance_rescale: float = 0.0,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **options: Any,
    ) -> PipelineOutput:
        """Draw images of the prompts; returns the tuple ``(images,)``, which also has ``.images``.

        ``output_type`` is "pil", "np" ((N, H, W, 3) in [0, 1]) or "latent". Latents are arrays, also in callbacks.
        With ``use_resolution_binning`` and a model of a published size, the image is drawn at the published size of the
        nearest ratio, then resized and cropped to the requested one (not for latents). timesteps or sigmas replace
        ``num_inference_steps`` (see ``Scheduler.plan``); ``eta`` is DDIM's share of noise; latents are unit noise.

        ``callback(step, timestep, latents)`` is called every ``callback_steps`` steps, ``callback_on_step_end(pipe,
        step, timestep, {"latents": latents})`` after each: latents that it returns replace those of the step, and
        ``pipe._interrupt = True`` ends the run. Options without a meaning here are named in one warning.
        """
        call = {name: value for name, value in (locals() | options).items() if name in self.sampling_defaults}
        check_output_type(output_type)
        _check_callbacks(callback, callback_steps, callback_on_step_end, callback_on_step_end_tensor_inputs)
        ignore_options("the pipeline", {n: options[n] for n in options if n not in call}, parameters_of(self.__call__))
        drawn = (self.binned_size if use_resolution_binning else self.check_size)(height, width)
        steps = self.sample(prompt, **call | dict(zip(("height", "width"), drawn, strict=True)))
        self._interrupt = False
        next(steps)
        for step in self.progress_bar(steps, self._count(call)):
            if callback is not None and step.index % (callback_steps or 1) == 0:
                callback(step.index, step.timestep, step.latents)
            if callback_on_step_end is not None:
                self._replace_latents(step, callback_on_step_end)
            if self._interrupt:
                break
        if output_type == "latent":
            return PipelineOutput(step.latents)
        images = resize_and_crop(self._decode(step.latents), height or drawn[0], width or drawn[1])
        return PipelineOutput(to_output_type(images, output_type))

    def _replace_latents(self, step: Step, callback: Callable[..., dict[str, Any] | None]) -> None:
        """Call ``callback_on_step_end``; what it returns goes into the array with which the sampler continues."""
        changed = callback(self, step.index, step.timestep, {"latents": step.latents})
        if changed is not None and not (isinstance(changed, dict) and changed.keys() <= {"latents"}):
            keys = sorted(map(str, changed)) if isinstance(changed, dict) else f"a {type(changed).__name__}"
            raise PixArtNBError(f"callback_on_step_end returned {keys}; expected {{'latents': ...}} or None")
        if changed:
            latents = _as_array(changed["latents"], "latents of callback_on_step_end")
            if latents.shape != step.latents.shape:
                raise PixArtNBError(
                    f"callback_on_step_end returned latents of shape {latents.shape}; expected {step.latents.shape}"
                )
            step.latents[...] = latents


_NOT_SAMPLING = """self prompt output_type return_dict callback callback_steps use_resolution_binning options
    callback_on_step_end callback_on_step_end_tensor_inputs"""
#: Arguments of ``sample`` and their defaults.
PixArtSigmaPipeline.sampling_defaults = {
    name: parameter.default
    for name, parameter in inspect.signature(PixArtSigmaPipeline.__call__).parameters.items()
    if name not in _NOT_SAMPLING.split()
} | {"pag_scale": 0.0, "pag_adaptive_scale": 0.0, "image_latents": None, "strength": 0.6, "mask": None}


class PixArtAlphaPipeline(PixArtSigmaPipeline):
    """PixArt-alpha: prompts of 120 tokens."""

    max_sequence_length = 120


class PixArtSigmaPAGPipeline(PixArtSigmaPipeline):
    """PixArt-Sigma with perturbed-attention guidance (Ahn et al. 2024).

    ``pipe(prompt, pag_scale=3.0, pag_adaptive_scale=0.0)``: the scale is at least 0, which is without, and the adaptive
    scale times (1000 - timestep) is subtracted from it. ``guidance_scale=1`` is without classifier-free guidance.
    ``pag_applied_layers``: names of the self-attention layers that are perturbed (see ``set_pag_applied_layers``).
    """

    sampling_defaults = PixArtSigmaPipeline.sampling_defaults | {"pag_scale": 3.0}

    def __init__(self, *components: Any, pag_applied_layers: str | Sequence[str] = "blocks.1", **named: Any):
        super().__init__(*components, **named)
        self.set_pag_applied_layers(pag_applied_layers)

    @classmethod
    def from_pretrained(cls, *args: Any, pag_applied_layers: str | Sequence[str] = "blocks.1", **options: Any):
        """Load a pipeline as ``PixArtSigmaPipeline.from_pretrained`` does, and choose the perturbed layers."""
        pipe = super().from_pretrained(*args, **options)
        pipe.set_pag_applied_layers(pag_applied_layers)
        return pipe


def repeated(rows: np.ndarray | ms.Tensor, count: int) -> np.ndarray:
    """Return an array of ``count`` rows, each of the given ones repeated side by side if their number divides it."""
    rows = as_array(rows)
    return rows if not len(rows) or count % len(rows) else np.repeat(rows, count // len(rows), 0)


def _unmasked_kept(steps, scheduler, image, noise, schedule, mask) -> Iterator[Step]:
    """Yield the steps, whose latents outside the mask are those of the image with the noise of that time."""
    for step in steps:
        kept = scheduler.noised_at(image, noise, float(schedule.sigmas[step.index, 1]))
        step.latents[...] = mask * step.latents + (1 - mask) * kept  # the sampler continues with this array
        yield step


def _check_images(images: Array | None, mask: Array | None, rows: int) -> None:
    """Refuse a mask without an image, and images or masks that are neither one for all nor one for each row."""
    if mask is not None and images is None:
        raise PixArtNBError("mask was given without image_latents, the image to paint in; give both")
    for name, values in (("images to begin with", images), ("masks", mask)):
        if values is not None:
            check_count(name, len(values), rows)


def check_count(name: str, count: int, rows: int) -> None:
    """Raise an error unless ``count`` of what is called ``name`` are one for all ``rows``, or shared evenly by them."""
    if not count or rows % count:
        expected = "1" if rows == 1 else f"1 or {rows}"
        raise PixArtNBError(f"{count} {name} were given for {pluralized(rows, 'image')}; expected {expected}")


def _rows(texts: TextInput) -> int:
    return len(texts) if isinstance(texts, list) else texts[0].shape[0]


def _as_array(values: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(as_array(values), np.float32)
    except (TypeError, ValueError):
        raise PixArtNBError(f"{name} are of {type(values).__name__}; expected an array of numbers") from None


def _check_callbacks(callback: Any, steps: int | None, on_step_end: Any, tensors: Sequence[str] | None) -> None:
    for name, function in (("callback", callback), ("callback_on_step_end", on_step_end)):
        if function is not None and not callable(function):
            raise PixArtNBError(f"{name} is {function!r}; expected a function")
    if steps is not None:
        check_number("callback_steps", steps, 1, whole=True)
    if tensors is not None and list(tensors) not in ([], ["latents"]):
        raise PixArtNBError(f"callback_on_step_end_tensor_inputs is {tensors!r}; expected ['latents']")
