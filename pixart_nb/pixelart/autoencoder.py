"""VAE of factor 8 of the bundled models, trained on drawn scenes of all sizes and on synthetic images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from mindspore import mint, ops

from pixart_nb.core.backend import ms
from pixart_nb.core.data.images import to_signed
from pixart_nb.core.models.layers import Conv2d
from pixart_nb.core.models.operators import silu
from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig
from pixart_nb.core.training.trainer import Batch, Trainer, TrainerOptions
from pixart_nb.pixelart.batches import generator, set_weights
from pixart_nb.pixelart.pool import PATCH, autoencoder_pool

#: Few groups: a group of one channel would lose the mean of the channel, and with it the colours.
CONFIG = VAEConfig(block_out_channels=(8, 16, 64, 64), layers_per_block=1, norm_num_groups=4, sample_size=256)
OPTIONS = TrainerOptions(
    steps=2500,
    start_learning_rate=2e-3,
    warmup_steps=50,
    schedule="cosine",
    betas=(0.9, 0.95),
    ema_rate=0.99,
    save_every=50,
    log_every=10,
)
#: Options of the decoder's own training, after both parts were trained together.
DECODER_OPTIONS = replace(OPTIONS, steps=4500, start_learning_rate=1e-3, ema_rate=0.995, save_every=100)
#: Most noise on its latents, in their standard deviation. Sampled latents are not exact either.
DECODER_NOISE = 0.08
SHARDS = 24
BATCH, CROP = 8, 64
KL_WEIGHT = 1e-4
#: Latents at the start: colours times this, with this logarithm of the variance.
COLOUR_SPREAD, START_LOGVAR = 2.0, -6.0
#: Standard deviation of the scaled latents. A latent cell of a drawn scene is one cell of it, with much less
#: redundancy than in a photograph; a larger deviation shifts the noise schedule to where scenes are decided.
LATENT_SPREAD = 2.0


def train_autoencoder(work: Path, seed: int = 0, processes: int = 2) -> AutoencoderKL:
    """Train, resume or load the VAE in ``work``; return it with EMA weights and its measured scaling factor."""
    net = AutoencoderKL(CONFIG)
    net.initialize(generator(seed, 1))
    parameters = dict(net.parameters_and_names())
    drawn, synthetic = autoencoder_pool(work / "images", SHARDS, seed, processes)
    start_with_colours(net, np.concatenate([drawn[:16], synthetic[:16]]))
    batch = patch_batches(drawn, synthetic, seed)
    trainer = Trainer(autoencoder_loss(net), parameters, batch, OPTIONS, work, names=("squared_error", "kl"))
    trainer.run()
    set_weights(parameters, trainer.weights())
    _train_decoder(net, batch, work.with_name("decoder"))
    net.config = replace(CONFIG, scaling_factor=scaling_factor(net, drawn))
    return net


def _train_decoder(net: AutoencoderKL, batch: Batch, work: Path) -> None:
    """Train the decoder alone on noisy latents, for sharp edges and flat cells; the latents stay as they are.

    The loss is the absolute error of the images and of their finest detail, see ``decoder_loss``.
    """
    parts = ("decoder.", "post_quant_conv.")
    parameters = {name: p for name, p in net.parameters_and_names() if name.startswith(parts)}
    trainer = Trainer(decoder_loss(net), parameters, batch, DECODER_OPTIONS, work, names=("squared_error", "detail"))
    trainer.run()
    set_weights(parameters, trainer.weights())


def start_with_colours(net: AutoencoderKL, images: np.ndarray) -> None:
    """Fit the last layers of encoder and decoder, so that three latents start as the mean colour of 8 x 8 pixels.

    Otherwise training gives all four latents to brightness, one axis of colour and detail, and stays there: the other
    axis of colour explains less error, but without it green and red are lost. ``images``: (N, H, W, 3) uint8.
    """
    pixels = ms.Tensor(to_signed(images))
    n, channels, height, width = pixels.shape
    means = pixels.asnumpy().reshape(n, channels, height // 8, 8, width // 8, 8).mean((3, 5))
    latents = CONFIG.latent_channels
    for conv in (net.quant_conv, net.post_quant_conv):
        conv.weight.set_data(ms.Tensor(np.eye(conv.weight.shape[0], dtype=np.float32)[..., None, None]))
    encoder, decoder = net.encoder, net.decoder
    hidden = encoder.mid_block(encoder.fine(pixels))
    _fit(encoder.conv_out, silu(encoder.conv_norm_out(hidden)), COLOUR_SPREAD * means)
    bias = encoder.conv_out.bias.asnumpy().copy()
    bias[latents:] = START_LOGVAR
    encoder.conv_out.bias.set_data(ms.Tensor(bias))
    hidden = decoder.coarse(net.encode(pixels)[0].mean)
    for block in decoder.up_blocks:
        hidden = block(hidden)
    _fit(decoder.conv_out, silu(decoder.conv_norm_out(hidden)), means.repeat(8, 2).repeat(8, 3))


def _fit(conv: Conv2d, features: ms.Tensor, targets: np.ndarray) -> None:
    """Set the middle weights and the bias of the first outputs of a convolution by least squares, the rest to 0."""
    rows = features.asnumpy().transpose(0, 2, 3, 1).reshape(-1, features.shape[1])
    rows = np.concatenate([rows, np.ones((len(rows), 1), np.float32)], 1)
    target = targets.transpose(0, 2, 3, 1).reshape(len(rows), -1)
    solution = np.linalg.solve(rows.T @ rows + 1e-3 * len(rows) * np.eye(rows.shape[1]), rows.T @ target)
    weight, bias = (np.zeros(part.shape, np.float32) for part in (conv.weight, conv.bias))
    weight[: target.shape[1], :, 1, 1], bias[: target.shape[1]] = solution[:-1].T, solution[-1]
    conv.weight.set_data(ms.Tensor(weight))
    conv.bias.set_data(ms.Tensor(bias))


def patch_batches(drawn: np.ndarray, synthetic: np.ndarray, seed: int) -> Batch:
    """Return batches of (images (BATCH, 3, CROP, CROP), noise), half of each source.

    Crops are flipped and transposed at random; those of drawn scenes start on the grid of the latents.
    """

    def crop(images: np.ndarray, step: int, rng: np.random.Generator) -> np.ndarray:
        y, x = step * rng.integers(0, (PATCH - CROP) // step + 1, 2)
        image = images[rng.integers(len(images)), y : y + CROP, x : x + CROP]
        image = image[:: rng.choice((-1, 1)), :: rng.choice((-1, 1))]
        return image.transpose(1, 0, 2) if rng.random() < 0.5 else image

    def batch(step: int) -> tuple[np.ndarray, ...]:
        rng = generator(seed, step, 12)
        sources = ((drawn, 8), (synthetic, 1))
        crops = [crop(*sources[k % 2], rng) for k in range(BATCH)]
        noise = rng.standard_normal((BATCH, CONFIG.latent_channels, CROP // 8, CROP // 8), dtype=np.float32)
        return to_signed(np.stack(crops)), noise

    return batch


def autoencoder_loss(net: AutoencoderKL):
    """Return the loss of a batch: squared and absolute error, and the KL divergence from the unit normal."""

    def loss(images: ms.Tensor, noise: ms.Tensor):
        output, moments = net(images, noise)
        difference = output - images
        squared = (difference * difference).mean()
        mean, logvar = mint.chunk(moments, 2, 1)
        kl = 0.5 * (mean * mean + ops.exp(logvar) - 1.0 - logvar).mean()
        return squared + 0.1 * ops.abs(difference).mean() + KL_WEIGHT * kl, squared, kl

    return loss


def decoder_loss(net: AutoencoderKL):
    """Return the decoder's loss of a batch: absolute error of images and of the differences of neighbouring pixels.

    ``noise`` has the shape of the latents and is used at a different strength for each image, from none to
    ``DECODER_NOISE`` of the standard deviation of the latents.
    """

    def loss(images: ms.Tensor, noise: ms.Tensor):
        strength = DECODER_NOISE * ops.linspace(0.0, 1.0, len(noise)).reshape(-1, 1, 1, 1)
        mean = ops.stop_gradient(mint.chunk(net.moments(images), 2, 1)[0])
        difference = net.reconstruct(mean + strength * mean.std() * noise) - images
        rows, columns = difference.diff(axis=2), difference.diff(axis=3)
        detail = ops.abs(rows).mean() + ops.abs(columns).mean()
        return ops.abs(difference).mean() + detail, (difference * difference).mean(), detail

    return loss


def scaling_factor(net: AutoencoderKL, drawn: np.ndarray) -> float:
    """Return ``LATENT_SPREAD`` / standard deviation of the latents of drawn scenes."""
    firsts = range(0, min(256, len(drawn)), 16)
    means = [net.encode(ms.Tensor(to_signed(drawn[i : i + 16])))[0].mean.asnumpy() for i in firsts]
    return round(float(LATENT_SPREAD / np.concatenate(means).std()), 5)
