"""A sampling run that is kept whole, and what a model, as it is now, predicts along it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixart_nb.config import GUIDANCE_SCALE
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.conditioning import Conditioning
from pixart_nb.core.sampling.guidance import guided_prediction


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Every step of a run of N pictures. Arrays are float32.

    ``timesteps`` (S,); ``latents`` (S + 1, N, C, h, w), the noise first, then what each step left; ``denoised``
    (S, N, C, h, w), the clean latents that each step predicted; what the run was conditioned on.
    """

    timesteps: np.ndarray
    latents: np.ndarray
    denoised: np.ndarray
    condition: Conditioning
    guidance_scale: float
    height: int
    width: int


def follow(
    pipe: Any,
    prompt: str | Sequence[str],
    *,
    height: int | None = None,
    width: int | None = None,
    guidance_scale: float = GUIDANCE_SCALE,
    generator: Any = None,
    num_images_per_prompt: int = 1,
    **call: Any,
) -> Trajectory:
    """Sample and keep every step; arguments as those of ``pipe.sample``."""
    height, width = pipe.check_size(height, width)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    start = pipe.initial_latents(len(prompts) * num_images_per_prompt, height, width, generator)
    records = pipe.sample(
        prompts,
        height=height,
        width=width,
        guidance_scale=guidance_scale,
        generator=generator,
        latents=start,
        num_images_per_prompt=num_images_per_prompt,
        **call,
    )
    condition, *steps = records
    return Trajectory(
        np.array([step.timestep for step in steps]),
        np.stack([start, *(step.latents for step in steps)]).astype(np.float32),
        np.stack([step.denoised for step in steps]).astype(np.float32),
        condition,
        guidance_scale,
        height,
        width,
    )


def predictions(pipe: Any, run: Trajectory, guidance_scale: float | None = None) -> np.ndarray:
    """The noise that the model predicts at the start of every step of ``run``: (S, N, C, h, w).

    The latents are the run's, whatever the model would have made of them, so that two models can be compared at the
    same points. ``guidance_scale`` is the run's own unless told: 0 is the unconditional, 1 the conditional prediction.
    """
    scale = run.guidance_scale if guidance_scale is None else guidance_scale
    predict = guided_prediction(pipe.transformer, run.condition, scale, run.height, run.width)
    pairs = zip(run.latents[:-1], run.timesteps, strict=True)
    return np.stack([predict(latents, float(timestep)).noise for latents, timestep in pairs])


def guidance_directions(pipe: Any, run: Trajectory) -> np.ndarray:
    """Conditional minus unconditional prediction along a guided run: (S, N, C, h, w)."""
    if run.condition.negative_embeds is None:
        raise PixArtNBError(
            f"the run has guidance_scale {run.guidance_scale}, so nothing was predicted without the prompt; "
            "follow one with a scale above 1"
        )
    return predictions(pipe, run, 1.0) - predictions(pipe, run, 0.0)
