"""``pixart-nb plan``: memory, computation and time of a run, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pixart_nb.cli.options import config_options, start
from pixart_nb.cli.sample import ConfigFile
from pixart_nb.config import INFERENCE_CONFIG, InferenceConfig, load_config


@config_options(InferenceConfig, without=("output_path", "imagegrid", "use_parallel", "seed", "first_image"))
def plan(
    config: ConfigFile = INFERENCE_CONFIG,
    sizes: Annotated[list[int] | None, typer.Option(help="Image sides in pixels that the overview shows.")] = None,
    ratios: Annotated[list[int] | None, typer.Option(help="Compression ratios that the overview shows.")] = None,
    timed: Annotated[
        bool, typer.Option("--timed/--no-timed", help="Estimate the time from one measured step and tile.")
    ] = True,
    output_path: Annotated[
        Path | None, typer.Option("--output-path", "-o", metavar="file", help="JSON file for all numbers.")
    ] = None,
    **options: Any,
) -> None:
    """Show what a run needs before it starts: memory by stage, multiply-accumulates, time, and how to make it fit.

    Weights that are missing are planned as the published ones.

    Example: pixart-nb plan -c configs/inference/pixart-sigma-1024-MS.yaml --dtype fp32
    """
    settings = load_config(config, "inference", options)
    start(settings)
    from pixart_nb.core.io import ensure_writable, write_json
    from pixart_nb.core.sampling.planning import RATIOS, SIZES, plan_config

    if output_path:
        ensure_writable(output_path.parent)
    planned = plan_config(settings, sizes or SIZES, ratios or RATIOS, timed=timed)
    typer.echo(report(planned))
    if output_path:
        write_json(output_path, planned.to_dict())
        typer.echo(output_path)


def report(planned: Any) -> str:
    """Return a ``ConfigPlan`` as text."""
    from pixart_nb.viz.tables import in_words

    plan, run = planned.plan, planned.plan.run
    networks = {name.replace("_", " "): count for name, count in plan.networks.parameters().items()}
    stages = [
        {
            "stage": stage.name,
            "weights GB": stage.weights / 1e9,
            "activations GB": stage.activations / 1e9,
            "tera MACs": stage.macs / 1e12,
            "estimated seconds": stage.seconds,
        }
        for stage in plan.stages
    ]
    parts = ", ".join(f"{name} {count / 1e9:.3g}" for name, count in plan.step_macs.items())
    title = f"{run.height}x{run.width}, batch {run.batch}, {run.steps} steps, {run.dtype}"
    lines = [
        *(f"{name}: {in_words(count)} parameters" for name, count in networks.items()),
        "",
        _table(stages, title),
        f"Peak memory: {plan.peak / 1e9:.2f} GB.",
        f"Giga MACs of one step: {parts}.",
    ]
    if planned.overview:
        lines += ["", _table(planned.overview, "Overview by size, compression ratio and dtype")]
    return "\n".join([*lines, *("\n" + note for note in planned.notes)])


def _table(rows: list[dict], caption: str) -> str:
    """Return rows as text, without the columns that have no value, such as times that were not estimated."""
    from pixart_nb.viz.tables import Table

    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return str(Table(rows, caption, columns))
