"""Training loss of the official code: squared error of the noise plus the bound for the learned variance."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from mindspore import mint, ops

from pixart_nb.core.backend import as_array, ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.controlnet import PixArtControlNet
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.sampling.noise_schedule import LINEAR, NoiseSchedule

#: Columns of ``coefficients``.
SIGNAL, NOISE, START_FROM_X, START_FROM_NOISE, MEAN_START, MEAN_X, LOG_MIN, LOG_MAX, IS_FIRST = range(9)
#: Names of the values that ``diffusion_loss`` returns beside the loss.
NAMES = ("mse", "vb")
#: Index of the positions among the arguments of ``diffusion_loss``.
POSITIONS = 7


def diffusion_loss(net: PixArt, positions: ms.Tensor | None = None) -> Callable:
    """Return the loss function of a transformer for ``Trainer``.

    Args:
        net: the transformer to train.
        positions: embeddings (1, N, D) for batches that do not carry their own.

    Returns:
        ``loss(latents, noise, table, timesteps, embeddings, mask, weights, positions, micro) -> (loss, mse, vb)``,
        means over the batch. The last three arguments are optional; ``weights`` (N,) multiply the squared error.
    """
    own = positions

    def loss(latents, noise, table, timesteps, embeddings, mask, weights=None, positions=None, micro=None):
        x_t = add_noise(latents, noise, table)
        output = net.forward(x_t, timesteps, embeddings, mask, own if positions is None else positions, micro)
        return _means(output, latents, x_t, noise, table, weights)

    return loss


def control_loss(net: PixArtControlNet) -> Callable:
    """Return the loss function of a ControlNet: that of ``diffusion_loss``, which takes control (N, C, H, W) too.

    ``loss(latents, noise, table, timesteps, embeddings, mask, weights, positions, control, micro)``.
    """

    def loss(latents, noise, table, timesteps, embeddings, mask, weights, positions, control, micro=None):
        x_t = add_noise(latents, noise, table)
        output = net.forward(x_t, timesteps, embeddings, mask, positions, micro, control)
        return _means(output, latents, x_t, noise, table, weights)

    return loss


def _means(output, latents, x_t, noise, table, weights) -> tuple[ms.Tensor, ms.Tensor, ms.Tensor]:
    """Return the loss, the squared error and the bound of a model's output, means over the batch."""
    mse, vb = loss_terms(output, latents, x_t, noise, table)
    weighted = mse if weights is None else weights * mse
    return (weighted + vb).mean(), mse.mean(), vb.mean()


def min_snr_weights(gamma: float) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from timesteps (N,) to weights of the squared error (N,): min(SNR, gamma) / SNR.

    Hang et al. 2023 (arXiv 2303.09556), section 3.4, with SNR = alpha_bar / (1 - alpha_bar).
    """
    if gamma <= 0:
        raise PixArtNBError(f"snr_gamma is {gamma}; expected a number above 0 (5 in the paper)")
    ratio = LINEAR.alphas_cumprod / (1 - LINEAR.alphas_cumprod)
    table = np.minimum(ratio, gamma) / ratio
    return lambda timesteps: table[np.asarray(timesteps, np.int64)]


def coefficients(timestep: np.ndarray, schedule: NoiseSchedule = LINEAR) -> np.ndarray:
    """Return the coefficients of the loss at integer timesteps (N,): (N, 9) float32, columns as named above."""
    t = np.asarray(timestep)
    if t.ndim != 1 or not np.issubdtype(t.dtype, np.integer) or t.min() < 0 or t.max() >= schedule.steps:
        raise PixArtNBError(f"timesteps must be (N,) integers in 0..{schedule.steps - 1}, got {t!r}")
    alpha = schedule.alphas_cumprod
    start, current = schedule.posterior_mean_coefficients
    columns = [
        np.sqrt(alpha),
        np.sqrt(1 - alpha),
        np.sqrt(1 / alpha),
        np.sqrt(1 / alpha - 1),
        start,
        current,
        schedule.posterior_log_variance,
        np.log(schedule.betas),
        np.arange(schedule.steps) == 0,
    ]
    return np.stack(columns, 1)[t].astype(np.float32)


def training_losses(model, x_start, timestep, noise, schedule: NoiseSchedule = LINEAR) -> dict[str, ms.Tensor]:
    """Compute the loss terms of a noise prediction with learned variance (official ``IDDPM``; arXiv 2102.09672).

    Args:
        model: ``model(x_t, timestep)`` maps (N, C, H, W) and (N,) to (N, 2 C, H, W).
        x_start, noise: (N, C, H, W).
        timestep: (N,) integers.

    Returns:
        ``{"mse", "vb", "loss"}``, each (N,): squared error of the noise, variational bound in bits per dimension, and
        their sum. The gradient of the bound reaches the variance only.
    """
    table = ms.Tensor(coefficients(as_array(timestep).astype(np.int64), schedule))
    x_t = add_noise(x_start, noise, table)
    mse, vb = loss_terms(model(x_t, timestep), x_start, x_t, noise, table)
    return {"mse": mse, "vb": vb, "loss": mse + vb}


def add_noise(x_start: ms.Tensor, noise: ms.Tensor, table: ms.Tensor) -> ms.Tensor:
    """Diffuse x_start (N, C, H, W) to the timesteps of ``table`` (N, 9)."""
    return column(table, SIGNAL) * x_start + column(table, NOISE) * noise


def clean_latents(x_t: ms.Tensor, noise: ms.Tensor, table: ms.Tensor) -> ms.Tensor:
    """Return the clean latents that x_t (N, C, H, W) contains if its noise is ``noise``; inverts ``add_noise``."""
    return column(table, START_FROM_X) * x_t - column(table, START_FROM_NOISE) * noise


def loss_terms(output, x_start, x_t, noise, table) -> tuple[ms.Tensor, ms.Tensor]:
    """Return squared error and variational bound, each (N,), of a model's output (N, 2 C, H, W)."""
    channels = x_start.shape[1]
    output = output.astype(ms.float32)
    predicted, variance = output[:, :channels], output[:, channels:]
    error = noise - predicted
    mse = (error * error).mean((1, 2, 3))
    return mse, variational_bound(ops.stop_gradient(predicted), variance, x_start, x_t, table)


def variational_bound(predicted, variance, x_start, x_t, table) -> ms.Tensor:
    """Return the bound of the transition at each row's timestep, (N,) in bits per dimension.

    KL divergence from the true posterior; at the first timestep the likelihood of x_start in 256 levels. The variance,
    in [-1, 1], interpolates between the logarithms of the posterior variance and of beta.
    """
    share = (variance + 1) / 2
    log_variance = share * column(table, LOG_MAX) + (1 - share) * column(table, LOG_MIN)
    start = clean_latents(x_t, predicted, table)
    mean = column(table, MEAN_START) * start + column(table, MEAN_X) * x_t
    true_mean = column(table, MEAN_START) * x_start + column(table, MEAN_X) * x_t
    kl = _normal_kl(true_mean, column(table, LOG_MIN), mean, log_variance).mean((1, 2, 3))
    likelihood = _discretized_log_likelihood(x_start, mean, 0.5 * log_variance).mean((1, 2, 3))
    first = table[:, IS_FIRST]
    return (first * -likelihood + (1 - first) * kl) / math.log(2.0)


def column(table: ms.Tensor, index: int) -> ms.Tensor:
    """Return a column of (N, K) as (N, 1, 1, 1)."""
    return table[:, index].reshape(-1, 1, 1, 1)


def _normal_kl(mean_a, log_variance_a, mean_b, log_variance_b):
    ratio, difference = ops.exp(log_variance_a - log_variance_b), mean_a - mean_b
    distance = difference * difference * ops.exp(-log_variance_b)
    return 0.5 * (log_variance_b - log_variance_a - 1.0 + ratio + distance)


def _normal_cdf(x):
    """0.5 (1 + tanh(u)) of the official code as sigmoid(2 u): tanh on the CPU is off by up to 1e-4."""
    return ops.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))


def _discretized_log_likelihood(x, mean, log_scale):
    centred, inverse = x - mean, ops.exp(-log_scale)
    above = _normal_cdf(inverse * (centred + 1.0 / 255.0))
    below = _normal_cdf(inverse * (centred - 1.0 / 255.0))
    low, high = (x < -0.999).astype(ms.float32), (x > 0.999).astype(ms.float32)
    inside = mint.clamp(above - below, min=1e-12) * (1 - low) * (1 - high)
    return ops.log(inside + low * mint.clamp(above, min=1e-12) + high * mint.clamp(1 - below, min=1e-12))
