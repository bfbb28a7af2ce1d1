"""Several workers, each with its share of every batch: means over all of them, and who keeps which moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from mindspore import ops

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError


@dataclass(frozen=True)
class Workers:
    """This worker's ``rank`` among ``size`` workers that msrun started. Everything below is called by all of them."""

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this worker writes the files: the first one does."""
        return self.rank == 0

    def rows(self, count: int) -> slice:
        """This worker's rows of a batch of ``count``, which must be a multiple of the number of workers."""
        if count % self.size:
            raise PixArtNBError(f"a batch of {count} cannot be divided among {self.size} workers")
        share = count // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def mean(self, tensors: Sequence[ms.Tensor]) -> list[ms.Tensor]:
        """The mean of each tensor over all workers, in float32."""
        if self.size == 1:
            return list(tensors)
        reduce = ops.AllReduce()
        return [reduce(tensor.astype(ms.float32)) * (1.0 / self.size) for tensor in tensors]

    def total(self, numbers: Sequence[float]) -> list[float]:
        """The sums of a few numbers over all workers, added in float32."""
        if self.size == 1:
            return list(numbers)
        return ops.AllReduce()(ms.Tensor(np.array(numbers, np.float32))).asnumpy().tolist()

    def sent(self, array: np.ndarray, root: int = 0) -> np.ndarray:
        """The float32 array of worker ``root``; the others give one of the same shape."""
        if self.size == 1:
            return array
        return ops.Broadcast(root)((ms.Tensor(array, ms.float32),))[0].asnumpy()

    def send(self, parameter: ms.Parameter, root: int = 0) -> None:
        """Give every worker the parameter of worker ``root``."""
        if self.size > 1:
            ops.assign(parameter, ops.Broadcast(root)((parameter,))[0])


ALONE = Workers()
#: The owner of a parameter that every worker updates by itself.
EVERYONE = -1


def join() -> Workers:
    """Join the workers that msrun started."""
    return Workers(*backend.join_workers())


def owners(sizes: Mapping[str, int], workers: int, threshold: int = 0) -> dict[str, int]:
    """Which worker keeps the moments of each parameter (ZeRO stage 1), so that all keep about as many numbers.

    Whole parameters, not slices: an optimizer that looks at rows and columns takes the same steps as one worker's.
    Parameters of fewer numbers than ``threshold`` are ``EVERYONE``'s: what they take is less than what sending costs.
    """
    loads, owner = [0] * workers, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if sizes[name] < threshold:
            owner[name] = EVERYONE
            continue
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += sizes[name]
    return owner
