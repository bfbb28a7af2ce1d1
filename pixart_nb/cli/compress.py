"""``pixart-nb compress``: token compression for any checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixart_nb.cli.convert import ModelConfigFile, SampleSize, Stored, StoredDtype
from pixart_nb.cli.options import config_options
from pixart_nb.config import InferenceConfig

KEYS = ("model", "kv_compress_sampling", "kv_compress_scale_factor", "sampling_steps", "prompt", "seed")
ADAPTATION = "Adaptation"


@config_options(InferenceConfig, only=KEYS)
def compress(
    options: dict,
    source: Annotated[
        Path, typer.Option("--source", "-s", help="Checkpoint without compression, or its pipeline.")
    ],
    target: Annotated[
        Path | None,
        typer.Option("--target", "-t", help="File or folder to write. By default, SOURCE-kv2.safetensors."),
    ] = None,
    kv_compress_layer: Annotated[
        list[str] | None,
        typer.Option(
            help="Layers that compress: 14-27, or 0 2 5-7, or deep (the half that the paper compresses), or all.",
            rich_help_panel="Token compression",
            show_default="deep",
        ),
    ] = None,
    config: ModelConfigFile = None,
    sample_size: SampleSize = None,
    dtype: Stored = StoredDtype.keep,
    image_height: Annotated[
        int,
        typer.Option(
            min=0,
            max=16384,
            help="Height of the images that the error is measured on.",
            show_default="the model's own",
        ),
    ] = 0,
    image_width: Annotated[
        int, typer.Option(min=0, max=16384, help="Width of these images.", show_default="the model's own")
    ] = 0,
    adapt_steps: Annotated[
        int,
        typer.Option(
            min=0,
            help="Updates that lower the error; need --model and a label file.",
            rich_help_panel=ADAPTATION,
        ),
    ] = 0,
    json_path: Annotated[
        Path | None, typer.Option(help="Label file of the adaptation.", rich_help_panel=ADAPTATION)
    ] = None,
    image_dir: Annotated[
        Path | None, typer.Option(help="Folder of its images.", rich_help_panel=ADAPTATION)
    ] = None,
    start_learning_rate: Annotated[
        float, typer.Option(min=0, help="Its learning rate.", rich_help_panel=ADAPTATION)
    ] = 2e-5,
    batch_size: Annotated[
        int, typer.Option(min=1, max=4096, help="Its batch size.", rich_help_panel=ADAPTATION)
    ] = 8,
) -> None:
    """Add token compression to a PixArt checkpoint, and measure how far its predictions move.

    New convolutions start as the average (PixArt-Sigma, section 3.2). The error
    at every timestep, before and after the adaptation, is printed and written
    to TARGET.errors.json.

    Example: pixart-nb compress --source data/tiny-sigma --target outputs/kv.safetensors --model data/tiny-sigma
    """
    from pixart_nb.core.training import compress as compression

    options = {"kv_compress_sampling": "conv", "kv_compress_scale_factor": 2} | options
    target = target or compression.default_target(source, options["kv_compress_scale_factor"])
    adapt = {}
    if adapt_steps:
        adapt = {"steps": adapt_steps, "start_learning_rate": start_learning_rate, "batch_size": batch_size}
        adapt |= {"json_path": str(json_path or ""), "image_dir": str(image_dir or "")}
    report = compression.compress(
        compression.CompressOptions(
            source=source,
            target=target,
            layers=",".join(kv_compress_layer or ["deep"]),
            ratio=options["kv_compress_scale_factor"],
            operator=options["kv_compress_sampling"],
            config=config,
            sample_size=sample_size,
            dtype=dtype.value,
            model=options.get("model", ""),
            prompts=options.get("prompt", ()),
            steps=options.get("sampling_steps", 20),
            height=image_height,
            width=image_width,
            seed=options.get("seed", 0),
            adapt=adapt,
        )
    )
    typer.echo(_error_table(report))
    typer.echo(f"{target}\n{target}.errors.json")


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
