"""Models, sampling, training and hooks on MindSpore. Names are imported on first use."""

from __future__ import annotations

from pixart_nb import lazy_names

_MODULES = {
    "models.transformer": ("PixArtConfig", "PixArt"),
    "checkpoints.load": ("load_transformer",),
    "models.controlnet": ("PixArtControlNet",),
    "checkpoints.controlnet": ("load_controlnet",),
    "training.loss": ("training_losses",),
    "hooks.recorder": ("trace", "TraceTooLargeError"),
    "hooks.trace": ("Trace",),
    "hooks.interventions": ("ablate_heads", "reweight_token", "replace_compression", "swap_prompt"),
    "hooks.compression_loss": ("compression_loss",),
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
