"""``pixart-nb sample``: images of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pixart_nb.cli.options import config_options, start
from pixart_nb.config import INFERENCE_CONFIG, InferenceConfig, load_config

#: The option of a configuration file, for all commands that read one.
ConfigFile = Annotated[
    Path,
    typer.Option(
        "--config",
        "-c",
        metavar="file",
        help="YAML file. The options below replace its values. "
        "The defaults shown below apply to keys that the file does not set.",
    ),
]


@config_options(InferenceConfig)
def sample(
    config: ConfigFile = INFERENCE_CONFIG,
    like: Annotated[
        Path | None,
        typer.Option(metavar="file", help="Image of this command to generate again, with the options below changed."),
    ] = None,
    **options: Any,
) -> None:
    """Generate images of prompts, as PNG files that hold the settings to repeat them.

    Example: pixart-nb sample --prompt "a red mushroom on grass" -o outputs/mushroom
    """
    settings = None if like else load_config(config, "inference", options)
    if settings is not None:
        start(settings)
    from pixart_nb.core.sampling import generate

    if settings is None:
        settings = generate.like(like, **options)
        start(settings)
    for path in generate.sample(settings):
        typer.echo(path)
    typer.echo(f"{generate.seconds_of_this_process():.1f} s in all, with loading")
