"""``pixart-nb plan``: what a configuration takes on this machine, before it is run, and whether it was right."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.config import InferenceConfig
from pixart_nb.core.io import read_json
from pixart_nb.core.sampling import generate as sample
from pixart_nb.viz.tables import Table, in_words

#: What the overview shows unless told.
SIZES = (256, 512, 1024, 2048, 4096)
RATIOS = (1, 2, 4)
#: A token of English has about this many letters.
_LETTERS = 4


def networks_of(config: InferenceConfig) -> tuple[Any, list[str]]:
    """The ``Networks`` of a configuration, and sentences on those that are not at hand, taken to be the published."""
    from pixart_nb.core.models.t5 import T5Config
    from pixart_nb.core.models.transformer import PixArtConfig
    from pixart_nb.core.models.vae import VAEConfig
    from pixart_nb.core.planning.memory import Networks

    notes = []
    folder = Path(config.model) if config.model else None
    here = Path(config.checkpoint).exists() if config.checkpoint else bool(folder and folder.exists())
    if here:
        transformer = sample.transformer_config(config)
    else:
        notes.append(f"{config.checkpoint or config.model} is not here: planned for PixArt-Sigma XL/2.")
        transformer = PixArtConfig(**sample.architecture_of(config))
    found = {}
    for name, kind in (("text_encoder", T5Config), ("vae", VAEConfig)):
        root = getattr(config, f"{name}_root") or (folder / name if folder else "")
        said = Path(root) / "config.json"
        found[name] = kind.from_dict(read_json(said)) if said.is_file() else kind()
        if not said.is_file():
            notes.append(f"{root or name} is not here: planned for the published {name.replace('_', ' ')}.")
    return Networks(transformer, **found), notes


def run_of(config: InferenceConfig, networks: Any) -> Any:
    """The ``Run`` of a configuration."""
    from pixart_nb.core.planning.memory import Run
    from pixart_nb.core.sampling.samplers import steps_taken

    height, width = sample.drawn_size(config, networks.transformer)
    prompts = sample.prompts_of(config)
    pictures = len(prompts) * config.nrows * config.ncols
    return Run(
        height,
        width,
        batch=1 if config.stages_path else min(config.batch_size, pictures),
        steps=steps_taken(config.sampling_steps, config.strength if config.upscale_from else 1),
        guided=config.guidance_scale > 1,
        dtype=_computed(config.dtype),
        t5_load=config.t5_load,
        tile=config.tile_size or (sample.TILE if config.stages_path else 0),
        staged=bool(config.stages_path),
        caption_tokens=_tokens(max(prompts, key=len), config),
        negative_tokens=_tokens(max(sample.negative_prompts_of(config, len(prompts)), key=len), config),
    )


def _tokens(text: str, config: InferenceConfig) -> int:
    """About how many tokens a text has: an empty one only that which ends it."""
    return min(-(-len(text) // _LETTERS) + 1, config.t5_max_length)


def _computed(dtype: str) -> str:
    """The kind of number that a network computes in on this device."""
    from pixart_nb.core.backend import dtype_from_name, ms, supported_dtype

    names = {ms.float32: "fp32", ms.float16: "fp16", ms.bfloat16: "bf16"}
    return names[supported_dtype(dtype_from_name(dtype))]


def check_memory(config: InferenceConfig) -> None:
    """Refuse a configuration that takes more memory than its limit, or than the machine has, before it is run.

    Networks that are not here cannot be judged; what is wrong with their places is said when they are loaded.
    """
    from pixart_nb.core.planning.memory import live_here
    from pixart_nb.core.planning.plan import check_fits, plan

    networks, absent = networks_of(config)
    if not absent:
        check_fits(plan(networks, run_of(config, networks), live=live_here()), memory_limit(config))


def memory_limit(config: InferenceConfig) -> float:
    """Bytes that a run may take: those that are set, or what the machine has free for this process."""
    from pixart_nb.core.memory import available, in_use

    return config.memory_limit * 1e9 or float(available() + in_use())


def planned(
    config: InferenceConfig,
    sizes: Sequence[int] = SIZES,
    ratios: Sequence[int] = RATIOS,
    dtypes: Sequence[str] = ("fp32", "fp16"),
    timed: bool = True,
) -> dict[str, Any]:
    """Everything that ``pixart-nb plan`` shows.

    ``plan``: the ``Plan`` of the configuration itself; ``overview``: rows for every size, ratio and kind of number;
    ``notes``: sentences on what was assumed, what does not fit and what the checkpoint was not trained for;
    ``calibrations`` by kind of number. ``timed`` off leaves time out.
    """
    from pixart_nb.core.planning.calibration import calibrate
    from pixart_nb.core.planning.plan import (
        DoesNotFitError,
        check_fits,
        needed_keys,
        overview,
        plan,
        warnings_of,
    )

    networks, notes = networks_of(config)
    run = run_of(config, networks)
    wanted = dict.fromkeys([run.dtype, *map(_computed, dtypes)])
    keys = needed_keys(networks.transformer, run) | {
        (size // 16) ** 2 // ratio**2 for size in sizes for ratio in ratios
    }
    largest = replace(run, height=max([run.height, *sizes]), width=max([run.width, *sizes]), batch=1)
    if timed:
        wanted = {dtype: calibrate(networks, replace(largest, dtype=dtype), keys) for dtype in wanted}
    found = plan(networks, run, wanted[run.dtype])
    try:
        check_fits(found, memory_limit(config))
    except DoesNotFitError as error:
        notes.append(str(error)[0].upper() + str(error)[1:])
    rows = overview(networks, run, sizes, ratios, wanted) if sizes else []
    return {
        "plan": found,
        "overview": rows,
        "notes": notes + warnings_of(networks.transformer, run),
        "calibrations": wanted,
    }


def checked(config: InferenceConfig, steps: int = 2, repeats: int = 1) -> list[dict[str, Any]]:
    """Draw one picture in stages with few steps, and compare: rows of planned and measured memory and seconds.

    Measuring the machine and drawing take turns, ``repeats`` times, each in a fresh process; seconds are medians.
    """
    from pixart_nb.core.planning.calibration import calibrate
    from pixart_nb.core.planning.plan import needed_keys, plan
    from pixart_nb.core.subprocesses import apart

    config = config.model_copy(
        update={"stages_path": "a folder", "sampling_steps": steps, "nrows": 1, "ncols": 1, "batch_size": 1}
    )
    networks, _ = networks_of(config)
    run = run_of(config, networks)
    found = []
    for _ in range(repeats):
        calibration = calibrate(networks, run, needed_keys(networks.transformer, run))
        measured = apart("draws the picture", drawn_for_check, config)
        found.append(compared_rows([plan(networks, run, calibration)], [measured]))
    return medians(found)


def medians(repeats: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One table of several of ``compared_rows``: medians of the seconds; memory, which does not waver, of the first."""
    times = ("planned s", "measured s", "loading s")
    return [
        same[0] | {name: float(np.median([row[name] for row in same])) for name in times}
        for same in zip(*repeats, strict=True)
    ]


def drawn_for_check(config: InferenceConfig) -> dict[str, Any]:
    """Draw the first picture of a configuration in a folder that is removed: what ``StageFiles.measured`` says."""
    with tempfile.TemporaryDirectory() as folder:
        config = config.model_copy(update={"stages_path": folder})
        prompts = sample.prompts_of(config)[:1]
        (drawing,) = sample.staged_images(config, prompts, sample.requests_of(config, 1))
        sample.show_progress([drawing], lambda names: sample.load_pipeline(config, names))
        return drawing.files.measured()


# ---- a picture that grows


def growing_rows(plans: Sequence[Any], plans_all_keys: Sequence[Any]) -> list[dict[str, Any]]:
    """The ``Plan``s of the sizes of a growing picture as rows, beside those without compression."""
    found = []
    for ours, whole in zip(plans, plans_all_keys, strict=True):
        config, run = ours.networks.transformer, ours.run
        denoise, decode = (next(s for s in ours.stages if s.name == part) for part in ("denoise", "decode"))
        found.append(
            {
                "size": f"{run.height} x {run.width}",
                "tokens": run.tokens(config),
                "keys": run.tokens(config) // config.layer_ratio(0) ** 2,
                "steps": run.steps,
                "tera multiply-adds": denoise.multiply_adds / 1e12,
                "peak GB": ours.peak / 1e9,
                "denoise s": denoise.seconds,
                "decode s": decode.seconds,
                "denoise s, all keys": next(s.seconds for s in whole.stages if s.name == "denoise"),
            }
        )
    return found


def compared_rows(plans: Sequence[Any], measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Stages of plans beside what ``StageFiles.measured`` says of the same runs, done in this order by one process."""
    found, kept = [], 0.0
    for plan, took in zip(plans, measured, strict=True):
        held = plan.held(kept)
        kept = max([kept, *(stage.activations for stage in plan.stages)])
        for stage, planned in zip(plan.stages, held, strict=True):
            found.append(
                {
                    "size": f"{plan.run.height} x {plan.run.width}",
                    "stage": stage.name,
                    "planned s": stage.seconds,
                    "measured s": took[stage.name]["seconds"],
                    "loading s": took[stage.name]["load_seconds"],
                    "planned GB": planned / 1e9,
                    "measured GB": took[stage.name]["peak_bytes"] / 1e9,
                }
            )
    return found


# ---- as text


def told(found: dict[str, Any]) -> str:
    """What ``planned`` gives, as text."""
    from pixart_nb.core.planning.counts import parameters

    plan, run = found["plan"], found["plan"].run
    sizes = {name.replace("_", " "): parameters(config) for name, config in vars(plan.networks).items()}
    lines = [f"{name}: {in_words(count)} parameters" for name, count in sizes.items()]
    parts = ", ".join(f"{name} {count / 1e9:.3g}" for name, count in plan.products.items())
    time = "" if plan.seconds is None else f", {plan.seconds:.3g} s without loading"
    tables = [
        Table(plan.rows(), f"{run.height}x{run.width}, {run.batch} at once, {run.steps} steps, {run.dtype}"),
        f"Peak memory {plan.peak / 1e9:.2f} GB{time}.",
        f"Giga multiply-adds of a step: {parts}.",
    ]
    if found["overview"]:
        tables += ["", Table(found["overview"], "Every size, compression ratio and kind of number")]
    return "\n".join([*lines, "", *map(str, tables), *("\n" + note for note in found["notes"])])


def numbers_of(found: dict[str, Any]) -> dict[str, Any]:
    """What ``planned`` gives, as JSON holds it."""
    calibrations = {dtype: c and vars(c) for dtype, c in found["calibrations"].items()}
    return {**found, "plan": found["plan"].to_dict(), "calibrations": calibrations}


def check_table(rows: list[dict[str, Any]]) -> Table:
    """What ``checked`` gives, with measured over planned."""
    ratios = [
        {
            "memory ratio": row["measured GB"] / row["planned GB"],
            "time ratio": row["measured s"] / max(row["planned s"], 1e-9),
        }
        for row in rows
    ]
    return Table([row | more for row, more in zip(rows, ratios, strict=True)], "Planned and measured")
