"""Operators of the CPU path, several times as fast as MindSpore's own (2.8). They have no gradient.

Group norms: NumPy computes mean and variance from the tensor's memory, batch normalization with given statistics the
rest. Row-wise operators: each thread passes over its part of the rows once; MindSpore passes over the whole memory many
times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from mindspore import ops

from pixart_nb.core import backend, onednn_operators
from pixart_nb.core.backend import ms, to_numpy
from pixart_nb.core.models.layers import MLP, GroupNorm, Linear
from pixart_nb.core.models.low_precision import BFloat16Linear
from pixart_nb.core.onednn_operators import linear, rounded_bits

#: Elements whose squares are summed in float32 at a time; the sums of these parts are added in float64.
PART = 2**15
#: With a mean above this many standard deviations, the mean of squares minus the squared mean is too coarse.
FAR = 30.0


class ImageStatistics:
    """Mean and variance of each image of a batch, for ``GroupNorm.statistics``."""

    def normalize(self, norm: GroupNorm, x: ms.Tensor) -> ms.Tensor:
        """Group normalization of x (N, C, H, W)."""
        n, c, height, width = x.shape
        wide = x.astype(ms.float32)
        mean, variance = (
            ms.Tensor(np.repeat(values, c // norm.groups).astype(np.float32))
            for values in moments(wide.asnumpy().reshape(n * norm.groups, -1))
        )
        weight, bias = (ops.tile(vector.astype(ms.float32), (n,)) for vector in (norm.weight, norm.bias))
        batch_norm = ops.BatchNorm(is_training=False, epsilon=norm.eps)
        rows = wide.reshape(1, n * c, height, width)
        return batch_norm(rows, weight, bias, mean, variance)[0].reshape(x.shape).astype(x.dtype)


def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of every row of (G, K) float32, each (G,) float64.

    >>> [values.tolist() for values in moments(np.array([[1, 3], [5, 5]], np.float32))]
    [[2.0, 5.0], [1.0, 0.0]]
    """
    mean = rows.mean(1).astype(np.float64)
    short = rows.shape[1] <= PART
    square = np.einsum("gk,gk->g", rows, rows) if short else np.array([_square_sum(row) for row in rows])
    square = square.astype(np.float64) / rows.shape[1]
    variance = np.maximum(square - mean**2, 0)
    for number in np.flatnonzero(FAR**2 * variance < mean**2):
        variance[number] = rows[number].astype(np.float64).var()
    return mean, variance


def _square_sum(row: np.ndarray) -> float:
    parts = (row[start : start + PART] for start in range(0, len(row), PART))
    return sum(float(part @ part) for part in parts)


def by_rows(work: Callable[[slice], object], count: int) -> None:
    """Call ``work`` for ``count`` rows, each thread for its part of them."""
    backend.in_threads(work, backend.thread_slices(count))


def modulate(x: np.ndarray, eps: float, shift: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return layer_norm(x) (1 + scale) + shift: x (M, D), shift and scale (D,)."""
    out, gain = np.empty_like(x), 1 + scale
    by_rows(lambda rows: onednn_operators.layer_norm(x[rows], eps, out[rows], gain, shift), len(x))
    return out


def add_gated(x: np.ndarray, gate: np.ndarray | None, change: np.ndarray) -> None:
    """Add gate change to x: x and change (M, D), gate (D,) or None for 1. The change is overwritten."""

    def work(rows: slice) -> None:
        if gate is not None:
            change[rows] *= gate
        x[rows] += change[rows]

    by_rows(work, len(x))


def on_arrays(layer: Linear) -> Callable[[np.ndarray], np.ndarray]:
    """Return a linear layer as a function of arrays, (M, in) float32 -> (M, out) float32."""
    bias = None if layer.bias is None else to_numpy(layer.bias)
    if type(layer) is BFloat16Linear:
        return partial(linear, weight=layer.bits, bias=bias)
    if type(layer) is Linear and layer.dtype == ms.float32:
        return partial(linear, weight=layer.weight.asnumpy(), bias=bias)
    return lambda x: to_numpy(layer(ms.Tensor.from_numpy(x).astype(layer.dtype)))


def mlp_on_arrays(mlp: MLP) -> Callable[[np.ndarray], np.ndarray]:
    """Return an MLP as a function of arrays, (M, D) -> (M, D)."""
    fc1, fc2 = on_arrays(mlp.fc1), on_arrays(mlp.fc2)
    if type(mlp.fc1) is type(mlp.fc2) is BFloat16Linear:
        return partial(_bfloat16_mlp, first=fc1.keywords, second=fc2.keywords)
    return lambda x: fc2(_gelu(fc1(x)))


def _gelu(x: np.ndarray) -> np.ndarray:
    by_rows(lambda rows: onednn_operators.gelu(x[rows], x[rows]), len(x))
    return x


def _bfloat16_mlp(x: np.ndarray, first: dict, second: dict) -> np.ndarray:
    """Compute an MLP whose weights are bits of bfloat16; what is between its layers is rounded to bfloat16 once."""
    out = np.empty((len(x), len(second["weight"])), np.float32)

    def work(rows: slice) -> None:
        hidden = np.empty((rows.stop - rows.start, len(first["weight"])), np.uint16)
        onednn_operators.bfloat16_linear(rounded_bits(x[rows]), first["weight"], first["bias"], hidden, True)
        onednn_operators.bfloat16_linear(hidden, second["weight"], second["bias"], out[rows])

    by_rows(work, len(x))
    return out
