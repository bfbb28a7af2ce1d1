"""Where the time of some work goes: matrix products, their rate, and the other operators."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from mindspore import ops

from pixart_nb.core.backend import ms

#: Side of the square matrices whose product shows what the machine can do.
LIMIT_SIDE = 2048


def machine_limit(repeats: int = 5) -> float:
    """Floating-point operations per second of one large float32 matrix product, the best of some."""
    rng = np.random.default_rng(0)
    a, b = (ms.Tensor(rng.standard_normal((LIMIT_SIDE, LIMIT_SIDE), np.float32)) for _ in range(2))
    product, times = ops.MatMul(), []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        product(a, b)
        times.append(time.perf_counter() - started)
    return 2 * LIMIT_SIDE**3 / min(times[1:])


def profiled(work: Callable[[], Any]) -> dict:
    """Seconds of one run of ``work``, of its matrix products, and their floating-point operations.

    Operators are launched one after the other on the CPU, so the time of a call is that of its kernel.
    """
    with timed_products() as found:
        started = time.perf_counter()
        work()
        seconds = time.perf_counter() - started
    products = sum(spent for spent, _ in found.values())
    operations = sum(count for _, count in found.values())
    return {
        "seconds": seconds,
        "product_seconds": products,
        "operations": operations,
        "limit": machine_limit(),
        "by_shape": {name: {"seconds": s, "operations": n} for name, (s, n) in found.items()},
    }


@contextmanager
def timed_products() -> Iterator[dict[str, list[float]]]:
    """Within it every matrix product and convolution is timed: its kind -> [seconds, operations]."""
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    kinds = (ops.MatMul, ops.BatchMatMul, ops.Conv2D)
    before = {kind: kind.__call__ for kind in kinds}

    def timing(kind: type) -> Callable:
        def call(self: Any, a: Any, b: Any) -> Any:
            started = time.perf_counter()
            out = before[kind](self, a, b)
            entry = found[kind.__name__]
            entry[0] += time.perf_counter() - started
            entry[1] += _operations(kind.__name__, a, b, out)
            return out

        return call

    for kind in kinds:
        kind.__call__ = timing(kind)
    try:
        yield found
    finally:
        for kind, call in before.items():
            kind.__call__ = call


def _operations(kind: str, a: ms.Tensor, b: ms.Tensor, out: ms.Tensor) -> float:
    """Multiplications and additions: twice the size of the output times the length of the sums."""
    if kind == "Conv2D":
        return 2.0 * out.size * int(np.prod(b.shape[1:]))
    inner = np.sqrt(a.size / _batch(a) * b.size / _batch(b) / (out.size / _batch(out)))
    return 2.0 * out.size * inner


def _batch(x: ms.Tensor) -> int:
    return int(np.prod(x.shape[:-2]))
