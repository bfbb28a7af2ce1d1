"""Base class of the kit's exceptions."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real


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


def counted(problems: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a text for each problem that there is, with the names that have it.

    >>> counted({"missing": ["a", "b"], "unexpected": []})
    ['2 missing (a, b)']
    """
    return [f"{len(names)} {problem} ({first_few(names)})" for problem, names in problems.items() if names]


def differences(stored: Mapping, present: Mapping) -> str:
    """Return the values that differ between what was stored and what is given now, or nothing.

    >>> differences({"steps": 6, "seed": 0}, {"steps": 7, "seed": 0})
    'steps: 6 there, 7 here'
    """
    keys = [key for key in sorted({*stored, *present}) if stored.get(key) != present.get(key)]
    values = [(key, stored.get(key, "nothing"), present.get(key, "nothing")) for key in keys]
    return "; ".join(f"{key}: {before!r} there, {now!r} here" for key, before, now in values)
