"""Operators of Ascend, each of them one call of an aclnn kernel.

A CPU has none of them, so the tests replace each by a stand-in that checks what the documentation of MindSpore and CANN
asks for. **Not run on Ascend.**
"""

from __future__ import annotations

from mindspore import mint, ops
from mindspore.ops.auto_generate import AdamW

from pixart_nb.core.backend import ms

_functional = mint.nn.functional
#: AdamW in place: (parameter, its two averages, the second again, gradient, step (1,) from 0, numbers, two flags).
fused_adamw = AdamW()
#: Head sizes of flash attention are multiples of HEAD_MULTIPLE, up to HEAD_LIMIT.
HEAD_MULTIPLE, HEAD_LIMIT = 16, 256
#: Dtypes of flash attention.
FLASH_DTYPES = (ms.float16, ms.bfloat16)


def layer_norm(x: ms.Tensor, weight: ms.Tensor | None, bias: ms.Tensor | None, eps: float) -> ms.Tensor:
    """Layer normalization over the last axis of x (..., D), computed in float32: LayerNormExt."""
    return _functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def rms_norm(x: ms.Tensor, weight: ms.Tensor, eps: float) -> ms.Tensor:
    """Root mean square normalization over the last axis: RmsNorm."""
    return ops.rms_norm(x, weight, eps)[0]


def gelu_tanh(x: ms.Tensor) -> ms.Tensor:
    """Return the tanh approximation of GELU: GeluExt."""
    return _functional.gelu(x, approximate="tanh")


def addcmul(x: ms.Tensor, gate: ms.Tensor, y: ms.Tensor) -> ms.Tensor:
    """Return ``x + gate y``, of the shape of ``gate y``: AddcmulExt."""
    return mint.addcmul(x, gate, y)


def conv2d(
    x: ms.Tensor, weight: ms.Tensor, bias: ms.Tensor | None, stride: int = 1, padding: int = 0, groups: int = 1
) -> ms.Tensor:
    """2-D convolution of x (N, C, H, W): Conv2DExt."""
    return _functional.conv2d(x, weight, bias, stride, padding, 1, groups)


def pad(x: ms.Tensor, padding: tuple[int, ...]) -> ms.Tensor:
    """Pad the last axes with zeros, (before, after) from the last axis on: ConstantPadND."""
    return _functional.pad(x, padding)


def embedding(table: ms.Tensor, ids: ms.Tensor) -> ms.Tensor:
    """Return the rows ``ids`` (...,) of a table (count, size): Embedding."""
    return _functional.embedding(ids, table)


def copy_into(parameter: ms.Parameter, value: ms.Tensor) -> None:
    """Copy a tensor, or a part of one, into a parameter of its shape, in the parameter's dtype: InplaceCopy."""
    parameter.copy_(value)


def flash_attention_score(
    q: ms.Tensor, k: ms.Tensor, v: ms.Tensor, heads: int, discard: ms.Tensor | None, scale: float, layout: str
) -> ms.Tensor:
    """Attention by FlashAttentionScore. In ``discard`` (B, 1, N, M), uint8, 1 hides a key."""
    return ops.flash_attention_score(q, k, v, heads, attn_mask=discard, scalar_value=scale, input_layout=layout)


def flash_supports(head_size: int, dtype: ms.Type) -> bool:
    """Return True if flash attention takes heads of this size, padded to the next multiple of 16, in this dtype."""
    return dtype in FLASH_DTYPES and padded_size(head_size) <= HEAD_LIMIT


def padded_size(head_size: int) -> int:
    """Return the next multiple of 16."""
    return -(-head_size // HEAD_MULTIPLE) * HEAD_MULTIPLE


def padded_heads(x: ms.Tensor, heads: int, axis: int) -> ms.Tensor:
    """Pad each head with zeros to a multiple of 16 on ``axis`` (heads * size): exact, as zeros add nothing.

    A concatenation, as padding in bfloat16 does not compile (MindSpore 2.8).
    """
    shape = x.shape
    axis = axis % len(shape)
    size = shape[axis] // heads
    extra = padded_size(size) - size
    if not extra:
        return x
    before, after = shape[:axis], shape[axis + 1 :]
    zeros = mint.zeros((*before, heads, extra, *after), dtype=x.dtype)
    split = x.reshape(*before, heads, size, *after)
    return mint.cat((split, zeros), axis + 1).reshape(*before, heads * (size + extra), *after)


def discard_mask(mask: ms.Tensor, queries: int) -> ms.Tensor:
    """Return a mask (B, M) bool with True = token as flash attention takes it: (B, 1, N, M) uint8, 1 = discard."""
    batch, keys = mask.shape
    discard = ops.logical_not(mask).astype(ms.uint8).reshape(batch, 1, 1, keys)
    return ops.tile(discard, (1, 1, queries, 1))


def flash_attention(q: ms.Tensor, k: ms.Tensor, v: ms.Tensor, mask: ms.Tensor | None, scale: float) -> ms.Tensor:
    """Attention of heads q (B, H, N, d), k and v (B, H, M, d) with mask (B, M) bool, True = token."""
    size, heads = q.shape[-1], q.shape[1]
    discard = None if mask is None else discard_mask(mask, q.shape[2])
    q, k, v = padded_heads(q, 1, -1), padded_heads(k, 1, -1), padded_heads(v, 1, -1)
    return flash_attention_score(q, k, v, heads, discard, scale, "BNSD")[..., :size]
