"""Types and bounds of the fields of a network's configuration, checked before anything is built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from pixart_nb.core.errors import PixArtNBError


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
