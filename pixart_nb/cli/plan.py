"""``pixart-nb plan``: memory, computation and time of a run, before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixart_nb.cli.options import config_options
from pixart_nb.cli.sample import INFERENCE_CONFIG, ConfigFile
from pixart_nb.config import InferenceConfig, load_config


@config_options(InferenceConfig, without=("output_path", "imagegrid", "use_parallel", "seed", "first_image"))
def plan(
    options: dict,
    config: ConfigFile = INFERENCE_CONFIG,
    sizes: Annotated[
        list[int] | None, typer.Option(help="Image sides in pixels that the overview shows.")
    ] = None,
    ratios: Annotated[
        list[int] | None, typer.Option(help="Compression ratios that the overview shows.")
    ] = None,
    timed: Annotated[
        bool, typer.Option("--timed/--no-timed", help="Estimate the time, from a short measurement.")
    ] = True,
    output_path: Annotated[
        Path | None, typer.Option("--output-path", "-o", metavar="file", help="JSON file for all numbers.")
    ] = None,
) -> None:
    """Show what a run needs before it starts: memory by stage, multiply-accumulates, time, and how to make it fit.

    Weights that are missing are planned as the published ones.

    Example: pixart-nb plan -c configs/inference/pixart-sigma-1024-MS.yaml --dtype fp32
    """
    from pixart_nb.core.io import write_json
    from pixart_nb.core.planning import report

    settings = load_config(config, "inference", options)
    planned = report.planned(settings, sizes or report.SIZES, ratios or report.RATIOS, timed=timed)
    typer.echo(report.told(planned))
    if output_path:
        write_json(output_path, report.numbers_of(planned))
        typer.echo(output_path)
