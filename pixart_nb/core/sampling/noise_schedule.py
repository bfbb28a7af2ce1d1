"""Noise schedule of training: signal and noise at each of the 1,000 timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pixart_nb.core.errors import PixArtNBError

TIMESTEPS = 1000
#: Bound of the tables' length, whatever a configuration file says.
_MOST_TIMESTEPS = 100_000


@dataclass(frozen=True)
class NoiseSchedule:
    """Diffusion with linear betas (Ho et al. 2020). Every table is (steps,) float64.

    ``x_t = sqrt(alphas_cumprod) x_0 + sqrt(1 - alphas_cumprod) noise``.
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = TIMESTEPS

    def __post_init__(self):
        if not isinstance(self.steps, int) or not 2 <= self.steps <= _MOST_TIMESTEPS:
            raise PixArtNBError(
                f"num_train_timesteps is {self.steps!r}; expected 2 to {_MOST_TIMESTEPS}, 1000 in PixArt"
            )
        betas = (self.beta_start, self.beta_end)
        if not all(isinstance(beta, (int, float)) for beta in betas) or not 0 < betas[0] <= betas[1] < 1:
            raise PixArtNBError(f"betas go from {betas[0]!r} to {betas[1]!r}; expected numbers, 0 < start <= end < 1")

    @cached_property
    def betas(self) -> np.ndarray:
        """Variance added by each step."""
        return np.linspace(self.beta_start, self.beta_end, self.steps, dtype=np.float64)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """Remaining share of the signal's variance."""
        return np.cumprod(1.0 - self.betas)

    @cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """``alphas_cumprod`` one step earlier, 1 before the first."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0); 0 at the first step."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """Logarithm of ``posterior_variance``, its first value replaced by the second, which is finite."""
        finite = self.posterior_variance[1:] if len(self.betas) > 1 else self.betas
        return np.log(np.append(finite[0], finite)[: len(self.betas)])

    @cached_property
    def posterior_mean_coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights of x_0 and of x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        rest = 1.0 - self.alphas_cumprod
        start = self.betas * np.sqrt(self.alphas_cumprod_prev) / rest
        current = (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / rest
        return start, current

    @cached_property
    def sigmas(self) -> np.ndarray:
        """Noise-to-signal ratios, ``sqrt((1 - a) / a)``."""
        return np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)

    def sigma_at(self, timesteps: np.ndarray) -> np.ndarray:
        """Return sigmas at timesteps (N,), interpolated linearly between those of the table, as in diffusers."""
        return np.interp(timesteps, np.arange(self.steps), self.sigmas)

    def continuous_sigma_at(self, timesteps: np.ndarray) -> np.ndarray:
        """Return sigmas at timesteps (N,), linear in the log signal (DPM-Solver; official ``NoiseScheduleVP``)."""
        log_signal = np.interp(timesteps, np.arange(self.steps), 0.5 * np.log(self.alphas_cumprod))
        return np.sqrt(np.expm1(-2.0 * log_signal))

    def timestep_of(self, sigmas: np.ndarray) -> np.ndarray:
        """Return fractional timesteps (N,) of sigmas (N,), linear in their logarithm and clipped to the table."""
        return np.interp(np.log(sigmas), np.log(self.sigmas), np.arange(self.steps))

    def respaced(self, timesteps: Sequence[int]) -> RespacedSchedule:
        """Return the diffusion that visits only these timesteps, in any order."""
        kept = tuple(sorted(int(timestep) for timestep in timesteps))
        return RespacedSchedule(self.beta_start, self.beta_end, self.steps, kept)


@dataclass(frozen=True)
class RespacedSchedule(NoiseSchedule):
    """Diffusion that skips timesteps (Nichol and Dhariwal 2021, section 4; official ``SpacedDiffusion``).

    Its tables are (len(timesteps),); row k belongs to ``timesteps[k]``.
    """

    timesteps: tuple[int, ...] = ()

    @cached_property
    def betas(self) -> np.ndarray:
        """Variance added between one kept timestep and the next."""
        kept = NoiseSchedule(self.beta_start, self.beta_end, self.steps).alphas_cumprod[list(self.timesteps)]
        return 1.0 - kept / np.append(1.0, kept[:-1])


LINEAR = NoiseSchedule()


# ---- validation of a caller's timesteps and sigmas


def check_count(count: int, most: int, why: str = "") -> None:
    """Raise an error for a number of steps outside 1..most."""
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or not 1 <= count <= most:
        raise PixArtNBError(f"num_inference_steps is {count!r}; expected 1 to {most}{why}")


def check_timesteps(values: Sequence[float], total: int, fractions: bool) -> np.ndarray:
    """Return the caller's timesteps (N,) float64, which fall strictly within total - 1..0."""
    timesteps = _falling(values, "timesteps", 1)
    if timesteps[0] > total - 1 or timesteps[-1] < 0:
        raise PixArtNBError(f"timesteps go from {timesteps[0]:g} to {timesteps[-1]:g}; expected them in {total - 1}..0")
    if not fractions and (timesteps != timesteps.round()).any():
        raise PixArtNBError(f"timesteps are {timesteps.tolist()}; this scheduler takes whole numbers")
    return timesteps


def check_sigmas(values: Sequence[float], schedule: NoiseSchedule) -> np.ndarray:
    """Return the caller's sigmas (N + 1,) float64 for N steps."""
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
