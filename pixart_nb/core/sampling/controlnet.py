"""Pipelines with a ControlNet-Transformer (PixArt-delta, Chen et al. 2024): the image follows a condition image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.components import component_path, saved_dtype, source_of, weights_of
from pixart_nb.core.checkpoints.controlnet import load_controlnet, save_controlnet
from pixart_nb.core.errors import PixArtNBError, check_number
from pixart_nb.core.models.controlnet import Controlled, PixArtControlNet
from pixart_nb.core.sampling.editing import ImageInput, encode_image, image_array, resized
from pixart_nb.core.sampling.images import PipelineOutput, check_ratio
from pixart_nb.core.sampling.pipeline import PixArtSigmaPipeline, check_count, repeated
from pixart_nb.core.sampling.samplers import StepSchedule, active_steps


class PixArtSigmaControlNetPipeline(PixArtSigmaPipeline):
    """PixArt-Sigma with a ControlNet: ``pipe("a red house", image=edges)``.

    ``PixArtSigmaControlNetPipeline.from_pretrained(folder, controlnet=load_controlnet(file))``. The base model of the
    ControlNet is the transformer of the pipeline. A folder of ``save_pretrained`` holds its ControlNet.
    """

    def __init__(self, *components: Any, controlnet: PixArtControlNet | None = None, **named: Any):
        super().__init__(*components, **named)
        self.controlnet, self._control = controlnet, None
        if controlnet is not None:
            self.transformer = controlnet.base_model
            self.max_sequence_length = min(self.max_sequence_length, controlnet.config.model_max_length)

    @classmethod
    def from_pretrained(cls, folder_or_hub_id: Any = None, *args: Any, controlnet: Any = None, **options: Any):
        """Load a pipeline as ``PixArtSigmaPipeline.from_pretrained`` does, with the transformer of ``controlnet``.

        Without ``controlnet`` it is that of the pipeline's folder; a path is read for the pipeline's transformer.
        """
        if controlnet is None or isinstance(controlnet, str | Path):
            source = source_of(folder_or_hub_id, options.get("pretrained_model_name_or_path"))
            path = controlnet or component_path(source, "controlnet", dict(options))
            pipe = super().from_pretrained(folder_or_hub_id, *args, **options)
            pipe.controlnet = load_controlnet(path, None, pipe.dtype, pipe.transformer)
            return pipe
        pipe = super().from_pretrained(folder_or_hub_id, *args, **{"transformer": controlnet.base_model} | options)
        pipe.controlnet = controlnet
        return pipe

    @property
    def components(self) -> dict[str, Any]:
        """Components by name, as the arguments of another pipeline, with the ControlNet."""
        return super().components | {"controlnet": self.controlnet}

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the components and the ControlNet into a folder that ``from_pretrained`` reads."""
        super().save_pretrained(save_directory, **options)
        if self.controlnet is not None:
            weights = weights_of(self.controlnet.controlnet, saved_dtype(self.transformer))
            own = {f"controlnet.{name.removeprefix('controlnet.')}": value for name, value in weights.items()}
            save_controlnet(Path(save_directory).expanduser() / "controlnet", own, self.controlnet.edges)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: ImageInput | None = None,
        controlnet_conditioning_scale: float = 1.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        guess_mode: bool = False,
        **call: Any,
    ) -> PipelineOutput:
        """Draw images that follow ``image``, one for all or one for each prompt; returns the tuple ``(images,)``.

        ``image`` is what the ControlNet was trained on, such as edges. ``controlnet_conditioning_scale`` multiplies
        what the ControlNet adds, from the share ``control_guidance_start`` of the steps to the share
        ``control_guidance_end``. With ``guess_mode``, it acts on the prediction with the prompt alone, so that guidance
        strengthens the condition as it does the prompt; all copied blocks have the same scale. Other arguments are
        those of ``PixArtSigmaPipeline``.
        """
        shares = control_guidance_start, control_guidance_end
        self.set_control(image, controlnet_conditioning_scale, *shares, guess_mode)
        return super().__call__(prompt, **call)

    def set_control(
        self,
        image: ImageInput | None,
        scale: float = 1.0,
        start: float = 0.0,
        end: float = 1.0,
        guess_mode: bool = False,
    ) -> None:
        """Set the condition of the next runs, also those of ``sample``: the arguments of ``__call__`` in its order."""
        check_number("control_guidance_start", start)
        check_number("control_guidance_end", end)
        check_number("controlnet_conditioning_scale", scale)
        if not 0 <= start < end <= 1:
            raise PixArtNBError(f"control goes from {start} to {end} of the steps; expected 0 <= start < end <= 1")
        if self.controlnet is None or self.vae is None:
            missing = "ControlNet" if self.controlnet is None else "VAE"
            raise PixArtNBError(f"this pipeline has no {missing}, which the condition image needs")
        self._control = image_array(image), scale, start, end, guess_mode

    def _network(self, schedule: StepSchedule, rows: int, height: int, width: int) -> Controlled:
        if self._control is None:
            raise PixArtNBError("set the condition, by image or by set_control, before steps are sampled")
        if self.transformer is not self.controlnet.base_model:
            raise PixArtNBError(
                "the transformer of this pipeline is not the base model of its ControlNet, so it would have no effect; "
                "load the ControlNet with load_controlnet(path, base_model=pipe.transformer)"
            )
        pixels, scale, start, end, guess_mode = self._control
        check_count("condition images", len(pixels), rows)
        check_ratio("the condition image", pixels.shape[1:3], height, width)
        control = repeated(encode_image(self.vae, resized(pixels, height, width)), rows)
        active = active_steps(len(schedule), start, end)
        return Controlled(self.controlnet, ms.Tensor(control), schedule.timesteps, scale * active, guess_mode)

    def _perturbation(self, scale: float, adaptive: float) -> None:
        if scale:
            raise PixArtNBError(f"pag_scale is {scale}; perturbed-attention guidance does not go with a ControlNet")


class PixArtAlphaControlnetPipeline(PixArtSigmaControlNetPipeline):
    """PixArt-alpha with a ControlNet, under the name of diffusers' research project: prompts of 120 tokens."""

    max_sequence_length = 120
