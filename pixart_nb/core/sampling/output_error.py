"""How far the predictions of one transformer lie from another's, timestep by timestep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pixart_nb.config import SAMPLING_STEPS
from pixart_nb.core.backend import ms
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.sampling.randomness import picture_generators
from pixart_nb.core.sampling.trajectory import Trajectory, follow, predictions

#: Timesteps at which random latents are compared.
TIMESTEPS = (20, 100, 200, 300, 400, 500, 600, 700, 800, 900, 980)
_CAPTION = 20


def errors_along(pipe: Any, run: Trajectory, other: PixArt) -> np.ndarray:
    """||other - own|| / ||own|| of the guided noise at every step of a run of the pipeline's own transformer: (S,)."""
    own, reference = pipe.transformer, predictions(pipe, run)
    try:
        pipe.transformer = other
        found = predictions(pipe, run)
    finally:
        pipe.transformer = own
    return _relative(found, reference)


def reference_run(
    pipe: Any, prompts: Sequence[str], steps: int = SAMPLING_STEPS, seed: int = 0, **call: Any
) -> Trajectory:
    """A run of the pipeline's own transformer with these prompts, a stream of noise for each."""
    rngs = picture_generators(seed, range(len(prompts)))
    return follow(pipe, list(prompts), num_inference_steps=steps, generator=rngs, **call)


def errors_on_noise(
    net: PixArt,
    other: PixArt,
    height: int,
    width: int,
    timesteps: Sequence[int] = TIMESTEPS,
    rows: int = 2,
    seed: int = 0,
) -> np.ndarray:
    """The same of the unguided prediction, on random latents of height x width pixels and random captions: (S,).

    For a transformer of which no text encoder is at hand. Real latents lie elsewhere, so the numbers tell less.
    """
    rng, config = np.random.default_rng(seed), net.config
    latents = rng.standard_normal((rows, config.in_channels, height // 8, width // 8), np.float32)
    caption = rng.standard_normal((rows, _CAPTION, config.caption_channels), np.float32)
    found = [
        [
            part(ms.Tensor(latents), ms.Tensor(np.full(rows, t, np.float32)), ms.Tensor(caption))
            for t in timesteps
        ]
        for part in (other, net)
    ]
    channels = config.in_channels
    arrays = [np.stack([out.astype(ms.float32).asnumpy()[:, :channels] for out in part]) for part in found]
    return _relative(*arrays)


def _relative(found: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Norm of the difference over the norm of the reference, for each entry of the first axis."""
    found, reference = (part.reshape(len(part), -1).astype(np.float64) for part in (found, reference))
    return np.linalg.norm(found - reference, axis=1) / np.linalg.norm(reference, axis=1)
