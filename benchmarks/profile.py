"""Time of the matrix products of a function, and their rate."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
from mindspore import ops

from pixart_nb.core import backend, onednn
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

    Operators of MindSpore run one after the other on the CPU, so the time of a call is that of its kernel.
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
    """Time every matrix product and convolution of a block: operator -> [seconds, operations].

    Those of oneDNN run in several threads at a time, each of which counts for its part of the seconds.
    """
    timed: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    operators, part = (ops.MatMul, ops.BatchMatMul, ops.Conv2D), 1 / len(backend.thread_slices(2**16))

    def add(name: str, seconds: float, operations: float) -> None:
        timed[name][0] += seconds
        timed[name][1] += operations

    def timing(operator: type) -> Callable:
        before = operator.__call__

        def call(self: Any, a: Any, b: Any) -> Any:
            started = time.perf_counter()
            out = before(self, a, b)
            seconds = time.perf_counter() - started
            add(operator.__name__, seconds, _operations(operator.__name__, a, b, out))
            return out

        return call

    def gemm(name: str) -> Callable:
        product = function(name)

        def call(trans_a, trans_b, rows: int, columns: int, inner: int, *rest: Any) -> int:
            started = time.perf_counter()
            status = product(trans_a, trans_b, rows, columns, inner, *rest)
            add(name, part * (time.perf_counter() - started), 2.0 * rows * columns * inner)
            return status

        return call

    def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, out: np.ndarray, *rest: Any) -> None:
        started = time.perf_counter()
        before(x, weight, bias, out, *rest)
        add("bfloat16_linear", part * (time.perf_counter() - started), 2.0 * out.size * x.shape[1])

    function, before = onednn.function, onednn.bfloat16_linear
    with ExitStack() as stack:
        for operator in operators:
            stack.enter_context(patch.object(operator, "__call__", timing(operator)))
        stack.enter_context(patch.object(onednn, "function", cache(gemm)))
        stack.enter_context(patch.object(onednn, "bfloat16_linear", linear))
        yield timed


def _operations(operator: str, a: ms.Tensor, b: ms.Tensor, out: ms.Tensor) -> float:
    """Return multiplications and additions: twice the size of the output times the length of the sums."""
    if operator == "Conv2D":
        return 2.0 * out.size * int(np.prod(b.shape[1:]))
    inner = np.sqrt(a.size / _batch(a) * b.size / _batch(b) / (out.size / _batch(out)))
    return 2.0 * out.size * inner


def _batch(x: ms.Tensor) -> int:
    return int(np.prod(x.shape[:-2]))
