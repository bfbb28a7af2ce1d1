"""Linear layers with low-rank updates beside their weights: LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import mint, nn, ops

from pixart_nb.core.backend import ms
from pixart_nb.core.models.operators import linear, transpose

_matmul = ops.MatMul()
#: Rows of a batch with a dropout phase of their own; larger batches repeat them.
PHASES = 2**16


def as_matrix(weight: ms.Tensor) -> ms.Tensor:
    """Return a layer's weight as (out, in); that of a patch embedding (out, C, p, p) in the order of its patches."""
    if weight.ndim == 4:
        return transpose(weight, 0, 2, 3, 1).reshape(weight.shape[0], -1)
    return weight


def to_matrix(weight: np.ndarray) -> np.ndarray:
    """Return ``as_matrix`` of an array."""
    return weight.transpose(0, 2, 3, 1).reshape(len(weight), -1) if weight.ndim == 4 else weight


def from_matrix(matrix: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Invert ``to_matrix`` for all rows of the matrix and the trailing axes of ``shape``."""
    if len(shape) != 4:
        return matrix
    _, channels, height, width = shape
    return matrix.reshape(len(matrix), height, width, channels).transpose(0, 3, 1, 2)


def row_norms(matrix: ms.Tensor) -> ms.Tensor:
    """Return the Euclidean norm of each row of (out, in): (out,)."""
    return ops.sqrt((matrix * matrix).sum(-1))


class LoraDropout(nn.Cell):
    """Dropout of (..., size) with probability ``rate``, by noise that is drawn outside of the network.

    A value is dropped if frac(phase of its row + phase of its column) < rate: any two are independent, and the noise of
    a layer is two vectors, which NumPy draws and a compiled step reads as it reads weights.
    """

    def __init__(self, size: int, rate: float, rows: ms.Parameter, name: str):
        super().__init__(auto_prefix=False)
        self.rate, self.rows = rate, rows
        self.columns = ms.Parameter(ms.Tensor(np.zeros(size, np.float32)), name=name, requires_grad=False)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        size = x.shape[-1]
        count = x.size // size
        rows = ops.tile(self.rows, (-(-count // PHASES),))[:count]
        row_phase = ops.tile(rows.reshape(count, 1), (1, size))
        phase = row_phase + ops.tile(self.columns.reshape(1, size), (count, 1))
        factor = (phase - ops.floor(phase) >= self.rate).astype(x.dtype) * (1.0 / (1.0 - self.rate))
        return x * factor.reshape(x.shape)


class LoraBranch(nn.Cell):
    """Low-rank update of some outputs of a layer: strength * scale * up(down(x)).

    ``down`` is (r, in), ``up`` (rows, r): lora_A and lora_B of PEFT. ``scale`` is alpha / r; ``strength``, (1,), is
    shared by all branches of an adapter.
    """

    def __init__(
        self,
        name: str,
        down: np.ndarray,
        up: np.ndarray,
        scale: float,
        strength: ms.Parameter,
        dropout: LoraDropout | None = None,
    ):
        super().__init__(auto_prefix=False)
        self.scale, self.strength, self.dropout = scale, strength, dropout
        self.down = ms.Parameter(ms.Tensor(np.array(down)), name=f"{name}.lora_A")
        self.up = ms.Parameter(ms.Tensor(np.array(up)), name=f"{name}.lora_B")

    def parameters(self) -> dict[str, ms.Parameter]:
        """Return the trained parameters, under PEFT's names."""
        return {"lora_A": self.down, "lora_B": self.up}

    def input(self, x: ms.Tensor, training: bool) -> ms.Tensor:
        """Return the input in the dtype of the branch, with dropout in training."""
        x = x.astype(self.down.dtype)
        return self.dropout(x) if training and self.dropout is not None else x

    def construct(self, x: ms.Tensor, weight: ms.Tensor, training: bool = False) -> ms.Tensor:
        """x (..., in) and these rows of the layer's weight (rows, in) -> update of the output (..., rows)."""
        factor = (self.strength * self.scale).astype(self.up.dtype)
        return linear(linear(self.input(x, training), self.down), self.up * factor).astype(x.dtype)

    def update(self, weight: ms.Tensor) -> ms.Tensor:
        """Return the update of these rows of the layer's weight, (rows, in)."""
        factor = (self.strength * self.scale).astype(self.up.dtype)
        return _matmul(self.up * factor, self.down).astype(weight.dtype)

    def exact_update(self, weight: np.ndarray) -> np.ndarray:
        """Return the update of the rows (rows, in) of the weight by a strength of 1, float64."""
        down, up = (p.asnumpy().astype(np.float64) for p in (self.down, self.up))
        return self.scale * (up @ down)


class DoraBranch(LoraBranch):
    """DoRA: rows of W + scale up down, scaled to the norms ``magnitude`` (rows,), replace those of W.

    The update is the difference to W. As in section 4.3 of the paper, no gradient flows through the norm.
    """

    def __init__(self, name, down, up, scale, strength, dropout=None, magnitude=None):
        super().__init__(name, down, up, scale, strength, dropout)
        self.magnitude = ms.Parameter(ms.Tensor(np.array(magnitude)), name=f"{name}.lora_magnitude_vector")

    def parameters(self) -> dict[str, ms.Parameter]:
        return super().parameters() | {"lora_magnitude_vector": self.magnitude}

    def construct(self, x: ms.Tensor, weight: ms.Tensor, training: bool = False) -> ms.Tensor:
        update = self.update(weight.astype(self.up.dtype))
        return linear(self.input(x, training), update).astype(x.dtype)

    def update(self, weight: ms.Tensor) -> ms.Tensor:
        weight_dtype, weight = weight.dtype, weight.astype(self.up.dtype)
        adapted = weight + _matmul(self.up, self.down) * self.scale
        gain = self.magnitude / ops.stop_gradient(row_norms(adapted))
        update = ops.tile(gain.reshape(-1, 1), (1, weight.shape[1])) * adapted - weight
        return (update * self.strength.astype(update.dtype)).astype(weight_dtype)

    def exact_update(self, weight: np.ndarray) -> np.ndarray:
        weight = weight.astype(np.float64)
        adapted = weight + super().exact_update(weight)
        gain = self.magnitude.asnumpy().astype(np.float64) / np.linalg.norm(adapted, axis=1)
        return gain[:, None] * adapted - weight


class DeltaBranch(LoraBranch):
    """Update of some outputs of a layer by a matrix without factors, (rows, in): strength * scale * delta."""

    def __init__(self, name: str, delta: np.ndarray, scale: float, strength: ms.Parameter):
        nn.Cell.__init__(self, auto_prefix=False)
        self.scale, self.strength = scale, strength
        self.delta = ms.Parameter(ms.Tensor(np.array(delta)), name=f"{name}.diff", requires_grad=False)

    def parameters(self) -> dict[str, ms.Parameter]:
        return {"diff": self.delta}

    def construct(self, x: ms.Tensor, weight: ms.Tensor, training: bool = False) -> ms.Tensor:
        return linear(x.astype(self.delta.dtype), self.update(self.delta)).astype(x.dtype)

    def update(self, weight: ms.Tensor) -> ms.Tensor:
        factor = (self.strength * self.scale).astype(self.delta.dtype)
        return (self.delta * factor).astype(weight.dtype)

    def exact_update(self, weight: np.ndarray) -> np.ndarray:
        return self.scale * self.delta.asnumpy().astype(np.float64)


class ZeroBranch(nn.Cell):
    """Branch of the outputs that an adapter does not change."""

    def __init__(self, rows: int):
        super().__init__(auto_prefix=False)
        self.rows = rows

    def construct(self, x: ms.Tensor, weight: ms.Tensor, training: bool = False) -> ms.Tensor:
        return mint.zeros((*x.shape[:-1], self.rows), dtype=x.dtype)

    def update(self, weight: ms.Tensor) -> ms.Tensor:
        return mint.zeros(weight.shape, dtype=weight.dtype)

    def exact_update(self, weight: np.ndarray) -> np.ndarray:
        return np.zeros(weight.shape)


class AdaptedLayer(nn.Cell):
    """A ``Linear`` or a ``PatchProjection`` with updates beside it; it has the parameters of that layer alone.

    Each update is a row of (start, stop, branch) that together cover the layer's outputs in order.
    """

    def __init__(self, layer: nn.Cell, updates: Sequence[Sequence[tuple[int, int, nn.Cell]]]):
        super().__init__(auto_prefix=False)
        self.weight, self.bias = layer.weight, layer.bias
        self.layer = (layer,)  # cells in tuples are not registered as children
        self.updates = tuple(tuple(update) for update in updates)

    @property
    def dtype(self) -> ms.Type:
        """Dtype of the input."""
        return getattr(self.layer[0], "dtype", self.weight.dtype)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        weight, out = as_matrix(self.weight), self.layer[0](x)
        for update in self.updates:
            parts = [branch(x, weight[start:stop], self.training) for start, stop, branch in update]
            out = out + (parts[0] if len(parts) == 1 else mint.cat(parts, -1))
        return out

    @property
    def is_product(self) -> bool:
        """Return whether the output is a product with ``matrix()``: without dropout, or not in training."""
        branches = (branch for update in self.updates for _, _, branch in update)
        return not self.training or all(getattr(branch, "dropout", None) is None for branch in branches)

    def matrix(self) -> ms.Tensor:
        """Return the weight with all updates added, (out, in)."""
        weight = as_matrix(self.weight)
        out = weight
        for update in self.updates:
            out = out + mint.cat([branch.update(weight[start:stop]) for start, stop, branch in update], 0)
        return out
