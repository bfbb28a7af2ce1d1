"""Time of the matrix products of a function, and their rate."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from mindspore import ops

from pixart_nb.core.backend import ms

#: Side of the square matrices whose product shows the rate of the machine.
LIMIT_SIDE = 2048


def machine_limit(repeats: int = 5) -> float:
    """Return the floating-point operations per second of one large float32 matrix product, the best of ``repeats``."""
    rng = np.random.default_rng(0)
    a, b = (ms.Tensor(rng.standard_normal((LIMIT_SIDE, LIMIT_SIDE), np.float32)) for _ in range(2))
    product, times = ops.MatMul(), []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        product(a, b)
        times.append(time.perf_counter() - started)
    return 2 * LIMIT_SIDE**3 / min(times[1:])


def profiled(function: Callable[[], Any]) -> dict:
    """Return the seconds of a call, of its matrix products, and their floating-point operations.

    Operators run one after the other on the CPU, so the time of a call is that of its kernel.
    """
    with timed_products() as timed:
        started = time.perf_counter()
        function()
        seconds = time.perf_counter() - started
    products = sum(spent for spent, _ in timed.values())
    operations = sum(count for _, count in timed.values())
    return {
        "seconds": seconds,
        "product_seconds": products,
        "operations": operations,
        "limit": machine_limit(),
        "by_shape": {name: {"seconds": s, "operations": n} for name, (s, n) in timed.items()},
    }


@contextmanager
def timed_products() -> Iterator[dict[str, list[float]]]:
    """Time every matrix product and convolution of a block: operator -> [seconds, operations]."""
    timed: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    operators = (ops.MatMul, ops.BatchMatMul, ops.Conv2D)
    before = {operator: operator.__call__ for operator in operators}

    def timing(operator: type) -> Callable:
        def call(self: Any, a: Any, b: Any) -> Any:
            started = time.perf_counter()
            out = before[operator](self, a, b)
            entry = timed[operator.__name__]
            entry[0] += time.perf_counter() - started
            entry[1] += _operations(operator.__name__, a, b, out)
            return out

        return call

    for operator in operators:
        operator.__call__ = timing(operator)
    try:
        yield timed
    finally:
        for operator, call in before.items():
            operator.__call__ = call


def _operations(operator: str, a: ms.Tensor, b: ms.Tensor, out: ms.Tensor) -> float:
    """Return multiplications and additions: twice the size of the output times the length of the sums."""
    if operator == "Conv2D":
        return 2.0 * out.size * int(np.prod(b.shape[1:]))
    inner = np.sqrt(a.size / _batch(a) * b.size / _batch(b) / (out.size / _batch(out)))
    return 2.0 * out.size * inner


def _batch(x: ms.Tensor) -> int:
    return int(np.prod(x.shape[:-2]))
