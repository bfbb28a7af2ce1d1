"""Learning-rate schedules, gradient clipping and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from mindspore import mint, ops

from pixart_nb.core.backend import ms


def learning_rate(step: int, peak: float, warmup: int, total: int, shape: str = "cosine") -> float:
    """Learning rate of a step that counts from 0: a linear warm-up, then ``constant`` or ``cosine`` to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if shape == "constant":
        return peak
    if shape == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))
    raise ValueError(f"learning-rate schedule {shape!r} is not known; expected 'constant' or 'cosine'")


def global_norm(gradients: Sequence[ms.Tensor]) -> ms.Tensor:
    """Euclidean norm over all gradients together, a 0-d float32 tensor."""
    total = ms.Tensor(0.0, ms.float32)
    for gradient in gradients:
        wide = gradient.astype(ms.float32).reshape(-1)
        total = total + (wide * wide).sum()
    return ops.sqrt(total)


def clip_by_norm(gradients: Sequence[ms.Tensor], norm: ms.Tensor, largest: float) -> list[ms.Tensor]:
    """Scale gradients so that their global ``norm`` is at most ``largest``."""
    factor = mint.clamp(largest / (norm + 1e-6), max=1.0)
    return [gradient * factor for gradient in gradients]


class EMA:
    """Exponential moving average of parameters.

    The rate rises with the number of updates, ``min(rate, (1 + n) / (10 + n))``, so that a short run is not an
    average of its initialisation.
    """

    def __init__(self, parameters: Sequence[ms.Parameter], rate: float):
        if not 0 <= rate < 1:
            raise ValueError(f"EMA rate is {rate}; expected 0 <= rate < 1")
        self.rate, self.updates = rate, 0
        self.parameters = list(parameters)
        self.averages = [
            np.array(p.asnumpy(), np.float32) for p in self.parameters
        ]  # copies: asnumpy aliases

    def update(self) -> None:
        """Take the parameters as they are now into the average."""
        self.updates += 1
        rate = min(self.rate, (1 + self.updates) / (10 + self.updates))
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average *= rate
            average += (1 - rate) * parameter.asnumpy()
