"""Samplers: from the predicted noise of one step to the latents of the next. All are generators of ``Step``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from pixart_nb.core.sampling.schedule import LINEAR, NoiseSchedule


@dataclass(frozen=True)
class Step:
    """One step of sampling: its number, the timestep it started from, the latents after it, and the predicted picture.

    latents and denoised are (N, C, H, W) float32.
    """

    index: int
    timestep: float
    latents: np.ndarray
    denoised: np.ndarray


#: ``predict(latents, timestep) -> noise``, both (N, C, H, W) float32 arrays.
Predict = Callable[[np.ndarray, float], np.ndarray]


def linspace_timesteps(count: int, total: int) -> np.ndarray:
    """``count`` timesteps from the last down, evenly spaced, 0 left out (diffusers' ``linspace``): int64."""
    if not 1 <= count <= total - 1:
        raise ValueError(f"num_inference_steps is {count}; expected 1 to {total - 1}")
    return np.linspace(0, total - 1, count + 1).round()[::-1][:-1].astype(np.int64)


def dpm_solver_2m(
    predict: Predict,
    latents: np.ndarray,
    timesteps: np.ndarray,
    schedule: NoiseSchedule = LINEAR,
) -> Iterator[Step]:
    """DPM-Solver++ 2M, multistep with the midpoint rule (Lu et al. 2022, algorithm 2), ending at no noise.

    latents (N, C, H, W) of unit variance at ``timesteps[0]``. The first step, and the last of a run shorter than 15,
    is of first order. Yields a ``Step`` per timestep.
    """
    sigmas = np.append(schedule.sigmas[np.asarray(timesteps)], 0.0)
    previous, previous_lambda = None, None
    for index, timestep in enumerate(timesteps):
        signal, noise = _signal_noise(sigmas[index])
        next_signal, next_noise = _signal_noise(sigmas[index + 1])
        denoised = (latents - np.float32(noise) * predict(latents, float(timestep))) / np.float32(signal)
        here, there = np.log(signal / noise), np.log(next_signal / next_noise) if next_noise else np.inf
        first_order = previous is None or index == len(timesteps) - 1  # the last step lands on sigma 0
        estimate = denoised
        if not first_order:
            ratio = (here - previous_lambda) / (there - here)
            estimate = denoised + np.float32(0.5 / ratio) * (denoised - previous)
        shrink = np.exp(-(there - here))
        latents = (
            np.float32(next_noise / noise) * latents - np.float32(next_signal * (shrink - 1.0)) * estimate
        )
        previous, previous_lambda = denoised, here
        yield Step(index, float(timestep), latents, denoised)


def _signal_noise(sigma: float) -> tuple[float, float]:
    """Scale of picture and noise, of unit variance together, at noise-to-signal ratio ``sigma``."""
    signal = 1.0 / np.sqrt(sigma**2 + 1.0)
    return signal, sigma * signal
