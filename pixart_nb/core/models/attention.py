"""Attention: the one function that computes every attention of the kit, and PixArt's two attention layers."""

from __future__ import annotations

import numpy as np
from mindspore import mint, nn, ops

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.ascend_operators import flash_attention, flash_supports
from pixart_nb.core.models.kv_compression import DepthwiseReduction, compress_tokens
from pixart_nb.core.models.layers import LayerNorm, Linear
from pixart_nb.core.models.operators import (
    masked_attention,
    merge_heads,
    scaled_dot_product_attention,
    split_heads,
    split_parts,
    upcast,
)

#: Added to the score of a masked token. Finite, so that it also passes through a matrix product.
MASKED_SCORE = -1e9
MASKED_SCORE_HALF = -6e4
#: Multiple of the memory budget in training, where slices and their gradients cost more than the cache gains.
TRAINING_CHUNKS = 4
#: Queries per chunk if the memory budget allows it.
CHUNK_QUERIES = 2048
_scores = ops.BatchMatMul(transpose_b=True)
_weighted_sum = ops.BatchMatMul()


def check_mask(mask: np.ndarray) -> None:
    """Refuse a (B, M) mask with a row that masks every token: softmax over nothing has no value."""
    empty = np.flatnonzero(~np.asarray(mask, bool).any(axis=1))
    if empty.size:
        raise PixArtNBError(
            f"attention mask of shape {tuple(mask.shape)} masks every token in rows {empty.tolist()}; "
            "each row needs at least one token (True)"
        )


def attention(
    q: ms.Tensor,
    k: ms.Tensor,
    v: ms.Tensor,
    mask: ms.Tensor | None = None,
    scale: float | None = None,
    bias: ms.Tensor | None = None,
    hook_point=None,
    chunks: int = 1,
) -> ms.Tensor:
    """Return ``softmax(scale q k^T + bias) v`` over the tokens that ``mask`` allows, softmax in float32.

    q (B, H, N, d), k and v (B, H, M, d), mask (B, M) bool with True = token, bias (B or 1, H, N, M) added to the
    scores -> (B, H, N, d). ``scale`` is d ** -0.5 by default. As many heads and queries are computed at a time as the
    memory budget allows, so that no N x M matrix exists. Ascend's flash attention takes over in half precision, without
    a bias and for heads of up to 256.

    ``chunks`` multiplies the budget. ``hook_point`` (``core.hooks``) takes over when the layer is traced or changed. It
    computes the attention by this function too, so a trace does not change a bit.
    """
    if hook_point is not None:
        return hook_point(q, k, v, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend.on_ascend() and bias is None and flash_supports(q.shape[-1], q.dtype):
        return flash_attention(q, k, v, mask, scale)
    if mask is None:
        return _attention_in_chunks(q, k, v, scale, bias, chunks)
    q, column = q * scale, _mask_column(k, mask)
    rows, queries = q.shape[0] * q.shape[1], q.shape[2]
    if bias is None and chunk_shape(rows, queries, k.shape[2], chunks) == (rows, queries):
        return masked_attention(upcast(q), upcast(k), upcast(v), upcast(column)).astype(v.dtype)
    ones = mint.ones((*q.shape[:3], 1), dtype=q.dtype)
    return _attention_in_chunks(mint.cat((q, ones), -1), mint.cat((k, column), -1), v, 1.0, bias, chunks)


def _attention_in_chunks(
    q: ms.Tensor, k: ms.Tensor, v: ms.Tensor, scale: float, bias: ms.Tensor | None, chunks: int
) -> ms.Tensor:
    batch, heads, queries, _ = q.shape
    rows = batch * heads
    if bias is None:
        group, chunk = chunk_shape(rows, queries, k.shape[2], chunks)
    else:
        group, chunk = rows, max(1, backend.ATTENTION_CHUNK_BYTES // (4 * rows * k.shape[2]))
    if group == rows and chunk >= queries:
        return _attention(q, k, v, scale, bias)
    if group < rows:
        q, k, v = (x.reshape(1, rows, x.shape[2], x.shape[3]) for x in (q, k, v))
    outputs = []
    for first in range(0, q.shape[1], group):
        last = first + group
        keys, values = k[:, first:last], v[:, first:last]
        parts = []
        for start in range(0, queries, chunk):
            part_bias = None if bias is None else bias[:, :, start : start + chunk]
            parts.append(_attention(q[:, first:last, start : start + chunk], keys, values, scale, part_bias))
        outputs.append(parts[0] if len(parts) == 1 else mint.cat(parts, 2))
    out = outputs[0] if len(outputs) == 1 else mint.cat(outputs, 1)
    return out.reshape(batch, heads, queries, v.shape[3])


def chunk_shape(heads: int, queries: int, keys: int, chunks: int = 1) -> tuple[int, int]:
    """Return how many heads and queries to compute at a time, so that their scores keep to ``chunks`` memory budgets.

    Fewer heads are better than fewer queries: each product with few queries prepares all keys again.

    >>> chunk_shape(32, 4096, 4096), chunk_shape(32, 256, 256)
    ((1, 2048), (32, 256))
    """
    rows = max(1, chunks * backend.ATTENTION_CHUNK_BYTES // (4 * keys))
    chunk = min(queries, rows, max(CHUNK_QUERIES, rows // heads))
    return max(1, min(heads, rows // chunk)), chunk


def _attention(q: ms.Tensor, k: ms.Tensor, v: ms.Tensor, scale: float, bias: ms.Tensor | None = None) -> ms.Tensor:
    dtype = v.dtype
    q, k, v = upcast(q), upcast(k), upcast(v)
    q = q if scale == 1.0 else q * scale
    if bias is None:
        return scaled_dot_product_attention(q, k, v).astype(dtype)
    scores = _scores(q, k).astype(ms.float32) + bias
    return _weighted_sum(ops.softmax(scores, -1).astype(v.dtype), v).astype(dtype)


def _mask_column(k: ms.Tensor, mask: ms.Tensor) -> ms.Tensor:
    """Column (B, H, M, 1) of k that masks, beside a column of ones in q: 0 for a token, very negative for padding."""
    batch, heads, keys, _ = k.shape
    masked = MASKED_SCORE if k.dtype == ms.float32 else MASKED_SCORE_HALF
    column = (1.0 - mask.astype(k.dtype)) * masked
    return ops.tile(column.reshape(batch, 1, keys, 1), (1, heads, 1, 1))


def _chunks(layer: nn.Cell) -> int:
    return TRAINING_CHUNKS if layer.training else 1


class IdentityAttention:
    """Hook point of a self-attention in which each token attends to itself alone."""

    def compress(self, x: ms.Tensor, height: int, width: int) -> ms.Tensor:
        return x

    def __call__(self, q: ms.Tensor, k: ms.Tensor, v: ms.Tensor, mask: ms.Tensor | None) -> ms.Tensor:
        return v


class SelfAttention(nn.Cell):
    """Self-attention with optional query-key norm and KV token compression (PixArt-Sigma, section 3.2).

    With ``ratio`` R > 1 keys and values are on a grid that is R times coarser in each direction; queries are not.
    """

    def __init__(self, size: int, heads: int, qk_norm: bool = False, operator: str | None = None, ratio: int = 1):
        super().__init__()
        self.heads, self.size, self.operator, self.ratio = heads, size, operator, ratio
        self.qkv, self.proj = Linear(size, 3 * size), Linear(size, size)
        self.q_norm = LayerNorm(size) if qk_norm else None
        self.k_norm = LayerNorm(size) if qk_norm else None
        learned = operator == "conv" and ratio > 1
        self.sr = DepthwiseReduction(size, ratio) if learned else None
        self.norm = LayerNorm(size) if learned else None
        self.hook_point = None  # a HookPoint while the layer is traced or changed, never in a compiled graph

    def construct(self, x: ms.Tensor, height: int, width: int) -> ms.Tensor:
        """x (B, height * width, D) -> the same shape; height and width count tokens."""
        qkv = self.qkv(x)
        if self.q_norm is None and self.ratio == 1 and self.hook_point is None:
            q, k, v = split_parts(qkv, 3, self.heads)
        else:
            q, k, v = (part.reshape(x.shape) for part in split_parts(qkv, 3, 1))
            if self.q_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
            k, v = self.compress(k, height, width), self.compress(v, height, width)
            q, k, v = split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)
        return self.proj(merge_heads(attention(q, k, v, hook_point=self.hook_point, chunks=_chunks(self))))

    def replace_reduction(self, reduction: DepthwiseReduction) -> None:
        """Replace the learned reduction. The new parameters have the names of the old ones, which graphs look for."""
        names = [parameter.name for parameter in self.sr.get_parameters()]
        self.sr = reduction  # renames them
        for parameter, name in zip(self.sr.get_parameters(), names, strict=True):
            parameter.name = name

    def compress(self, x: ms.Tensor, height: int, width: int) -> ms.Tensor:
        """Return keys or values (B, N, D) on the coarser grid: (B, M, D)."""
        if self.hook_point is not None:
            return self.hook_point.compress(x, height, width)
        if self.ratio == 1:
            return x
        return compress_tokens(x, height, width, self.ratio, self.operator, self.sr, self.norm)


class CrossAttention(nn.Cell):
    """Attention from image tokens to caption tokens."""

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads, self.size = heads, size
        self.q_linear, self.kv_linear = Linear(size, size), Linear(size, 2 * size)
        self.proj = Linear(size, size)
        self.hook_point = None  # as in SelfAttention

    def keys_values(self, caption: ms.Tensor) -> tuple[ms.Tensor, ms.Tensor]:
        """Project a caption (B, T, D) to keys and values (B, H, T, d). They do not depend on the timestep."""
        return split_parts(self.kv_linear(caption), 2, self.heads)

    def construct(self, x: ms.Tensor, k: ms.Tensor, v: ms.Tensor, mask: ms.Tensor | None) -> ms.Tensor:
        """x (B, N, D), k and v of ``keys_values``, mask (B, T) bool or None -> (B, N, D)."""
        q = split_heads(self.q_linear(x), self.heads)
        return self.proj(merge_heads(attention(q, k, v, mask, hook_point=self.hook_point, chunks=_chunks(self))))
