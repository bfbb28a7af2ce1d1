"""The loss on pictures that are never trained on: the same pictures, noise and timesteps at every measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.data.errors import DataError
from pixart_nb.core.data.labels import Label

#: Pictures that are measured at most; each measurement costs a forward pass of all of them.
MOST_PICTURES = 128


class HeldOut:
    """Batches that are drawn once and measured again and again.

    ``batches(number)`` as the trainer takes it; ``count``: how many of them are measured.
    """

    def __init__(self, batches: Callable[[int], tuple[np.ndarray | ms.Tensor, ...]], count: int):
        self.batches = [batches(number) for number in range(count)]

    def loss(self, loss: Callable) -> float:
        """Mean over the batches of ``loss(*tensors) -> (loss, ...)``, with the weights as they are now."""
        return float(np.mean([loss(*map(_tensor, batch))[0].asnumpy() for batch in self.batches]))


def require_apart(training: Sequence[Label], measured: Sequence[Label]) -> None:
    """Refuse pictures that are trained on among those that are measured; ``DataError`` names the first."""
    trained = {label.file for label in training}
    both = [label.path for label in measured if label.file in trained]
    if both:
        raise DataError(
            f"validation_json_path: {len(both)} of its {len(measured)} pictures are trained on too, such as {both[0]}; "
            "expected pictures that json_path does not name"
        )


def _tensor(part: np.ndarray | ms.Tensor) -> ms.Tensor:
    return part if isinstance(part, ms.Tensor) else ms.Tensor(part)
