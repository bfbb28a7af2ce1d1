"""Layers whose parameters carry the names that published checkpoints use (``weight``, ``bias``)."""

from __future__ import annotations

import math

import numpy as np
from mindspore import nn, ops
from mindspore.common.initializer import initializer

from pixart_nb.core.backend import ms
from pixart_nb.core.models.operators import linear, repeat_rows, standardise


def parameter(shape: tuple[int, ...], init: str | float = "zeros", name: str = "weight") -> ms.Parameter:
    """A float32 parameter; ``init`` is a name of mindspore's initializers or a number."""
    return ms.Parameter(initializer(init, shape, ms.float32), name=name)


class Linear(nn.Cell):
    """``x @ weight.T + bias``: (..., in_features) -> (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = parameter((out_features, in_features))
        self.bias = parameter((out_features,), name="bias") if bias else None

    @property
    def dtype(self) -> ms.Type:
        """Dtype of the input."""
        return self.weight.dtype

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return linear(x, self.weight, self.bias)

    def matrix(self) -> ms.Tensor:
        """What the input is multiplied with, (out, in): the weight. A LoRA's layer adds its changes."""
        return self.weight

    def in_float32(self, x: ms.Tensor) -> ms.Tensor:
        """The same computed in float32, whatever the weights: for inputs that overflow half precision."""
        bias = self.bias if self.bias is None else self.bias.astype(ms.float32)
        return linear(x.astype(ms.float32), self.weight.astype(ms.float32), bias)


class LayerNorm(nn.Cell):
    """Layer normalisation over the last axis; without ``affine`` it has no parameters (adaLN supplies them)."""

    def __init__(self, size: int, eps: float = 1e-5, affine: bool = True):
        super().__init__()
        self.standardise, self.eps = standardise(eps), eps
        self.weight = parameter((size,), "ones") if affine else None
        self.bias = parameter((size,), name="bias") if affine else None

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        rows = self.standardise(x.astype(ms.float32).reshape(-1, x.shape[-1]))
        if self.weight is not None:
            rows = rows * self._written_out(self.weight, rows) + self._written_out(self.bias, rows)
        return rows.reshape(x.shape).astype(x.dtype)

    @staticmethod
    def _written_out(vector: ms.Tensor, rows: ms.Tensor) -> ms.Tensor:
        count, size = rows.shape
        return repeat_rows(vector.astype(ms.float32).reshape(1, 1, size), count).reshape(count, size)


class RMSNorm(nn.Cell):
    """T5's normalisation: no mean, no bias, variance in float32."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = parameter((size,), "ones")
        self.eps = eps

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        wide = x.astype(ms.float32)
        wide = wide * ops.rsqrt((wide * wide).mean(-1, keep_dims=True) + self.eps)
        return wide.astype(x.dtype) * self.weight


class Embedding(nn.Cell):
    """A table of vectors: integer (...,) -> (..., size)."""

    def __init__(self, count: int, size: int):
        super().__init__()
        self.weight = parameter((count, size))

    def construct(self, ids: ms.Tensor) -> ms.Tensor:
        return ops.gather(self.weight, ids, 0)


class Conv2d(nn.Cell):
    """2-D convolution with torch's conventions: bias, symmetric ``padding``, weight (out, in, k, k)."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
    ):
        super().__init__()
        self.weight = parameter((out_channels, in_channels, kernel_size, kernel_size))
        self.bias = parameter((out_channels,), name="bias")
        self.conv = ops.Conv2D(out_channels, kernel_size, pad_mode="pad", pad=padding, stride=stride)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return ops.bias_add(self.conv(x, self.weight), self.bias)


class GroupNorm(nn.Cell):
    """Group normalisation of (N, C, H, W) with per-channel weight and bias.

    ``shared`` replaces each picture's own statistics, for tiles of one picture (see ``tiling``).
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.bias = parameter((channels,), "ones"), parameter((channels,), name="bias")
        self.groups, self.eps, self.shared = groups, eps, None

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        if self.shared is not None:
            return self.shared.normalise(self, x)
        return ops.group_norm(x, self.groups, self.weight, self.bias, self.eps)


def xavier_uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Glorot's uniform initialisation of a (out, in, ...) weight, float32; trailing axes count as inputs."""
    fan_out, fan_in = shape[0], int(np.prod(shape[1:]))
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def normal(rng: np.random.Generator, shape: tuple[int, ...], std: float = 0.02) -> np.ndarray:
    """Normal initialisation with standard deviation ``std``, float32."""
    return (rng.standard_normal(shape) * std).astype(np.float32)
