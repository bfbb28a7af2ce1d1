"""Samplers that draw noise at every step: iDDPM with learned variance, consistency models, and SA-Solver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.noise_schedule import RespacedSchedule
from pixart_nb.core.sampling.step import (
    Generators,
    Plan,
    Predict,
    Prediction,
    Step,
    denoise,
    draw_noise,
    scales,
)

#: Standard deviation of the data that LCM's boundary condition assumes (Luo et al. 2023).
_SIGMA_DATA = 0.5


class Moments(NamedTuple):
    """Of p(x_{t-1} | x_t): mean and log variance, and the predicted picture behind them, all (N, C, H, W)."""

    mean: np.ndarray
    log_variance: np.ndarray
    denoised: np.ndarray


def iddpm_moments(latents: np.ndarray, prediction: Prediction, row: int, spaced: RespacedSchedule) -> Moments:
    """Where the reverse process goes from ``spaced.timesteps[row]`` (Nichol and Dhariwal 2021, equations 11 and 15).

    The model's variance, -1..1, lies between the logarithms of the posterior variance and of beta.
    """
    if prediction.variance is None:
        raise PixArtNBError(
            "iddpm needs the variance that the model predicts, but this model has none (pred_sigma is off); "
            "use another scheduler, for example 'ddim-official'"
        )
    denoised = denoise(latents, prediction.noise, float(spaced.sigmas[row]))
    start, current = (float(table[row]) for table in spaced.posterior_mean_coefficients)
    low, high = float(spaced.posterior_log_variance[row]), float(np.log(spaced.betas[row]))
    share = (prediction.variance + 1.0) / 2.0
    return Moments(start * denoised + current * latents, share * high + (1.0 - share) * low, denoised)


def iddpm(
    predict: Predict,
    latents: np.ndarray,
    plan: Plan,
    spaced: RespacedSchedule,
    generator: Generators = None,
) -> Iterator[Step]:
    """Ancestral sampling with the learned variance (official ``p_sample_loop``); the last step adds no noise."""
    for index, timestep, _, _ in plan:
        row = len(plan) - 1 - index
        mean, log_variance, denoised = iddpm_moments(latents, predict(latents, timestep), row, spaced)
        latents = mean
        if row > 0:
            latents = mean + np.exp(0.5 * log_variance) * draw_noise(mean.shape, generator)
        yield Step(index, timestep, latents, denoised)


def lcm(
    predict: Predict,
    latents: np.ndarray,
    plan: Plan,
    generator: Generators = None,
    timestep_scaling: float = 10.0,
    clip: float | None = None,
) -> Iterator[Step]:
    """Multistep consistency sampling (Luo et al. 2023, algorithm 3): jump to the picture, add noise, jump again.

    The jump is c_skip x + c_out picture, which at timestep 0 leaves x as it is; ``denoised`` is its result.
    """
    for index, timestep, here, there in plan:
        denoised = denoise(latents, predict(latents, timestep).noise, here)
        if clip is not None:
            denoised = denoised.clip(-clip, clip)
        scaled = timestep * timestep_scaling
        whole = scaled**2 + _SIGMA_DATA**2
        denoised = scaled / whole**0.5 * denoised + _SIGMA_DATA**2 / whole * latents
        latents = denoised
        if index < len(plan) - 1:
            signal, noise = scales(there)
            latents = signal * denoised + noise * draw_noise(latents.shape, generator)
        yield Step(index, timestep, latents, denoised)


def sa_solver(
    predict: Predict,
    latents: np.ndarray,
    plan: Plan,
    tau: Callable[[float], float],
    orders: tuple[int, int] = (2, 2),
    rescaled: bool = True,
    generator: Generators = None,
) -> Iterator[Step]:
    """SA-Solver: stochastic Adams predictor and corrector of the reverse SDE (Xue et al. 2023, algorithm 1, PEC).

    ``tau(timestep)`` of the step's end scales the noise: 0 is the ODE, 1 the usual SDE. Predictor and corrector share
    a step's noise; the last step has none, is of first order and is not corrected (official ``few_steps``).
    ``rescaled`` is the paper's appendix D. Yields a ``Step`` per timestep.
    """
    count, known = len(plan), []  # known: (log signal-to-noise, predicted picture), oldest first
    step = latents, 0.0, 1.0, 0.0  # latents, level, tau and noise of the step that led here
    for index, timestep, here, there in plan:
        denoised = denoise(latents, predict(latents, timestep).noise, here)
        known.append((-np.log(here), denoised))
        if index > 0 and orders[1] > 0:
            order = min(orders[1], index + 1)
            start, level, scale, noise = step
            latents = _adams(start, known[-order:], level, here, scale, noise, rescaled)
        last = index == count - 1
        scale = 0.0 if last else float(tau(float(plan.timesteps[index + 1])))
        noise = draw_noise(latents.shape, generator) if scale else 0.0
        step = latents, here, scale, noise
        order = min(orders[0], index + 1, count - index)
        latents = _adams(latents, known[-order:], here, there, scale, noise, rescaled)
        known = known[-max(orders) :]
        yield Step(index, timestep, latents, denoised)


def _adams(start, known, here: float, there: float, tau: float, noise, rescaled: bool) -> np.ndarray:
    """One step of the SDE with the picture interpolated through ``known`` (Xue et al. 2023, equations 14 and 17)."""
    h, rate = np.log(here / there), 1.0 + tau**2
    (signal, scale), scale_here = scales(there), scales(here)[1]
    nodes = np.array([log_snr for log_snr, _ in known]) + np.log(here)
    weights = rate * signal * _adams_weights(nodes, h, rate, rescaled)
    latents = float(np.exp(-(tau**2) * h)) * scale / scale_here * start
    for weight, (_, picture) in zip(weights, known, strict=True):
        latents = latents + float(weight) * picture
    return latents + scale * float(np.sqrt(-np.expm1(-2.0 * tau**2 * h))) * noise if tau else latents


def _adams_weights(nodes: np.ndarray, h: float, rate: float, rescaled: bool) -> np.ndarray:
    """Integrals over u in 0..h of exp(rate (u - h)) times each Lagrange polynomial of the nodes (K,): (K,), exact.

    ``rescaled`` puts h^2 / 2 for the integral of exp(rate (u - h)) u when there are two nodes.
    """
    moments = [-np.expm1(-rate * h) / rate]
    for power in range(1, len(nodes)):
        moments.append((h**power - power * moments[-1]) / rate)
    if rescaled and len(nodes) == 2:
        moments[1] = h * h / 2.0
    # the weights give every polynomial up to the degree its integral
    return np.linalg.solve(np.vander(nodes, increasing=True).T, np.array(moments))
