"""The noise schedule: how much of the picture is left at each of the 1,000 timesteps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

TIMESTEPS = 1000


@dataclass(frozen=True)
class NoiseSchedule:
    """A diffusion with linear betas (Ho et al. 2020), every table (steps,) float64.

    ``x_t = sqrt(alphas_cumprod) x_0 + sqrt(1 - alphas_cumprod) noise``.
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = TIMESTEPS

    def __post_init__(self):
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"betas go from {self.beta_start} to {self.beta_end}; expected 0 < start <= end < 1"
            )

    @cached_property
    def betas(self) -> np.ndarray:
        """Variance added by each step."""
        return np.linspace(self.beta_start, self.beta_end, self.steps, dtype=np.float64)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """Share of the picture's variance that is left."""
        return np.cumprod(1.0 - self.betas)

    @cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        """The same one step earlier, 1 before the first."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0); 0 at the first step."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance(self) -> np.ndarray:
        """Its logarithm, the first value replaced by the second, which is finite."""
        return np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    @cached_property
    def posterior_mean_coefficients(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights of x_0 and of x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        rest = 1.0 - self.alphas_cumprod
        start = self.betas * np.sqrt(self.alphas_cumprod_prev) / rest
        current = (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / rest
        return start, current

    @cached_property
    def sigmas(self) -> np.ndarray:
        """Noise over signal, ``sqrt((1 - a) / a)``."""
        return np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)


LINEAR = NoiseSchedule()
