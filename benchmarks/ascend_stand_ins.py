"""Stand-ins for Ascend's operators on a CPU: the same results, and an error where the documentation asks for another.

They are made of MindSpore's operators for the CPU, so that they have gradients. The contracts are those of
``ops.flash_attention_score`` ("Atlas A2 training series") and of aclnn's documentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
from mindspore import mint, ops

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.models import ascend_operators
from pixart_nb.core.models.operators import normalize

FLOATS = (ms.float32, ms.float16, ms.bfloat16)
#: Dtypes that FlashAttentionScore takes, and the limits of its shapes.
FLASH_DTYPES = (ms.float16, ms.bfloat16)
FLASH_HEAD_SIZE, FLASH_HEADS, FLASH_BATCH, FLASH_TOKENS = 256, 256, 2048, 512 * 1024
FLASH_LAYOUTS = ("BSH", "BNSD")


class ContractError(Exception):
    """An operator was called in a way that its documentation refuses."""


def require(condition: bool, message: str) -> None:
    """Raise ``ContractError`` with the message unless the condition holds."""
    if not condition:
        raise ContractError(message)


def _floats(*tensors: ms.Tensor | None) -> None:
    dtypes = [x.dtype for x in tensors if x is not None]
    require(dtypes[0] in FLOATS and len(set(dtypes)) == 1, f"dtypes {dtypes}; expected one floating dtype")


def layer_norm(x, weight, bias, eps):
    """LayerNormExt: weight and bias of the shape of the last axis, or neither."""
    _floats(x, weight, bias)
    require((weight is None) == (bias is None), "weight and bias come together")
    wide = normalize(x.astype(ms.float32).reshape(-1, x.shape[-1]), eps).reshape(x.shape)
    if weight is not None:
        require(weight.shape == bias.shape == x.shape[-1:], f"weight {weight.shape} for x {x.shape}")
        wide = wide * weight.astype(ms.float32) + bias.astype(ms.float32)
    return wide.astype(x.dtype)


def rms_norm(x, weight, eps):
    """RmsNorm: weight of the shape of the last axis."""
    _floats(x, weight)
    require(weight.shape == x.shape[-1:], f"weight {weight.shape} for x {x.shape}")
    wide = x.astype(ms.float32)
    wide = wide * ops.rsqrt((wide * wide).mean(-1, keep_dims=True) + eps)
    return (wide * weight.astype(ms.float32)).astype(x.dtype)


def gelu_tanh(x):
    """GeluExt."""
    _floats(x)
    wide = x.astype(ms.float32)
    gate = ops.sigmoid(wide * (1.5957691216057308 + 0.07135481627260025 * (wide * wide)))
    return (wide * gate).astype(x.dtype)


def addcmul(x, gate, y):
    """AddcmulExt: x broadcasts to the shape of gate y."""
    _floats(x, gate, y)
    product = np.broadcast_shapes(gate.shape, y.shape)
    require(np.broadcast_shapes(x.shape, product) == product, f"{x.shape}, {gate.shape}, {y.shape}")
    return x + gate * y


def conv2d(x, weight, bias, stride=1, padding=0, groups=1):
    """Conv2DExt: x (N, C, H, W), weight (out, C / groups, k, k), bias (out,)."""
    _floats(x, weight, bias)
    channels, out, side = x.shape[1], weight.shape[0], weight.shape[-1]
    require(x.ndim == weight.ndim == 4 and channels == groups * weight.shape[1], f"{x.shape} by {weight.shape}")
    require(out % groups == 0 and (bias is None or bias.shape == (out,)), f"weight {weight.shape} in {groups} groups")
    require(min(x.shape[2:]) + 2 * padding >= side, f"a kernel of {side} on {x.shape}")
    if groups == 1:
        convolved = ops.Conv2D(out, side, pad_mode="pad", pad=padding, stride=stride)(x, weight)
    else:
        require(groups == channels == out and stride == side and padding == 0, "the stand-in only compresses cells")
        rows, columns = x.shape[2] // side, x.shape[3] // side
        grid = x[:, :, : rows * side, : columns * side].reshape(-1, channels, rows, side, columns, side)
        cells = grid.astype(ms.float32) * weight.astype(ms.float32).reshape(1, channels, 1, side, 1, side)
        convolved = cells.sum(5).sum(3).astype(x.dtype)
    return convolved if bias is None else convolved + bias.reshape(1, out, 1, 1)


def pad(x, padding):
    """ConstantPadND."""
    _floats(x)
    require(len(padding) % 2 == 0 and len(padding) <= 2 * x.ndim, f"padding {padding} of {x.shape}")
    return ops.pad(x, padding)


def embedding(table, ids):
    """Embedding: a matrix, and integers."""
    require(table.ndim == 2 and ids.dtype in (ms.int32, ms.int64), f"table {table.shape}, ids {ids.dtype}")
    return ops.gather(table, ids, 0)


def copy_into(parameter, value):
    """InplaceCopy: without broadcasting, which the kit never asks for."""
    _floats(parameter)
    _floats(value)
    require(parameter.shape == value.shape, f"{value.shape} into {parameter.shape}")
    ops.assign(parameter, value.astype(parameter.dtype))


def fused_adamw(var, m, v, max_v, gradient, step, lr, beta1, beta2, decay, eps, amsgrad, maximize):
    """AdamW, in float64: ``step`` (1,) counts from 0, and ``max_v`` is for amsgrad alone."""
    _floats(var, m, v, gradient)
    numbers = lr, beta1, beta2, decay, eps
    require(max_v is v and not amsgrad and not maximize, "max_v is v without amsgrad")
    require(step.shape == (1,) and all(type(number) is float for number in numbers), f"step {step}, {numbers}")
    t = step.asnumpy()[0] + 1.0
    value, first, second, g = (tensor.asnumpy().astype(np.float64) for tensor in (var, m, v, gradient))
    first, second = beta1 * first + (1 - beta1) * g, beta2 * second + (1 - beta2) * g**2
    value = value * (1 - lr * decay) - lr * first / (1 - beta1**t) / (np.sqrt(second / (1 - beta2**t)) + eps)
    for parameter, new in ((var, value), (m, first), (v, second)):
        ops.assign(parameter, ms.Tensor(new.astype(np.float32)))


def flash_attention_score(q, k, v, heads, discard, scale, layout, dtypes=FLASH_DTYPES):
    """FlashAttentionScore: half precision, heads of a multiple of 16 up to 256; 1 in a mask means discard."""
    require(layout in FLASH_LAYOUTS, f"layout {layout!r}")
    require(q.dtype in dtypes, f"dtype {q.dtype}; expected float16 or bfloat16")
    require(q.dtype == k.dtype == v.dtype and k.shape == v.shape, "keys and values of one shape, all of one dtype")
    require(isinstance(scale, float) and isinstance(heads, int), "scale is a float, heads an integer")
    if layout == "BSH":
        require(q.ndim == k.ndim == 3 and q.shape[0] == k.shape[0], f"q {q.shape}, k {k.shape}")
        require(q.shape[2] == k.shape[2] and q.shape[2] % heads == 0, f"{heads} heads in q {q.shape}, k {k.shape}")
        q, k, v = (mint.permute(x.reshape(*x.shape[:2], heads, -1), (0, 2, 1, 3)).contiguous() for x in (q, k, v))
    require(q.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3], f"q {q.shape}, k {k.shape}")
    batch, count, queries, size = q.shape
    keys = k.shape[2]
    require(count == heads <= FLASH_HEADS and batch <= FLASH_BATCH, f"{heads} heads for q {q.shape}")
    require(size % 16 == 0 and size <= FLASH_HEAD_SIZE, f"head size {size}; expected a multiple of 16 up to 256")
    require(min(queries, keys) > 0 and max(queries, keys) <= FLASH_TOKENS, f"{queries} queries, {keys} keys")
    scores = ops.BatchMatMul(transpose_b=True)(q.astype(ms.float32), k.astype(ms.float32)) * scale
    if discard is not None:
        scores = scores - 1e30 * _checked_mask(discard, batch, heads, queries, keys)
    out = ops.BatchMatMul()(ops.softmax(scores, -1), v.astype(ms.float32)).astype(q.dtype)
    if layout == "BSH":
        out = mint.permute(out, (0, 2, 1, 3)).contiguous().reshape(batch, queries, heads * size)
    return out


def _checked_mask(discard, batch: int, heads: int, queries: int, keys: int) -> ms.Tensor:
    """Return the mask as float32 ones for what is discarded."""
    shapes = ((batch, heads, queries, keys), (batch, 1, queries, keys), (queries, keys))
    require(discard.dtype in (ms.uint8, ms.bool_), f"mask of {discard.dtype}; expected uint8 or bool")
    require(discard.shape in shapes, f"mask {discard.shape}; expected one of {shapes}")
    require(not discard.asnumpy().astype(bool).all(-1).any(), "a row of the mask discards every key")
    return discard.astype(ms.float32)


#: Names in ``models.ascend_operators`` and their stand-ins.
STAND_INS: dict[str, Callable] = {
    f.__name__: f
    for f in (
        layer_norm, rms_norm, gelu_tanh, addcmul, conv2d, pad, embedding, copy_into, flash_attention_score, fused_adamw,
    )
}  # fmt: skip


@contextmanager
def ascend(flash_in_float32: bool = False, wrap: Callable[[str, Callable], Callable] | None = None) -> Iterator[None]:
    """Take the Ascend path inside the block, with the stand-ins.

    Args:
        flash_in_float32: Let FlashAttentionScore take float32, which it does not, to compare its wiring exactly.
        wrap: Function from a name and a stand-in to what is called in its place.
    """
    stand_ins = dict(STAND_INS)
    dtypes = (*FLASH_DTYPES, ms.float32) if flash_in_float32 else FLASH_DTYPES
    stand_ins["flash_attention_score"] = lambda *arguments: flash_attention_score(*arguments, dtypes=dtypes)
    with ExitStack() as stack:
        stack.enter_context(patch.object(backend, "_DEVICE", "Ascend"))
        stack.enter_context(patch.object(ascend_operators, "FLASH_DTYPES", dtypes))
        for name, function in stand_ins.items():
            stack.enter_context(patch.object(ascend_operators, name, wrap(name, function) if wrap else function))
        yield
