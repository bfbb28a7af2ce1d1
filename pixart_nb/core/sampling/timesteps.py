"""Timesteps that a scheduler visits: the published spacings, and the validation of a caller's own list."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.noise_schedule import NoiseSchedule

#: Karras et al. 2022, section 3.1.
_KARRAS_RHO = 7.0


def check_count(count: int, most: int, why: str = "") -> None:
    """Raise an error for a number of steps outside 1..most."""
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 1 <= count <= most:
        raise PixArtNBError(f"num_inference_steps is {count!r}; expected 1 to {most}{why}")


def multistep_timesteps(count: int, total: int, spacing: str, offset: int = 0) -> np.ndarray:
    """Return ``count`` falling timesteps (N,) int64, spaced as in diffusers' multistep solvers.

    ``linspace`` and ``leading`` compute one more and leave out the last, 0; ``trailing`` counts down from the end.
    """
    check_count(count, total if spacing == "trailing" else total - 1)
    if spacing == "linspace":
        timesteps = np.linspace(0, total - 1, count + 1).round()[:0:-1]
    elif spacing == "leading":
        timesteps = np.arange(count, 0, -1) * (total // (count + 1)) + offset
    else:
        timesteps = _trailing(count, total)
    return _in_table(timesteps, total, offset).astype(np.int64)


def single_step_timesteps(count: int, total: int, spacing: str, offset: int = 0) -> np.ndarray:
    """Return ``count`` falling timesteps (N,) float64, spaced as in diffusers' DDIM (which rounds them) and Euler.

    A single one of ``linspace`` is the last timestep. In diffusers it is 0, where there is no noise to start from.
    """
    check_count(count, total)
    if spacing == "linspace":
        timesteps = np.linspace(0, total - 1, count)[::-1] if count > 1 else np.array([total - 1.0])
    elif spacing == "leading":
        timesteps = np.arange(count - 1, -1, -1) * (total // count) + offset
    else:
        timesteps = _trailing(count, total)
    return _in_table(timesteps, total, offset).astype(np.float64)


def _trailing(count: int, total: int) -> np.ndarray:
    return (total - np.arange(count) * (total / count)).round() - 1


def _in_table(timesteps: np.ndarray, total: int, offset: int) -> np.ndarray:
    if timesteps[0] > total - 1 or timesteps[-1] < 0:
        raise PixArtNBError(
            f"steps_offset {offset} moves {len(timesteps)} timesteps out of 0..{total - 1}; choose a smaller one"
        )
    return timesteps


def lcm_timesteps(count: int, total: int, original: int) -> np.ndarray:
    """Return ``count`` falling timesteps (N,) int64 of the ``original`` ones of distillation (Luo et al. 2023)."""
    check_count(count, original, f", the number that the model was distilled with (of {total} in all)")
    distilled = np.arange(original, 0, -1) * (total // original) - 1
    return distilled[np.floor(np.linspace(0, original, count, endpoint=False)).astype(np.int64)]


def respaced_timesteps(count: int, total: int) -> np.ndarray:
    """Return ``count`` timesteps (N,) int64 from the last to 0, both included (official ``space_timesteps``)."""
    check_count(count, total)
    stride = (total - 1) / (count - 1) if count > 1 else 1.0
    return np.cumsum(np.append(0.0, np.full(count - 1, stride))).round()[::-1].astype(np.int64)


def uniform_timesteps(count: int, total: int) -> np.ndarray:
    """Return ``count`` evenly falling fractional timesteps (N,), without the last, 0 (official ``time_uniform``)."""
    check_count(count, total)
    return np.linspace(total - 1, 0.0, count + 1)[:-1]


def karras_sigmas(count: int, low: float, high: float) -> np.ndarray:
    """Return sigmas (N,) from ``high`` to ``low`` (Karras et al. 2022, equation 5)."""
    ends = np.array([high, low]) ** (1 / _KARRAS_RHO)
    return (ends[0] + np.linspace(0, 1, count) * (ends[1] - ends[0])) ** _KARRAS_RHO


def custom_timesteps(values: Sequence[float], total: int, fractions: bool = False) -> np.ndarray:
    """Return the caller's timesteps as float64 (N,). They must fall strictly and be in 0..total - 1."""
    timesteps = _falling(values, "timesteps", 1)
    if timesteps[0] > total - 1 or timesteps[-1] < 0:
        raise PixArtNBError(f"timesteps go from {timesteps[0]:g} to {timesteps[-1]:g}; expected them in {total - 1}..0")
    if not fractions and (timesteps != timesteps.round()).any():
        raise PixArtNBError(f"timesteps are {timesteps.tolist()}; this scheduler takes whole numbers")
    return timesteps


def custom_sigmas(values: Sequence[float], schedule: NoiseSchedule) -> np.ndarray:
    """Return the caller's sigmas as float64 (N + 1,) for N steps; the last is where sampling ends, usually 0."""
    sigmas = _falling(values, "sigmas", 2)
    low, high = schedule.sigmas[[0, -1]]
    slack = 1e-3  # published lists are rounded
    if sigmas[0] > high * (1 + slack) or sigmas[-2] < low * (1 - slack) or sigmas[-1] < 0:
        raise PixArtNBError(
            f"sigmas are {sigmas.tolist()}; expected them in {high:.4g}..{low:.4g}, the last alone down to 0"
        )
    return sigmas


def _falling(values: Sequence[float], name: str, least: int) -> np.ndarray:
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise PixArtNBError(f"{name} are {values!r}; expected a list of numbers") from None
    if array.ndim != 1 or len(array) < least or not np.isfinite(array).all():
        more = "; the last is the sigma at which sampling ends, usually 0" if least > 1 else ""
        raise PixArtNBError(f"{name} are {values!r}; expected a list of at least {least} finite numbers{more}")
    if (np.diff(array) >= 0).any():
        raise PixArtNBError(f"{name} are {array.tolist()}; expected each smaller than the one before")
    return array
