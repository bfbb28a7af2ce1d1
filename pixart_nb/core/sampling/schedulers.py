"""The schedulers: options and timesteps. Their steps are taken by the functions of ``samplers``.

A class has the name, the options and the defaults of diffusers, but for the noise schedule, whose defaults are
PixArt's. To add one, write its sampler in ``samplers``, then the class with ``choices``, ``spaced``, ``sampler`` and
``options``, and add it to ``CLASSES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling import samplers
from pixart_nb.core.sampling import timesteps as spacings
from pixart_nb.core.sampling.noise_schedule import LINEAR, NoiseSchedule
from pixart_nb.core.sampling.samplers import StepSchedule
from pixart_nb.core.sampling.scheduler import COMMON, Scheduler, nearest, options_with

SPACINGS = ("linspace", "leading", "trailing")
SWITCH = (False, True)
_SIGMA_SPACINGS = options_with("use_exponential_sigmas use_beta_sigmas use_flow_sigmas", False)


# ---- the schedulers of diffusers


@dataclass(frozen=True)
class _SigmaScheduler(Scheduler):
    """Schedulers of diffusers that follow a list of sigmas."""

    timestep_spacing: str = "linspace"
    steps_offset: int = 0
    use_karras_sigmas: bool = False
    final_sigmas_type: str = "zero"

    takes_sigmas: ClassVar[bool] = True
    choices: ClassVar = COMMON | _SIGMA_SPACINGS | options_with("timestep_spacing", *SPACINGS)
    choices |= options_with("use_karras_sigmas", *SWITCH) | options_with("final_sigmas_type", "zero", "sigma_min")

    def at_timesteps(self, timesteps: np.ndarray) -> StepSchedule:
        if self.use_karras_sigmas:
            raise PixArtNBError(
                "timesteps were given, but use_karras_sigmas chooses its own; switch it off, or give sigmas"
            )
        return self._ending(timesteps, self.schedule.sigma_at(timesteps))

    def _ending(self, timesteps: np.ndarray, sigmas: np.ndarray) -> StepSchedule:
        final = 0.0 if self.final_sigmas_type == "zero" else self.schedule.sigmas[0]
        return StepSchedule.chained(timesteps, np.append(sigmas, final))


@dataclass(frozen=True)
class _MultistepScheduler(_SigmaScheduler):
    """Common part of DPM-Solver++ and UniPC."""

    solver_order: int = 2
    lower_order_final: bool = True

    choices: ClassVar = _SigmaScheduler.choices | options_with("thresholding use_dynamic_shifting", False)
    choices |= options_with("solver_order", 1, 2) | options_with("lower_order_final", *SWITCH)

    def spaced(self, count: int) -> StepSchedule:
        timesteps = spacings.multistep_timesteps(
            count, self.num_train_timesteps, self.timestep_spacing, self.steps_offset
        )
        if not self.use_karras_sigmas:
            return self.at_timesteps(timesteps)
        sigmas = spacings.karras_sigmas(count, *self.schedule.sigmas[[0, -1]])
        return self._ending(self.schedule.timestep_of(sigmas).round(), sigmas)

    def options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        return {"order": self.solver_order, "lower_order_final": self.lower_order_final}


@dataclass(frozen=True)
class DPMSolverMultistepScheduler(_MultistepScheduler):
    """DPM-Solver++ 2M, PixArt's default. See ``samplers.dpm_solver_2m``."""

    euler_at_final: bool = False

    sampler = staticmethod(samplers.dpm_solver_2m)
    choices: ClassVar = _MultistepScheduler.choices | options_with("euler_at_final", *SWITCH)
    choices |= options_with("algorithm_type", "dpmsolver++") | options_with("solver_type", "midpoint")
    choices |= options_with("variance_type", None) | options_with("lambda_min_clipped", -np.inf)
    choices |= options_with("use_lu_lambdas", False)
    replaced: ClassVar = {"algorithm_type": {"deis": "dpmsolver++"}}
    replaced |= {"solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint")}

    def options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        lower = self.euler_at_final or (self.lower_order_final and len(schedule) < 15)
        return {"order": self.solver_order, "lower_order_final": lower}


@dataclass(frozen=True)
class UniPCMultistepScheduler(_MultistepScheduler):
    """UniPC of second order. See ``samplers.unipc``."""

    sampler = staticmethod(samplers.unipc)
    choices: ClassVar = _MultistepScheduler.choices | options_with("solver_type", "bh2")
    choices |= options_with("predict_x0", True) | options_with("disable_corrector", [])
    choices |= options_with("solver_p sigma_min sigma_max shift_terminal", None)
    replaced: ClassVar = {"solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")}


@dataclass(frozen=True)
class EulerDiscreteScheduler(_SigmaScheduler):
    """Euler steps. See ``samplers.euler``; the latents of its steps are clean latents plus sigma times noise."""

    sampler = staticmethod(samplers.euler)
    takes_fractions: ClassVar[bool] = True
    choices: ClassVar = _SigmaScheduler.choices | options_with("interpolation_type", "linear")
    choices |= options_with("timestep_type", "discrete") | options_with("sigma_min sigma_max", None)

    def spaced(self, count: int) -> StepSchedule:
        timesteps = spacings.single_step_timesteps(
            count, self.num_train_timesteps, self.timestep_spacing, self.steps_offset
        )
        if not self.use_karras_sigmas:
            return self.at_timesteps(timesteps)
        spaced = self.schedule.sigma_at(timesteps)
        sigmas = spacings.karras_sigmas(count, spaced[-1], spaced[0])
        return self._ending(self.schedule.timestep_of(sigmas), sigmas)

    def init_noise_sigma(self, schedule: StepSchedule) -> float:
        first = float(schedule.sigmas[0, 0])
        return first if self.timestep_spacing != "leading" else float(np.hypot(first, 1.0))

    def noised(self, image: np.ndarray, noise: np.ndarray, schedule: StepSchedule) -> np.ndarray:
        sigma = float(schedule.sigmas[0, 0])
        return ((image + sigma * noise) / self.init_noise_sigma(schedule)).astype(np.float32)


@dataclass(frozen=True)
class DDIMScheduler(Scheduler):
    """DDIM as in diffusers, whose defaults clip the clean latents to -1..1 and end without noise.

    Latent diffusion wants ``clip_sample=False, set_alpha_to_one=False``. See ``samplers.ddim``.
    """

    timestep_spacing: str = "leading"
    steps_offset: int = 0
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True

    sampler = staticmethod(samplers.ddim)
    choices: ClassVar = COMMON | options_with("timestep_spacing", *SPACINGS) | options_with("thresholding", False)
    choices |= options_with("clip_sample set_alpha_to_one", *SWITCH)

    def spaced(self, count: int) -> StepSchedule:
        timesteps = spacings.single_step_timesteps(
            count, self.num_train_timesteps, self.timestep_spacing, self.steps_offset
        ).round()
        # as in diffusers a step goes down by an equal share, though not every spacing has its next timestep there
        following = timesteps - self.num_train_timesteps // count
        sigmas_next = self.schedule.sigma_at(np.maximum(following, 0))
        return self._from_to(timesteps, np.where(following >= 0, sigmas_next, self._final()))

    def at_timesteps(self, timesteps: np.ndarray) -> StepSchedule:
        return self._from_to(timesteps, np.append(self.schedule.sigma_at(timesteps[1:]), self._final()))

    def _from_to(self, timesteps: np.ndarray, sigmas_next: np.ndarray) -> StepSchedule:
        return StepSchedule(timesteps, np.stack([self.schedule.sigma_at(timesteps), sigmas_next], 1))

    def _final(self) -> float:
        return 0.0 if self.set_alpha_to_one else float(self.schedule.sigmas[0])

    def options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        return {"eta": eta, "clip": self.clip_sample_range if self.clip_sample else None}


@dataclass(frozen=True)
class LCMScheduler(Scheduler):
    """Sampling of latent consistency models. See ``samplers.lcm``."""

    original_inference_steps: int = 50
    timestep_scaling: float = 10.0
    clip_sample: bool = False
    clip_sample_range: float = 1.0

    sampler = staticmethod(samplers.lcm)
    choices: ClassVar = COMMON | options_with("clip_sample", *SWITCH) | options_with("thresholding", False)

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.original_inference_steps <= self.num_train_timesteps:
            raise PixArtNBError(
                f"original_inference_steps is {self.original_inference_steps!r}; expected 1 to "
                f"{self.num_train_timesteps}"
            )

    def spaced(self, count: int) -> StepSchedule:
        return self.at_timesteps(spacings.lcm_timesteps(count, self.num_train_timesteps, self.original_inference_steps))

    def options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        clip = self.clip_sample_range if self.clip_sample else None
        return {"timestep_scaling": self.timestep_scaling, "clip": clip}


@dataclass(frozen=True)
class DMDScheduler(LCMScheduler):
    """One step from timestep 400, for models distilled by distribution matching (Yin et al. 2023; PixArt-DMD)."""

    def spaced(self, count: int) -> StepSchedule:
        if count != 1:
            raise PixArtNBError(
                f"num_inference_steps is {count}; DMD models take one step, so give 1 (at timestep 400), or timesteps"
            )
        return self.at_timesteps(np.array([400 * self.num_train_timesteps // 1000]))


# ---- the samplers of the official repository, which are also those of mindone's example


@dataclass(frozen=True)
class _RespacedScheduler(Scheduler):
    """Official respaced diffusion: whole timesteps from the last to 0, ending without noise."""

    def spaced(self, count: int) -> StepSchedule:
        return self.at_timesteps(spacings.respaced_timesteps(count, self.num_train_timesteps))


@dataclass(frozen=True)
class IDDPMScheduler(_RespacedScheduler):
    """Official ``IDDPM``: ancestral sampling with the learned variance. See ``samplers.iddpm``."""

    sampler = staticmethod(samplers.iddpm)

    def options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        return {"respaced": self.schedule.respaced(schedule.timesteps)}


@dataclass(frozen=True)
class OfficialDDIMScheduler(_RespacedScheduler):
    """Official ``ddim_sample_loop``, mindone's ``ddim``. See ``samplers.ddim``."""

    sampler = staticmethod(samplers.ddim)

    def options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        return {"eta": eta}


@dataclass(frozen=True)
class _ContinuousScheduler(Scheduler):
    """Official solvers in continuous time: even fractional timesteps, ending at the noise of timestep 0."""

    takes_fractions: ClassVar[bool] = True

    def spaced(self, count: int) -> StepSchedule:
        return self.at_timesteps(spacings.uniform_timesteps(count, self.num_train_timesteps))

    def at_timesteps(self, timesteps: np.ndarray) -> StepSchedule:
        return StepSchedule.chained(timesteps, self.schedule.continuous_sigma_at(np.append(timesteps, 0.0)))


@dataclass(frozen=True)
class DPMSolverContinuousScheduler(_ContinuousScheduler):
    """Official ``DPMS``: DPM-Solver++ 2M, ``time_uniform``; mindone's ``dpm``. See ``samplers.dpm_solver_2m``.

    The last step is of first order, as in PixArt-Sigma's repository; alpha's has it below ten steps only.
    """

    solver_order: int = 2
    lower_order_final: bool = True

    sampler = staticmethod(samplers.dpm_solver_2m)
    choices: ClassVar = COMMON | options_with("solver_order", 1, 2) | options_with("lower_order_final", *SWITCH)
    options = _MultistepScheduler.options


@dataclass(frozen=True)
class SASolverScheduler(_ContinuousScheduler):
    """SA-Solver as the official ``SASolverSampler`` calls it. See ``samplers.sa_solver``.

    ``tau_func(timestep)`` scales the noise; None is the official 1 in the middle and 0 in the first and last fifth of
    time. ``rescaled`` is the paper's appendix D. diffusers' class of this name rounds the timesteps, and asks for the
    noise of a step at its start instead of its end.
    """

    predictor_order: int = 2
    corrector_order: int = 2
    tau_func: Callable[[float], float] | None = None
    rescaled: bool = True

    sampler = staticmethod(samplers.sa_solver)
    choices: ClassVar = COMMON | _SIGMA_SPACINGS | options_with("predictor_order", 1, 2, 3)
    choices |= options_with("corrector_order", 0, 1, 2, 3) | options_with("rescaled", *SWITCH)
    choices |= options_with("thresholding use_karras_sigmas", False) | options_with("lower_order_final", True)
    choices |= options_with("algorithm_type", "data_prediction") | options_with("timestep_spacing", "linspace")
    choices |= options_with("steps_offset", 0) | options_with("variance_type", None)
    choices |= options_with("lambda_min_clipped", -np.inf)

    def __post_init__(self):
        super().__post_init__()
        if self.tau_func is not None and not callable(self.tau_func):
            raise PixArtNBError(f"tau_func is {self.tau_func!r}; expected a function of the timestep, or None")

    def tau(self, timestep: float) -> float:
        """Return the noise scale of a step that ends at ``timestep``."""
        if self.tau_func is not None:
            return float(self.tau_func(timestep))
        time = (timestep + 1) / self.num_train_timesteps
        return 1.0 if 0.2 <= time <= 0.8 else 0.0

    def options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        orders = self.predictor_order, self.corrector_order
        return {"tau": self.tau, "orders": orders, "rescaled": self.rescaled}


# ---- names


#: Class name -> class.
CLASSES: dict[str, type[Scheduler]] = {
    cls.__name__: cls
    for cls in (
        DPMSolverMultistepScheduler,
        DDIMScheduler,
        EulerDiscreteScheduler,
        UniPCMultistepScheduler,
        LCMScheduler,
        DMDScheduler,
        IDDPMScheduler,
        OfficialDDIMScheduler,
        DPMSolverContinuousScheduler,
        SASolverScheduler,
    )
}
#: Value of ``sampling_method`` -> class and options. iddpm, ddim and dpm are what mindone's example means by them.
SAMPLING_METHODS: dict[str, tuple[type[Scheduler], dict[str, Any]]] = {
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "dpm++karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "dmd": (DMDScheduler, {}),
    "iddpm": (IDDPMScheduler, {}),
    "ddim": (OfficialDDIMScheduler, {}),
    "dpm": (DPMSolverContinuousScheduler, {}),
    "sa-solver": (SASolverScheduler, {}),
    "ddim-diffusers": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
}


def scheduler_named(name: str, schedule: NoiseSchedule = LINEAR) -> Scheduler:
    """Return the scheduler of a name of ``SAMPLING_METHODS`` or of a class name, with a noise schedule."""
    if name not in SAMPLING_METHODS and name not in CLASSES:
        hint = nearest(str(name), CLASSES, 0.8) or nearest(str(name).lower(), SAMPLING_METHODS, 0.4)
        raise PixArtNBError(
            f"scheduler {name!r} is not known; expected one of {', '.join((*SAMPLING_METHODS, *CLASSES))}{hint}"
        )
    cls, options = SAMPLING_METHODS.get(name) or (CLASSES[name], {})
    return cls(schedule.steps, schedule.beta_start, schedule.beta_end, **options)


def scheduler_from_config(config: Mapping[str, Any]) -> Scheduler:
    """Return the scheduler that a ``scheduler_config.json`` describes; its ``_class_name`` decides which."""
    name = config.get("_class_name") if isinstance(config, Mapping) else None
    if not isinstance(name, str) or name not in CLASSES:
        raise PixArtNBError(
            f"_class_name is {name!r}; expected one of {', '.join(CLASSES)}{nearest(str(name), CLASSES)}. Give "
            "another scheduler by name, for example scheduler='dpm++' (a DMD checkpoint wants 'dmd')"
        )
    return CLASSES[name].from_config(config)


def as_scheduler(value: Scheduler | str | None, present: Scheduler | None = None) -> Scheduler | None:
    """Return a scheduler given as such, or by its name with the noise schedule of the ``present`` one, or None."""
    if isinstance(value, str):
        return scheduler_named(value, present.schedule if present else LINEAR)
    if value is not None and not isinstance(value, Scheduler):
        raise PixArtNBError(
            f"scheduler is {value!r}; expected one of {', '.join(CLASSES)}, or a name: {', '.join(SAMPLING_METHODS)}"
        )
    return value
