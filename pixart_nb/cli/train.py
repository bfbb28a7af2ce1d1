"""``pixart-nb train``: finetuning, LoRA, ControlNet, distillation and weak-to-strong training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from pixart_nb.cli.options import config_options, start
from pixart_nb.cli.sample import ConfigFile
from pixart_nb.config import TrainConfig, load_config


@config_options(TrainConfig)
def train(config: ConfigFile = Path("configs/train/tiny.yaml"), **options: Any) -> None:
    """Train the transformer, a LoRA or a ControlNet on images with captions. The same command resumes a training.

    Writes checkpoints, curve.csv, validation images and, at the end, the folder
    pipeline, lora or controlnet, which `sample` takes as --model, --lora or
    --controlnet. On several devices, run it under msrun with --use_parallel True.

    Example: pixart-nb train -c configs/train/tiny.yaml --steps 40
    """
    settings = load_config(config, "train", options)
    start(settings)
    from pixart_nb.core.training import run

    if result := run.train(settings):
        typer.echo(result)
