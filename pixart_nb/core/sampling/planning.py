"""The run that a configuration describes: prompts, networks, size, and a plan of memory, MACs and estimated time."""

from __future__ import annotations

import warnings
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pixart_nb.config import ConfigError, InferenceConfig, bundled_path
from pixart_nb.core.backend import on_ascend
from pixart_nb.core.checkpoints.components import component_paths, pipeline_class
from pixart_nb.core.checkpoints.configuration import FAMILIES, describe, explicit_values, positions_of
from pixart_nb.core.checkpoints.files import open_checkpoint
from pixart_nb.core.checkpoints.key_maps import to_official_names
from pixart_nb.core.checkpoints.load import t5_config, vae_config
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.memory import available, in_use, run_in_subprocess
from pixart_nb.core.models.low_precision import inference_dtype_name
from pixart_nb.core.models.t5 import T5Config
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.models.vae_blocks import VAEConfig
from pixart_nb.core.run_plan import (
    DoesNotFitError,
    Networks,
    RunPlan,
    RunSettings,
    Speed,
    check_fits,
    measure_speed,
    overview,
    plan_run,
    process_memory,
    size_warnings,
)
from pixart_nb.core.sampling.guidance import perturbed_layers
from pixart_nb.core.sampling.images import binned_size, bins_for, checked_size
from pixart_nb.core.sampling.samplers import active_steps, steps_taken
from pixart_nb.core.sampling.text import card_header, per_prompt

#: Default side in pixels of the tiles that runs in stages decode.
TILE = 512
#: Sizes in pixels and compression ratios of the overview.
SIZES = (256, 512, 1024, 2048, 4096)
RATIOS = (1, 2, 4)
#: Mean letters of an English token.
_LETTERS_PER_TOKEN = 4
#: Copied blocks of PixArt-delta's ControlNet.
_PUBLISHED_COPIES = 13


def prompts_of(config: InferenceConfig) -> list[str]:
    """Return the prompts of a configuration, or the lines of its ``prompt_path`` that are not blank."""
    if not config.prompt_path:
        return list(config.prompt)
    try:
        lines = Path(config.prompt_path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        reason = f"{error.strerror}" if isinstance(error, OSError) else f"{error}; save it as UTF-8"
        raise ConfigError(f"prompt_path {config.prompt_path}: cannot be read as text ({reason})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"prompt_path {config.prompt_path} holds no prompt; expected one on each line")
    return prompts


def max_sequence_length(config: InferenceConfig) -> int:
    """Return the number of prompt tokens: ``t5_max_length``, or that of the model's pipeline class."""
    if config.t5_max_length or not config.model:
        return config.t5_max_length or 300
    try:
        return 120 if pipeline_class(config.model) == "PixArtAlphaPipeline" else 300
    except CheckpointError:  # a model that does not exist: its loading says so
        return 300


def stated_config(config: InferenceConfig) -> PixArtConfig:
    """Return what a configuration says about the transformer but for ``sample_size``. The checkpoint shows the rest."""
    fields: dict[str, Any] = {"model_max_length": max_sequence_length(config)}
    if config.kv_compress:
        fields["kv_compress_config"] = config.kv_compress_config
    return PixArtConfig(**fields)


def architecture_of(config: InferenceConfig) -> dict[str, Any]:
    """Return what a configuration says about the transformer, with the positions of ``sample_size``."""
    fields = explicit_values(stated_config(config))
    if config.sample_size:
        fields |= positions_of(config.sample_size, FAMILIES.get(fields["model_max_length"], ""))
    return fields


def transformer_config(config: InferenceConfig) -> PixArtConfig:
    """Return the ``PixArtConfig`` of a configuration's transformer, from the names and shapes of its tensors."""
    if config.checkpoint:
        path, stated = Path(config.checkpoint), (stated_config(config), config.sample_size or None)
    else:
        path, stated = component_paths(config.model, ["transformer"])["transformer"], ()
    return describe(to_official_names(open_checkpoint(path)), path, *stated).config


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


# ---- memory and time


@dataclass(frozen=True)
class ConfigPlan:
    """Plan of a configuration, an overview of other sizes, and notes on assumptions and limits."""

    plan: RunPlan
    overview: list[dict[str, Any]]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {"plan": self.plan.to_dict(), "overview": self.overview, "notes": self.notes}


def networks_of(config: InferenceConfig) -> tuple[Networks, list[str]]:
    """Return the networks of a configuration, and a note on each that is missing and taken to be the published one."""
    notes = []
    folder = Path(config.model) if config.model else None
    if Path(config.checkpoint).exists() if config.checkpoint else bool(folder and folder.exists()):
        transformer = transformer_config(config)
    else:
        notes.append(f"{config.checkpoint or config.model} does not exist: planned for PixArt-Sigma XL/2.")
        transformer = PixArtConfig(**architecture_of(config))
    networks = {}
    for name, published, config_of in (("text_encoder", T5Config, t5_config), ("vae", VAEConfig, vae_config)):
        root = Path(getattr(config, f"{name}_root") or (folder / name if folder else ""))
        exists = root.is_file() or (root / "config.json").is_file()
        networks[name] = config_of(root) if exists else published()
        if not exists:
            notes.append(
                f"{root if root.name else name} does not exist: planned for the published {name.replace('_', ' ')}."
            )
    if config.controlnet:
        from pixart_nb.core.checkpoints.controlnet import copied_blocks  # a run without one does not need it

        copies = _PUBLISHED_COPIES
        if Path(config.controlnet).exists():
            copies = copied_blocks(config.controlnet)
        else:
            notes.append(f"{config.controlnet} does not exist: planned for a ControlNet of {copies} copied blocks.")
        transformer = replace(transformer, copy_blocks_num=copies)
    return Networks(transformer, **networks), notes


def run_settings(config: InferenceConfig, networks: Networks) -> RunSettings:
    """Return the settings of the run that a configuration describes."""
    height, width = drawn_size(config, networks.transformer)
    prompts = prompts_of(config)
    negative = per_prompt(config.negative_prompt, len(prompts))
    images = len(prompts) * config.nrows * config.ncols
    steps = steps_taken(config.sampling_steps, config.strength if config.upscale_from or config.image else 1)
    layers = config.pag_applied_layers if config.pag_scale else ()
    controlled = active_steps(steps, config.control_guidance_start, config.control_guidance_end)
    return RunSettings(
        height,
        width,
        batch=1 if config.stages_path else min(config.batch_size, images),
        steps=steps,
        guided=config.guidance_scale > 1,
        dtype=inference_dtype_name(config.dtype),
        t5_load=config.t5_load,
        tile=config.tile_size or (TILE if config.stages_path else 0),
        sequential=bool(config.stages_path),
        caption_tokens=_tokens(max(prompts, key=len), config),
        negative_tokens=_tokens(max(negative, key=len), config),
        perturbed=perturbed_layers(networks.transformer.depth, layers),
        controlled_steps=int(controlled.sum()),
        guess_mode=config.guess_mode,
        images=int(bool(config.controlnet or config.image)),
    )


def _tokens(text: str, config: InferenceConfig) -> int:
    """Estimate the tokens of a text, with the one that ends it."""
    return min(-(-len(text) // _LETTERS_PER_TOKEN) + 1, config.t5_max_length or 300)


def check_run(config: InferenceConfig, keys: Container[str] | None = None) -> None:
    """Refuse a configuration that needs more memory than its limit or than is available.

    Warn of images that are resized, or of a size that the model was not trained for.

    Networks that do not exist cannot be planned; loading them reports what is wrong.

    Args:
        keys: Configuration keys that the user can set, and the message may name; None for all.

    Raises:
        DoesNotFitError: names the options that would make the run fit.
    """
    networks, notes = networks_of(config)
    if not notes:
        run = run_settings(config, networks)
        check_fits(plan_run(networks, run, process=process_memory()), memory_limit(config), keys)
        for sentence in _size_notes(config, networks, run):
            warnings.warn(sentence, stacklevel=2)


def _size_notes(config: InferenceConfig, networks: Networks, run: RunSettings) -> list[str]:
    """Return sentences about images that are generated at another size, or far from the sizes of the training."""
    notes, (height, width) = [], (config.image_height, config.image_width)
    if (run.height, run.width) != (height, width):
        notes.append(
            f"Images of {height}x{width} are generated at {run.height}x{run.width}, the published resolution with the "
            "nearest ratio, and resized. With use_resolution_binning False they are generated at their own size."
        )
    return notes + size_warnings(networks.transformer, run, trained_sizes(config))


def trained_sizes(config: InferenceConfig) -> Sequence[int]:
    """Return the sides in pixels of the images of the model's training, if its card lists them."""
    return () if config.checkpoint else card_header(bundled_path(config.model) / "README.md").sizes


def memory_limit(config: InferenceConfig) -> float:
    """Return the bytes that a run may take: ``memory_limit``, or what is available to this process on its device."""
    held = 0 if on_ascend() else in_use()  # there the process is in the memory of the host
    return config.memory_limit * 1e9 or float(available() + held)


def plan_config(
    config: InferenceConfig, sizes: Sequence[int] = SIZES, ratios: Sequence[int] = RATIOS, timed: bool = True
) -> ConfigPlan:
    """Plan a configuration, with an overview of every size, compression ratio and dtype.

    Args:
        timed: Measure one denoising step and one decoded tile per dtype, in a process of its own, and scale them.
    """
    networks, notes = networks_of(config)
    run = run_settings(config, networks)
    speeds: dict[str, Speed | None] = dict.fromkeys([run.dtype, *map(inference_dtype_name, ("fp32", "fp16"))])
    if timed:
        speeds = {
            dtype: run_in_subprocess("measures the speed", measure_speed, networks, replace(run, dtype=dtype))
            for dtype in speeds
        }
    plan = plan_run(networks, run, speeds[run.dtype])
    try:
        check_fits(plan, memory_limit(config))
    except DoesNotFitError as error:
        notes.append(str(error)[0].upper() + str(error)[1:])
    rows = overview(networks, run, sizes, ratios, speeds) if sizes else []
    return ConfigPlan(plan, rows, notes + _size_notes(config, networks, run))


def measured_rows(plans: Sequence[RunPlan], measurements: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return table rows of planned memory beside measured memory and time, for runs in stages in one process.

    Args:
        measurements: For each plan, stage -> ``seconds``, ``load_seconds``, ``peak_bytes``.
    """
    rows, kept = [], 0.0
    for plan, measured in zip(plans, measurements, strict=True):
        held = plan.held(kept)
        kept = max([kept, *(stage.activations for stage in plan.stages)])
        rows += [
            {
                "size": f"{plan.run.height} x {plan.run.width}",
                "stage": stage.name,
                "seconds": measured[stage.name]["seconds"],
                "loading seconds": measured[stage.name]["load_seconds"],
                "planned GB": planned / 1e9,
                "measured GB": measured[stage.name]["peak_bytes"] / 1e9,
            }
            for stage, planned in zip(plan.stages, held, strict=True)
        ]
    return rows
