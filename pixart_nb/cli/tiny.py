"""``pixart-nb tiny``: the training of the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixart_nb.cli.options import start


def tiny(
    output_path: Annotated[
        Path, typer.Option("--output-path", "-o", metavar="folder", help="Folder for the trained pipeline.")
    ] = Path("data/tiny-sigma"),
    work_path: Annotated[
        Path, typer.Option(metavar="folder", help="Folder for the state of an unfinished training.")
    ] = Path("outputs/tiny"),
    stage: Annotated[
        str,
        typer.Option(
            metavar="stage",
            help="Stage to train up to, from weak to strong: 128, 256, 512 or 1024, or a stage between these.",
        ),
    ] = "256",
) -> None:
    """Train the bundled model from scratch on drawn pixel art. The same command resumes a stopped training."""
    start()
    from pixart_nb.pixelart.bundled_model import train_tiny

    train_tiny(output_path, work_path, stage)
    typer.echo(output_path)
