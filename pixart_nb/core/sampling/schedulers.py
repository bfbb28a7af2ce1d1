"""All schedulers by name: the class of ``scheduler_config.json``, and the short one of ``sampling_method``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.diffusers_schedulers import (
    DDIMScheduler,
    DMDScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from pixart_nb.core.sampling.noise_schedule import LINEAR, NoiseSchedule
from pixart_nb.core.sampling.official_schedulers import (
    DPMSolverContinuousScheduler,
    IDDPMScheduler,
    OfficialDDIMScheduler,
    SASolverScheduler,
)
from pixart_nb.core.sampling.scheduler import Scheduler

_PUBLIC = (
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
#: Name of a class -> the class.
CLASSES: dict[str, type[Scheduler]] = {cls.__name__: cls for cls in _PUBLIC}
#: Short name, as in ``sampling_method`` -> the class and its options.
SAMPLING_METHODS: dict[str, tuple[type[Scheduler], dict[str, Any]]] = {
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "dpm++karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "ddim": (DDIMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "dmd": (DMDScheduler, {}),
    "iddpm": (IDDPMScheduler, {}),
    "ddim-official": (OfficialDDIMScheduler, {}),
    "dpm": (DPMSolverContinuousScheduler, {}),
    "sa-solver": (SASolverScheduler, {}),
}


def scheduler_named(name: str, schedule: NoiseSchedule = LINEAR) -> Scheduler:
    """The scheduler of a short name, over a noise schedule; the names are those of ``SAMPLING_METHODS``."""
    if name not in SAMPLING_METHODS:
        near = difflib.get_close_matches(str(name).lower(), SAMPLING_METHODS, 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise PixArtNBError(
            f"scheduler {name!r} is not known; expected one of {', '.join(SAMPLING_METHODS)}{hint}"
        )
    cls, options = SAMPLING_METHODS[name]
    return cls(schedule.steps, schedule.beta_start, schedule.beta_end, **options)


def scheduler_from_config(config: Mapping[str, Any]) -> Scheduler:
    """The scheduler that a ``scheduler_config.json`` describes; its ``_class_name`` decides which."""
    name = config.get("_class_name") if isinstance(config, Mapping) else None
    if not isinstance(name, str) or name not in CLASSES:
        raise PixArtNBError(
            f"_class_name is {name!r}; expected one of {', '.join(CLASSES)}. Give another scheduler by name, for "
            f"example scheduler='dpm++' (a DMD checkpoint wants 'dmd')"
        )
    return CLASSES[name].from_config(config)


def as_scheduler(value: Scheduler | str | None, present: Scheduler | None = None) -> Scheduler | None:
    """A scheduler given as such, or by its short name over the noise schedule of the ``present`` one, or None."""
    if isinstance(value, str):
        return scheduler_named(value, present.schedule if present else LINEAR)
    if value is not None and not isinstance(value, Scheduler):
        raise PixArtNBError(
            f"scheduler is {value!r}; expected one of {', '.join(CLASSES)}, or a name: "
            f"{', '.join(SAMPLING_METHODS)}"
        )
    return value
