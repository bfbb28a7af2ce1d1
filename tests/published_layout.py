"""A checkpoint in the published layout: XL/2's names and 16 heads, but narrow and with random weights."""

from pathlib import Path

import numpy as np

from pixart_nb.config import read_yaml
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.components import write_transformer
from pixart_nb.core.models.transformer import PixArt, PixArtConfig

#: XL/2 at 256 pixels, but narrow; and a small one that the notebooks with trainings can run on.
DEEP = dict(class_name="PixArt", hidden_size=128, depth=28, input_size=32, pe_interpolation=0.5)
SMALL = dict(class_name="PixArtMS", hidden_size=64, depth=2, input_size=16, pe_interpolation=0.25)


def published_parameters(project: Path, folder: Path, network: dict = DEEP, **changes) -> dict:
    """Write the checkpoint, and return the published 256 configuration with its paths pointing there."""
    net = PixArt(PixArtConfig(num_heads=16, caption_channels=128, **network))
    rng = np.random.default_rng(0)
    net.initialize(rng, zero_cross_attention=False)
    output = net.final_layer.linear.weight  # zero at the start of a training: then nothing would be predicted
    output.set_data(ms.Tensor(rng.standard_normal(output.shape).astype(np.float32) * 0.05))
    write_transformer(folder / "transformer", net)
    values = read_yaml(project / "configs/inference/pixart-sigma-256x256.yaml")
    bundled = project / "data/tiny-sigma"
    roots = {f"{name}_root": str(bundled / name) for name in ("vae", "text_encoder", "tokenizer")}
    return values | roots | {"checkpoint": str(folder / "transformer"), "dtype": "fp32"} | changes
