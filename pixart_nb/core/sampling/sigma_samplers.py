"""Samplers that step by the predicted noise, dx = noise d sigma, with the signature of ``samplers``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from pixart_nb.core.sampling.samplers import Step, denoise, draw_noise, interpolation_weights, scales


def euler(predict, latents, schedule, generator=None, *, ancestral: bool = False) -> Iterator[Step]:
    """Euler steps in sigma (Karras et al. 2022, algorithm 2 without churn), or ancestral ones (k-diffusion).

    Latents of this and the next three samplers are clean latents plus sigma times noise, as in diffusers.
    """
    for index, timestep, sigma, sigma_next in schedule:
        noise = predict(latents * scales(sigma)[0], timestep).noise
        denoised = latents - sigma * noise
        down, up = _ancestral_sigmas(sigma, sigma_next) if ancestral else (sigma_next, 0.0)
        latents = latents + (down - sigma) * noise
        if ancestral:
            latents = latents + up * draw_noise(latents.shape, generator)
        yield Step(index, timestep, latents, denoised)


def _ancestral_sigmas(sigma: float, sigma_next: float) -> tuple[float, float]:
    """Return the sigma to step down to, and that of the noise that is added, which together give ``sigma_next``."""
    down = sigma_next**2 / sigma
    return down, float(np.sqrt(max(0.0, sigma_next**2 - down**2)))


def heun(predict, latents, schedule, generator=None, *, clip: float | None = None) -> Iterator[Step]:
    """Heun steps in sigma (Karras et al. 2022, algorithm 1): two predictions for each step but the last.

    ``clip`` limits the clean latents, as diffusers' ``clip_sample`` does.
    """

    def predicted(x: np.ndarray, timestep: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the noise and the clean latents."""
        noise = predict(x * scales(sigma)[0], timestep).noise
        denoised = x - sigma * noise
        if clip is None:
            return noise, denoised
        denoised = denoised.clip(-clip, clip)
        return (x - denoised) / sigma, denoised

    for index, timestep, sigma, sigma_next in schedule:
        noise, denoised = predicted(latents, timestep, sigma)
        step = sigma_next - sigma
        if index < len(schedule) - 1:
            ahead = predicted(latents + step * noise, float(schedule.timesteps[index + 1]), sigma_next)[0]
            noise = (noise + ahead) / 2
        latents = latents + step * noise
        yield Step(index, timestep, latents, denoised)


def dpm_solver_2(
    predict, latents, schedule, generator=None, *, timestep_of: Callable[[float], float], ancestral: bool = False
) -> Iterator[Step]:
    """DPM-Solver-2 in sigma (Karras et al. 2022, algorithm 2 with k-diffusion's midpoint), or its ancestral form.

    The second prediction of a step is made at the geometric mean of its sigmas; the last step is an Euler step.
    """
    for index, timestep, sigma, sigma_next in schedule:
        noise = predict(latents * scales(sigma)[0], timestep).noise
        denoised = latents - sigma * noise
        down, up = _ancestral_sigmas(sigma, sigma_next) if ancestral else (sigma_next, 0.0)
        last = index == len(schedule) - 1
        if not last:
            middle = float(np.sqrt(sigma * down))
            ahead = (latents + (middle - sigma) * noise) * scales(middle)[0]
            noise = predict(ahead, timestep_of(middle)).noise
        latents = latents + (down - sigma) * noise
        if ancestral and not last:
            latents = latents + up * draw_noise(latents.shape, generator)
        yield Step(index, timestep, latents, denoised)


def lms(predict, latents, schedule, generator=None, *, order: int = 4) -> Iterator[Step]:
    """Linear multistep of the predicted noise as a polynomial in sigma (Adams-Bashforth; k-diffusion)."""
    history: list[tuple[np.ndarray, float]] = []  # noise and sigmas, the newest first
    for index, timestep, sigma, sigma_next in schedule:
        noise = predict(latents * scales(sigma)[0], timestep).noise
        denoised = latents - sigma * noise
        history = [(noise, sigma), *history[: order - 1]]
        nodes = np.array([level for _, level in history])
        powers = np.arange(1, len(nodes) + 1)
        weights = interpolation_weights(nodes, (sigma_next**powers - sigma**powers) / powers)
        latents = latents + sum(float(weight) * value for weight, (value, _) in zip(weights, history, strict=True))
        yield Step(index, timestep, latents, denoised)


def deis(
    predict, latents, schedule, generator=None, *, order: int = 2, lower_order_final: bool = True
) -> Iterator[Step]:
    """DEIS: multistep of the predicted noise as a polynomial in log sigma (Zhang and Chen 2022, log-rho AB-DEIS).

    The order rises and falls as in ``dpm_solver``.
    """
    history: list[tuple[np.ndarray, float]] = []  # noise and sigmas, the newest first
    for index, timestep, sigma, sigma_next in schedule:
        noise = predict(latents, timestep).noise
        denoised = denoise(latents, noise, sigma)
        history = [(noise, sigma), *history[: order - 1]]
        nodes = history[: len(schedule) - index] if lower_order_final else history
        integrals = _log_integrals(len(nodes), sigma_next) - _log_integrals(len(nodes), sigma)
        weights = interpolation_weights(np.log([level for _, level in nodes]), integrals)
        change = sum(float(weight) * value for weight, (value, _) in zip(weights, nodes, strict=True))
        latents = _noise_step(latents, change, sigma, sigma_next)
        yield Step(index, timestep, latents, denoised)


def _noise_step(latents: np.ndarray, change: np.ndarray, sigma: float, sigma_next: float) -> np.ndarray:
    """Add ``change`` to latents divided by their signal scale, in which the ODE is dx = noise d sigma."""
    signal_next = scales(sigma_next)[0]
    return signal_next / scales(sigma)[0] * latents + signal_next * change


def _log_integrals(count: int, sigma: float) -> np.ndarray:
    """Return the antiderivatives of log(sigma)^k at ``sigma``, for k below ``count``."""
    values = [sigma]
    for power in range(1, count):
        values.append(sigma * np.log(sigma) ** power - power * values[-1] if sigma else 0.0)
    return np.array(values)


def pndm(predict, latents, schedule, generator=None, *, warm_up: tuple[float, float] | None = None) -> Iterator[Step]:
    """PNDM without Runge-Kutta steps (PLMS; Liu et al. 2022, equations 9 and 11).

    The first step is taken twice, the second time with the mean of both predictions, between the sigmas ``warm_up``.
    """
    coefficients = [(1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)]
    history: list[np.ndarray] = []  # noise, the newest first
    for index, timestep, sigma, sigma_next in schedule:
        noise = predict(latents, timestep).noise
        denoised = denoise(latents, noise, sigma)
        history = [noise, *history[:3]]
        mean = sum(factor * value for factor, value in zip(coefficients[len(history) - 1], history, strict=True))
        start, latents = latents, _noise_step(latents, (sigma_next - sigma) * mean, sigma, sigma_next)
        if index == 0 and len(schedule) > 1:
            again = predict(latents, float(schedule.timesteps[1])).noise
            sigma, sigma_next = warm_up or (sigma, sigma_next)
            latents = _noise_step(start, (sigma_next - sigma) * (noise + again) / 2, sigma, sigma_next)
        yield Step(index, timestep, latents, denoised)
