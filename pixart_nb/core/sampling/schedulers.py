"""The schedulers: options and timesteps. Their steps are taken by the functions of ``samplers``.

A class has the name, the options and the defaults of diffusers, but for the noise schedule, whose defaults are
PixArt's. To add one, write its sampler in ``samplers``, then the class with its options, ``spaced``, ``sampler`` and
``sampler_options``, and add it to ``SAMPLING_METHODS``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from pixart_nb.config import bundled_path
from pixart_nb.core.errors import PixArtNBError, check_number, did_you_mean
from pixart_nb.core.io import read_json, write_json
from pixart_nb.core.sampling import samplers, sigma_samplers
from pixart_nb.core.sampling.noise_schedule import LINEAR, NoiseSchedule, check_count, check_sigmas, check_timesteps
from pixart_nb.core.sampling.samplers import Generators, Predict, Step, StepSchedule, check_generators, scales

Spacing = Literal["linspace", "leading", "trailing"]
Final = Literal["zero", "sigma_min"]
#: Options of diffusers of which one value is implemented.
FIXED: dict[str, Any] = {
    **dict.fromkeys(("thresholding", "rescale_betas_zero_snr", "use_flow_sigmas", "use_dynamic_shifting"), False),
    **dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False),
    **dict.fromkeys(("trained_betas", "variance_type", "solver_p", "sigma_min", "sigma_max", "shift_terminal"), None),
    **dict.fromkeys(("predict_x0", "skip_prk_steps", "lower_order_final"), True),
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "disable_corrector": [],
    "lambda_min_clipped": -math.inf,
}


class SchedulerConfig(dict):
    """Options of a scheduler, read-only: ``config["beta_end"]``, ``config.beta_end``, ``dict(config)``.

    ``defaults`` names the options that were not chosen. ``from_config`` of another class uses its own default for them.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Iterable[str] = ()):
        super().__init__(values)
        self.__dict__["defaults"] = frozenset(defaults)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self:
            raise AttributeError(f"the configuration has no {name!r}; it has {', '.join(self)}")
        return self[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a configuration is read-only; use from_config(config, {name}={value!r})")

    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError(f"a configuration is read-only; use from_config(config, {name}={value!r})")


class Scheduler(BaseModel):
    """Base class. It holds options only: ``plan`` returns the steps of a run, ``steps`` takes them.

    The types of the options are what is implemented of diffusers' values.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
    num_train_timesteps: int = LINEAR.steps
    beta_start: float = LINEAR.beta_start
    beta_end: float = LINEAR.beta_end
    beta_schedule: Literal["linear"] = "linear"
    prediction_type: Literal["epsilon"] = "epsilon"

    #: Names of further options of diffusers' class, of which ``FIXED`` has the value.
    fixed: ClassVar[str] = "trained_betas"
    #: Values that diffusers replaces, such as another class's solver_type.
    replaced: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    takes_sigmas: ClassVar[bool] = False
    takes_fractions: ClassVar[bool] = False
    #: The function of ``samplers`` that takes the steps.
    sampler: ClassVar[Callable[..., Iterator[Step]]]

    def __init__(self, **options: Any):
        for name in options.keys() & set(self.fixed.split()):
            if (value := options.pop(name)) != FIXED[name]:
                raise PixArtNBError(
                    f"{type(self).__name__} option {name} is {value!r}, which is not implemented; supported: "
                    f"{FIXED[name]!r}"
                )
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise PixArtNBError(f"{type(self).__name__} {self._problem(error.errors()[0])}") from None
        _ = self.schedule  # validates its own

    @classmethod
    def _problem(cls, error: Mapping[str, Any]) -> str:
        name, value, problem = error["loc"][0], error["input"], error["type"]
        if problem == "extra_forbidden":
            hint = did_you_mean(name, cls.model_fields) or "; it has " + ", ".join(cls.model_fields)
            return f"has no option {name!r} (given {value!r}){hint}"
        types = {"int_type": "a whole number", "float_type": "a number", "finite_number": "a number"}
        types["bool_type"] = "True or False"
        if problem in types:
            default = cls.model_fields[name].default
            return f"option {name} is {value!r}; expected {types[problem]}, by default {default}"
        expected = error["msg"].removeprefix("Input should be ")
        return f"option {name} is {value!r}, which is not implemented; supported: {expected}"

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """Noise schedule that the model was trained with."""
        return NoiseSchedule(self.beta_start, self.beta_end, self.num_train_timesteps)

    # ---- configuration

    @property
    def config(self) -> SchedulerConfig:
        """All options, as ``from_config`` of any scheduler and ``scheduler_config.json`` take them."""
        values = {name: value for name, value in self.model_dump().items() if value is not None}
        return SchedulerConfig({"_class_name": type(self).__name__} | values, values.keys() - self.model_fields_set)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Scheduler:
        """Make a scheduler of this class with the options of ``config``, which may be another class's.

        As in diffusers, options that this class does not have are ignored, and an option that the other class left at
        its default gets this class's default. Raises an error for an option that diffusers' class has and this one
        does not implement, and for an unknown name in ``overrides``.
        """
        skipped = {*getattr(config, "defaults", ()), *config.get("_use_default_values", ())}
        options = {}
        for key, value in config.items():
            if key in skipped or key.startswith("_"):
                continue
            if key in cls.model_fields or key in cls.fixed.split():
                options[key] = cls.replaced.get(key, {}).get(value, value) if isinstance(value, str) else value
            elif not any(key in other.model_fields for other in CLASSES.values()) and (
                hint := did_you_mean(key, cls.model_fields, 0.85)
            ):
                warnings.warn(f"{cls.__name__} has no option {key!r} and ignores it{hint}", stacklevel=2)
        # null stands for the default
        return cls(**{key: value for key, value in options.items() if value is not None} | overrides)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = "", **overrides: Any
    ) -> Scheduler:
        """Make a scheduler of this class with the options of a local folder's ``scheduler_config.json``."""
        folder = bundled_path(pretrained_model_name_or_path) / (subfolder or "")
        if not folder.is_dir():
            raise PixArtNBError(
                f"{folder} is no folder here; give a local one. Of a model on a hub, take the options of its pipeline: "
                f"{cls.__name__}.from_config(pipe.scheduler.config)"
            )
        return cls.from_config(read_json(folder / "scheduler_config.json"), **overrides)

    def check_savable(self) -> None:
        """Raise an error if an option is a function, which no file can hold."""
        if functions := [name for name, value in self.config.items() if callable(value)]:
            raise PixArtNBError(f"{', '.join(functions)} of the scheduler is a function, which cannot be saved")

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``scheduler_config.json`` into a folder."""
        self.check_savable()
        write_json(Path(save_directory).expanduser() / "scheduler_config.json", dict(self.config))

    # ---- steps of a run

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> StepSchedule:
        """Return the steps of a run: ``num_inference_steps`` of them, or those of given timesteps or sigmas.

        timesteps fall within 0..num_train_timesteps - 1. sigmas are noise-to-signal ratios, falling, one more than
        there are steps; the last is where sampling ends (usually 0). With either, the number is ignored. Raises an
        error for both, for neither, and for values that the scheduler cannot follow.
        """
        if timesteps is not None and sigmas is not None:
            raise PixArtNBError("both timesteps and sigmas were given; give one of them")
        if sigmas is not None:
            if not self.takes_sigmas:
                raise PixArtNBError(f"{type(self).__name__} takes no sigmas; dpm++, unipc and euler do")
            sigmas = check_sigmas(sigmas, self.schedule)
            return StepSchedule.chained(self.schedule.timestep_of(sigmas[:-1]), sigmas)
        if timesteps is not None:
            return self.at_timesteps(check_timesteps(timesteps, self.num_train_timesteps, self.takes_fractions))
        if num_inference_steps is None:
            raise PixArtNBError("give num_inference_steps, timesteps or sigmas")
        return self.spaced(num_inference_steps)

    def spaced(self, count: int) -> StepSchedule:
        """Return the scheduler's own ``count`` steps."""
        raise NotImplementedError

    def at_timesteps(self, timesteps: np.ndarray) -> StepSchedule:
        """Return the steps at validated timesteps (N,)."""
        return StepSchedule.chained(timesteps, np.append(self.schedule.sigma_at(timesteps), 0.0))

    def sampler_options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        """Return the options of ``sampler``."""
        return {}

    def steps(
        self,
        predict: Predict,
        latents: np.ndarray,
        schedule: StepSchedule,
        generator: Generators = None,
        eta: float = 0.0,
    ) -> Iterator[Step]:
        """Sample: latents (N, C, H, W) of unit noise, a ``Step`` for each timestep of the schedule.

        ``generator`` draws the noise of the steps, if there is any: one, or one for each row. ``eta``, 0..1, is DDIM's
        and has no effect elsewhere.
        """
        check_eta(eta)
        check_generators(generator, len(latents))
        latents = self.init_noise_sigma(schedule) * latents
        return self.sampler(predict, latents, schedule, generator, **self.sampler_options(schedule, float(eta)))

    def init_noise_sigma(self, schedule: StepSchedule) -> float:
        """Return the factor of unit noise before the first step, as in diffusers."""
        return 1

    def noised(self, image: np.ndarray, noise: np.ndarray, schedule: StepSchedule) -> np.ndarray:
        """Return what ``steps`` takes in place of unit noise to start from clean latents (N, C, H, W).

        This is image-to-image (SDEdit, Meng et al. 2022).
        """
        return self.noised_at(image, noise, float(schedule.sigmas[0, 0]))

    def noised_at(self, image: np.ndarray, noise: np.ndarray, sigma: float) -> np.ndarray:
        """Return what the latents of a step would be at ``sigma``, for these clean latents and this noise."""
        signal, scale = scales(sigma)
        return (signal * image + scale * noise).astype(np.float32)


# ---- validation


def check_eta(eta: float) -> None:
    """Raise an error for an ``eta`` outside 0..1."""
    check_number("eta", eta)
    if not 0 <= eta <= 1:
        raise PixArtNBError(f"eta is {eta!r}; expected 0 (no noise) to 1 (as much as DDPM)")


# ---- the schedulers of diffusers


class _Spaced(BaseModel):
    """Options of the published spacings of timesteps."""

    timestep_spacing: Spacing = "linspace"
    steps_offset: int = 0


class _Curved(BaseModel):
    """Options that choose the sigmas of the steps."""

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False


class _Clipped(BaseModel):
    """Options that limit the clean latents."""

    clip_sample: bool = False
    clip_sample_range: float = 1.0

    @property
    def clip(self) -> float | None:
        return self.clip_sample_range if self.clip_sample else None


class _DiffusersScheduler(Scheduler):
    """Schedulers of diffusers but for consistency models."""

    def spaced_timesteps(self, count: int, left_out: int = 0) -> np.ndarray:
        """Return ``count`` falling timesteps (N,) float64; those of ``linspace`` are fractions.

        Multistep solvers leave out one, 0, at the end. A single one of ``linspace`` is the last timestep; in diffusers
        it is 0, where there is no noise to start from.
        """
        total, spacing = self.num_train_timesteps, getattr(self, "timestep_spacing", "linspace")
        check_count(count, total if spacing == "trailing" else total - left_out)
        all_steps = count + left_out
        if spacing == "linspace":
            timesteps = np.linspace(0, total - 1, all_steps)[::-1] if all_steps > 1 else np.array([total - 1.0])
        elif spacing == "leading":
            timesteps = np.arange(all_steps - 1, -1, -1.0) * (total // all_steps) + self.steps_offset
        else:
            timesteps = (total - np.arange(count) * (total / count)).round() - 1
        timesteps = timesteps[:count]
        if timesteps[0] > total - 1 or timesteps[-1] < 0:
            raise PixArtNBError(
                f"steps_offset {self.steps_offset} moves {count} timesteps out of 0..{total - 1}; choose a smaller one"
            )
        return timesteps


def _karras(count: int, high: float, low: float) -> np.ndarray:
    """Return falling sigmas (N,) (Karras et al. 2022, equation 5, rho 7)."""
    first, last = np.array([high, low]) ** (1 / 7.0)
    return (first + np.linspace(0, 1, count) * (last - first)) ** 7.0


def _exponential(count: int, high: float, low: float) -> np.ndarray:
    """Return sigmas (N,) that fall by equal ratios (Lu et al. 2022)."""
    return np.exp(np.linspace(np.log(high), np.log(low), count))


def _beta(count: int, high: float, low: float) -> np.ndarray:
    """Return sigmas (N,) at even quantiles of the beta distribution (0.6, 0.6) (Lee et al. 2024)."""
    from scipy.special import betaincinv  # slow to import, and used for these sigmas only

    return low + betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, count)) * (high - low)


#: Option that chooses the sigmas of the steps between the highest and the lowest -> its curve.
_CURVES = {
    "use_karras_sigmas": _karras,
    "use_exponential_sigmas": _exponential,
    "use_beta_sigmas": _beta,
    "use_lu_lambdas": _exponential,
}


class _SigmaScheduler(_DiffusersScheduler):
    """Schedulers of diffusers that follow a list of sigmas."""

    takes_sigmas: ClassVar = True
    #: Options whose timesteps are rounded.
    rounded: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **options: Any):
        super().__init__(**options)
        _ = self.curve  # validates its options

    @cached_property
    def curve(self) -> str:
        """Option that chooses the sigmas, or an empty text."""
        names = [name for name in _CURVES if getattr(self, name, False)]
        if len(names) > 1:
            raise PixArtNBError(f"{type(self).__name__}: {' and '.join(names)} exclude each other; choose one")
        return "".join(names)

    def at_timesteps(self, timesteps: np.ndarray) -> StepSchedule:
        if self.curve:
            raise PixArtNBError(
                f"timesteps were given, but {self.curve} chooses its own; switch it off, or give sigmas"
            )
        return self._ending(timesteps, self.schedule.sigma_at(timesteps))

    def _ending(self, timesteps: np.ndarray, sigmas: np.ndarray) -> StepSchedule:
        final = self.schedule.sigmas[0] if getattr(self, "final_sigmas_type", "zero") == "sigma_min" else 0.0
        return StepSchedule.chained(timesteps, np.append(sigmas, final))


class _SolverScheduler(_SigmaScheduler, _Curved):
    """Common part of the solvers whose steps leave out timestep 0."""

    fixed: ClassVar = Scheduler.fixed + " thresholding use_flow_sigmas use_dynamic_shifting"
    rounded: ClassVar = ("use_karras_sigmas", "use_lu_lambdas")
    #: With so many steps the last ones keep their order.
    many_steps: ClassVar[float] = math.inf
    solver_order: Literal[1, 2, 3] = 2
    lower_order_final: bool = True

    def spaced(self, count: int) -> StepSchedule:
        timesteps = self.spaced_timesteps(count, 1).round()
        if not self.curve:
            return self.at_timesteps(timesteps)
        sigmas = _CURVES[self.curve](count, *self.schedule.sigmas[[-1, 0]])
        timesteps = self.schedule.timestep_of(sigmas)
        # as in diffusers, whose timesteps are integers
        return self._ending(timesteps.round() if self.curve in self.rounded else np.floor(timesteps + 1e-6), sigmas)

    def sampler_options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        lower = self.lower_order_final and len(schedule) < self.many_steps
        return {"order": self.solver_order, "lower_order_final": lower}


class _DPMSolver(_SolverScheduler):
    """Options of DPM-Solver++."""

    fixed: ClassVar = _SolverScheduler.fixed + " variance_type lambda_min_clipped"
    algorithm_type: Literal["dpmsolver++", "sde-dpmsolver++"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    final_sigmas_type: Final = "zero"

    replaced: ClassVar = {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
    }

    @property
    def variant(self) -> dict[str, bool]:
        """Options that choose the form of a step."""
        return {"heun": self.solver_type == "heun", "stochastic": self.algorithm_type == "sde-dpmsolver++"}


class DPMSolverMultistepScheduler(_DPMSolver, _Spaced):
    """DPM-Solver++ 2M, PixArt's default, 3M and SDE-DPM-Solver++. See ``samplers.dpm_solver``."""

    sampler = staticmethod(samplers.dpm_solver)
    fixed: ClassVar = _DPMSolver.fixed + " rescale_betas_zero_snr"
    many_steps: ClassVar = 15
    euler_at_final: bool = False
    use_lu_lambdas: bool = False

    def sampler_options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        return super().sampler_options(schedule, eta) | self.variant | {"euler_at_final": self.euler_at_final}


class DPMSolverSinglestepScheduler(_DPMSolver):
    """DPM-Solver++ single-step, 2S and 3S. See ``samplers.dpm_solver_singlestep``."""

    sampler = staticmethod(samplers.dpm_solver_singlestep)
    lower_order_final: bool = False

    def orders(self, count: int) -> list[int]:
        """Return the order of each of ``count`` steps: 1, 2, ... again and again, and lower ones at the end."""
        order = self.solver_order
        orders = [1 + step % order for step in range(count)]
        # without lower_order_final, diffusers switches it on for these
        lower = self.lower_order_final or self.final_sigmas_type == "zero" or count % order
        if lower and order > 1:
            if order == 3 and count % 3 == 0 and count > 0:
                orders[-3:] = [1, 2, 1]
            orders[-1] = orders[-1] if order == 3 and count % 3 == 2 else 1
        if self.final_sigmas_type == "zero":
            orders[-1] = 1
        return orders

    def sampler_options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        return self.variant | {"orders": self.orders(len(schedule))}


class DEISMultistepScheduler(_SolverScheduler, _Spaced):
    """DEIS of first to third order. See ``sigma_samplers.deis``. It ends at the least noise of the table."""

    sampler = staticmethod(sigma_samplers.deis)
    many_steps: ClassVar = 15
    final_sigmas_type: ClassVar = "sigma_min"
    algorithm_type: Literal["deis"] = "deis"
    solver_type: Literal["logrho"] = "logrho"

    replaced: ClassVar = {
        "algorithm_type": dict.fromkeys(("dpmsolver", "dpmsolver++"), "deis"),
        "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
    }


class UniPCMultistepScheduler(_SolverScheduler, _Spaced):
    """UniPC of first to third order. See ``samplers.unipc``."""

    sampler = staticmethod(samplers.unipc)
    fixed: ClassVar = (
        _SolverScheduler.fixed
        + " predict_x0 disable_corrector solver_p"
        + " sigma_min sigma_max shift_terminal rescale_betas_zero_snr"
    )
    solver_type: Literal["bh2"] = "bh2"
    final_sigmas_type: Final = "zero"

    replaced: ClassVar = {"solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")}


class _SigmaSpaceScheduler(_SigmaScheduler, _Spaced):
    """Schedulers whose latents are clean latents plus sigma times noise, also those of the steps."""

    takes_fractions: ClassVar = True

    def spaced(self, count: int) -> StepSchedule:
        timesteps = self.spaced_timesteps(count)
        if not self.curve:
            return self.at_timesteps(timesteps)
        sigmas = _CURVES[self.curve](count, *self.schedule.sigma_at(timesteps[[0, -1]]))
        timesteps = self.schedule.timestep_of(sigmas)
        return self._ending(timesteps.round() if self.curve in self.rounded else timesteps, sigmas)

    def init_noise_sigma(self, schedule: StepSchedule) -> float:
        first = float(schedule.sigmas[0, 0])
        return first if self.timestep_spacing != "leading" else float(np.hypot(first, 1.0))

    def noised(self, image: np.ndarray, noise: np.ndarray, schedule: StepSchedule) -> np.ndarray:
        sigma = float(schedule.sigmas[0, 0])
        return ((image + sigma * noise) / self.init_noise_sigma(schedule)).astype(np.float32)

    def noised_at(self, image: np.ndarray, noise: np.ndarray, sigma: float) -> np.ndarray:
        return (image + sigma * noise).astype(np.float32)


class EulerDiscreteScheduler(_SigmaSpaceScheduler, _Curved):
    """Euler steps. See ``sigma_samplers.euler``."""

    sampler = staticmethod(sigma_samplers.euler)
    fixed: ClassVar = (
        Scheduler.fixed
        + " rescale_betas_zero_snr use_flow_sigmas interpolation_type"
        + " timestep_type sigma_min sigma_max"
    )
    final_sigmas_type: Final = "zero"


class EulerAncestralDiscreteScheduler(_SigmaSpaceScheduler):
    """Ancestral Euler steps, which draw noise. See ``sigma_samplers.euler``."""

    sampler = staticmethod(sigma_samplers.euler)
    fixed: ClassVar = Scheduler.fixed + " rescale_betas_zero_snr"

    def sampler_options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        return {"ancestral": True}


class HeunDiscreteScheduler(_SigmaSpaceScheduler, _Curved, _Clipped):
    """Heun steps, of two predictions each. See ``sigma_samplers.heun``."""

    sampler = staticmethod(sigma_samplers.heun)

    def sampler_options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        return {"clip": self.clip}


class KDPM2DiscreteScheduler(_SigmaSpaceScheduler, _Curved):
    """DPM-Solver-2, of two predictions for each step. See ``sigma_samplers.dpm_solver_2``."""

    sampler = staticmethod(sigma_samplers.dpm_solver_2)
    rounded: ClassVar = ("use_karras_sigmas",)
    ancestral: ClassVar = False

    def sampler_options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        return {"timestep_of": lambda sigma: float(self.schedule.timestep_of(sigma)), "ancestral": self.ancestral}


class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """DPM-Solver-2 with ancestral noise. See ``sigma_samplers.dpm_solver_2``."""

    ancestral: ClassVar = True


class LMSDiscreteScheduler(_SigmaSpaceScheduler, _Curved):
    """Linear multistep of fourth order. See ``sigma_samplers.lms``."""

    sampler = staticmethod(sigma_samplers.lms)


class _DiffusionScheduler(_DiffusersScheduler, _Spaced):
    """Schedulers of diffusers with whole timesteps and latents of unit variance."""

    fixed: ClassVar = Scheduler.fixed + " thresholding rescale_betas_zero_snr"
    timestep_spacing: Spacing = "leading"

    def spaced(self, count: int) -> StepSchedule:
        timesteps = self.spaced_timesteps(count).round()
        # as in diffusers a step goes down by an equal share, though not every spacing has its next timestep there
        following = timesteps - self.num_train_timesteps // count
        sigmas_next = self.schedule.sigma_at(np.maximum(following, 0))
        return self._from_to(timesteps, np.where(following >= 0, sigmas_next, self._final()))

    def at_timesteps(self, timesteps: np.ndarray) -> StepSchedule:
        return self._from_to(timesteps, np.append(self.schedule.sigma_at(timesteps[1:]), self._final()))

    def _from_to(self, timesteps: np.ndarray, sigmas_next: np.ndarray) -> StepSchedule:
        return StepSchedule(timesteps, np.stack([self.schedule.sigma_at(timesteps), sigmas_next], 1))

    def _final(self) -> float:
        return 0.0 if getattr(self, "set_alpha_to_one", True) else float(self.schedule.sigmas[0])


class DDIMScheduler(_DiffusionScheduler, _Clipped):
    """DDIM as in diffusers, whose defaults clip the clean latents to -1..1 and end without noise.

    Latent diffusion wants ``clip_sample=False, set_alpha_to_one=False``. See ``samplers.ddim``.
    """

    sampler = staticmethod(samplers.ddim)
    clip_sample: bool = True
    set_alpha_to_one: bool = True

    def sampler_options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        return {"eta": eta, "clip": self.clip}


class DDPMScheduler(_DiffusionScheduler, _Clipped):
    """Ancestral sampling with a fixed variance; the defaults clip as those of DDIM. See ``samplers.ddpm``."""

    sampler = staticmethod(samplers.ddpm)
    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large"] = "fixed_small"
    clip_sample: bool = True

    def spaced(self, count: int) -> StepSchedule:
        return self.at_timesteps(self.spaced_timesteps(count).round())

    def sampler_options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        return {"large_variance": self.variance_type == "fixed_large", "clip": self.clip}


class PNDMScheduler(_DiffusionScheduler):
    """PLMS: PNDM without its Runge-Kutta steps. See ``sigma_samplers.pndm``."""

    sampler = staticmethod(sigma_samplers.pndm)
    fixed: ClassVar = Scheduler.fixed + " skip_prk_steps"
    set_alpha_to_one: bool = False

    def sampler_options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        if len(schedule) < 2:
            return {}
        # as in diffusers, the repeated first step ends at the second timestep and has the length of the others
        second, first_end = schedule.timesteps[1], self.schedule.timestep_of(schedule.sigmas[0, 1])
        earlier = min(second + (schedule.timesteps[0] - first_end).round(), self.num_train_timesteps - 1)
        return {"warm_up": tuple(map(float, self.schedule.sigma_at(np.array([earlier, second]))))}


class LCMScheduler(Scheduler, _Clipped):
    """Sampling of latent consistency models. See ``samplers.lcm``."""

    sampler = staticmethod(samplers.lcm)
    fixed: ClassVar = Scheduler.fixed + " thresholding rescale_betas_zero_snr"
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    def __init__(self, **options: Any):
        super().__init__(**options)
        original, most = self.original_inference_steps, self.num_train_timesteps
        if not 1 <= original <= most:
            raise PixArtNBError(f"original_inference_steps is {original!r}; expected 1 to {most}")

    def spaced(self, count: int) -> StepSchedule:
        """Return ``count`` of the timesteps that the model was distilled with (Luo et al. 2023)."""
        original, total = self.original_inference_steps, self.num_train_timesteps
        check_count(count, original, f", the number that the model was distilled with (of {total} in all)")
        distilled = np.arange(original, 0, -1) * (total // original) - 1
        return self.at_timesteps(distilled[np.floor(np.linspace(0, original, count, endpoint=False)).astype(np.int64)])

    def sampler_options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        return {"timestep_scaling": self.timestep_scaling, "clip": self.clip}


class DMDScheduler(LCMScheduler):
    """One step from timestep 400, for models distilled by distribution matching (Yin et al. 2023; PixArt-DMD)."""

    def spaced(self, count: int) -> StepSchedule:
        if count != 1:
            raise PixArtNBError(
                f"num_inference_steps is {count}; DMD models take one step, so give 1 (at timestep 400), or timesteps"
            )
        return self.at_timesteps(np.array([400 * self.num_train_timesteps // 1000]))


# ---- the samplers of the official repository, which are also those of mindone's example


class _RespacedScheduler(Scheduler):
    """Official respaced diffusion: whole timesteps from the last to 0, ending without noise."""

    def spaced(self, count: int) -> StepSchedule:
        """Return the timesteps of the official ``space_timesteps``."""
        total = self.num_train_timesteps
        check_count(count, total)
        stride = (total - 1) / (count - 1) if count > 1 else 1.0
        timesteps = np.cumsum(np.append(0.0, np.full(count - 1, stride))).round()[::-1]
        return self.at_timesteps(timesteps.astype(np.int64))


class IDDPMScheduler(_RespacedScheduler):
    """Official ``IDDPM``: ancestral sampling with the learned variance. See ``samplers.iddpm``."""

    sampler = staticmethod(samplers.iddpm)

    def sampler_options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        return {"respaced": self.schedule.respaced(schedule.timesteps)}


class OfficialDDIMScheduler(_RespacedScheduler):
    """Official ``ddim_sample_loop``, mindone's ``ddim``. See ``samplers.ddim``."""

    sampler = staticmethod(samplers.ddim)

    def sampler_options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        return {"eta": eta}


class _ContinuousScheduler(Scheduler):
    """Official solvers in continuous time: even fractional timesteps, ending at the noise of timestep 0."""

    takes_fractions: ClassVar = True

    def spaced(self, count: int) -> StepSchedule:
        """Return the timesteps of the official ``time_uniform``."""
        check_count(count, self.num_train_timesteps)
        return self.at_timesteps(np.linspace(self.num_train_timesteps - 1, 0.0, count + 1)[:-1])

    def at_timesteps(self, timesteps: np.ndarray) -> StepSchedule:
        return StepSchedule.chained(timesteps, self.schedule.continuous_sigma_at(np.append(timesteps, 0.0)))


class DPMSolverContinuousScheduler(_ContinuousScheduler):
    """Official ``DPMS``: DPM-Solver++ 2M, ``time_uniform``; mindone's ``dpm``. See ``samplers.dpm_solver``.

    The last step is of first order, as in PixArt-Sigma's repository; alpha's has it below ten steps only.
    """

    sampler = staticmethod(samplers.dpm_solver)
    solver_order: Literal[1, 2] = 2
    lower_order_final: bool = True

    def sampler_options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        return {"order": self.solver_order, "lower_order_final": self.lower_order_final}


class SASolverScheduler(_ContinuousScheduler):
    """SA-Solver as the official ``SASolverSampler`` calls it. See ``samplers.sa_solver``.

    ``tau_func(timestep)`` scales the noise; None is the official 1 in the middle and 0 in the first and last fifth of
    time. ``rescaled`` is the paper's appendix D. diffusers' class of this name rounds the timesteps, and asks for the
    noise of a step at its start instead of its end.
    """

    sampler = staticmethod(samplers.sa_solver)
    predictor_order: Literal[1, 2, 3] = 2
    corrector_order: Literal[0, 1, 2, 3] = 2
    tau_func: Callable[[float], float] | None = None
    rescaled: bool = True
    algorithm_type: Literal["data_prediction"] = "data_prediction"

    fixed: ClassVar = (
        Scheduler.fixed
        + " thresholding lower_order_final timestep_spacing steps_offset variance_type"
        + " lambda_min_clipped use_karras_sigmas use_exponential_sigmas use_beta_sigmas use_flow_sigmas"
    )

    def tau(self, timestep: float) -> float:
        """Return the noise scale of a step that ends at ``timestep``."""
        if self.tau_func is not None:
            return float(self.tau_func(timestep))
        time = (timestep + 1) / self.num_train_timesteps
        return 1.0 if 0.2 <= time <= 0.8 else 0.0

    def sampler_options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
        orders = self.predictor_order, self.corrector_order
        return {"tau": self.tau, "orders": orders, "rescaled": self.rescaled}


# ---- names


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
    "heun": (HeunDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "dpm++2s": (DPMSolverSinglestepScheduler, {}),
    "dpm++3m": (DPMSolverMultistepScheduler, {"solver_order": 3}),
    "dpm++sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "deis": (DEISMultistepScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
    "pndm": (PNDMScheduler, {"steps_offset": 1}),
    "kdpm2": (KDPM2DiscreteScheduler, {}),
    "kdpm2-a": (KDPM2AncestralDiscreteScheduler, {}),
    "ddpm": (DDPMScheduler, {"clip_sample": False}),
}
#: Class name -> class.
CLASSES: dict[str, type[Scheduler]] = {cls.__name__: cls for cls, _ in SAMPLING_METHODS.values()}


def scheduler_named(name: str, schedule: NoiseSchedule = LINEAR) -> Scheduler:
    """Return the scheduler of a name of ``SAMPLING_METHODS`` or of a class name, with a noise schedule."""
    if name not in SAMPLING_METHODS and name not in CLASSES:
        hint = did_you_mean(name, CLASSES, 0.8) or did_you_mean(str(name).lower(), SAMPLING_METHODS, 0.4)
        raise PixArtNBError(
            f"scheduler {name!r} is not known; expected one of {', '.join((*SAMPLING_METHODS, *CLASSES))}{hint}"
        )
    cls, options = SAMPLING_METHODS.get(name) or (CLASSES[name], {})
    betas = {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    return cls(num_train_timesteps=schedule.steps, **betas, **options)


def scheduler_from_config(config: Mapping[str, Any]) -> Scheduler:
    """Return the scheduler that a ``scheduler_config.json`` describes; its ``_class_name`` decides which."""
    name = config.get("_class_name") if isinstance(config, Mapping) else None
    if not isinstance(name, str) or name not in CLASSES:
        raise PixArtNBError(
            f"_class_name is {name!r}; expected one of {', '.join(CLASSES)}{did_you_mean(name, CLASSES)}. Give "
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
