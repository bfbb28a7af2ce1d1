"""Models, sampling, training and hooks on MindSpore. Names are imported on first use."""

from __future__ import annotations

from importlib import import_module

_PUBLIC = {
    "PixArtConfig": "pixart_nb.core.models.transformer",
    "PixArt": "pixart_nb.core.models.transformer",
    "load_transformer": "pixart_nb.core.checkpoints.load",
    "PixArtControlNet": "pixart_nb.core.models.controlnet",
    "load_controlnet": "pixart_nb.core.checkpoints.controlnet",
    "training_losses": "pixart_nb.core.training.loss",
    "trace": "pixart_nb.core.hooks.recorder",
    "Trace": "pixart_nb.core.hooks.trace",
    "TraceTooLargeError": "pixart_nb.core.hooks.recorder",
    "ablate_heads": "pixart_nb.core.hooks.interventions",
    "reweight_token": "pixart_nb.core.hooks.interventions",
    "replace_compression": "pixart_nb.core.hooks.interventions",
    "swap_prompt": "pixart_nb.core.hooks.interventions",
    "compression_loss": "pixart_nb.core.hooks.compression_loss",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
