"""Plan of a configuration: memory, MACs and estimated time of the run that it describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pixart_nb.config import InferenceConfig
from pixart_nb.core.backend import dtype_from_name, ms, supported_dtype
from pixart_nb.core.io import read_json
from pixart_nb.core.memory import available, in_use
from pixart_nb.core.models.t5 import T5Config
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.models.vae_blocks import VAEConfig
from pixart_nb.core.run_memory import ActivationMemory, Networks, RunSettings
from pixart_nb.core.run_plan import (
    DoesNotFitError,
    RunPlan,
    Speed,
    check_fits,
    measure_speed,
    overview,
    plan_run,
    size_warnings,
)
from pixart_nb.core.sampling import run_config
from pixart_nb.core.sampling.samplers import steps_taken
from pixart_nb.core.subprocesses import run_in_subprocess

#: Sizes in pixels and compression ratios of the overview.
SIZES = (256, 512, 1024, 2048, 4096)
RATIOS = (1, 2, 4)
#: Mean letters of an English token.
_LETTERS_PER_TOKEN = 4
_DTYPES = {ms.float32: "fp32", ms.float16: "fp16", ms.bfloat16: "bf16"}


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
        transformer = run_config.transformer_config(config)
    else:
        notes.append(f"{config.checkpoint or config.model} does not exist: planned for PixArt-Sigma XL/2.")
        transformer = PixArtConfig(**run_config.architecture_of(config))
    networks = {}
    for name, network in (("text_encoder", T5Config), ("vae", VAEConfig)):
        root = getattr(config, f"{name}_root") or (folder / name if folder else "")
        path = Path(root) / "config.json"
        networks[name] = network.from_dict(read_json(path), path) if path.is_file() else network()
        if not path.is_file():
            notes.append(f"{root or name} does not exist: planned for the published {name.replace('_', ' ')}.")
    return Networks(transformer, **networks), notes


def run_settings(config: InferenceConfig, networks: Networks) -> RunSettings:
    """Return the settings of the run that a configuration describes."""
    height, width = run_config.drawn_size(config, networks.transformer)
    prompts = run_config.prompts_of(config)
    negative = run_config.negative_prompts_of(config, len(prompts))
    images = len(prompts) * config.nrows * config.ncols
    return RunSettings(
        height,
        width,
        batch=1 if config.stages_path else min(config.batch_size, images),
        steps=steps_taken(config.sampling_steps, config.strength if config.upscale_from else 1),
        guided=config.guidance_scale > 1,
        dtype=_computed_dtype(config.dtype),
        t5_load=config.t5_load,
        tile=config.tile_size or (run_config.TILE if config.stages_path else 0),
        sequential=bool(config.stages_path),
        caption_tokens=_tokens(max(prompts, key=len), config),
        negative_tokens=_tokens(max(negative, key=len), config),
    )


def _tokens(text: str, config: InferenceConfig) -> int:
    """Estimate the tokens of a text, with the one that ends it."""
    return min(-(-len(text) // _LETTERS_PER_TOKEN) + 1, config.t5_max_length or 300)


def _computed_dtype(dtype: str) -> str:
    """Return the dtype that this device computes in."""
    return _DTYPES[supported_dtype(dtype_from_name(dtype))]


def check_memory(config: InferenceConfig) -> None:
    """Refuse a configuration that needs more memory than its limit or than is available.

    Networks that do not exist cannot be planned; loading them reports what is wrong.

    Raises:
        DoesNotFitError: names the options that would make the run fit.
    """
    networks, notes = networks_of(config)
    if not notes:
        memory = ActivationMemory.of_this_process()
        check_fits(plan_run(networks, run_settings(config, networks), memory=memory), memory_limit(config))


def memory_limit(config: InferenceConfig) -> float:
    """Return the bytes that a run may take: ``memory_limit``, or what is available to this process."""
    return config.memory_limit * 1e9 or float(available() + in_use())


def plan_config(
    config: InferenceConfig,
    sizes: Sequence[int] = SIZES,
    ratios: Sequence[int] = RATIOS,
    dtypes: Sequence[str] = ("fp32", "fp16"),
    timed: bool = True,
) -> ConfigPlan:
    """Plan a configuration, with an overview of every size, compression ratio and dtype.

    Args:
        timed: Measure one denoising step and one decoded tile per dtype, in a process of its own, and scale them.
    """
    networks, notes = networks_of(config)
    run = run_settings(config, networks)
    speeds: dict[str, Speed | None] = dict.fromkeys([run.dtype, *map(_computed_dtype, dtypes)])
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
    return ConfigPlan(plan, rows, notes + size_warnings(networks.transformer, run))


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
