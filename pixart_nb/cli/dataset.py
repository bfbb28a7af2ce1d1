"""``pixart-nb dataset``: bring in data, check it, compute its features. Thin functions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixart_nb.cli.commands import one_line_errors
from pixart_nb.config import load_config

dataset = typer.Typer(
    no_args_is_help=True, help="Bring in pictures with captions, check them, compute their features once."
)
Config = Annotated[Path, typer.Option("--config", "-c", help="Configuration file of a training.")]


@dataset.command()
def diffusiondb(
    source: Annotated[
        Path,
        typer.Option(
            help="What was downloaded: the parquet file, a zip part, metadata.parquet, or their folder."
        ),
    ],
    target: Annotated[Path, typer.Option(help="Folder for labels.json, labels_test.json and images/.")],
    max_nsfw: Annotated[
        float, typer.Option(min=0, max=2, help="Leave out pictures and prompts with a higher NSFW score.")
    ] = 0.5,
    test_count: Annotated[int, typer.Option(min=0, help="The last rows, which are kept for testing.")] = 400,
) -> None:
    """Turn diffusiondb-pixelart, in any of its published forms, into labels and pictures.

    User names are not read. Rows without a readable picture or a prompt are
    left out and named. Stopped, the same command goes on.

    Example: pixart-nb dataset diffusiondb --source 0000.parquet --target data/diffusiondb
    """
    with one_line_errors():
        from pixart_nb.core.data.diffusiondb import import_diffusiondb

        typer.echo(import_diffusiondb(source, target, max_nsfw, test_count))


@dataset.command()
def folder(
    source: Annotated[Path, typer.Option(help="Folder of pictures; image_dir of the training.")],
    captions: Annotated[
        Path | None,
        typer.Option(
            help="CSV or JSONL table of captions. Else metadata.jsonl or .csv, or cat.txt beside cat.png."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The label file; labels.json in the folder unless told."),
    ] = None,
    skip: Annotated[bool, typer.Option("--skip", help="Leave out what cannot be used, and name it.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a label file that is there.")
    ] = False,
) -> None:
    """Write the label file of your own pictures and captions, all of them checked.

    Example: pixart-nb dataset folder --source my-pictures
    """
    with one_line_errors():
        from pixart_nb.core.data.folder import import_folder

        typer.echo(import_folder(source, captions, output, skip, overwrite))


@dataset.command()
def check(config: Config) -> None:
    """Check the labels and pictures of a training, all of them, and tell the sizes that it is trained at.

    Example: pixart-nb dataset check -c configs/train/tiny.yaml
    """
    with one_line_errors():
        from pixart_nb.core.training.data import describe

        typer.echo(describe(load_config(config, "train")))


@dataset.command()
def features(
    config: Config,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures or captions computed at once.")] = 8,
    stream: Annotated[
        bool,
        typer.Option("--stream", help="Keep one layer of the text encoder at a time: less memory, slower."),
    ] = False,
) -> None:
    """Compute latents and caption embeddings once, into the feature_cache of a training's configuration.

    Only what is missing, or was made from other data or networks, is
    computed. Stopped, the same command goes on.

    Example: pixart-nb dataset features -c configs/train/tiny.yaml
    """
    with one_line_errors():
        from pixart_nb.core.training.data import write_features

        typer.echo(write_features(load_config(config, "train"), batch_size, stream))


@dataset.command()
def sample(
    target: Annotated[Path, typer.Option(help="Folder for the published files.")],
    count: Annotated[int, typer.Option(min=4, help="Number of scenes.")] = 120,
    side: Annotated[int, typer.Option(min=16, help="Height of the images in pixels.")] = 128,
) -> None:
    """Write a sample of drawn scenes in the published forms of diffusiondb-pixelart.

    Example: pixart-nb dataset sample --target outputs/finetune/raw
    """
    with one_line_errors():
        from pixart_nb.pixelart.datasets import write_sample

        typer.echo(f"wrote {write_sample(target, count, side)} images to {target}")
