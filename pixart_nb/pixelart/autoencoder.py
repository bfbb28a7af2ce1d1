"""First part of the embedded model: a small autoencoder of factor 8, trained on the drawn pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from mindspore import mint, ops

from pixart_nb.core.backend import ms
from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig
from pixart_nb.core.training.trainer import Trainer, TrainerOptions
from pixart_nb.pixelart.batches import autoencoder_batches, draw_scenes, generator, to_signed
from pixart_nb.pixelart.scenes import Scene

# Four groups: a group for each channel would take every channel's mean away, and with it the colours.
CONFIG = VAEConfig(block_out_channels=(8, 16, 32, 32), layers_per_block=1, norm_num_groups=4, sample_size=128)
OPTIONS = TrainerOptions(
    steps=1000,
    start_learning_rate=2.5e-3,
    warmup_steps=50,
    schedule="cosine",
    betas=(0.9, 0.95),
    ema_rate=0.99,
    save_every=100,
    log_every=10,
    compile=False,
)
BATCH, CROP = 8, 64
KL_WEIGHT = 1e-4
#: Standard deviation of the scaled latents. The published models have about 1 on grids of 32 to 256 cells a side. On
#: 16 x 16 cells the same noise would hide the colour of a whole background, which is then averaged over far fewer
#: cells, until so late that the first steps of sampling only add errors. Louder latents move the schedule back.
LATENT_SPREAD = 3.0


def train_autoencoder(scenes: list[Scene], work: Path, seed: int = 0) -> AutoencoderKL:
    """Train (or finish, or just load) the autoencoder in ``work``: EMA weights, measured scaling factor."""
    net = AutoencoderKL(CONFIG)
    net.initialize(generator(seed, 1))
    parameters = dict(net.parameters_and_names())
    batches = autoencoder_batches(scenes, BATCH, CROP, CONFIG.latent_channels, seed)
    trainer = Trainer(_loss(net), parameters, batches, OPTIONS, work, names=("squared_error", "kl"))
    trainer.run()
    for parameter, average in zip(parameters.values(), trainer.ema.averages, strict=True):
        parameter.set_data(ms.Tensor(average))
    net.config = replace(CONFIG, scaling_factor=scaling_factor(net, scenes, seed))
    return net


def _loss(net: AutoencoderKL):
    def loss(pictures: ms.Tensor, noise: ms.Tensor):
        output, moments = net(pictures, noise)
        difference = output - pictures
        squared = (difference * difference).mean()
        mean, logvar = mint.chunk(moments, 2, 1)
        kl = 0.5 * (mean * mean + ops.exp(logvar) - 1.0 - logvar).mean()
        return squared + 0.1 * ops.abs(difference).mean() + KL_WEIGHT * kl, squared, kl

    return loss


def scaling_factor(net: AutoencoderKL, scenes: list[Scene], seed: int) -> float:
    """``LATENT_SPREAD`` / standard deviation of the latents."""
    rng = generator(seed, 2)
    chosen = [scenes[i] for i in rng.integers(0, len(scenes), 128)]
    means = [
        net.encode(ms.Tensor(to_signed(draw_scenes(chosen[i : i + 16], rng))))[0].mean
        for i in range(0, 128, 16)
    ]
    return round(float(LATENT_SPREAD / np.concatenate([m.asnumpy() for m in means]).std()), 5)
