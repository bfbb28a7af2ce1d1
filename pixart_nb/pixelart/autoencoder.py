"""First part of the bundled model: a small VAE of factor 8, trained on drawn images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from mindspore import mint, ops

from pixart_nb.core.backend import ms
from pixart_nb.core.data.images import to_signed
from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig
from pixart_nb.core.training.trainer import Trainer, TrainerOptions
from pixart_nb.pixelart.batches import autoencoder_batches, draw_scenes, generator, set_weights
from pixart_nb.pixelart.scenes import Scene

#: Four groups: one group per channel would remove the mean of each channel, and with it the colours.
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
)
BATCH, CROP = 8, 64
KL_WEIGHT = 1e-4
#: Standard deviation of the scaled latents. The published models have about 1 on grids of 32 to 256 cells a side. On
#: 16 x 16 cells the same noise would hide the colour of a background, which is averaged over far fewer cells, until
#: late in the sampling, and the first steps would only add errors. A larger deviation shifts the schedule back.
LATENT_SPREAD = 3.0


def train_autoencoder(scenes: list[Scene], work: Path, seed: int = 0) -> AutoencoderKL:
    """Train, resume or load the VAE in ``work``; return it with EMA weights and its measured scaling factor."""
    net = AutoencoderKL(CONFIG)
    net.initialize(generator(seed, 1))
    parameters = dict(net.parameters_and_names())
    batches = autoencoder_batches(scenes, BATCH, CROP, CONFIG.latent_channels, seed)
    trainer = Trainer(_loss(net), parameters, batches, OPTIONS, work, names=("squared_error", "kl"))
    trainer.run()
    set_weights(parameters, trainer.weights())
    net.config = replace(CONFIG, scaling_factor=scaling_factor(net, scenes, seed))
    return net


def _loss(net: AutoencoderKL):
    def loss(images: ms.Tensor, noise: ms.Tensor):
        output, moments = net(images, noise)
        difference = output - images
        squared = (difference * difference).mean()
        mean, logvar = mint.chunk(moments, 2, 1)
        kl = 0.5 * (mean * mean + ops.exp(logvar) - 1.0 - logvar).mean()
        return squared + 0.1 * ops.abs(difference).mean() + KL_WEIGHT * kl, squared, kl

    return loss


def scaling_factor(net: AutoencoderKL, scenes: list[Scene], seed: int) -> float:
    """Return ``LATENT_SPREAD`` / standard deviation of the latents."""
    rng = generator(seed, 2)
    chosen = [scenes[i] for i in rng.integers(0, len(scenes), 128)]
    means = [net.encode(ms.Tensor(to_signed(draw_scenes(chosen[i : i + 16], rng))))[0].mean for i in range(0, 128, 16)]
    return round(float(LATENT_SPREAD / np.concatenate([m.asnumpy() for m in means]).std()), 5)
