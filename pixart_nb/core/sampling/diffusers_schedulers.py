"""The schedulers of diffusers that PixArt is used with, under their names and with their options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.scheduler import FINAL_SIGMAS, SPACINGS, SWITCH, Scheduler
from pixart_nb.core.sampling.solvers import ddim, dpm_solver_2m, euler, unipc
from pixart_nb.core.sampling.step import Plan, Step, chained
from pixart_nb.core.sampling.stochastic import lcm
from pixart_nb.core.sampling.timesteps import (
    karras_sigmas,
    lcm_timesteps,
    multistep_timesteps,
    single_step_timesteps,
)


@dataclass(frozen=True)
class _SigmaScheduler(Scheduler):
    """Schedulers of diffusers that walk down a list of noise-to-signal ratios."""

    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    use_karras_sigmas: bool = False
    final_sigmas_type: str = "zero"

    choices: ClassVar[Mapping[str, tuple]] = {
        "timestep_spacing": SPACINGS,
        "use_karras_sigmas": SWITCH,
        "final_sigmas_type": FINAL_SIGMAS,
    }
    takes_sigmas: ClassVar[bool] = True

    def at_timesteps(self, timesteps: np.ndarray) -> Plan:
        if self.use_karras_sigmas:
            raise PixArtNBError(
                "timesteps were given, but use_karras_sigmas chooses its own; switch it off, or give sigmas"
            )
        return self._ending(timesteps, self.schedule.sigma_at(timesteps))

    def _ending(self, timesteps: np.ndarray, sigmas: np.ndarray) -> Plan:
        final = 0.0 if self.final_sigmas_type == "zero" else self.schedule.sigmas[0]
        return chained(timesteps, np.append(sigmas, final))


@dataclass(frozen=True)
class _MultistepScheduler(_SigmaScheduler):
    """What DPM-Solver++ and UniPC have in common."""

    solver_order: int = 2
    lower_order_final: bool = True

    choices: ClassVar[Mapping[str, tuple]] = _SigmaScheduler.choices | {
        "solver_order": (1, 2),
        "lower_order_final": SWITCH,
    }

    def spaced(self, count: int) -> Plan:
        timesteps = multistep_timesteps(
            count, self.num_train_timesteps, self.timestep_spacing, self.steps_offset
        )
        if not self.use_karras_sigmas:
            return self.at_timesteps(timesteps)
        sigmas = karras_sigmas(count, *self.schedule.sigmas[[0, -1]])
        return self._ending(self.schedule.timestep_of(sigmas).round(), sigmas)


@dataclass(frozen=True)
class DPMSolverMultistepScheduler(_MultistepScheduler):
    """DPM-Solver++ 2M, with Karras sigmas if asked: PixArt's default. See ``solvers.dpm_solver_2m``."""

    euler_at_final: bool = False

    choices: ClassVar[Mapping[str, tuple]] = _MultistepScheduler.choices | {"euler_at_final": SWITCH}
    only: ClassVar[Mapping[str, Any]] = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}

    def _steps(self, predict, latents, plan, generator, eta) -> Iterator[Step]:
        simple_end = self.euler_at_final or (self.lower_order_final and len(plan) < 15)
        return dpm_solver_2m(predict, latents, plan, self.solver_order, simple_end)


@dataclass(frozen=True)
class UniPCMultistepScheduler(_MultistepScheduler):
    """UniPC of second order. See ``solvers.unipc``."""

    only: ClassVar[Mapping[str, Any]] = {
        "solver_type": "bh2",
        "predict_x0": True,
        "disable_corrector": [],
        "solver_p": None,
    }

    def _steps(self, predict, latents, plan, generator, eta) -> Iterator[Step]:
        return unipc(predict, latents, plan, self.solver_order, self.lower_order_final)


@dataclass(frozen=True)
class EulerDiscreteScheduler(_SigmaScheduler):
    """Euler steps. See ``solvers.euler``; the latents of its steps are picture plus sigma times noise."""

    only: ClassVar[Mapping[str, Any]] = {"interpolation_type": "linear", "timestep_type": "discrete"}
    takes_fractions: ClassVar[bool] = True

    def spaced(self, count: int) -> Plan:
        timesteps = single_step_timesteps(
            count, self.num_train_timesteps, self.timestep_spacing, self.steps_offset
        )
        if not self.use_karras_sigmas:
            return self.at_timesteps(timesteps)
        spaced = self.schedule.sigma_at(timesteps)
        sigmas = karras_sigmas(count, spaced[-1], spaced[0])
        return self._ending(self.schedule.timestep_of(sigmas), sigmas)

    def init_noise_sigma(self, plan: Plan) -> float:
        """What unit noise is multiplied by before the first step, as in diffusers."""
        first = float(plan.levels[0, 0])
        return first if self.timestep_spacing != "leading" else float(np.hypot(first, 1.0))

    def noised(self, picture: np.ndarray, noise: np.ndarray, plan: Plan) -> np.ndarray:
        sigma = float(plan.levels[0, 0])
        return ((picture + sigma * noise) / self.init_noise_sigma(plan)).astype(np.float32)

    def _steps(self, predict, latents, plan, generator, eta) -> Iterator[Step]:
        return euler(predict, self.init_noise_sigma(plan) * latents, plan)


@dataclass(frozen=True)
class DDIMScheduler(Scheduler):
    """DDIM as diffusers has it. See ``solvers.ddim``.

    Two defaults are those of latent diffusion, not of diffusers' class, which clips to the range of pixels:
    ``clip_sample`` and ``set_alpha_to_one`` are off, so the last step ends at the noise of timestep 0.
    """

    timestep_spacing: str = "leading"
    steps_offset: int = 0
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = False

    choices: ClassVar[Mapping[str, tuple]] = {
        "timestep_spacing": SPACINGS,
        "clip_sample": SWITCH,
        "set_alpha_to_one": SWITCH,
    }

    def spaced(self, count: int) -> Plan:
        timesteps = single_step_timesteps(
            count, self.num_train_timesteps, self.timestep_spacing, self.steps_offset
        ).round()
        # as in diffusers a step goes down by an equal share, though not every spacing has its next timestep there
        following = timesteps - self.num_train_timesteps // count
        there = self.schedule.sigma_at(np.maximum(following, 0))
        return self._from_to(timesteps, np.where(following >= 0, there, self._final()))

    def at_timesteps(self, timesteps: np.ndarray) -> Plan:
        return self._from_to(timesteps, np.append(self.schedule.sigma_at(timesteps[1:]), self._final()))

    def _from_to(self, timesteps: np.ndarray, there: np.ndarray) -> Plan:
        return Plan(timesteps, np.stack([self.schedule.sigma_at(timesteps), there], 1))

    def _final(self) -> float:
        return 0.0 if self.set_alpha_to_one else float(self.schedule.sigmas[0])

    def _steps(self, predict, latents, plan, generator, eta) -> Iterator[Step]:
        clip = self.clip_sample_range if self.clip_sample else None
        return ddim(predict, latents, plan, generator, eta, clip)


@dataclass(frozen=True)
class LCMScheduler(Scheduler):
    """Consistency sampling of models distilled for it. See ``stochastic.lcm``."""

    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    clip_sample: bool = False
    clip_sample_range: float = 1.0

    choices: ClassVar[Mapping[str, tuple]] = {"clip_sample": SWITCH}
    idle: ClassVar[frozenset[str]] = frozenset({"set_alpha_to_one", "steps_offset", "timestep_spacing"})

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.original_inference_steps <= self.num_train_timesteps:
            raise PixArtNBError(
                f"original_inference_steps is {self.original_inference_steps!r}; expected 1 to "
                f"{self.num_train_timesteps}"
            )

    def spaced(self, count: int) -> Plan:
        return self.at_timesteps(
            lcm_timesteps(count, self.num_train_timesteps, self.original_inference_steps)
        )

    def at_timesteps(self, timesteps: np.ndarray) -> Plan:
        return chained(timesteps, np.append(self.schedule.sigma_at(timesteps), 0.0))

    def _steps(self, predict, latents, plan, generator, eta) -> Iterator[Step]:
        clip = self.clip_sample_range if self.clip_sample else None
        return lcm(predict, latents, plan, generator, self.timestep_scaling, clip)


@dataclass(frozen=True)
class DMDScheduler(LCMScheduler):
    """One step from timestep 400, for models distilled by distribution matching (Yin et al. 2023; PixArt-DMD)."""

    def spaced(self, count: int) -> Plan:
        if count != 1:
            raise PixArtNBError(
                f"num_inference_steps is {count}; DMD models draw in one step, so give 1 (at timestep 400), or "
                "timesteps"
            )
        return self.at_timesteps(np.array([400 * self.num_train_timesteps // 1000]))
