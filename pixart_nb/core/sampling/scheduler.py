"""What all schedulers share: their configuration as diffusers writes it, and the planning of timesteps."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import read_json
from pixart_nb.core.sampling.noise_schedule import LINEAR, TIMESTEPS, NoiseSchedule
from pixart_nb.core.sampling.step import (
    Generators,
    Plan,
    Predict,
    Step,
    chained,
    check_generators,
    scales,
)
from pixart_nb.core.sampling.timesteps import custom_sigmas, custom_timesteps

SPACINGS = ("linspace", "leading", "trailing")
FINAL_SIGMAS = ("zero", "sigma_min")
SWITCH = (False, True)
#: Options of diffusers that PixArt has no use for: the one value that each may have.
_COMMON = {
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "variance_type": None,
    "lambda_min_clipped": -np.inf,
    "use_lu_lambdas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "sigma_min": None,
    "sigma_max": None,
}
#: Details of options that are off, which change nothing.
_IDLE = {"dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type", "shift_terminal"}
_SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end")


class SchedulerConfig(Mapping):
    """Options of a scheduler, read-only: ``config["beta_end"]``, ``config.beta_end``, ``dict(config)``."""

    def __init__(self, values: Mapping[str, Any]):
        object.__setattr__(self, "_values", dict(values))

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self._values:
            raise AttributeError(f"the configuration has no {name!r}; it has {', '.join(self._values)}")
        return self._values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a configuration is read-only; use from_config(config, {name}={value!r})")

    def __repr__(self) -> str:
        return f"SchedulerConfig({self._values!r})"


@dataclass(frozen=True)
class Scheduler:
    """A way to sample. Holds options only, nothing of a run: ``plan`` the timesteps, then take the ``steps``.

    The options are diffusers' (``from_config`` reads them); the noise schedule's defaults are PixArt's.
    """

    num_train_timesteps: int = TIMESTEPS
    beta_start: float = LINEAR.beta_start
    beta_end: float = LINEAR.beta_end

    #: Options that may have these values only.
    choices: ClassVar[Mapping[str, tuple]] = {}
    #: Options of diffusers that are no fields here: the one value that each may have.
    only: ClassVar[Mapping[str, Any]] = {}
    #: Options of diffusers that the class of that name does not use either.
    idle: ClassVar[frozenset[str]] = frozenset()
    takes_sigmas: ClassVar[bool] = False
    takes_fractions: ClassVar[bool] = False

    def __post_init__(self):
        for name, values in self.choices.items():
            if getattr(self, name) not in values:
                raise _not_implemented(type(self), name, getattr(self, name), values)
        for field in fields(self):
            _check_number(type(self), field.name, getattr(self, field.name), field.default)
        _ = self.schedule  # checks its own

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The diffusion that the model was trained with."""
        return NoiseSchedule(self.beta_start, self.beta_end, self.num_train_timesteps)

    # ---- configuration

    @property
    def config(self) -> SchedulerConfig:
        """All options, as ``from_config`` of any scheduler and ``scheduler_config.json`` take them."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        told = {key: value for key, value in (_COMMON | dict(self.only)).items() if isinstance(value, str)}
        return SchedulerConfig({"_class_name": type(self).__name__} | own | told)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Scheduler:
        """A scheduler of this class with the options of ``config``, which may be another class's.

        Of another class's options, the noise schedule is taken over, and what both know unless it is that class's
        default, so that each keeps its own way to space timesteps. Raises ValueError for an option that is not
        implemented, and for a name in ``overrides`` that is not known.
        """
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        source = config.get("_class_name", cls.__name__)
        taken = cls._own(given) if source == cls.__name__ else cls._of_another(given, source)
        return cls(**cls._read(taken) | cls._read(overrides))

    @classmethod
    def _own(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Without what this version does not know but is off, as a newer diffusers may write."""
        known = {field.name for field in fields(cls)} | set(_COMMON) | set(cls.only)
        return {
            key: value
            for key, value in given.items()
            if key in known or not (value is None or value is False)
        }

    @classmethod
    def _of_another(cls, given: Mapping[str, Any], source: str) -> dict[str, Any]:
        """What this class takes over of another's options."""
        other = scheduler_classes().get(source)
        defaults = {field.name: field.default for field in fields(other)} if other else {}
        common = {key: given[key] for key in (*_SCHEDULE, *_COMMON) if key in given}
        shared = [field.name for field in fields(cls) if field.name in given]
        chosen = {key: given[key] for key in shared if key not in defaults or given[key] != defaults[key]}
        return common | chosen

    @classmethod
    def _read(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that are fields; of the others, that they ask for nothing that is not implemented."""
        known = {field.name: field.default for field in fields(cls)}
        only = {key: value for key, value in (_COMMON | dict(cls.only)).items() if key not in known}
        for key, value in options.items():
            if key in only and value != only[key]:
                raise _not_implemented(cls, key, value, (only[key],))
            if key not in known and key not in only and key not in _IDLE | cls.idle:
                near = difflib.get_close_matches(key, [*known, *only], 1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}"
                raise PixArtNBError(f"{cls.__name__} has no option {key!r} (given {value!r}){hint}")
        # null in a file stands for the default
        return {k: v for k, v in options.items() if k in known and not (v is None and known[k] is not None)}

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str = "", **overrides: Any) -> Scheduler:
        """A scheduler of this class with the options of a local folder's ``scheduler_config.json``."""
        return cls.from_config(read_json(Path(folder) / subfolder / "scheduler_config.json"), **overrides)

    # ---- planning

    def plan(
        self,
        num_inference_steps: int | None = None,
        *,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> Plan:
        """The steps of a run: ``num_inference_steps`` of them, or at the timesteps or noise levels of one's own.

        timesteps fall within 0..num_train_timesteps - 1; sigmas are noise over signal, falling, one more than there
        are steps, the last being where they end (usually 0). With either the number is not looked at. Raises
        ValueError for both, for neither, and for what the scheduler cannot follow.
        """
        if timesteps is not None and sigmas is not None:
            raise PixArtNBError("both timesteps and sigmas were given; give one of them")
        if sigmas is not None:
            if not self.takes_sigmas:
                raise PixArtNBError(
                    f"{type(self).__name__} takes no sigmas; those that do are "
                    f"{', '.join(name for name, part in scheduler_classes().items() if part.takes_sigmas)}"
                )
            levels = custom_sigmas(sigmas, self.schedule)
            return chained(self.schedule.timestep_of(levels[:-1]), levels)
        if timesteps is not None:
            return self.at_timesteps(
                custom_timesteps(timesteps, self.num_train_timesteps, self.takes_fractions)
            )
        if num_inference_steps is None:
            raise PixArtNBError("give num_inference_steps, timesteps or sigmas")
        return self.spaced(num_inference_steps)

    def spaced(self, count: int) -> Plan:
        """The scheduler's own plan of ``count`` steps."""
        raise NotImplementedError

    def at_timesteps(self, timesteps: np.ndarray) -> Plan:
        """The plan that visits the given timesteps (N,), which are checked already."""
        raise NotImplementedError

    def steps(
        self,
        predict: Predict,
        latents: np.ndarray,
        plan: Plan,
        generator: Generators = None,
        eta: float = 0.0,
    ) -> Iterator[Step]:
        """Sample: latents (N, C, H, W) of unit noise, a ``Step`` for each timestep of the plan.

        ``generator`` draws the noise of the steps, if there is any: one, or one for each row; ``eta``, 0..1, is DDIM's
        and without effect elsewhere.
        """
        check_eta(eta)
        check_generators(generator, len(latents))
        return self._steps(predict, latents, plan, generator, float(eta))

    def _steps(self, predict, latents, plan, generator, eta) -> Iterator[Step]:
        raise NotImplementedError

    def noised(self, picture: np.ndarray, noise: np.ndarray, plan: Plan) -> np.ndarray:
        """What ``steps`` takes in place of unit noise, to begin with a picture (N, C, H, W) as noisy as the plan is.

        SDEdit (Meng et al. 2022), which is image-to-image.
        """
        signal, scale = scales(float(plan.levels[0, 0]))
        return (signal * picture + scale * noise).astype(np.float32)


def check_eta(eta: float) -> None:
    """Refuse a share of DDPM's noise outside 0..1."""
    if not isinstance(eta, (int, float, np.number)) or not 0 <= eta <= 1:
        raise PixArtNBError(f"eta is {eta!r}; expected 0 (no noise) to 1 (as much as DDPM)")


def scheduler_classes() -> dict[str, type[Scheduler]]:
    """Every scheduler by the name of its class."""
    from pixart_nb.core.sampling.schedulers import CLASSES

    return CLASSES


def _check_number(cls: type[Scheduler], name: str, value: Any, default: Any) -> None:
    """Refuse what is no number where the default is one."""
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        return
    kind, said = (int, "whole number") if isinstance(default, int) else ((int, float), "number")
    if isinstance(value, bool) or not isinstance(value, kind) or not np.isfinite(value):
        raise PixArtNBError(f"{cls.__name__}: {name} is {value!r}; expected a {said}, by default {default}")


def _not_implemented(cls: type[Scheduler], name: str, value: Any, values: tuple) -> PixArtNBError:
    expected = " or ".join(repr(v) for v in values)
    return PixArtNBError(
        f"{cls.__name__}: {name} is {value!r}, which is not implemented; supported: {expected}"
    )
