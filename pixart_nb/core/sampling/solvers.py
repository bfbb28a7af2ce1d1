"""Samplers of the probability-flow ODE: DPM-Solver++ 2M, UniPC, Euler, and DDIM, which may add noise."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pixart_nb.core.sampling.step import Generators, Plan, Predict, Step, denoise, draw_noise, scales


def dpm_solver_2m(
    predict: Predict, latents: np.ndarray, plan: Plan, order: int = 2, end_first_order: bool = True
) -> Iterator[Step]:
    """DPM-Solver++ 2M, multistep with the midpoint rule (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    latents (N, C, H, W) of unit variance. The first step is of first order, and the last if ``end_first_order`` or if
    it ends at no noise. Yields a ``Step`` per timestep.
    """
    before = None  # predicted picture and level of the step before
    for index, timestep, here, there in plan:
        denoised = denoise(latents, predict(latents, timestep).noise, here)
        at_end = index == len(plan) - 1 and (end_first_order or there == 0)
        estimate = denoised
        if before is not None and order == 2 and not at_end:
            slope = (denoised - before[0]) / _log_ratio(before[1], here)
            estimate = denoised + 0.5 * _log_ratio(here, there) * slope
        latents = _exponential_step(latents, estimate, here, there)
        before = denoised, here
        yield Step(index, timestep, latents, denoised)


def _log_ratio(here: float, there: float) -> float:
    """Growth of the half log signal-to-noise ratio, the h of Lu et al., from one level to a lower one."""
    return float(np.log(here / there)) if there else np.inf


def _exponential_step(latents: np.ndarray, estimate: np.ndarray, here: float, there: float) -> np.ndarray:
    """Exact step of the ODE while the predicted picture is ``estimate`` (Lu et al. 2022, equation 8 with k = 1)."""
    signal, noise = scales(there)
    return noise / scales(here)[1] * latents + signal * (1.0 - there / here) * estimate


def unipc(
    predict: Predict, latents: np.ndarray, plan: Plan, order: int = 2, end_first_order: bool = True
) -> Iterator[Step]:
    """UniPC of order 1 or 2 with B_2(h) = e^h - 1, predicting pictures (Zhao et al. 2023, algorithms 5 and 7).

    Each prediction first corrects the latents that it was made at, then predicts the next ones; the corrected latents
    are not evaluated again. latents (N, C, H, W) of unit variance. The first step is of first order, and the last as
    in ``dpm_solver_2m``. Yields a ``Step`` per timestep.
    """
    history: list[tuple[np.ndarray, float]] = []  # predicted pictures and their levels, the last two
    start, used = latents, 0
    for index, timestep, here, there in plan:
        denoised = denoise(latents, predict(latents, timestep).noise, here)
        if history:
            latents = _correct(start, denoised, history, here, used)
        history = [*history[-1:], (denoised, here)]
        lower = end_first_order or there == 0
        used = min(order, index + 1, len(plan) - index if lower else order)
        start = latents
        latents = _predict_next(latents, history, there, used)
        yield Step(index, timestep, latents, denoised)


def _predict_next(latents: np.ndarray, history: list, there: float, order: int) -> np.ndarray:
    """UniP (equation 3 of Zhao et al.): the latents at level ``there``."""
    (denoised, here), estimate = history[-1], history[-1][0]
    if order == 2:
        before, level = history[-2]
        estimate = denoised + 0.5 * _log_ratio(here, there) / _log_ratio(level, here) * (denoised - before)
    return _exponential_step(latents, estimate, here, there)


def _correct(start: np.ndarray, denoised: np.ndarray, history: list, here: float, order: int) -> np.ndarray:
    """UniC (equation 9 of Zhao et al.): latents at level ``here`` from those at the step's start, ``history[-1]``."""
    middle, level = history[-1]
    if order == 1:
        return _exponential_step(start, 0.5 * (middle + denoised), level, here)
    before, earlier = history[-2]
    weight, weight_before = _corrector_weights(_log_ratio(level, here), _log_ratio(earlier, level))
    estimate = middle + weight_before * (before - middle) + weight * (denoised - middle)
    return _exponential_step(start, estimate, level, here)


def _corrector_weights(h: float, h_before: float) -> tuple[float, float]:
    """Weights of the differences of the new and of the older picture: the solution of R rho = b with order 2."""
    ratio = -h_before / h
    growth = np.expm1(-h)
    second = growth / -h - 1.0
    third = second / -h - 0.5
    b_1, b_2 = second / growth, 2.0 * third / growth
    older = (b_1 - b_2) / (1.0 - ratio)
    return float(b_1 - older), float(older / ratio)


def euler(predict: Predict, latents: np.ndarray, plan: Plan) -> Iterator[Step]:
    """Euler steps in the noise-to-signal ratio (Karras et al. 2022, algorithm 2 without churn).

    latents (N, C, H, W) are picture plus ``plan.levels[0, 0]`` times noise, and so are those of the steps.
    """
    for index, timestep, here, there in plan:
        noise = predict(latents * scales(here)[0], timestep).noise
        denoised = latents - here * noise
        latents = latents + (there - here) * noise
        yield Step(index, timestep, latents, denoised)


def ddim(
    predict: Predict,
    latents: np.ndarray,
    plan: Plan,
    generator: Generators = None,
    eta: float = 0.0,
    clip: float | None = None,
) -> Iterator[Step]:
    """DDIM (Song et al. 2021, equations 12 and 16); ``eta`` 0 adds no noise, 1 as much as DDPM does.

    ``clip`` limits the predicted picture, as diffusers' ``clip_sample`` does. Yields a ``Step`` per timestep.
    """
    for index, timestep, here, there in plan:
        noise = predict(latents, timestep).noise
        denoised = denoise(latents, noise, here)
        if clip is not None:
            denoised = denoised.clip(-clip, clip)
        (signal, scale), (signal_here, scale_here) = scales(there), scales(here)
        spread = eta * scale / scale_here * np.sqrt(max(0.0, 1.0 - (signal_here / signal) ** 2))
        latents = signal * denoised + float(np.sqrt(scale**2 - spread**2)) * noise
        if spread > 0:
            latents = latents + float(spread) * draw_noise(latents.shape, generator)
        yield Step(index, timestep, latents, denoised)
