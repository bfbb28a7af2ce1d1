"""Random streams: one for each picture, so that a picture does not depend on those drawn beside it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def picture_generators(seed: int, numbers: Iterable[int]) -> list[np.random.Generator]:
    """The generators of the pictures with these numbers, for a seed."""
    return [np.random.default_rng((seed, number)) for number in numbers]
