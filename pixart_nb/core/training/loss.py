"""The official training loss: mean squared error of the noise plus the variational bound for the learned variance."""

from __future__ import annotations

import math

import numpy as np
from mindspore import mint, ops

from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.noise_schedule import LINEAR, NoiseSchedule

#: Columns of ``coefficients``.
SIGNAL, NOISE, START_FROM_X, START_FROM_NOISE, MEAN_START, MEAN_X, LOG_MIN, LOG_MAX, IS_FIRST = range(9)


def coefficients(timestep: np.ndarray, schedule: NoiseSchedule = LINEAR) -> np.ndarray:
    """What the loss needs of the schedule at (N,) integer timesteps: (N, 9) float32, columns named above."""
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


def training_losses(
    model, x_start, timestep, noise, schedule: NoiseSchedule = LINEAR
) -> dict[str, ms.Tensor]:
    """Loss terms of a noise prediction with learned variance (Nichol and Dhariwal 2021; official ``IDDPM``).

    ``model(x_t, timestep)`` maps (N, C, H, W) and (N,) to (N, 2 C, H, W). x_start and noise (N, C, H, W), timestep
    (N,) integers. -> ``{"mse", "vb", "loss"}``, each (N,): the error of the noise, the bound in bits per dimension,
    their sum. The bound's gradient reaches the variance alone, not the noise.
    """
    steps = timestep.asnumpy() if isinstance(timestep, ms.Tensor) else np.asarray(timestep)
    table = ms.Tensor(coefficients(steps.astype(np.int64), schedule))
    x_t = add_noise(x_start, noise, table)
    mse, vb = loss_terms(model(x_t, timestep), x_start, x_t, noise, table)
    return {"mse": mse, "vb": vb, "loss": mse + vb}


def add_noise(x_start: ms.Tensor, noise: ms.Tensor, table: ms.Tensor) -> ms.Tensor:
    """Diffuse x_start (N, C, H, W) to the timesteps of ``table`` (N, 9)."""
    return _column(table, SIGNAL) * x_start + _column(table, NOISE) * noise


def loss_terms(output, x_start, x_t, noise, table) -> tuple[ms.Tensor, ms.Tensor]:
    """Error of the noise and variational bound, each (N,), of a model's output (N, 2 C, H, W)."""
    channels = x_start.shape[1]
    output = output.astype(ms.float32)
    predicted, variance = output[:, :channels], output[:, channels:]
    mse = ((noise - predicted) ** 2).mean((1, 2, 3))
    return mse, variational_bound(ops.stop_gradient(predicted), variance, x_start, x_t, table)


def variational_bound(predicted, variance, x_start, x_t, table) -> ms.Tensor:
    """Bound of the transition at each row's timestep, (N,) in bits per dimension.

    The KL divergence from the true posterior; at the first timestep the likelihood of x_start discretised to 256
    levels. The variance, in [-1, 1], interpolates between the logarithms of the posterior variance and of beta.
    """
    share = (variance + 1) / 2
    log_variance = share * _column(table, LOG_MAX) + (1 - share) * _column(table, LOG_MIN)
    start = _column(table, START_FROM_X) * x_t - _column(table, START_FROM_NOISE) * predicted
    mean = _column(table, MEAN_START) * start + _column(table, MEAN_X) * x_t
    true_mean = _column(table, MEAN_START) * x_start + _column(table, MEAN_X) * x_t
    kl = _normal_kl(true_mean, _column(table, LOG_MIN), mean, log_variance).mean((1, 2, 3))
    likelihood = _discretised_log_likelihood(x_start, mean, 0.5 * log_variance).mean((1, 2, 3))
    first = table[:, IS_FIRST]
    return (first * -likelihood + (1 - first) * kl) / math.log(2.0)


def _column(table: ms.Tensor, index: int) -> ms.Tensor:
    return table[:, index].reshape(-1, 1, 1, 1)


def _normal_kl(mean_a, log_variance_a, mean_b, log_variance_b):
    """KL divergence between two diagonal normals, element by element, in nats."""
    ratio = ops.exp(log_variance_a - log_variance_b)
    return 0.5 * (
        log_variance_b - log_variance_a - 1.0 + ratio + (mean_a - mean_b) ** 2 * ops.exp(-log_variance_b)
    )


def _normal_cdf(x):
    """0.5 (1 + tanh(u)) of the official code, as sigmoid(2u): the CPU's tanh is off by up to 1e-4."""
    return ops.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))


def _discretised_log_likelihood(x, mean, log_scale):
    """Log-probability of x in [-1, 1], rounded to 256 levels, under a normal, element by element."""
    centred, inverse = x - mean, ops.exp(-log_scale)
    above = _normal_cdf(inverse * (centred + 1.0 / 255.0))
    below = _normal_cdf(inverse * (centred - 1.0 / 255.0))
    low, high = (x < -0.999).astype(ms.float32), (x > 0.999).astype(ms.float32)
    inside = mint.clamp(above - below, min=1e-12) * (1 - low) * (1 - high)
    return ops.log(inside + low * mint.clamp(above, min=1e-12) + high * mint.clamp(1 - below, min=1e-12))
