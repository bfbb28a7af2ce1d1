"""Layers, heads and steps as users name them, checked against what a model or a run has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pixart_nb.core.errors import PixArtNBError

#: Kind of attention and the name of its layer in a block.
KINDS = {"self": "attn", "cross": "cross_attn"}
Numbers = int | Sequence[int] | None
Layers = int | str | Sequence[int | str] | None


def is_cross(name: str) -> bool:
    """Whether a layer is a cross-attention."""
    return name.endswith("." + KINDS["cross"])


def layer_names(depth: int, layers: Layers = None, kinds: Sequence[str] = tuple(KINDS)) -> list[str]:
    """Names of layers (numbers, or names such as ``blocks.14.attn``; None is all) in the model's order.

    Raises ValueError that lists what there is.
    """
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise PixArtNBError(f"kinds is {kinds}; expected one or several of {', '.join(KINDS)}")
    parts = [part for kind, part in KINDS.items() if kind in kinds]
    every = [f"blocks.{number}.{part}" for number in range(depth) for part in parts]
    given = range(depth) if layers is None else as_list(layers)
    wanted = {name for layer in given for name in _named(layer, kinds)}
    missing = sorted(wanted - set(every))
    if missing or not wanted:
        raise PixArtNBError(
            f"there are no layers {missing or '(none was given)'} to choose; there are blocks.0 to blocks.{depth - 1}, "
            f"each with {' and '.join(parts)}"
        )
    return [name for name in every if name in wanted]


def _named(layer: int | str, kinds: Sequence[str]) -> list[str]:
    if isinstance(layer, str) and not layer.isdigit():
        return [layer]
    return [f"blocks.{layer}.{KINDS[kind]}" for kind in kinds]


def head_numbers(count: int, heads: Numbers) -> list[int]:
    """Numbers of heads, rising; None is all ``count``. Raises ValueError that lists what there is."""
    if heads is None:
        return list(range(count))
    wanted = sorted({int(head) for head in as_list(heads)})
    if not wanted or wanted[0] < 0 or wanted[-1] >= count:
        raise PixArtNBError(f"heads is {heads!r}; the model has heads 0 to {count - 1}")
    return wanted


def step_numbers(steps: Numbers) -> list[int] | None:
    """Numbers of steps, counted from 0; None stays None, which is all."""
    if steps is None:
        return None
    numbers = [int(step) for step in as_list(steps)]
    if not numbers or min(numbers) < 0:
        raise PixArtNBError(f"steps is {steps!r}; expected numbers of steps, counted from 0")
    return numbers


def check_steps(steps: list[int] | None, planned: Sequence[float]) -> None:
    """Refuse steps that a run of the ``planned`` timesteps does not have."""
    if missing := [step for step in steps or () if step >= len(planned)]:
        raise PixArtNBError(f"the run has no steps {missing}; it has steps 0 to {len(planned) - 1}")


def as_list(values: Any) -> list:
    """One value or several as a list."""
    return [values] if isinstance(values, (int, float, str, np.number)) else list(values)


def chosen(what: str, wanted: Numbers, there: Sequence[int]) -> list[int]:
    """Of the numbers that a trace has, those that are wanted; None is all."""
    numbers = list(there) if wanted is None else as_list(wanted)
    missing = [number for number in numbers if number not in there]
    if missing or not numbers:
        raise PixArtNBError(f"the trace has no {what} {missing or '(none was given)'}; it has {list(there)}")
    return [int(number) for number in numbers]
