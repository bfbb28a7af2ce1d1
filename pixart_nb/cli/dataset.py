"""``pixart-nb dataset``: import images with captions, check them, compute their features."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from pixart_nb.cli.options import Command, config_options, start
from pixart_nb.config import TrainConfig, load_config

dataset = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Import images with captions, check them, compute their features."
)
CaptionSource = Enum("CaptionSource", {name: name for name in ("text", "file", "folder")}, type=str)
TrainingConfigFile = Annotated[
    Path,
    typer.Option(
        "--config",
        "-c",
        metavar="file",
        help="Configuration file of a training. The defaults shown below apply to keys that the file does not set.",
    ),
]


@dataset.command(cls=Command)
def sample(
    output_path: Annotated[
        Path, typer.Option("--output-path", "-o", "--target", help="Folder for the published files.")
    ],
    count: Annotated[
        int, typer.Option(min=4, max=10000, help="Number of scenes. Three quarters are drawn four times, for training.")
    ] = 120,
    side: Annotated[int, typer.Option(min=128, max=4096, help="Height of the images in pixels.")] = 256,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing data set.")] = False,
) -> None:
    """Write a sample of drawn scenes in the published forms of diffusiondb-pixelart.

    Example: pixart-nb dataset sample -o outputs/finetune/raw
    """
    from pixart_nb.pixelart.datasets import write_sample

    typer.echo(f"wrote {write_sample(output_path, count, side, overwrite)} images to {output_path}")


@dataset.command(cls=Command)
def scenes(
    output_path: Annotated[
        Path, typer.Option("--output-path", "-o", "--target", help="Folder for labels.json and the images.")
    ],
    count: Annotated[int, typer.Option(min=1, max=100_000, help="Number of scenes.")] = 2000,
    side: Annotated[int, typer.Option(min=128, max=4096, help="Sides of the images in pixels.")] = 256,
    pair_share: Annotated[float, typer.Option(min=0, max=1, help="Share of the scenes with two objects.")] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes and their captions.")] = 0,
    silent_prompts: Annotated[
        bool,
        typer.Option(
            "--silent-prompts", help="Leave sizes and positions out of the prompts, for a ControlNet to show them."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the labels of another command.")] = False,
) -> None:
    """Draw scenes that the bundled model was trained with, and their label file. No held-out scene is among them.

    Example: pixart-nb dataset scenes -o outputs/scenes
    """
    from pixart_nb.pixelart.datasets import write_training_scenes

    labels = write_training_scenes(output_path, count, side, pair_share, seed, silent_prompts, overwrite)
    typer.echo(f"wrote {count} images and {labels}")


@dataset.command(cls=Command)
def diffusiondb(
    source: Annotated[
        Path,
        typer.Option("--source", "-s", help="Downloaded parquet file, zip part or metadata.parquet, or their folder."),
    ],
    output_path: Annotated[
        Path,
        typer.Option("--output-path", "-o", "--target", help="Folder for labels.json, labels_test.json and images/."),
    ],
    max_nsfw: Annotated[
        float, typer.Option(min=0, max=2, help="Leave out images and prompts with a higher NSFW score.")
    ] = 0.5,
    test_count: Annotated[int, typer.Option(min=0, help="Number of last rows that are kept for testing.")] = 400,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the labels of another import.")] = False,
) -> None:
    """Convert diffusiondb-pixelart, in any of its published forms, into labels and images.

    User names are not read. Rows without a readable image or a prompt are left
    out and named. The same command resumes a stopped import.

    Example: pixart-nb dataset diffusiondb --source 0000.parquet -o data/diffusiondb-pixelart
    """
    from pixart_nb.core.data.diffusiondb import import_diffusiondb

    typer.echo(import_diffusiondb(source, output_path, max_nsfw, test_count, overwrite))


@dataset.command(cls=Command)
def folder(
    source: Annotated[Path, typer.Option("--source", "-s", help="Folder of images, the image_dir of the training.")],
    captions: Annotated[
        Path | None,
        typer.Option(
            help="CSV, JSON or parquet table. By default metadata.jsonl, .csv or .parquet, or cat.txt beside cat.png."
        ),
    ] = None,
    output_path: Annotated[
        Path | None,
        typer.Option("--output-path", "-o", help="Label file to write. By default, labels.json in the folder."),
    ] = None,
    caption_from: Annotated[
        CaptionSource, typer.Option(help="Captions are texts, or the names of the image files or their folders.")
    ] = CaptionSource.text,
    skip: Annotated[bool, typer.Option("--skip", help="Leave out what cannot be used, and name it.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing label file.")] = False,
) -> None:
    """Write the label file of your own images and captions, and check all of them.

    Example: pixart-nb dataset folder --source my-images
    """
    from pixart_nb.core.data.folder import import_folder

    typer.echo(import_folder(source, captions, output_path, skip, overwrite, caption_from.value))


@dataset.command(cls=Command)
@config_options(TrainConfig)
def check(config: TrainingConfigFile, **options: Any) -> None:
    """Check all labels and images of a training, and list the resolutions that it trains at.

    Example: pixart-nb dataset check -c configs/train/tiny.yaml
    """
    from pixart_nb.core.training.data import describe

    typer.echo(describe(load_config(config, "train", options)))


@dataset.command(cls=Command)
@config_options(TrainConfig, without=("batch_size",))
def features(
    config: TrainingConfigFile,
    batch_size: Annotated[int, typer.Option(min=1, max=4096, help="Number of images or captions per batch.")] = 8,
    stream: Annotated[
        bool, typer.Option("--stream", help="Load T5 one layer at a time, which needs less memory and takes longer.")
    ] = False,
    **options: Any,
) -> None:
    """Compute latents and caption embeddings once, into the feature_cache of a training configuration.

    Only missing features are computed; those of other data or networks are
    kept. The same command resumes.

    Example: pixart-nb dataset features -c configs/train/tiny-512.yaml
    """
    settings = load_config(config, "train", options)
    start(settings)
    from pixart_nb.core.training.data import write_features

    typer.echo(write_features(settings, batch_size, stream))
