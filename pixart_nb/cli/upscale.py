"""``pixart-nb upscale``: a large image with a model of small ones."""

from __future__ import annotations

from typing import Annotated

import typer

from pixart_nb.cli.options import config_options
from pixart_nb.cli.sample import INFERENCE_CONFIG, ConfigFile
from pixart_nb.config import InferenceConfig, load_config


@config_options(
    InferenceConfig, without=("upscale_from", "strength", "imagegrid", "nrows", "ncols", "batch_size")
)
def upscale(
    options: dict,
    config: ConfigFile = INFERENCE_CONFIG,
    factors: Annotated[
        list[int] | None,
        typer.Option(help="Divisors of the final size, falling to 1. Powers of 2 by default."),
    ] = None,
    strengths: Annotated[
        list[float] | None,
        typer.Option(help="Share of the denoising steps at each size but the first."),
    ] = None,
    keys: Annotated[
        int,
        typer.Option(
            min=1, help="Number of keys per side that self-attention is compressed to at every size."
        ),
    ] = 8,
) -> None:
    """Generate a large image by progressive upscaling: small first, then upscaled and denoised again.

    Uses the first prompt. Works in resumable stages: the same command resumes
    where it was stopped. Writes the image, and zoom.html to look around in it.

    Example: pixart-nb upscale --image_height 1024 --image_width 1024 --prompt "a red mushroom in a forest"
    """
    from pixart_nb.core.sampling import generate_stages
    from pixart_nb.viz.tables import Table

    settings = load_config(config, "inference", options)
    paths, rows = generate_stages.grow(settings, factors or (), strengths or (), keys)
    columns = ["size", "stage", "measured s", "loading s", "planned GB", "measured GB"]
    typer.echo(Table([{name: row[name] for name in columns} for row in rows], "Time and memory"))
    typer.echo("\n".join(map(str, paths)))
