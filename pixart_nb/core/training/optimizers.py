"""AdamW, CAME, exponential moving average, learning-rate schedules, gradient clipping and loss scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from mindspore import mint, ops

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.models import ascend_operators
from pixart_nb.core.models.operators import assign

#: Images per update for which ``start_learning_rate`` is meant when ``auto_lr`` scales it.
BASE_BATCH = 256
#: Most elements of a stack of tensors that CAME updates together: 64 MB for each temporary of an update.
STACK_ELEMENTS = 2**24
_batch_matmul, _adam_step = ops.BatchMatMul(), ops.AdamWeightDecay()


def learning_rate(step: int, peak: float, warmup: int, total: int, shape: str = "cosine", end: float = 0.0) -> float:
    """Return the learning rate of a step, counted from 0: linear warm-up, then a schedule.

    ``constant`` keeps ``peak``; ``cosine`` and ``linear`` fall to ``end`` at step ``total``.
    """
    if shape not in ("constant", "cosine", "linear"):
        raise PixArtNBError(f"learning-rate schedule {shape!r}; expected 'constant', 'cosine' or 'linear'")
    if step < warmup:
        return peak * (step + 1) / warmup
    if shape == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    left = 0.5 * (1 + math.cos(math.pi * done)) if shape == "cosine" else 1 - done
    return end + (peak - end) * left


def scaled_rate(rate: float, images: int, rule: str) -> float:
    """Scale a learning rate by ``images`` per update over 256 (``linear``), by its root (``sqrt``), or not at all."""
    if rule not in ("", "linear", "sqrt"):
        raise PixArtNBError(f"auto_lr {rule!r}; expected 'linear', 'sqrt' or nothing")
    ratio = images / BASE_BATCH
    return rate * {"": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[rule]


def global_norm(gradients: Sequence[ms.Tensor]) -> float:
    """Return the Euclidean norm over all gradients; not finite if any element is not."""
    if backend.on_ascend():  # the gradients stay on the device. Not run on Ascend
        squares = [wide.mul(wide).sum() for wide in map(_wide, gradients)]
        return math.sqrt(float(sum(squares[1:], squares[0]).asnumpy()))
    flat = (gradient.asnumpy().reshape(-1).astype(np.float32, copy=False) for gradient in gradients)
    return math.sqrt(sum(float(np.dot(part, part)) for part in flat))


def _wide(gradient: ms.Tensor) -> ms.Tensor:
    return gradient if gradient.dtype == ms.float32 else gradient.astype(ms.float32)


def clip_by_norm(
    gradients: Sequence[ms.Tensor], norm: float, max_norm: float | None, scale: float = 1.0
) -> list[ms.Tensor]:
    """Return ``scale`` times the gradients, in float32, clipped to a global norm of ``max_norm``.

    ``norm`` is the norm of the gradients before they are scaled; ``max_norm`` None clips nothing. On the CPU, float32
    gradients are scaled in place: those of XL/2 take 2.4 GB.
    """
    if max_norm is not None:
        scale *= min(1.0, max_norm / (scale * norm + 1e-6))
    if backend.on_ascend():
        return [wide if scale == 1.0 else wide * scale for wide in map(_wide, gradients)]
    wide = [gradient.astype(ms.float32) for gradient in gradients]  # also makes parts of other tensors contiguous
    if scale == 1.0:
        return wide
    arrays, factor = [gradient.asnumpy() for gradient in wide], np.float32(scale)
    separate = {array.__array_interface__["data"][0]: array for array in arrays}  # two gradients may be one tensor
    backend.in_threads(lambda array: np.multiply(array, factor, out=array), list(separate.values()))
    return wide


class Optimizer:
    """Base class: state tensors in groups such as ``exp_avg``, by the first name of each stack of parameters.

    Parameters of one shape with at most ``stack_elements`` together share their state tensors, one above the other
    along the first axis; by default each parameter has its own.
    """

    def __init__(
        self,
        parameters: Mapping[str, ms.Parameter],
        betas: Sequence[float] = (0.9, 0.999),
        eps: float | Sequence[float] = 1e-8,
        weight_decay: float = 0.0,
        stack_elements: int = 0,
    ):
        self.parameters, self.updates = dict(parameters), 0
        self.betas, self.eps, self.weight_decay = tuple(betas), eps, weight_decay
        self.stacks = stacks({name: tuple(p.shape) for name, p in self.parameters.items()}, stack_elements)
        self.groups: dict[str, dict[str, ms.Parameter]] = {}
        for names in self.stacks:
            for group, shape in self.state_shapes(tuple(self.parameters[names[0]].shape)).items():
                zeros = np.zeros((len(names) * shape[0], *shape[1:]) if shape else (), np.float32)
                self.groups.setdefault(group, {})[names[0]] = ms.Parameter(ms.Tensor(zeros), name=f"{group}.{names[0]}")

    @staticmethod
    def state_shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of the state tensors of a parameter of this shape, by group."""
        return {"exp_avg": shape, "exp_avg_sq": shape}

    def state(self) -> dict[str, ms.Tensor]:
        """State tensors by name, such as ``exp_avg/blocks.0.attn.qkv.weight``, without the number of updates."""
        return {
            f"{group}/{name}": part
            for group, tensors in self.groups.items()
            for names in self.stacks
            if names[0] in tensors
            for name, part in zip(names, _parts(tensors[names[0]], len(names)), strict=True)
        }

    def restore(self, tensors: Mapping[str, np.ndarray], updates: int, source: object = "state") -> None:
        """Load what ``state`` returned. Raises ``CheckpointError`` for a missing tensor or another shape."""
        for name, parameter in self.parameters.items():
            for group, shape in self.state_shapes(tuple(parameter.shape)).items():
                key = f"{group}/{name}"
                if key not in tensors or tensors[key].shape != shape:
                    raise CheckpointError(
                        f"{source} holds {tensors[key].shape if key in tensors else 'nothing'} for the optimizer state "
                        f"{key}; expected {shape}. It was written with another optimizer or model"
                    )
        for names in self.stacks:
            for group, own in self.groups.items():
                if names[0] in own:
                    arrays = [tensors[f"{group}/{name}"] for name in names]
                    own[names[0]].set_data(ms.Tensor(np.concatenate(arrays) if len(arrays) > 1 else arrays[0]))
        self.updates = updates


def stacks(shapes: Mapping[str, tuple[int, ...]], elements: int) -> tuple[tuple[str, ...], ...]:
    """Return the names in stacks of one shape, each with at most ``elements`` elements or with one tensor."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, shape in shapes.items():
        by_shape.setdefault(shape, []).append(name)
    result = []
    for shape, names in by_shape.items():
        count = max(1, elements // math.prod(shape)) if shape else 1
        result += [tuple(names[i : i + count]) for i in range(0, len(names), count)]
    return tuple(result)


def _stacked(tensors: Sequence[ms.Tensor]) -> ms.Tensor:
    """Return tensors of one shape one above the other, along the first axis."""
    return ops.concat(tensors) if len(tensors) > 1 else tensors[0]


def _parts(tensor: ms.Tensor, count: int) -> Sequence[ms.Tensor]:
    """Return the tensors of a stack."""
    return mint.split(tensor, tensor.shape[0] // count) if count > 1 else [tensor]


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, Algorithm 2).

    The CPU's fused operator has no bias correction. A learning rate of ``lr sqrt(1 - b2^t) / (1 - b1^t)``, an epsilon
    of ``eps sqrt(1 - b2^t)`` and a decay divided by the change of the rate give the corrected step.
    """

    def update(self, gradients: Mapping[str, ms.Tensor], rate: float) -> None:
        """Update every parameter with its gradient (float32)."""
        self.updates += 1
        first, second = self.betas
        averages, squares = self.groups["exp_avg"], self.groups["exp_avg_sq"]
        if backend.on_ascend():  # the aclnn operator, whose steps count from 0. Not run on Ascend
            step = ms.Tensor([self.updates - 1.0], ms.float32)
            numbers = [float(number) for number in (rate, first, second, self.weight_decay, self.eps)]
            for name, parameter in self.parameters.items():
                state = averages[name], squares[name], squares[name]
                ascend_operators.fused_adamw(parameter, *state, gradients[name], step, *numbers, False, False)
            return
        root = math.sqrt(1 - second**self.updates)
        corrected = rate * root / (1 - first**self.updates)
        decay = self.weight_decay * rate / corrected if corrected else 0.0
        for name, parameter in self.parameters.items():
            numbers = corrected, first, second, self.eps * root, decay
            _adam_step(parameter, averages[name], squares[name], *numbers, gradients[name])


class CAME(Optimizer):
    """Confidence-guided Adafactor (Luo et al. 2023, arXiv 2307.02047, Algorithm 2), as in its authors' code.

    Squared gradients and the instability of the update are kept as means over rows and columns. A tensor with more
    than two axes is a stack of matrices; a vector keeps its squares whole and has no confidence term. No bias
    correction; decoupled weight decay. Nothing is read from the device. Tensors of one shape are updated together,
    up to ``stack_elements``, which takes far fewer operators and gives the same numbers within rounding.
    """

    def __init__(
        self,
        parameters,
        betas=(0.9, 0.999, 0.9999),
        eps=(1e-30, 1e-16),
        weight_decay=0.0,
        clip_threshold: float = 1.0,
        stack_elements: int = STACK_ELEMENTS,
    ):
        super().__init__(parameters, betas, tuple(eps), weight_decay, stack_elements)
        self.clip_threshold = clip_threshold

    @staticmethod
    def state_shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of the averages of the update, and of rows and columns of the squares and of the instability."""
        if len(shape) < 2:
            return {"exp_avg": shape, "exp_avg_sq": shape}
        rows, columns = shape[:-1], shape[:-2] + shape[-1:]
        axes = {"row": rows, "col": columns}
        return {"exp_avg": shape} | {f"exp_avg_{part}_{a}": axes[a] for part in ("sq", "res") for a in axes}

    def update(self, gradients: Mapping[str, ms.Tensor], rate: float) -> None:
        """Update every parameter with its gradient (float32)."""
        self.updates += 1
        for names in self.stacks:
            step = self._step(names, _stacked([gradients[name] for name in names])) * rate
            kept = _stacked([self.parameters[name] for name in names])
            kept = kept * (1 - self.weight_decay * rate) if self.weight_decay else kept
            for name, value in zip(names, _parts(kept - step, len(names)), strict=True):
                assign(self.parameters[name], value)  # methods such as sub_ do nothing on the CPU

    def _step(self, names: tuple[str, ...], gradient: ms.Tensor) -> ms.Tensor:
        """Return the step of a stack, for a learning rate of 1, from its gradients."""
        first, second, third = self.betas
        average, squares = self.groups["exp_avg"][names[0]], gradient * gradient
        if self.parameters[names[0]].ndim < 2:
            step = gradient * ops.rsqrt(_blend(self.groups["exp_avg_sq"][names[0]], squares + self.eps[0], second))
            steps = step.reshape(len(names), -1)
            return _blend(average, (steps * self._shares(steps)).reshape(step.shape), first)
        rows, columns = self._inverse_roots("sq", names, squares, second, self.eps[0])
        step = gradient * _batch_matmul(rows, columns).reshape(gradient.shape)
        shares = self._shares(step.reshape(len(names), -1)).reshape(len(names), 1, 1)
        rows = (rows.reshape(len(names), -1, 1) * shares).reshape(rows.shape)
        step = gradient * _batch_matmul(rows, columns).reshape(gradient.shape)  # on the CPU, broadcasting is slow
        _blend(average, step, first)
        distance = step - average
        rows, columns = self._inverse_roots("res", names, distance * distance, third, self.eps[1])
        return average * _batch_matmul(rows, columns).reshape(gradient.shape)

    def _shares(self, steps: ms.Tensor) -> ms.Tensor:
        """Return the shares (n, 1) that bound the root mean square of steps (n, elements)."""
        rms = ops.sqrt(mint.mean(steps * steps, -1, True))
        return 1.0 / mint.clamp(rms * (1.0 / self.clip_threshold), min=1.0)

    def _inverse_roots(
        self, part: str, names: tuple[str, ...], values: ms.Tensor, beta: float, eps: float
    ) -> tuple[ms.Tensor, ms.Tensor]:
        """Return the factors (S, R, 1) and (S, 1, C) of 1 / sqrt(r c / mean(r)).

        r and c are the running means of the rows and columns of ``values`` plus ``eps``, a stack of S matrices.
        """
        rows, columns = self.parameters[names[0]].shape[-2:]
        matrix = values.reshape(-1, rows, columns)
        count = matrix.shape[0]
        # means as matrix products: on the CPU, reducing any axis but the last is slow
        row_means = _batch_matmul(matrix, _full(count, columns, 1, 1.0 / columns)) + eps
        column_means = _batch_matmul(_full(count, 1, rows, 1.0 / rows), matrix) + eps
        row, column = (self.groups[f"exp_avg_{part}_{axis}"][names[0]] for axis in ("row", "col"))
        _blend(row, row_means.reshape(row.shape), beta)
        _blend(column, column_means.reshape(column.shape), beta)
        share = row.reshape(count, rows)
        share = share / mint.mean(share, -1, True)
        return ops.rsqrt(share).reshape(count, rows, 1), ops.rsqrt(column).reshape(count, 1, columns)


def _blend(average: ms.Parameter, values: ms.Tensor, beta: float) -> ms.Parameter:
    """Move a running average towards values, in place."""
    assign(average, average * beta + values * (1 - beta))
    return average


@lru_cache(maxsize=256)
def _full(count: int, rows: int, columns: int, value: float) -> ms.Tensor:
    return ms.Tensor(np.full((count, rows, columns), value, np.float32))


class EMA:
    """Exponential moving average of parameters, float32 on the device.

    The decay rate rises with the number of updates, ``min(rate, (1 + n) / (10 + n))``, so that the average of a short
    training does not keep its initial weights. ``averages`` are parameters that hold it, such as those of a network.
    """

    def __init__(
        self, parameters: Mapping[str, ms.Parameter], rate: float, averages: Mapping[str, ms.Parameter] | None = None
    ):
        if not 0 <= rate < 1:
            raise PixArtNBError(f"EMA rate is {rate}; expected 0 <= rate < 1")
        self.rate, self.updates, self.parameters = rate, 0, dict(parameters)
        if averages is not None:
            self.averages = {name: averages[name] for name in self.parameters}
            return
        self.averages = {
            name: ms.Parameter(ms.Tensor(np.array(p.asnumpy(), np.float32)), name=f"ema.{name}")
            for name, p in self.parameters.items()
        }

    def update(self) -> None:
        """Add the present parameters to the average."""
        self.updates += 1
        share = float(np.float32(1 - min(self.rate, (1 + self.updates) / (10 + self.updates))))
        for name, average in self.averages.items():
            assign(average, average + (self.parameters[name] - average) * share)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return copies of the averages."""
        return {name: np.array(average.asnumpy()) for name, average in self.averages.items()}


@dataclass
class LossScale:
    """Scale of a half-precision loss (Micikevicius et al. 2018, section 3.2).

    A ``dynamic`` scale is divided by ``factor`` when a gradient overflows and multiplied by it after ``window`` updates
    without an overflow; ``good`` counts the updates since its last change.
    """

    value: float = 1.0
    dynamic: bool = False
    factor: float = 2.0
    window: int = 1000
    good: int = 0

    def __post_init__(self):
        if self.value < 1 or self.factor <= 1 or self.window < 1:
            raise PixArtNBError(
                f"loss scale {self.value}, factor {self.factor}, window {self.window}; expected a scale of at least 1, "
                "a factor above 1 and a window of at least 1"
            )

    @property
    def used(self) -> bool:
        """Return whether the loss is multiplied at all."""
        return self.dynamic or self.value != 1.0

    def succeeded(self) -> None:
        """Count an update without an overflow."""
        self.good += 1
        if self.dynamic and self.good >= self.window:
            self.value, self.good = self.value * self.factor, 0

    def overflowed(self) -> bool:
        """Reduce the scale after an overflow; return False if it cannot be reduced."""
        if not self.dynamic or self.value == 1.0:
            return False
        self.value, self.good = max(1.0, self.value / self.factor), 0
        return True
