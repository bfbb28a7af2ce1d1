"""Row-wise operators of the CPU path on NumPy memory, by several threads, a part of the rows at a time.

MindSpore 2.8 computes these on a CPU with many passes over the whole memory. Here each part stays in the cache until it
is done. NumPy releases the lock of Python while it computes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.fast.cpu_operators import moments
from pixart_nb.core.models.layers import LayerNorm

#: Elements of a part.
_PART = 2**16


@cache
def _threads() -> ThreadPoolExecutor:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(count, thread_name_prefix="rows")


def _by_parts(work: Callable[[slice], None], shape: tuple[int, int]) -> None:
    """Call ``work`` for all rows of a matrix of this shape, in parts, on all threads."""
    step = max(1, _PART // shape[1])
    parts = [slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
    if len(parts) == 1:
        work(parts[0])
    else:
        list(_threads().map(work, parts))


def _array(x: ms.Tensor) -> np.ndarray:
    return (x if x.dtype == ms.float32 else x.astype(ms.float32)).asnumpy()


def _tensor(values: np.ndarray, dtype: ms.Type) -> ms.Tensor:
    tensor = ms.Tensor.from_numpy(values)
    return tensor if dtype == ms.float32 else tensor.astype(dtype)


def gelu_tanh(x: ms.Tensor) -> ms.Tensor:
    """Return the tanh approximation of GELU of x (M, D), as ``x / (1 + exp(-2 u))``."""
    values = _array(x)
    out = np.empty_like(values)

    def work(rows: slice) -> None:
        v, u = values[rows], out[rows]
        np.multiply(v, v, out=u)
        u *= np.float32(-0.07135481627260025)
        u -= np.float32(1.5957691216057308)
        u *= v
        with np.errstate(over="ignore"):
            np.exp(u, out=u)
        u += np.float32(1)
        np.divide(v, u, out=u)

    _by_parts(work, values.shape)
    return _tensor(out, x.dtype)


def modulate(norm: LayerNorm, x: ms.Tensor, shift: ms.Tensor, scale: ms.Tensor) -> ms.Tensor:
    """Return layer_norm(x) (1 + scale) + shift: x (M, D), shift and scale of D elements."""
    values, out = _array(x), np.empty(x.shape, np.float32)
    gain, offset = (_array(v).reshape(1, -1) for v in (1 + scale, shift))

    def work(rows: slice) -> None:
        part, result = values[rows], out[rows]
        mean, variance = moments(part)
        np.subtract(part, mean.astype(np.float32)[:, None], out=result)
        result *= (1 / np.sqrt(variance + norm.eps)).astype(np.float32)[:, None]
        result *= gain
        result += offset

    _by_parts(work, values.shape)
    return _tensor(out, x.dtype)


def add_gated(x: ms.Tensor, gate: ms.Tensor, change: ms.Tensor) -> ms.Tensor:
    """Return x + gate change: x and change (M, D), gate of D elements."""
    values, changes, out = _array(x), _array(change), np.empty(x.shape, np.float32)
    factor = _array(gate).reshape(1, -1)

    def work(rows: slice) -> None:
        np.multiply(changes[rows], factor, out=out[rows])
        out[rows] += values[rows]

    _by_parts(work, values.shape)
    return _tensor(out, x.dtype)
