"""CAME: Adafactor's memory with Adam's steps, guided by confidence (Luo et al. 2023, arXiv 2307.02047)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from mindspore import ops

from pixart_nb.core.backend import ms
from pixart_nb.core.training.optim import Moments

_product = ops.BatchMatMul()


class CAME(Moments):
    """Algorithm 2 of the paper, with the conventions of its authors' code.

    Of the squared gradient and of the instability of the step only sums over rows and columns are kept. A tensor of
    more than two axes is a stack of matrices (its last two axes); a vector keeps its squares whole and takes its
    averaged step without a measure of confidence. No bias correction. The weight decay is decoupled.
    """

    def __init__(
        self,
        parameters: Mapping[str, ms.Parameter],
        betas: Sequence[float] = (0.9, 0.999, 0.9999),
        eps: Sequence[float] = (1e-30, 1e-16),
        weight_decay: float = 0.0,
        clip_threshold: float = 1.0,
    ):
        super().__init__(parameters)
        self.betas, self.eps, self.weight_decay = tuple(betas), tuple(eps), weight_decay
        self.clip_threshold = clip_threshold

    @staticmethod
    def rooms(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Averages of the step, and of rows and columns of the squares and of the instability."""
        if len(shape) < 2:
            return {"exp_avg": shape, "exp_avg_sq": shape}
        rows, columns = shape[:-1], shape[:-2] + shape[-1:]
        return {
            "exp_avg": shape,
            "exp_avg_sq_row": rows,
            "exp_avg_sq_col": columns,
            "exp_avg_res_row": rows,
            "exp_avg_res_col": columns,
        }

    def update(self, gradients: Mapping[str, ms.Tensor], rate: float) -> None:
        """Move every parameter by its gradient (float32)."""
        self.updates += 1
        for name, parameter in self.parameters.items():
            step = self._step(name, gradients[name])
            kept = parameter * (1 - self.weight_decay * rate) if self.weight_decay else parameter
            ops.assign(parameter, kept - step * rate)  # methods such as sub_ do nothing on the CPU

    def _step(self, name: str, gradient: ms.Tensor) -> ms.Tensor:
        first, second, third = self.betas
        average, factored = self.memory["exp_avg"][name], gradient.ndim > 1
        squares = gradient * gradient + self.eps[0]
        if factored:
            step = gradient * self._inverse_root("sq", name, squares, second)
        else:
            step = gradient * ops.rsqrt(_blend(self.memory["exp_avg_sq"][name], squares, second))
        rms = math.sqrt(float((step * step).mean().asnumpy()))
        step = step * (1.0 / max(1.0, rms / self.clip_threshold))
        _blend(average, step, first)
        if not factored:
            return average
        distance = step - average
        return average * self._inverse_root("res", name, distance * distance + self.eps[1], third)

    def _inverse_root(self, what: str, name: str, values: ms.Tensor, beta: float) -> ms.Tensor:
        """1 / sqrt(R C / sum(R)): the averages R and C of the values' rows and columns, put together."""
        matrix = values.reshape(-1, *values.shape[-2:])
        count, rows, columns = matrix.shape
        # means by matrix products: reducing any but the last axis is slow on the CPU, and so is broadcasting
        of_rows = _product(matrix, _constant(count, columns, 1, 1.0 / columns))
        of_columns = _product(_constant(count, 1, rows, 1.0 / rows), matrix)
        row, column = (self.memory[f"exp_avg_{what}_{axis}"][name] for axis in ("row", "col"))
        _blend(row, of_rows.reshape(row.shape), beta)
        _blend(column, of_columns.reshape(column.shape), beta)
        share = row / row.mean(-1, keep_dims=True)
        left = ops.rsqrt(share).reshape(count, rows, 1)
        return _product(left, ops.rsqrt(column).reshape(count, 1, columns)).reshape(values.shape)


def _blend(average: ms.Parameter, values: ms.Tensor, beta: float) -> ms.Parameter:
    """Move a running average towards values, in place."""
    ops.assign(average, average * beta + values * (1 - beta))
    return average


def _constant(count: int, rows: int, columns: int, value: float) -> ms.Tensor:
    return ms.Tensor(np.full((count, rows, columns), value, np.float32))
