"""PixArt-NB: a Jupyter research kit for PixArt-Sigma on MindSpore.

Names are imported on first use, so that ``import pixart_nb`` is quick. More is in ``pixart_nb.core``
(models, sampling, training, hooks), ``pixart_nb.viz`` (figures, widgets) and ``pixart_nb.pixelart`` (the drawn world of
the bundled model).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

__version__ = "0.2.0"


def lazy_names(package: str, modules: Mapping[str, Sequence[str]]) -> tuple:
    """Return ``__getattr__``, ``__dir__`` and ``__all__`` of a package whose names are imported on first use.

    ``modules``: module of the package -> its public names.
    """
    public = {name: f"{package}.{module}" for module, names in modules.items() for name in names}

    def load(name: str):
        if name not in public:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(public[name]), name)

    return load, lambda: sorted({*vars(sys.modules[package]), *public}), list(public)


_MODULES = {
    # pipelines, their components and schedulers
    "core.sampling.pipeline": ("PixArtSigmaPipeline", "PixArtAlphaPipeline", "PixArtSigmaPAGPipeline"),
    "core.sampling.controlnet": ("PixArtSigmaControlNetPipeline", "PixArtAlphaControlnetPipeline"),
    "core.sampling.editing": ("PixArtSigmaImg2ImgPipeline", "PixArtSigmaInpaintPipeline"),
    "core.checkpoints.components": (
        "PixArtTransformer2DModel",
        "Transformer2DModel",
        "AutoencoderKL",
        "T5EncoderModel",
    ),
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
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
__all__ += ["__version__"]
