"""Data parallelism under msrun: collectives, and the worker that keeps the optimizer state of each parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from mindspore import ops

from pixart_nb.core import backend
from pixart_nb.core.backend import ms


@dataclass(frozen=True)
class Workers:
    """Rank of this worker and number of workers. The methods are collectives: every worker has to call them."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Return whether this is the worker that writes files."""
        return self.rank == 0

    def all_reduce_mean(self, tensors: Sequence[ms.Tensor]) -> list[ms.Tensor]:
        """Return the mean of each tensor over the workers, in float32."""
        if self.size == 1:
            return list(tensors)
        reduce = ops.AllReduce()
        return [reduce(tensor.astype(ms.float32)) * (1.0 / self.size) for tensor in tensors]

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """Return the sums of a few numbers over the workers, in float32."""
        if self.size == 1:
            return list(values)
        return ops.AllReduce()(ms.Tensor(np.array(values, np.float32))).asnumpy().tolist()

    def broadcast(self, array: np.ndarray, root: int = 0) -> np.ndarray:
        """Return the float32 array of worker ``root``; the others pass one of the same shape."""
        if self.size == 1:
            return array
        return ops.Broadcast(root)((ms.Tensor(array, ms.float32),))[0].asnumpy()

    def broadcast_parameter(self, parameter: ms.Parameter, root: int = 0) -> None:
        """Set a parameter to the value that it has on worker ``root``."""
        if self.size > 1:
            ops.assign(parameter, ops.Broadcast(root)((parameter,))[0])


SINGLE = Workers()
#: Owner of a parameter whose optimizer state every worker keeps.
ALL = -1


def join() -> Workers:
    """Join the workers that msrun started."""
    return Workers(*backend.join_workers())


def owners(sizes: Mapping[str, int], workers: int, threshold: int = 0) -> dict[str, int]:
    """Return the rank that keeps the optimizer state of each parameter (ZeRO stage 1), with balanced sizes.

    Whole parameters are assigned, not slices, so that factored optimizers take the same steps as with one worker.
    Parameters with fewer than ``threshold`` elements belong to ``ALL``: broadcasting them costs more than it saves.
    """
    loads, owner = [0] * workers, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if sizes[name] < threshold:
            owner[name] = ALL
            continue
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += sizes[name]
    return owner
