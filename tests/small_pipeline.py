"""A pipeline whose transformer is small enough to be trained in a test; its other parts are the bundled model's."""

import json
import os

import numpy as np

from pixart_nb.config import check_config
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import components
from pixart_nb.core.models.transformer import PixArt, PixArtConfig
from pixart_nb.core.sampling.schedulers import scheduler_named

CONFIG = PixArtConfig(
    hidden_size=48, num_heads=4, depth=2, caption_channels=128, input_size=8, pe_interpolation=1.0, model_max_length=300
)


def write_small_pipeline(folder, project, config=CONFIG, final_layer=0.0):
    """Write it; the folder. It draws 64 x 64 pixels of noise, which nothing changes while its final layer is zero."""
    net, rng = PixArt(config), np.random.default_rng(0)
    net.initialize(rng, zero_cross_attention=False)
    if final_layer:
        weight = net.final_layer.linear.weight
        weight.set_data(ms.Tensor((final_layer * rng.standard_normal(weight.shape)).astype(np.float32)))
    components.write_transformer(folder / "transformer", net)
    for name in ("vae", "text_encoder", "tokenizer"):
        os.symlink(project / "data" / "tiny-sigma" / name, folder / name)
    components.write_index(folder, scheduler_named("dpm++"))
    return folder


def train_options(project, model, output, /, **changes):
    """Options of a short training of it, as words of a command."""
    given = {
        "model": model,
        "json_path": project / "data/pixelart/labels.json",
        "image_dir": project / "data/pixelart",
        "steps": 4,
        "batch_size": 4,
        "start_learning_rate": 1e-3,
        "warmup_steps": 0,
        "ckpt_save_steps": 2,
        "start_report": False,
        "visualize": False,
        "output_path": output,
    } | changes
    return [word for key, value in given.items() for word in (f"--{key}", str(value))]


def write_training_data(folder, project, count, held_out=0, **pipeline):
    """Write the pipeline, and labels to train on and held out: model, train.json and test.json; the folder."""
    write_small_pipeline(folder / "model", project, **pipeline)
    labels = json.loads((project / "data/pixelart/labels.json").read_text())
    (folder / "train.json").write_text(json.dumps(labels[:count]))
    (folder / "test.json").write_text(json.dumps(labels[count : count + held_out]))
    return folder


def training_config(folder, project, output, /, **changes):
    """Configuration of a short training on what ``write_training_data`` wrote."""
    values = {
        "model": str(folder / "model"),
        "json_path": str(folder / "train.json"),
        "image_dir": str(project / "data/pixelart"),
        "feature_cache": str(folder / "features"),
        "batch_size": 2,
        "optim": "adamw",
        "start_learning_rate": 1e-3,
        "warmup_steps": 0,
        "ckpt_save_steps": 1,
        "start_report": False,
        "tensorboard": False,
        "output_path": str(output),
    }
    return check_config(values | changes, "train")
