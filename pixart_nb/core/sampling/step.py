"""What every sampler takes and gives: a model's prediction, a plan of noise levels, and one record per step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pixart_nb.core.errors import PixArtNBError


@dataclass(frozen=True)
class Step:
    """One step of sampling: its number, the timestep it started from, the latents after it, and the predicted picture.

    latents and denoised are (N, C, H, W), in the dtype of the latents that the sampler was given.
    """

    index: int
    timestep: float
    latents: np.ndarray
    denoised: np.ndarray


class Prediction(NamedTuple):
    """What the model says of latents (N, C, H, W): the noise in them, and the raw variance (about -1..1) if it has one.

    Both are (N, C, H, W) and guided already; the variance is that of the conditional rows.
    """

    noise: np.ndarray
    variance: np.ndarray | None = None


#: ``predict(latents, timestep) -> Prediction``; latents (N, C, H, W) of unit variance in all.
Predict = Callable[[np.ndarray, float], Prediction]
#: Where noise comes from: one generator, or one for each row.
Generators = np.random.Generator | Sequence[np.random.Generator] | None


@dataclass(frozen=True, eq=False)
class Plan:
    """The steps to take: timesteps (N,) falling, and levels (N, 2), noise over signal at a step's start and end."""

    timesteps: np.ndarray
    levels: np.ndarray

    def __len__(self) -> int:
        return len(self.timesteps)

    def __iter__(self) -> Iterator[tuple[int, float, float, float]]:
        """Index, timestep, level at the start, level at the end."""
        for index, (timestep, (here, there)) in enumerate(zip(self.timesteps, self.levels, strict=True)):
            yield index, float(timestep), float(here), float(there)

    def last(self, strength: float) -> Plan:
        """The steps that image-to-image takes: the last ``strength`` of them, at least one."""
        first = len(self) - steps_taken(len(self), strength)
        return Plan(self.timesteps[first:], self.levels[first:])


def steps_taken(count: int, strength: float) -> int:
    """How many of ``count`` steps image-to-image takes. Refuses a strength outside 0..1."""
    if not 0 < strength <= 1:
        raise PixArtNBError(
            f"strength is {strength!r}; expected above 0 (the picture stays) to 1 (all steps)"
        )
    return max(1, int(count * strength))


def chained(timesteps: np.ndarray, sigmas: np.ndarray) -> Plan:
    """The plan of timesteps (N,) whose levels are sigmas (N + 1,): each step ends where the next begins."""
    return Plan(np.asarray(timesteps), np.stack([sigmas[:-1], sigmas[1:]], 1))


def scales(sigma: float) -> tuple[float, float]:
    """Scale of picture and noise, of unit variance together, at noise-to-signal ratio ``sigma``."""
    signal = 1.0 / np.sqrt(sigma * sigma + 1.0)
    return float(signal), float(sigma * signal)


def denoise(latents: np.ndarray, noise: np.ndarray, sigma: float) -> np.ndarray:
    """The picture that latents (N, C, H, W) show if their noise is ``noise``."""
    signal_scale, noise_scale = scales(sigma)
    return (latents - noise_scale * noise) / signal_scale


def check_generators(generator: Generators, rows: int) -> None:
    """Refuse what is neither a generator, nor one for each of ``rows`` pictures, nor None."""
    if generator is None or isinstance(generator, np.random.Generator):
        return
    if not isinstance(generator, Sequence) or not all(isinstance(g, np.random.Generator) for g in generator):
        raise PixArtNBError(
            f"generator is {generator!r}; expected a numpy.random.Generator, as numpy.random.default_rng(seed) "
            "makes it, or a list with one for each picture"
        )
    if len(generator) != rows:
        raise PixArtNBError(f"{len(generator)} generators for {rows} pictures; give one, or one for each")


def draw_noise(shape: Sequence[int], generator: Generators) -> np.ndarray:
    """Unit noise of shape (N, C, H, W) float32 from one generator, or row by row from one for each."""
    check_generators(generator, shape[0])
    if generator is None or isinstance(generator, np.random.Generator):
        return (generator or np.random.default_rng()).standard_normal(tuple(shape), dtype=np.float32)
    return np.stack([rng.standard_normal(tuple(shape[1:]), dtype=np.float32) for rng in generator])
