"""Linear layers with low-rank changes beside their weights: LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mindspore import mint, nn, ops

from pixart_nb.core.backend import ms
from pixart_nb.core.models.operators import linear, transpose

_product = ops.MatMul()
#: Rows of a batch that have a phase of their own for dropout; larger batches use them again.
PHASES = 2**16


def as_matrix(weight: ms.Tensor) -> ms.Tensor:
    """A layer's weight as (out, in): itself, or the patch embedding's (out, C, p, p) in the order of its patches."""
    if weight.ndim == 4:
        return transpose(weight, 0, 2, 3, 1).reshape(weight.shape[0], -1)
    return weight


def to_matrix(weight: np.ndarray) -> np.ndarray:
    """``as_matrix`` for an array."""
    return weight.transpose(0, 2, 3, 1).reshape(len(weight), -1) if weight.ndim == 4 else weight


def from_matrix(matrix: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The inverse of ``to_matrix`` for as many rows as the matrix has and the trailing axes of ``shape``."""
    if len(shape) != 4:
        return matrix
    _, channels, height, width = shape
    return matrix.reshape(len(matrix), height, width, channels).transpose(0, 3, 1, 2)


def row_norms(matrix: ms.Tensor) -> ms.Tensor:
    """Euclidean norm of each row of (out, in): (out,)."""
    return ops.sqrt((matrix * matrix).sum(-1))


class Dropout(nn.Cell):
    """Zeroes each number of (..., size) with probability ``share``, by noise that is drawn outside of the network.

    A number is dropped where frac(phase of its row + phase of its column) < share: any two are independent, and the
    noise of a layer is two vectors. So NumPy can draw it, and a compiled step reads it as it reads weights.
    """

    def __init__(self, size: int, share: float, rows: ms.Parameter, name: str):
        super().__init__(auto_prefix=False)
        self.share, self.rows = share, rows
        self.columns = ms.Parameter(ms.Tensor(np.zeros(size, np.float32)), name=name, requires_grad=False)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        size = x.shape[-1]
        count = x.size // size
        rows = ops.tile(self.rows, (-(-count // PHASES),))[:count]
        phase = ops.tile(rows.reshape(count, 1), (1, size)) + ops.tile(
            self.columns.reshape(1, size), (count, 1)
        )
        kept = (phase - ops.floor(phase) >= self.share).astype(x.dtype) * (1.0 / (1.0 - self.share))
        return x * kept.reshape(x.shape)


class Branch(nn.Cell):
    """What LoRA adds to some outputs of a layer: strength * scale * up(down(x)).

    ``down`` is (r, in), ``up`` (rows, r): lora_A and lora_B of PEFT. ``scale`` is alpha / r; ``strength``, (1,), is
    shared by an adapter's branches.
    """

    def __init__(
        self,
        name: str,
        down: np.ndarray,
        up: np.ndarray,
        scale: float,
        strength: ms.Parameter,
        dropout: Dropout | None = None,
    ):
        super().__init__(auto_prefix=False)
        self.scale, self.strength, self.dropout = scale, strength, dropout
        self.down = ms.Parameter(ms.Tensor(np.array(down)), name=f"{name}.lora_A")
        self.up = ms.Parameter(ms.Tensor(np.array(up)), name=f"{name}.lora_B")

    def parameters(self) -> dict[str, ms.Parameter]:
        """What is trained, under PEFT's names."""
        return {"lora_A": self.down, "lora_B": self.up}

    def entering(self, x: ms.Tensor, training: bool) -> ms.Tensor:
        """The input in the dtype of the branch, with dropout in training."""
        x = x.astype(self.down.dtype)
        return self.dropout(x) if training and self.dropout is not None else x

    def construct(self, x: ms.Tensor, weight: ms.Tensor, training: bool = False) -> ms.Tensor:
        """x (..., in) and these rows of the layer's weight, (rows, in) -> what is added to its output, (..., rows)."""
        factor = (self.strength * self.scale).astype(self.up.dtype)
        return linear(linear(self.entering(x, training), self.down), self.up * factor).astype(x.dtype)

    def added(self, weight: ms.Tensor) -> ms.Tensor:
        """What is added to these rows of the layer's weight, (rows, in)."""
        factor = (self.strength * self.scale).astype(self.up.dtype)
        return _product(self.up * factor, self.down).astype(weight.dtype)

    def change(self, weight: np.ndarray) -> np.ndarray:
        """What a strength of 1 adds to the rows (rows, in) of the weight, float64."""
        down, up = (p.asnumpy().astype(np.float64) for p in (self.down, self.up))
        return self.scale * (up @ down)


class DoraBranch(Branch):
    """DoRA: the rows of W + scale up down, brought to the lengths ``magnitude`` (rows,), in place of those of W.

    What is added to the output is the difference to W. As in section 4.3 of the paper, no gradient goes through the
    norm that is divided by.
    """

    def __init__(self, name, down, up, scale, strength, dropout=None, magnitude=None):
        super().__init__(name, down, up, scale, strength, dropout)
        self.magnitude = ms.Parameter(ms.Tensor(np.array(magnitude)), name=f"{name}.lora_magnitude_vector")

    def parameters(self) -> dict[str, ms.Parameter]:
        return super().parameters() | {"lora_magnitude_vector": self.magnitude}

    def construct(self, x: ms.Tensor, weight: ms.Tensor, training: bool = False) -> ms.Tensor:
        wide = weight.astype(self.up.dtype)
        return linear(self.entering(x, training), self.added(wide)).astype(x.dtype)

    def added(self, weight: ms.Tensor) -> ms.Tensor:
        wide = weight.astype(self.up.dtype)
        turned = wide + _product(self.up, self.down) * self.scale
        gain = self.magnitude / ops.stop_gradient(row_norms(turned))
        added = ops.tile(gain.reshape(-1, 1), (1, wide.shape[1])) * turned - wide
        return (added * self.strength.astype(added.dtype)).astype(weight.dtype)

    def change(self, weight: np.ndarray) -> np.ndarray:
        weight = weight.astype(np.float64)
        turned = weight + super().change(weight)
        gain = self.magnitude.asnumpy().astype(np.float64) / np.linalg.norm(turned, axis=1)
        return gain[:, None] * turned - weight


class Unchanged(nn.Cell):
    """The place of outputs to which an adapter adds nothing."""

    def __init__(self, rows: int):
        super().__init__(auto_prefix=False)
        self.rows = rows

    def construct(self, x: ms.Tensor, weight: ms.Tensor, training: bool = False) -> ms.Tensor:
        return mint.zeros((*x.shape[:-1], self.rows), dtype=x.dtype)

    def added(self, weight: ms.Tensor) -> ms.Tensor:
        """As ``Branch.added``."""
        return mint.zeros(weight.shape, dtype=weight.dtype)


class Adapted(nn.Cell):
    """A ``Linear`` or a ``PatchProjection`` with changes beside it; its parameters are still those of the layer alone.

    Every change is a row of (start, stop, branch) that together cover the layer's outputs in order.
    """

    def __init__(self, layer: nn.Cell, changes: Sequence[Sequence[tuple[int, int, nn.Cell]]]):
        super().__init__(auto_prefix=False)
        self.weight, self.bias = layer.weight, layer.bias
        self.changes = tuple(
            tuple(change) for change in changes
        )  # in tuples, cells are not registered as children

    @property
    def dtype(self) -> ms.Type:
        """Dtype of the weights."""
        return self.weight.dtype

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        weight = as_matrix(self.weight)
        out = linear(x, weight, self.bias)
        for change in self.changes:
            added = [branch(x, weight[start:stop], self.training) for start, stop, branch in change]
            out = out + (added[0] if len(added) == 1 else mint.cat(added, -1))
        return out

    def matrix(self) -> ms.Tensor:
        """The weight with all changes added, (out, in)."""
        weight = as_matrix(self.weight)
        out = weight
        for change in self.changes:
            out = out + mint.cat([branch.added(weight[start:stop]) for start, stop, branch in change], 0)
        return out
