"""PixArt-NB: read, run, look into, finetune and scale PixArt-Sigma on MindSpore, in notebooks."""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"
_PIPELINES = ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
_SCHEDULERS = (
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
    "scheduler_named",
    "SAMPLING_METHODS",
)
_PUBLIC = dict.fromkeys(_PIPELINES, "pixart_nb.core.sampling.pipeline")
_PUBLIC |= {"T5EncoderModel": "pixart_nb.core.checkpoints.text_encoder"}
_PUBLIC |= dict.fromkeys(_SCHEDULERS, "pixart_nb.core.sampling.schedulers")
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
