"""PixArt-NB: a Jupyter research kit for PixArt-Sigma on MindSpore.

Names are imported on first use, so that ``import pixart_nb`` is quick. More is in ``pixart_nb.core``
(models, sampling, training, hooks), ``pixart_nb.viz`` (figures, widgets) and ``pixart_nb.pixelart`` (the drawn world of
the bundled model).
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.2.0"

_MODULES = {
    # pipelines, their components and schedulers
    "core.sampling.pipeline": ("PixArtSigmaPipeline", "PixArtAlphaPipeline", "PixArtSigmaPAGPipeline"),
    "core.sampling.controlnet": ("PixArtSigmaControlNetPipeline", "PixArtAlphaControlnetPipeline"),
    "core.sampling.editing": ("PixArtSigmaImg2ImgPipeline", "PixArtSigmaInpaintPipeline"),
    "core.checkpoints.components": ("T5EncoderModel",),
    "core.sampling.schedulers": (
        "DPMSolverMultistepScheduler",
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "UniPCMultistepScheduler",
        "LCMScheduler",
        "DMDScheduler",
        "IDDPMScheduler",
        "OfficialDDIMScheduler",
        "DPMSolverContinuousScheduler",
        "SASolverScheduler",
        "DPMSolverSinglestepScheduler",
        "DEISMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "LMSDiscreteScheduler",
        "DDPMScheduler",
        "PNDMScheduler",
        "scheduler_named",
        "SAMPLING_METHODS",
    ),
    # tracing and interventions
    "core.hooks.recorder": ("trace",),
    "core.hooks.trace": ("Trace",),
    "core.hooks.interventions": ("ablate_heads", "reweight_token", "replace_compression", "swap_prompt"),
    # training
    "core.training.run": ("Training", "train"),
    "core.lora": ("LoraConfig",),
    # checkpoints and conversion
    "core.models.transformer": ("PixArtConfig",),
    "core.checkpoints.load": ("load_transformer",),
    "core.checkpoints.controlnet": ("load_controlnet",),
    "core.models.controlnet": ("PixArtControlNet",),
    "core.checkpoints.convert": ("plan_conversion", "convert"),
    # figures and widgets
    "viz.figures": ("image_grid", "comparison_grid", "film_strip", "save_figure"),
    "viz.curves": ("training_curves",),
    "viz.attention": ("word_heat_maps",),
    "viz.playground": ("Playground",),
    "viz.attention_explorer": ("AttentionExplorer",),
    "viz.compression_explorer": ("CompressionExplorer",),
}
_PUBLIC = {name: f"pixart_nb.{module}" for module, names in _MODULES.items() for name in names}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
