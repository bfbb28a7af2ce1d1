"""Matrix products of the oneDNN library that MindSpore ships, on NumPy arrays. They release the GIL.

A product runs in the thread that calls it, so that several threads can compute parts of a larger one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError

#: Functions of oneDNN's C interface: products of float32, and of bfloat16 with float32 results.
SGEMM, BF16 = "dnnl_sgemm", "dnnl_gemm_bf16bf16f32"


@cache
def library() -> ctypes.CDLL | None:
    """Return the oneDNN library of MindSpore, or None where there is none."""
    try:
        return ctypes.CDLL(str(next((Path(ms.__file__).parent / "lib").glob("libdnnl.so*"))))
    except (OSError, StopIteration):
        return None


@cache
def function(name: str) -> Callable | None:
    """Return a product of oneDNN, or None where it is missing."""
    gemm = getattr(library(), name, None)
    if gemm is None:
        return None
    char, size, real, pointer = ctypes.c_char, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
    gemm.argtypes = [char, char, size, size, size, real, pointer, size, pointer, size, real, pointer, size]
    gemm.restype = ctypes.c_int
    return gemm


def multiply(a: np.ndarray, b: np.ndarray, out: np.ndarray, *, scale: float = 1.0, add: bool = False) -> None:
    """Write ``scale a @ b`` to ``out`` (..., M, N) float32, or add it: a (..., M, K) and b (..., K, N).

    a and b are float32, or the bits of bfloat16 (uint16).

    There is at most one leading axis. Each array may be a part of a larger one, and matrices of a and b may be
    transposed; one of their two axes has to be contiguous, in ``out`` the last one. Without oneDNN, NumPy computes
    float32.
    """
    call = function(BF16 if a.dtype == np.uint16 else SGEMM)
    if call is None and a.dtype == np.float32:
        product = np.matmul(a, b)
        product *= np.float32(scale)
        np.add(out, product, out=out) if add else np.copyto(out, product)
        return
    (rows, columns), inner = out.shape[-2:], a.shape[-1]
    trans_a, stride_a = _layout(a)
    trans_b, stride_b = _layout(b)
    stride = max(out.strides[-2] // out.itemsize if rows > 1 else columns, columns)
    beta, count = float(add), len(out) if out.ndim == 3 else 1
    (at_a, step_a), (at_b, step_b), (at_out, step_out) = _address(a), _address(b), _address(out)
    for i in range(count):
        status = call(
            trans_a, trans_b, rows, columns, inner, scale, at_a + i * step_a, stride_a, at_b + i * step_b, stride_b,
            beta, at_out + i * step_out, stride,
        )  # fmt: skip
        if status:
            raise PixArtNBError(f"oneDNN refused a product of {rows} x {inner} x {columns} (status {status})")


def write_linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, out: np.ndarray) -> None:
    """Write ``x @ weight.T + bias`` to ``out`` (M, N): x (M, K), weight (N, K), bias (N,)."""
    if bias is not None:
        out[...] = bias
    multiply(x, weight.T, out, add=bias is not None)


def _address(x: np.ndarray) -> tuple[int, int]:
    """Return the address of an array, and the bytes from one of its matrices to the next."""
    return x.__array_interface__["data"][0], x.strides[0] if x.ndim == 3 else 0


def _layout(x: np.ndarray) -> tuple[bytes, int]:
    """Return whether matrices are transposed in memory, and the elements between their rows (or columns)."""
    (rows, columns), (first, second), size = x.shape[-2:], x.strides[-2:], x.itemsize
    if second == size or columns == 1:
        return b"N", max(first // size if rows > 1 else columns, columns)
    if first == size or rows == 1:
        return b"T", max(second // size, rows)
    raise PixArtNBError(f"a product needs a contiguous axis; an array of shape {x.shape} has strides {x.strides}")
