"""Layers whose parameters carry the names that published checkpoints use (``weight``, ``bias``)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from mindspore import nn, ops
from mindspore.common.initializer import initializer

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.models import ascend_operators
from pixart_nb.core.models.operators import gelu_tanh, linear, normalize, repeat_tokens


def parameter(shape: tuple[int, ...], init: str | float = "zeros", name: str = "weight") -> ms.Parameter:
    """Return a float32 parameter; ``init`` is a name of mindspore's initializers or a number."""
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

    @property
    def is_product(self) -> bool:
        """Return whether the output is a product of the input with ``matrix()``, plus the bias."""
        return True

    def matrix(self) -> ms.Tensor:
        """Return the matrix that multiplies the input, (out, in): the weight, plus the update of a LoRA layer."""
        return self.weight

    def in_float32(self, x: ms.Tensor) -> ms.Tensor:
        """Compute in float32, whatever the dtype of the weights: for inputs that overflow half precision."""
        bias = self.bias if self.bias is None else self.bias.astype(ms.float32)
        return linear(x.astype(ms.float32), self.weight.astype(ms.float32), bias)


class MLP(nn.Cell):
    """Linear, GELU (tanh), Linear: (..., in_features) -> (..., out_features)."""

    def __init__(self, in_features: int, hidden: int, out_features: int):
        super().__init__()
        self.fc1, self.fc2 = Linear(in_features, hidden), Linear(hidden, out_features)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return self.fc2(gelu_tanh(self.fc1(x)))


class LayerNorm(nn.Cell):
    """Layer normalization over the last axis; without ``affine`` it has no parameters (adaLN supplies them)."""

    def __init__(self, size: int, eps: float = 1e-5, affine: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = parameter((size,), "ones") if affine else None
        self.bias = parameter((size,), name="bias") if affine else None

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        if backend.on_ascend():
            return self._fused(x)
        rows = normalize(x.astype(ms.float32).reshape(-1, x.shape[-1]), self.eps)
        if self.weight is not None:
            rows = rows * self._repeat(self.weight, rows) + self._repeat(self.bias, rows)
        return rows.reshape(x.shape).astype(x.dtype)

    def _fused(self, x: ms.Tensor) -> ms.Tensor:
        if self.weight is None:
            return ascend_operators.layer_norm(x, None, None, self.eps)
        return ascend_operators.layer_norm(x, self.weight.astype(x.dtype), self.bias.astype(x.dtype), self.eps)

    @staticmethod
    def _repeat(vector: ms.Tensor, rows: ms.Tensor) -> ms.Tensor:
        count, size = rows.shape
        return repeat_tokens(vector.astype(ms.float32).reshape(1, 1, size), count).reshape(count, size)


class RMSNorm(nn.Cell):
    """Normalization of T5: no mean, no bias, variance in float32."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = parameter((size,), "ones")
        self.eps = eps

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        if backend.on_ascend():
            return ascend_operators.rms_norm(x, self.weight.astype(x.dtype), self.eps)
        wide = x.astype(ms.float32)
        wide = wide * ops.rsqrt((wide * wide).mean(-1, keep_dims=True) + self.eps)
        return wide.astype(x.dtype) * self.weight


class Embedding(nn.Cell):
    """Table of vectors: integers (...,) -> (..., size)."""

    def __init__(self, count: int, size: int):
        super().__init__()
        self.weight = parameter((count, size))

    @property
    def dtype(self) -> ms.Type:
        """Dtype of the vectors."""
        return self.weight.dtype

    def construct(self, ids: ms.Tensor) -> ms.Tensor:
        if backend.on_ascend():
            return ascend_operators.embedding(self.weight, ids)
        return ops.gather(self.weight, ids, 0)


class Conv2d(nn.Cell):
    """2-D convolution with PyTorch's conventions: bias, symmetric ``padding``, weight (out, in, k, k)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0):
        super().__init__()
        self.weight = parameter((out_channels, in_channels, kernel_size, kernel_size))
        self.bias = parameter((out_channels,), name="bias")
        self.conv = ops.Conv2D(out_channels, kernel_size, pad_mode="pad", pad=padding, stride=stride)
        self.stride, self.padding = stride, padding

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        if backend.on_ascend():
            return ascend_operators.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return ops.bias_add(self.conv(x, self.weight), self.bias)


class GroupNorm(nn.Cell):
    """Group normalization of (N, C, H, W) with per-channel weight and bias.

    ``statistics`` is an object with ``normalize(norm, x)`` that takes over: for tiles that share the statistics of one
    image (``models.tiling``), and for a faster computation without a gradient (``fast.cpu_operators``).
    """

    def __init__(self, groups: int, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight, self.bias = parameter((channels,), "ones"), parameter((channels,), name="bias")
        self.groups, self.eps, self.statistics = groups, eps, None

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        if self.statistics is not None:
            return self.statistics.normalize(self, x)
        if backend.on_ascend() and x.dtype != ms.float32:  # half precision is poor there
            weight, bias = self.weight.astype(ms.float32), self.bias.astype(ms.float32)
            return ops.group_norm(x.astype(ms.float32), self.groups, weight, bias, self.eps).astype(x.dtype)
        return ops.group_norm(x, self.groups, self.weight, self.bias, self.eps)


@contextmanager
def norm_statistics(norms: Sequence[GroupNorm], statistics: Sequence[Any]) -> Iterator[None]:
    """Set ``norm.statistics`` of each norm inside the block."""
    for norm, values in zip(norms, statistics, strict=True):
        norm.statistics = values
    try:
        yield
    finally:
        for norm in norms:
            norm.statistics = None


def xavier_uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return a weight (out, in, ...) of Glorot's uniform initialization, float32; trailing axes count as inputs."""
    fan_out, fan_in = shape[0], int(np.prod(shape[1:]))
    bound = math.sqrt(6.0 / (fan_in + fan_out))
    return rng.uniform(-bound, bound, shape).astype(np.float32)


def normal(rng: np.random.Generator, shape: tuple[int, ...], std: float = 0.02) -> np.ndarray:
    """Return normal numbers with standard deviation ``std``, float32."""
    return (rng.standard_normal(shape) * std).astype(np.float32)
