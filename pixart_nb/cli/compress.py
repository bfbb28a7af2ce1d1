"""``pixart-nb compress``: token compression for any checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pixart_nb.cli.convert import ModelConfigFile, SampleSize, StoredDtype, StoredDtypeOption
from pixart_nb.cli.options import config_options, start
from pixart_nb.config import ConfigError, InferenceConfig, TrainConfig, check_config

KEYS = (
    "model", "kv_compress_sampling", "kv_compress_scale_factor", "sampling_steps", "prompt", "seed", "image_height",
    "image_width", "json_path", "image_dir", "start_learning_rate", "batch_size",
)  # fmt: skip
DEFAULTS = {"kv_compress_scale_factor": 2}
#: Values of keys that a configuration needs. They stand for those of the model and of the measurement.
STAND_INS = {"model": "none", "prompt": ["none"], "image_height": 16, "image_width": 16}
ADAPTATION = ("json_path", "image_dir", "start_learning_rate", "batch_size")


@config_options(InferenceConfig, TrainConfig, only=KEYS, defaults=DEFAULTS)
def compress(
    source: Annotated[Path, typer.Option("--source", "-s", help="Checkpoint without compression, or its pipeline.")],
    target: Annotated[
        Path | None, typer.Option("--target", "-t", help="File or folder to write. By default, SOURCE-kv2.safetensors.")
    ] = None,
    kv_compress_layer: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers that compress: 14-27, or 0 2 5-7, or deep (half of them), or all.", show_default="deep"
        ),
    ] = None,
    config: ModelConfigFile = None,
    sample_size: SampleSize = None,
    dtype: StoredDtypeOption = StoredDtype.keep,
    adapt_steps: Annotated[
        int, typer.Option(min=0, help="Number of updates that lower the error. They need --model and a label file.")
    ] = 0,
    **options: Any,
) -> None:
    """Add token compression to a PixArt checkpoint, and measure how far its predictions move.

    New convolutions start as the average (PixArt-Sigma, section 3.2). The errors
    before and after the adaptation are written to TARGET.errors.json.

    Example: pixart-nb compress --source data/tiny-sigma --target outputs/kv.safetensors --model data/tiny-sigma
    """
    from pixart_nb.core.checkpoints.convert import check_default_target
    from pixart_nb.core.training import compress as compression

    options = {key: value for key, value in options.items() if value not in (None, [])}
    keys = {key: value for key, value in options.items() if key in InferenceConfig.model_fields}
    settings = check_config(DEFAULTS | STAND_INS, options=keys)
    start(settings)
    if target is None:
        default = compression.default_target(source, settings.kv_compress_scale_factor)
        target = check_default_target(default)
    report = compression.compress(
        compression.CompressOptions(
            source=source,
            target=target,
            layers=",".join(kv_compress_layer or ["deep"]),
            ratio=settings.kv_compress_scale_factor,
            operator=settings.kv_compress_sampling,
            config=config,
            sample_size=sample_size,
            dtype=dtype.value,
            model=settings.model if "model" in options else "",
            prompts=settings.prompt if "prompt" in options else (),
            steps=settings.sampling_steps,
            height=options.get("image_height", 0),
            width=options.get("image_width", 0),
            seed=settings.seed,
            adapt=_adaptation(options, adapt_steps),
        )
    )
    typer.echo(_error_table(report))
    typer.echo(f"{target}\n{target}.errors.json")


def _adaptation(options: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return the options of an adaptation of so many steps, nothing without any."""
    adapt = {key: options[key] for key in ADAPTATION if key in options}
    if adapt and not steps:
        raise ConfigError(f"{', '.join(adapt)} changes nothing without adapt_steps; give its number of updates")
    return adapt | {"steps": steps} if steps else {}


def _error_table(report: dict) -> str:
    """Return the errors of a compressed checkpoint as text."""
    from pixart_nb.viz.tables import Table

    names = ["before", "after"] if "after" in report else ["before"]
    rows = [
        {"timestep": round(timestep), **{name: report[name][k] for name in names}}
        for k, timestep in enumerate(report["timesteps"])
    ]
    mean = {"timestep": "mean", **{name: sum(report[name]) / len(report[name]) for name in names}}
    return str(Table([*rows, mean], "Relative error of the prediction against the uncompressed model"))
