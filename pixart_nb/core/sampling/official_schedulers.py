"""The samplers of the official repository, which are also those of mindone's example."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.scheduler import SWITCH, Scheduler
from pixart_nb.core.sampling.solvers import ddim, dpm_solver_2m
from pixart_nb.core.sampling.step import Plan, Step, chained
from pixart_nb.core.sampling.stochastic import iddpm, sa_solver
from pixart_nb.core.sampling.timesteps import respaced_timesteps, uniform_timesteps


@dataclass(frozen=True)
class _RespacedScheduler(Scheduler):
    """The official diffusion, respaced: whole timesteps from the last to 0, then no noise."""

    def spaced(self, count: int) -> Plan:
        return self.at_timesteps(respaced_timesteps(count, self.num_train_timesteps))

    def at_timesteps(self, timesteps: np.ndarray) -> Plan:
        return chained(timesteps, np.append(self.schedule.sigma_at(timesteps), 0.0))


@dataclass(frozen=True)
class IDDPMScheduler(_RespacedScheduler):
    """The official ``IDDPM``: ancestral sampling with the variance that the model learned. See ``stochastic.iddpm``."""

    def _steps(self, predict, latents, plan, generator, eta) -> Iterator[Step]:
        return iddpm(predict, latents, plan, self.schedule.respaced(plan.timesteps), generator)


@dataclass(frozen=True)
class OfficialDDIMScheduler(_RespacedScheduler):
    """The official ``ddim_sample_loop``, which is also mindone's ``ddim``. See ``solvers.ddim``."""

    def _steps(self, predict, latents, plan, generator, eta) -> Iterator[Step]:
        return ddim(predict, latents, plan, generator, eta)


@dataclass(frozen=True)
class _ContinuousScheduler(Scheduler):
    """Official solvers in continuous time: even fractional timesteps, ending at the noise of timestep 0."""

    takes_fractions: ClassVar[bool] = True

    def spaced(self, count: int) -> Plan:
        return self.at_timesteps(uniform_timesteps(count, self.num_train_timesteps))

    def at_timesteps(self, timesteps: np.ndarray) -> Plan:
        return chained(timesteps, self.schedule.continuous_sigma_at(np.append(timesteps, 0.0)))


@dataclass(frozen=True)
class DPMSolverContinuousScheduler(_ContinuousScheduler):
    """The official ``DPMS``: DPM-Solver++ (2M), ``time_uniform``; mindone's ``dpm``. See ``solvers.dpm_solver_2m``.

    The last step is of first order, as in PixArt-Sigma's repository; alpha's has it so below ten steps only.
    """

    solver_order: int = 2
    lower_order_final: bool = True

    choices: ClassVar[Mapping[str, tuple]] = {"solver_order": (1, 2), "lower_order_final": SWITCH}

    def _steps(self, predict, latents, plan, generator, eta) -> Iterator[Step]:
        return dpm_solver_2m(predict, latents, plan, self.solver_order, self.lower_order_final)


@dataclass(frozen=True)
class SASolverScheduler(_ContinuousScheduler):
    """SA-Solver as the official ``SASolverSampler`` calls it. See ``stochastic.sa_solver``.

    ``tau_func(timestep)`` scales the noise; None is the official 1 in the middle and 0 in the first and last fifth of
    time. ``rescaled`` is the paper's appendix D. diffusers' class of this name rounds the timesteps, and asks for the
    noise of a step at its start instead of its end.
    """

    predictor_order: int = 2
    corrector_order: int = 2
    tau_func: Callable[[float], float] | None = None
    rescaled: bool = True

    choices: ClassVar[Mapping[str, tuple]] = {
        "predictor_order": (1, 2, 3),
        "corrector_order": (0, 1, 2, 3),
        "rescaled": SWITCH,
    }
    only: ClassVar[Mapping[str, Any]] = {
        "algorithm_type": "data_prediction",
        "lower_order_final": True,
        "use_karras_sigmas": False,
        "timestep_spacing": "linspace",
        "steps_offset": 0,
    }

    def __post_init__(self):
        super().__post_init__()
        if self.tau_func is not None and not callable(self.tau_func):
            raise PixArtNBError(
                f"tau_func is {self.tau_func!r}; expected a function of the timestep, or None"
            )

    def tau(self, timestep: float) -> float:
        """How much noise a step that ends at ``timestep`` draws."""
        if self.tau_func is not None:
            return float(self.tau_func(timestep))
        time = (timestep + 1) / self.num_train_timesteps
        return 1.0 if 0.2 <= time <= 0.8 else 0.0

    def _steps(self, predict, latents, plan, generator, eta) -> Iterator[Step]:
        orders = self.predictor_order, self.corrector_order
        return sa_solver(predict, latents, plan, self.tau, orders, self.rescaled, generator)
