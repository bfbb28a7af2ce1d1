"""Recorded sampling runs, and what a transformer predicts along one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixart_nb.config import GUIDANCE_SCALE
from pixart_nb.core.backend import ms, to_numpy
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.sampling.guidance import guided_model
from pixart_nb.core.sampling.text import Conditioning, as_list

#: Timesteps at which ``errors_on_noise`` compares.
TIMESTEPS = (20, 100, 200, 300, 400, 500, 600, 700, 800, 900, 980)
_CAPTION_TOKENS = 20


@dataclass(frozen=True, eq=False)
class Trajectory:
    """All steps of a run of N images. Arrays are float32.

    ``timesteps`` (S,); ``latents`` (S + 1, N, C, h, w), the initial noise first; ``denoised`` (S, N, C, h, w), the
    clean latents that each step predicted; height and width in pixels.
    """

    timesteps: np.ndarray
    latents: np.ndarray
    denoised: np.ndarray
    condition: Conditioning
    guidance_scale: float
    height: int
    width: int


def follow(pipe: Any, prompt: str | Sequence[str], generator: Any = None, **call: Any) -> Trajectory:
    """Sample and record every step. Arguments are those of ``pipe.sample``."""
    prompts, scale = as_list(prompt), call.get("guidance_scale", GUIDANCE_SCALE)
    height, width = pipe.check_size(call.pop("height", None), call.pop("width", None))
    start = pipe.initial_latents(len(prompts) * call.get("num_images_per_prompt", 1), height, width, generator)
    size = {"height": height, "width": width}
    condition, *steps = pipe.sample(prompts, generator=generator, latents=start, **size, **call)
    latents = np.stack([start, *(step.latents for step in steps)]).astype(np.float32)
    denoised = np.stack([step.denoised for step in steps]).astype(np.float32)
    timesteps = np.array([step.timestep for step in steps])
    return Trajectory(timesteps, latents, denoised, condition, scale, height, width)


def predicted_noise(
    pipe: Any, run: Trajectory, guidance_scale: float | None = None, transformer: PixArt | None = None
) -> Iterator[np.ndarray]:
    """Yield the noise predicted at the start of every step of ``run``, (N, C, h, w).

    The latents are the run's own, so that two models can be compared at the same points. ``guidance_scale``: the run's
    own if None, 0 for the unconditional and 1 for the conditional prediction. ``transformer``: another than the pipe's.
    """
    scale = run.guidance_scale if guidance_scale is None else guidance_scale
    predict = guided_model(transformer or pipe.transformer, run.condition, scale, run.height, run.width)
    for latents, timestep in zip(run.latents[:-1], run.timesteps, strict=True):
        yield predict(latents, float(timestep)).noise


def predictions(pipe: Any, run: Trajectory, *choices: Any, **options: Any) -> np.ndarray:
    """Return what ``predicted_noise`` yields, of all steps: (S, N, C, h, w)."""
    return np.stack(list(predicted_noise(pipe, run, *choices, **options)))


def guidance_directions(pipe: Any, run: Trajectory) -> np.ndarray:
    """Return conditional minus unconditional prediction along a guided run: (S, N, C, h, w)."""
    if run.condition.negative_embeds is None:
        raise PixArtNBError(
            f"the run has guidance_scale {run.guidance_scale}, so it has no unconditional prediction; "
            "follow one with a scale above 1"
        )
    return predictions(pipe, run, 1.0) - predictions(pipe, run, 0.0)


def errors_along(pipe: Any, run: Trajectory, other: PixArt) -> np.ndarray:
    """Return ||other - own|| / ||own|| of the guided noise at every step of a run: (S,)."""
    return relative_errors(predictions(pipe, run, transformer=other), predictions(pipe, run))


def errors_on_noise(
    net: PixArt, other: PixArt, height: int, width: int, timesteps: Sequence[int] = TIMESTEPS
) -> np.ndarray:
    """Return the relative error of the unguided prediction on random latents and random captions: (S,).

    For a transformer without a text encoder. Real latents are different, so the numbers say less.
    """
    rng, config, rows = np.random.default_rng(0), net.config, 2
    latents = rng.standard_normal((rows, config.in_channels, height // 8, width // 8), np.float32)
    caption = rng.standard_normal((rows, _CAPTION_TOKENS, config.caption_channels), np.float32)

    def outputs(part: PixArt) -> np.ndarray:
        inputs = [(ms.Tensor(latents), ms.Tensor(np.full(rows, t, np.float32))) for t in timesteps]
        out = [to_numpy(part(*pair, ms.Tensor(caption))) for pair in inputs]
        return np.stack([array[:, : config.in_channels] for array in out])

    return relative_errors(outputs(other), outputs(net))


def relative_errors(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return ||values - reference|| / ||reference|| for each entry of the first axis; finite for a zero reference."""
    values, reference = (part.reshape(len(part), -1).astype(np.float64) for part in (values, reference))
    norms = np.linalg.norm(reference, axis=1)
    return np.linalg.norm(values - reference, axis=1) / np.where(norms == 0, 1, norms)
