"""Data parallelism under msrun: collectives, and the worker that keeps the optimizer state of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from mindspore import mint, ops

from pixart_nb.core.backend import fuse_collectives, ms

#: Parts that tensors are summed in over the workers: few collectives, and no second copy of a whole model.
BUFFERS = 3
#: Owner of a parameter whose optimizer state every worker keeps.
ALL = -1


@dataclass(frozen=True)
class Workers:
    """Rank of this worker and number of workers. The methods are collectives: every worker has to call them.

    With ``fused``, means are one compiled graph whose collectives MindSpore joins, for Ascend: a call takes one
    dispatch in place of five for each tensor. The others go through flat buffers, and means without it.
    """

    rank: int = 0
    size: int = 1
    fused: bool = False

    @property
    def is_main(self) -> bool:
        """Return whether this is the worker that writes files."""
        return self.rank == 0

    def sum(self, tensors: Sequence[ms.Tensor]) -> list[ms.Tensor]:
        """Return the sum of each tensor over the workers, in float32, by at most ``BUFFERS`` collectives."""
        if self.size == 1:
            return list(tensors)
        sums, reduce = [], ops.AllReduce()
        for part in _parts(tensors):
            flat = reduce(ops.concat([tensor.astype(ms.float32).reshape(-1) for tensor in part]))
            ends = np.cumsum([tensor.size for tensor in part]).tolist()
            sums += [flat[end - t.size : end].reshape(t.shape) for t, end in zip(part, ends, strict=True)]
        return sums

    def mean(self, tensors: Sequence[ms.Tensor]) -> list[ms.Tensor]:
        """Return the mean of each tensor over the workers, in float32."""
        if self.size == 1:
            return list(tensors)
        if self.fused:
            return list(_fused_mean(self.size, tuple(_part_numbers(tensors).tolist()))(*tensors))
        return [total * (1.0 / self.size) for total in self.sum(tensors)]

    def all_reduce(self, values: Sequence[float]) -> list[float]:
        """Return the sums of a few numbers over the workers, in float32."""
        if self.size == 1:
            return list(values)
        return self.sum([ms.Tensor(np.array(values, np.float32))])[0].asnumpy().tolist()

    def from_owners(self, tensors: Mapping[str, ms.Tensor], owner: Mapping[str, int]) -> dict[str, ms.Tensor]:
        """Return each float32 tensor as its owner has it; the others pass any of the same shape."""
        if self.size == 1:
            return dict(tensors)
        shared = {name: tensor for name, tensor in tensors.items() if owner[name] != ALL}
        parts = [
            tensor if owner[name] == self.rank else mint.zeros(tensor.shape, dtype=tensor.dtype)
            for name, tensor in shared.items()
        ]
        return dict(tensors) | dict(zip(shared, self.sum(parts) if parts else [], strict=True))


SINGLE = Workers()


@cache
def _fused_mean(size: int, parts: tuple[int, ...]) -> Callable[..., tuple[ms.Tensor, ...]]:
    """Return the compiled function from tensors to their means over the workers, in float32, a collective per part."""
    fuse_collectives()
    reduce = [ops.AllReduce().add_prim_attr("fusion", part + 1) for part in parts]

    def mean(*tensors):
        means = ()
        for number, tensor in enumerate(tensors):
            means = (*means, reduce[number](ops.cast(tensor, ms.float32)) * (1.0 / size))
        return means

    return ms.jit(mean, jit_level="O0")


def _part_numbers(tensors: Sequence[ms.Tensor]) -> np.ndarray:
    """Return the part of each tensor, from 0: at most ``BUFFERS`` parts of about the same size, in order."""
    ends = np.cumsum([tensor.size for tensor in tensors])
    return np.minimum((ends - 1) * BUFFERS // ends[-1], BUFFERS - 1)


def _parts(tensors: Sequence[ms.Tensor]) -> Iterator[list[ms.Tensor]]:
    """Yield the tensors of each part."""
    numbers = _part_numbers(tensors)
    for number in range(BUFFERS):
        if part := [tensor for tensor, k in zip(tensors, numbers, strict=True) if k == number]:
            yield part


def owners(sizes: Mapping[str, int], workers: int, threshold: int = 0) -> dict[str, int]:
    """Return the rank that keeps the optimizer state of each parameter (ZeRO stage 1), with balanced sizes.

    Whole parameters are assigned, not slices, so that factored optimizers take the same steps as with one worker.
    Parameters with fewer than ``threshold`` elements belong to ``ALL``: sending them costs more than it saves.
    """
    loads, owner = [0] * workers, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        if sizes[name] < threshold:
            owner[name] = ALL
            continue
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += sizes[name]
    return owner
