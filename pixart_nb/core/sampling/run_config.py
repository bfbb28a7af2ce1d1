"""Prompts, network configuration and size that a configuration describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pixart_nb.config import ConfigError, InferenceConfig
from pixart_nb.core.checkpoints.components import component_paths, pipeline_class
from pixart_nb.core.checkpoints.configuration import FAMILIES, describe, positions_of
from pixart_nb.core.checkpoints.files import open_checkpoint
from pixart_nb.core.checkpoints.layouts import to_official_names
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.sampling.aspect_ratio import binned_size, bins_for, checked_size

#: Default side in pixels of the tiles that runs in stages decode.
TILE = 512


def prompts_of(config: InferenceConfig) -> list[str]:
    """Return the prompts of a configuration, or the lines of its ``prompt_path`` that are not blank."""
    if not config.prompt_path:
        return list(config.prompt)
    try:
        lines = Path(config.prompt_path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt_path {config.prompt_path}: cannot be read as text ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"prompt_path {config.prompt_path} holds no prompt; expected one on each line")
    return prompts


def negative_prompts_of(config: InferenceConfig, prompts: int) -> list[str]:
    """Return the negative prompt of each of ``prompts`` prompts."""
    negative = config.negative_prompt
    texts = [negative] if isinstance(negative, str) else negative or [""]
    if len(texts) not in (1, prompts):
        raise ConfigError(f"{len(texts)} negative prompts for {prompts} prompts; expected one, or one for each")
    return texts * prompts if len(texts) == 1 else list(texts)


def max_sequence_length(config: InferenceConfig) -> int:
    """Return the number of prompt tokens: ``t5_max_length``, or that of the model's pipeline class."""
    if config.t5_max_length or not config.model:
        return config.t5_max_length or 300
    try:
        return 120 if pipeline_class(config.model) == "PixArtAlphaPipeline" else 300
    except CheckpointError:  # a model that does not exist: its loading says so
        return 300


def architecture_of(config: InferenceConfig) -> dict[str, Any]:
    """Return what a configuration says about the transformer. The checkpoint itself shows the rest."""
    tokens = max_sequence_length(config)
    fields: dict[str, Any] = {"model_max_length": tokens}
    if config.sample_size:
        fields |= positions_of(config.sample_size, FAMILIES.get(tokens, ""))
    if config.kv_compress:
        fields["kv_compress_config"] = {
            "sampling": config.kv_compress_sampling,
            "scale_factor": config.kv_compress_scale_factor,
            "kv_compress_layer": config.kv_compress_layer,
        }
    return fields


def transformer_config(config: InferenceConfig) -> PixArtConfig:
    """Return the ``PixArtConfig`` of a configuration's transformer, from the names and shapes of its tensors."""
    if config.checkpoint:
        path, explicit = Path(config.checkpoint), PixArtConfig(**architecture_of(config))
    else:
        path, explicit = component_paths(config.model, ["transformer"])["transformer"], None
    return describe(to_official_names(open_checkpoint(path)), path, explicit).config


def drawn_size(config: InferenceConfig, model: PixArtConfig | None = None) -> tuple[int, int]:
    """Return the height and width that the model works at.

    Raises ``ConfigError`` for a size that it cannot draw, or a ratio beyond the published sizes.
    """
    model = model or transformer_config(config)
    height, width = config.image_height, config.image_width
    bins = bins_for(8 * model.input_size) if config.use_resolution_binning else None
    if bins and not min(bins) <= round(height / width, 2) <= max(bins):
        nearest = binned_size(model, height, width)
        raise ConfigError(
            f"image_height and image_width are {height}x{width}, a ratio of {height / width:.3g}; the published sizes "
            f"of {8 * model.input_size} have ratios from {min(bins)} to {max(bins)}. Give a size between, for example "
            f"{nearest[0]}x{nearest[1]}, or switch use_resolution_binning off"
        )
    return (binned_size if bins else checked_size)(model, height, width)
