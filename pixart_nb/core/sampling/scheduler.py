"""Base class of the schedulers: options as diffusers writes them, and the steps of a run."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import read_json
from pixart_nb.core.sampling import timesteps as spacings
from pixart_nb.core.sampling.noise_schedule import LINEAR, TIMESTEPS, NoiseSchedule
from pixart_nb.core.sampling.samplers import Generators, Predict, Step, StepSchedule, check_generators, scales


def options_with(names: str, *values: Any) -> dict[str, tuple]:
    """Return ``choices``: the implemented values of the options with these names."""
    return dict.fromkeys(names.split(), values)


#: Options of all classes of diffusers.
COMMON = options_with("beta_schedule", "linear") | options_with("prediction_type", "epsilon")
COMMON |= options_with("trained_betas", None) | options_with("rescale_betas_zero_snr", False)


class SchedulerConfig(dict):
    """Options of a scheduler, read-only: ``config["beta_end"]``, ``config.beta_end``, ``dict(config)``.

    ``defaults`` names the options that were not chosen. ``from_config`` of another class uses its own default for them.
    """

    def __init__(self, values: Mapping[str, Any], defaults: Sequence[str] = ()):
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


@dataclass(frozen=True)
class Scheduler:
    """Base class. It holds options only: ``plan`` returns the steps of a run, ``steps`` takes them."""

    num_train_timesteps: int = TIMESTEPS
    beta_start: float = LINEAR.beta_start
    beta_end: float = LINEAR.beta_end

    #: Implemented values of options; an option that is no field has one.
    choices: ClassVar[Mapping[str, tuple]] = COMMON
    #: Values that diffusers replaces, such as another class's solver_type.
    replaced: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    takes_sigmas: ClassVar[bool] = False
    takes_fractions: ClassVar[bool] = False
    #: The function of ``samplers`` that takes the steps.
    sampler: ClassVar[Callable[..., Iterator[Step]]]

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            _check_choice(type(self), field.name, value)
            _check_number(type(self), field.name, value, field.default)
        _ = self.schedule  # validates its own

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """Noise schedule that the model was trained with."""
        return NoiseSchedule(self.beta_start, self.beta_end, self.num_train_timesteps)

    # ---- configuration

    @property
    def config(self) -> SchedulerConfig:
        """All options, as ``from_config`` of any scheduler and ``scheduler_config.json`` take them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        fixed = {key: part[0] for key, part in self.choices.items() if key not in values}
        chosen = self.__dict__.get("_chosen", frozenset())
        defaults = [
            field.name for field in fields(self) if values[field.name] == field.default and field.name not in chosen
        ]
        words = {key: value for key, value in fixed.items() if isinstance(value, str)}
        return SchedulerConfig({"_class_name": type(self).__name__} | values | words, [*defaults, *words])

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Scheduler:
        """Make a scheduler of this class with the options of ``config``, which may be another class's.

        As in diffusers, options that this class does not have are ignored, and an option that the other class left at
        its default gets this class's default. Raises an error for an option that diffusers' class has and this one
        does not implement, and for an unknown name in ``overrides``.
        """
        skipped = {*getattr(config, "defaults", ()), *config.get("_use_default_values", ())}
        options = {key: value for key, value in config.items() if key[:1] != "_" and key not in skipped}
        defaults = {field.name: field.default for field in fields(cls)}
        for key in options.keys() - defaults.keys() - cls.choices.keys():
            if hint := nearest(key, defaults, 0.85):
                warnings.warn(f"{cls.__name__} has no option {key!r} and ignores it{hint}", stacklevel=2)
        for key in overrides.keys() - defaults.keys() - cls.choices.keys():
            hint = nearest(key, defaults) or "; it has " + ", ".join(defaults)
            raise PixArtNBError(f"{cls.__name__} has no option {key!r} (given {overrides[key]!r}){hint}")
        options |= overrides
        for key in cls.choices.keys() & options.keys():
            if isinstance(options[key], str):
                options[key] = cls.replaced.get(key, {}).get(options[key], options[key])
            if not (options[key] is None and key in defaults):
                _check_choice(cls, key, options[key])
        # null in a file stands for the default
        chosen = {k: v for k, v in options.items() if k in defaults and not (v is None and defaults[k] is not None)}
        scheduler = cls(**chosen)
        scheduler.__dict__["_chosen"] = frozenset(chosen)
        return scheduler

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str = "", **overrides: Any) -> Scheduler:
        """Make a scheduler of this class with the options of a local folder's ``scheduler_config.json``."""
        return cls.from_config(read_json(Path(folder) / subfolder / "scheduler_config.json"), **overrides)

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
            levels = spacings.custom_sigmas(sigmas, self.schedule)
            return StepSchedule.chained(self.schedule.timestep_of(levels[:-1]), levels)
        if timesteps is not None:
            return self.at_timesteps(
                spacings.custom_timesteps(timesteps, self.num_train_timesteps, self.takes_fractions)
            )
        if num_inference_steps is None:
            raise PixArtNBError("give num_inference_steps, timesteps or sigmas")
        return self.spaced(num_inference_steps)

    def spaced(self, count: int) -> StepSchedule:
        """Return the scheduler's own ``count`` steps."""
        raise NotImplementedError

    def at_timesteps(self, timesteps: np.ndarray) -> StepSchedule:
        """Return the steps at validated timesteps (N,)."""
        return StepSchedule.chained(timesteps, np.append(self.schedule.sigma_at(timesteps), 0.0))

    def options(self, schedule: StepSchedule, eta: float) -> dict[str, Any]:
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
        return self.sampler(predict, latents, schedule, generator, **self.options(schedule, float(eta)))

    def init_noise_sigma(self, schedule: StepSchedule) -> float:
        """Return the factor of unit noise before the first step, as in diffusers."""
        return 1

    def noised(self, image: np.ndarray, noise: np.ndarray, schedule: StepSchedule) -> np.ndarray:
        """Return what ``steps`` takes in place of unit noise to start from clean latents (N, C, H, W).

        This is image-to-image (SDEdit, Meng et al. 2022).
        """
        signal, scale = scales(float(schedule.sigmas[0, 0]))
        return (signal * image + scale * noise).astype(np.float32)


# ---- validation


def check_eta(eta: float) -> None:
    """Raise an error for an ``eta`` outside 0..1."""
    if not isinstance(eta, (int, float, np.number)) or not 0 <= eta <= 1:
        raise PixArtNBError(f"eta is {eta!r}; expected 0 (no noise) to 1 (as much as DDPM)")


def _check_choice(cls: type[Scheduler], name: str, value: Any) -> None:
    values = cls.choices.get(name)
    if values is not None and value not in values:
        expected = " or ".join(repr(v) for v in values)
        raise PixArtNBError(f"{cls.__name__}: {name} is {value!r}, which is not implemented; supported: {expected}")


def _check_number(cls: type[Scheduler], name: str, value: Any, default: Any) -> None:
    """Raise an error for a value that is no number where the default is one."""
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        return
    types, expected = (int, "whole number") if isinstance(default, int) else ((int, float), "number")
    if isinstance(value, bool) or not isinstance(value, types) or not np.isfinite(value):
        raise PixArtNBError(f"{cls.__name__}: {name} is {value!r}; expected a {expected}, by default {default}")


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Return "; did you mean NAME?" with the closest of ``names``, or nothing."""
    near = difflib.get_close_matches(name, [*names], 1, cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""
