"""``pixart-nb plan`` and ``pixart-nb compress``. Thin functions."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pixart_nb.cli.commands import one_line_errors
from pixart_nb.cli.options import with_key_options
from pixart_nb.config import InferenceConfig, load_config
from pixart_nb.core.io import write_json

Operator = StrEnum("Operator", {name: name for name in ("conv", "ave", "uniform", "mean")})
StoredDtype = StrEnum("StoredDtype", {name: name for name in ("keep", "fp32", "fp16", "bf16")})


@with_key_options(InferenceConfig)
def plan(
    given: dict,
    config: Annotated[
        Path, typer.Option("--config", "-c", help="Configuration file; the options below replace its values.")
    ] = Path("configs/inference/tiny.yaml"),
    sizes: Annotated[
        list[int] | None,
        typer.Option(help="A side in pixels that the overview shows; give it again for more."),
    ] = None,
    ratios: Annotated[
        list[int] | None, typer.Option(help="A compression ratio that it shows; give it again for more.")
    ] = None,
    timed: Annotated[
        bool,
        typer.Option(
            "--timed/--no-timed",
            help="Calibrate on this machine: half a minute, with the published networks two.",
        ),
    ] = True,
    check: Annotated[
        bool, typer.Option("--check", help="Draw one picture in two steps and compare with what was planned.")
    ] = False,
    repeats: Annotated[
        int, typer.Option(min=1, help="How often --check measures and draws; the table has medians.")
    ] = 1,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file of all numbers.")] = None,
) -> None:
    """Tell what a run takes before it is begun: memory by stage, multiply-adds, time; what would make it fit.

    The checkpoint need not be here: what is missing is planned as published.

    Example: pixart-nb plan -c configs/inference/pixart-sigma-1024-MS.yaml --dtype fp32
    """
    with one_line_errors():
        from pixart_nb.core.planning import report as command

        settings = load_config(config, "inference", given)
        if check:
            rows = command.checked(settings, repeats=repeats)
            typer.echo(command.check_table(rows))
            numbers = {"config": settings.model_dump(), "repeats": repeats, "checks": rows}
        else:
            found = command.planned(settings, sizes or command.SIZES, ratios or command.RATIOS, timed=timed)
            typer.echo(command.told(found))
            numbers = command.numbers_of(found)
        if output:
            write_json(output, numbers)
            typer.echo(output)


@with_key_options(InferenceConfig)
def grow(
    given: dict,
    config: Annotated[
        Path, typer.Option("--config", "-c", help="Configuration file; the options below replace its values.")
    ] = Path("configs/inference/tiny.yaml"),
    factors: Annotated[
        list[int] | None,
        typer.Option(
            help="The sizes, as what the picture's is divided by, falling to 1; by default powers of 2."
        ),
    ] = None,
    strengths: Annotated[
        list[float] | None,
        typer.Option(help="Share of the steps that is taken at each size but the first."),
    ] = None,
    keys: Annotated[
        int, typer.Option(min=1, help="Keys that a side of the picture is shrunk to at every size.")
    ] = 8,
) -> None:
    """Draw a large picture with a model of small ones: small first, then enlarged and drawn anew in part.

    Of the first prompt. It works in stages whose state is kept: the same
    command goes on where it was stopped. Writes picture.png, and zoom.html to look around in it.

    Example: pixart-nb grow --image-height 1024 --image-width 1024 --prompt "a red mushroom in a forest"
    """
    with one_line_errors():
        from pixart_nb.core.sampling import generate_stages as large
        from pixart_nb.viz.tables import Table

        settings = load_config(config, "inference", given)
        paths, rows = large.grow(settings, factors or (), strengths or (), keys)
        columns = ["size", "stage", "measured s", "loading s", "planned GB", "measured GB"]
        typer.echo(Table([{name: row[name] for name in columns} for row in rows], "What it took"))
        typer.echo("\n".join(map(str, paths)))


def compress(
    source: Annotated[
        Path, typer.Option(help="Checkpoint without compression, or the folder of its pipeline.")
    ],
    target: Annotated[
        Path | None,
        typer.Option(help="What to write, as `convert` does; else SOURCE-kv2.safetensors beside the source."),
    ] = None,
    layers: Annotated[
        str,
        typer.Option(help="Which layers: 14-27, 0,2,5-7, deep (the half that the paper compresses) or all."),
    ] = "deep",
    ratio: Annotated[int, typer.Option(min=2, help="Shrinking of keys and values in each direction.")] = 2,
    operator: Annotated[
        Operator, typer.Option(help="How cells become one token; conv learns it.")
    ] = Operator.conv,
    config: Annotated[
        Path | None, typer.Option(help="JSON with what the tensors do not show, as for `convert`.")
    ] = None,
    sample_size: Annotated[int | None, typer.Option(min=1, help="Latent side of the training size.")] = None,
    dtype: Annotated[StoredDtype, typer.Option(help="Kind of numbers that is written.")] = StoredDtype.keep,
    model: Annotated[
        str, typer.Option(help="Pipeline whose text encoder reads the prompts; else latents are random.")
    ] = "",
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to measure the error on; give it again for more.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the run that it is measured along.")] = 20,
    height: Annotated[int, typer.Option(min=0, help="Height of its pictures; 0 is the model's own.")] = 0,
    width: Annotated[int, typer.Option(min=0, help="Width of its pictures.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of its noise.")] = 0,
    adapt_steps: Annotated[
        int,
        typer.Option(min=0, help="Train so many steps to lower the error; needs --model and a label file."),
    ] = 0,
    json_path: Annotated[Path | None, typer.Option(help="Label file of that training.")] = None,
    image_dir: Annotated[Path | None, typer.Option(help="Folder of its pictures.")] = None,
    learning_rate: Annotated[float, typer.Option(min=0, help="Its learning rate.")] = 2e-5,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures of a step.")] = 8,
) -> None:
    """Make any PixArt checkpoint compress keys and values, and tell how far its predictions move.

    New convolutions start as the average (PixArt-Sigma, section 3.2). The error
    at every timestep, before and after the adaptation, is printed and written
    as TARGET.errors.json.

    Example: pixart-nb compress --source data/tiny-sigma --target outputs/kv.safetensors --model data/tiny-sigma
    """
    with one_line_errors():
        from pixart_nb.core.training import compress as command

        target = target or command.default_target(source, ratio)
        adapt = {}
        if adapt_steps:
            adapt = {"steps": adapt_steps, "start_learning_rate": learning_rate, "batch_size": batch_size}
            adapt |= {"json_path": str(json_path or ""), "image_dir": str(image_dir or "")}
        report = command.compress(
            command.Compression(
                source=source,
                target=target,
                layers=layers,
                ratio=ratio,
                operator=operator.value,
                config=config,
                sample_size=sample_size,
                dtype=dtype.value,
                model=model,
                prompts=prompt or (),
                steps=steps,
                height=height,
                width=width,
                seed=seed,
                adapt=adapt,
            )
        )
        typer.echo(command.table(report))
        typer.echo(f"{target}\n{target}.errors.json")
