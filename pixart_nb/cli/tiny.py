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
            metavar="size",
            help="Train on the richer drawn world instead, from weak to strong up to this image size: 128, 256, 512 or "
            "1024. Choose another output and work path for it.",
        ),
    ] = "",
) -> None:
    """Train the bundled model from scratch on drawn pixel art. The same command resumes a stopped training."""
    start()
    if stage:
        from pixart_nb.pixelart.world.stages import train_world

        train_world(folder=output_path, work=work_path, last=stage)
    else:
        from pixart_nb.pixelart.bundled_model import train_tiny

        train_tiny(folder=output_path, work=work_path)
    typer.echo(output_path)
