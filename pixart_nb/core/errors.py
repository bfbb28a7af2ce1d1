"""The kit's exceptions, and the checks of numbers, names and configuration fields that raise them."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any


class PixArtNBError(ValueError):
    """Base class of all exceptions that the kit raises on purpose.

    The message says what was given, what was expected and what to do. The command line prints it as one line; any
    other exception is a bug and shows its traceback.
    """


class WriteError(PixArtNBError, OSError):
    """An output that cannot be written: no space, no permission, a file in place of a folder."""


class FolderInUseError(PixArtNBError):
    """A folder that another process is writing into."""


def check_number(name: str, value: object, least: float = -math.inf, whole: bool = False) -> None:
    """Raise an error unless ``value`` is a finite number, Python's or NumPy's, of at least ``least``.

    >>> check_number("guidance_scale", "4")
    Traceback (most recent call last):
        ...
    pixart_nb.core.errors.PixArtNBError: guidance_scale is '4'; expected a finite number
    """
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if number and -math.inf < value < math.inf and value >= least:
        return
    bound = f" of at least {least}" if least > -math.inf else ""
    raise PixArtNBError(f"{name} is {value!r}; expected a {'whole' if whole else 'finite'} number{bound}")


@contextmanager
def delayed_interrupt() -> Iterator[None]:
    """Handle SIGINT after the block: inside an import of C++ code, ``KeyboardInterrupt`` would abort."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield
        return
    caught: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if caught:
        signal.raise_signal(signal.SIGINT)


def did_you_mean(name: object, names: Iterable[str], cutoff: float = 0.6) -> str:
    """Return "; did you mean 'x'?" with the closest of ``names``, or nothing if none is as close as ``cutoff``.

    >>> did_you_mean("guidence", ["guidance", "steps"]), did_you_mean("DDIM", ["ddim"]), did_you_mean("x", ["guidance"])
    ("; did you mean 'guidance'?", "; did you mean 'ddim'?", '')
    """
    of_lower = {choice.lower(): choice for choice in names}
    match = difflib.get_close_matches(str(name).lower(), list(of_lower), n=1, cutoff=cutoff)
    return f"; did you mean {of_lower[match[0]]!r}?" if match else ""


def first_few(names: Sequence[str], count: int = 4) -> str:
    """Return the first names and the number of the others.

    >>> first_few(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    listed = ", ".join(f"{name:.200}" for name in names[:count])
    return f"{listed} and {len(names) - count} more" if len(names) > count else listed


def pluralized(count: int, name: str) -> str:
    """Return a count with its name in the singular or the plural.

    >>> pluralized(1, "step"), pluralized(6, "block")
    ('1 step', '6 blocks')
    """
    return f"{count} {name}{'s' * (count != 1)}"


def counted(problems: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a text for each problem that there is, with the names that have it.

    >>> counted({"missing": ["a", "b"], "unexpected": []})
    ['2 missing (a, b)']
    """
    return [f"{len(names)} {problem} ({first_few(names)})" for problem, names in problems.items() if names]


def differences(stored: Mapping, present: Mapping) -> str:
    """Return the values that differ between what was stored and what is given now, or nothing.

    >>> differences({"net": {"depth": 6, "width": 8}, "seed": 0}, {"net": {"depth": 7, "width": 8}})
    'net: depth: 6 there, 7 here; seed: 0 there, not set here'
    >>> differences({"images": "0" * 64}, {"images": "1" * 64})
    'images: changed'
    """
    keys = [key for key in sorted({*stored, *present}) if stored.get(key) != present.get(key)]
    return "; ".join(f"{key}: {_difference(stored.get(key), present.get(key))}" for key in keys)


def _difference(before: Any, now: Any) -> str:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return differences(before, now)
    if all(isinstance(value, str) and re.fullmatch("[0-9a-f]{16,}", value) for value in (before, now)):
        return "changed"  # fingerprints
    texts = ["not set" if value is None else repr(value) for value in (before, now)]
    return "{} there, {} here".format(*texts)


def ignore_options(function: str, options: Mapping[str, Any], parameters: Iterable[str]) -> None:
    """Name in one warning the options that have no meaning here. One that resembles a parameter is an error."""
    for name in options:
        if hint := did_you_mean(name, parameters, 0.8):
            raise PixArtNBError(f"{function} has no parameter {name!r}{hint}")
    names = [name for name, value in options.items() if value is not None]
    if names:
        warnings.warn(f"{function}: no meaning here, ignored: {', '.join(names)}", stacklevel=3)


def parameters_of(function: Any) -> list[str]:
    """Return the names of a function's parameters."""
    return list(inspect.signature(function).parameters)


# ---- fields of a network's configuration


def bounded(default: Any, low: float, high: float) -> Any:
    """Return a dataclass field for a number, or numbers, from ``low`` to ``high``."""
    return dataclasses.field(default=default, metadata={"bounds": (low, high)})


def check_fields(config: Any) -> None:
    """Refuse a configuration with a field of a wrong type, or outside of its bounds."""
    for item in dataclasses.fields(config):
        value, annotation = getattr(config, item.name), str(item.type)
        if value is None and "None" in annotation:
            continue
        numbers = value if annotation.startswith("tuple") and isinstance(value, tuple) else (value,)
        low, high = item.metadata.get("bounds", (-math.inf, math.inf))
        expected = None
        if annotation.startswith(("int", "tuple[int")):
            valid = all(_is_number(n, Integral) and low <= n <= high for n in numbers)
            if not numbers or not valid or isinstance(value, tuple) != annotation.startswith("tuple"):
                expected = f"{'whole numbers' if 'tuple' in annotation else 'a whole number'} from {low} to {high}"
        elif annotation.startswith("float"):
            if not (_is_number(value, Real) and low <= value <= high):
                expected = f"a number from {low} to {high}"
        elif annotation.startswith(("bool", "str", "dict")):
            valid_type = {"bool": bool, "str": str, "dict": Mapping}[annotation.split(" ")[0]]
            if not isinstance(value, valid_type):
                expected = {bool: "true or false", str: "a string", Mapping: "a mapping"}[valid_type]
        if expected:
            raise PixArtNBError(f"{item.name} is {str(value)[:80]}; expected {expected}")


def _is_number(value: Any, number_type: type) -> bool:
    if not isinstance(value, number_type) or isinstance(value, bool):
        return False
    return isinstance(value, int) or math.isfinite(value)  # an int may be too large for a float


@contextmanager
def named_source(source: str | Path) -> Iterator[None]:
    """Put the name of the file before the message of an error inside the block."""
    try:
        yield
    except PixArtNBError as error:
        raise PixArtNBError(f"{source}: {error}") from error


def refuse_others(values: Mapping, allowed: Mapping[str, tuple]) -> None:
    """Refuse keys that change the result of a network, unless they have one of the values that are implemented."""
    for key, valid in allowed.items():
        if key in values and values[key] not in valid:
            names = " or ".join(repr(value) for value in valid)
            raise PixArtNBError(f"{key} is {str(values[key])[:80]!r}; this kit only implements {names}")
