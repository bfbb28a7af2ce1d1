"""MACs of the operators that a network runs."""

from contextlib import contextmanager
from functools import cache
from unittest import mock

from mindspore import ops

from pixart_nb.core import onednn


@contextmanager
def counted():
    """Collect the MACs of every matrix product and convolution of a block in a list."""
    macs = []

    def matmul(primitive, out, a, b):
        return a.shape[-2] * a.shape[-1] * out.shape[-1]

    def batched(primitive, out, a, b):
        inner = a.shape[-2] if getattr(primitive, "transpose_a", False) else a.shape[-1]
        size = inner
        for side in out.shape:
            size *= side
        return size

    def convolution(primitive, out, x, weight):
        size = weight.shape[1] * weight.shape[2] * weight.shape[3]
        for side in out.shape:
            size *= side
        return size

    def counting(operator, count):
        original = operator.__call__

        def call(self, *args):
            out = original(self, *args)
            macs.append(count(self, out, *args))
            return out

        return mock.patch.object(operator, "__call__", call)

    usual = onednn.function

    def gemm(name):
        found = usual(name)

        def call(trans_a, trans_b, rows, columns, inner, *rest):
            macs.append(rows * columns * inner)
            return found(trans_a, trans_b, rows, columns, inner, *rest)

        return call

    with (
        counting(ops.MatMul, matmul),
        counting(ops.BatchMatMul, batched),
        counting(ops.Conv2D, convolution),
        mock.patch.object(onednn, "function", cache(gemm)),
    ):
        yield macs
