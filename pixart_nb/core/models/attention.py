"""Attention: one function through which every attention of the kit goes, and PixArt's two attention layers."""

from __future__ import annotations

import numpy as np
from mindspore import mint, nn, ops

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.kv_compression import DepthwiseReduction, compress_tokens
from pixart_nb.core.models.layers import LayerNorm, Linear
from pixart_nb.core.models.operators import attend, transpose, widened

#: Added to the score of a token that must not be seen. Finite, so that it also passes through a matrix product.
MASKED_SCORE = -1e9
MASKED_SCORE_HALF = -6e4
#: Queries that go together if the memory budget allows it.
CHUNK_QUERIES = 2048
_scores = ops.BatchMatMul(transpose_b=True)
_weighted = ops.BatchMatMul()


def check_mask(mask: np.ndarray) -> None:
    """Refuse a (B, M) mask with a row in which no token may be seen: softmax over nothing has no value."""
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
    chunk: int | None = None,
    hook_point=None,
) -> ms.Tensor:
    """``softmax(scale q k^T + bias) v`` over the tokens that ``mask`` allows, softmax in float32.

    q (B, H, N, d), k and v (B, H, M, d), mask (B, M) bool with True = token, bias (B or 1, H, N, M) added to the
    scores -> (B, H, N, d). ``scale`` is d ** -0.5 unless told. On the CPU ``chunk`` queries are worked on at a time, or
    as many heads and queries as the memory budget allows, so that no N x M matrix exists; on Ascend the fused
    operator is used. A ``hook_point`` (core.hooks) takes over when the layer is traced or changed.
    """
    if hook_point is not None:
        return hook_point(q, k, v, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if backend.on_ascend() and bias is None:
        return backend.flash_attention(q, k, v, mask, scale)
    if mask is not None:
        q, k = _append_mask(q * scale, k, mask)
        scale = 1.0
    batch, heads, queries, _ = q.shape
    if chunk is None and bias is None:
        return _in_chunks(q, k, v, scale)
    chunk = chunk or max(1, backend.ATTENTION_CHUNK_BYTES // (4 * batch * heads * k.shape[2]))
    if chunk >= queries:
        return _attend(q, k, v, scale, bias)
    parts = []
    for start in range(0, queries, chunk):
        rows = None if bias is None else bias[:, :, start : start + chunk]
        parts.append(_attend(q[:, :, start : start + chunk], k, v, scale, rows))
    return mint.cat(parts, 2)


def _in_chunks(q: ms.Tensor, k: ms.Tensor, v: ms.Tensor, scale: float) -> ms.Tensor:
    """Attention by some heads at a time and, of them, by some queries."""
    batch, heads, queries, _ = q.shape
    some_heads, some = chunk_shape(batch * heads, queries, k.shape[2])
    if some_heads == batch * heads and some == queries:
        return _attend(q, k, v, scale)
    q, k, v = (x.reshape(1, batch * heads, x.shape[2], x.shape[3]) for x in (q, k, v))
    of_heads = []
    for first in range(0, batch * heads, some_heads):
        last = first + some_heads
        keys, values = k[:, first:last], v[:, first:last]
        parts = [
            _attend(q[:, first:last, i : i + some], keys, values, scale) for i in range(0, queries, some)
        ]
        of_heads.append(parts[0] if len(parts) == 1 else mint.cat(parts, 2))
    out = of_heads[0] if len(of_heads) == 1 else mint.cat(of_heads, 1)
    return out.reshape(batch, heads, queries, v.shape[3])


def chunk_shape(heads: int, queries: int, keys: int) -> tuple[int, int]:
    """How many heads and how many of their queries go together, so that their scores keep to the memory budget.

    Fewer heads are better than fewer queries: each product with few queries prepares all keys again.

    >>> chunk_shape(32, 4096, 4096), chunk_shape(32, 256, 256)
    ((1, 2048), (32, 256))
    """
    rows = max(1, backend.ATTENTION_CHUNK_BYTES // (4 * keys))
    some = min(queries, rows, max(CHUNK_QUERIES, rows // heads))
    return max(1, min(heads, rows // some)), some


def _attend(
    q: ms.Tensor, k: ms.Tensor, v: ms.Tensor, scale: float, bias: ms.Tensor | None = None
) -> ms.Tensor:
    dtype = v.dtype
    q, k, v = widened(q), widened(k), widened(v)
    q = q if scale == 1.0 else q * scale
    if bias is None:
        return attend(q, k, v).astype(dtype)
    scores = _scores(q, k).astype(ms.float32) + bias
    return _weighted(ops.softmax(scores, -1).astype(v.dtype), v).astype(dtype)


def _append_mask(q: ms.Tensor, k: ms.Tensor, mask: ms.Tensor) -> tuple[ms.Tensor, ms.Tensor]:
    """Mask by one more column: q's is 1, k's is 0 for a token and hugely negative for padding. Adds nothing else."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    masked = MASKED_SCORE if q.dtype == ms.float32 else MASKED_SCORE_HALF
    column = (1.0 - mask.astype(q.dtype)) * masked
    column = ops.tile(column.reshape(batch, 1, keys, 1), (1, heads, 1, 1))
    return mint.cat((q, mint.ones((batch, heads, queries, 1), dtype=q.dtype)), -1), mint.cat((k, column), -1)


def split_heads(x: ms.Tensor, heads: int) -> ms.Tensor:
    """(B, N, D) -> (B, heads, N, D / heads)."""
    batch, tokens, size = x.shape
    return transpose(x.reshape(batch, tokens, heads, size // heads), 0, 2, 1, 3)


def merge_heads(x: ms.Tensor) -> ms.Tensor:
    """(B, heads, N, d) -> (B, N, heads d)."""
    batch, heads, tokens, size = x.shape
    return transpose(x, 0, 2, 1, 3).reshape(batch, tokens, heads * size)


class SelfAttention(nn.Cell):
    """Self-attention with optional query-key norm and KV token compression (PixArt-Sigma, section 3.2).

    With ``ratio`` R > 1 keys and values live on a grid shrunk by R in each direction; queries keep theirs.
    """

    def __init__(
        self, size: int, heads: int, qk_norm: bool = False, operator: str | None = None, ratio: int = 1
    ):
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
        q, k, v = self.project(x, height, width)
        q, k, v = split_heads(q, self.heads), split_heads(k, self.heads), split_heads(v, self.heads)
        return self.proj(merge_heads(attention(q, k, v, hook_point=self.hook_point)))

    def project(self, x: ms.Tensor, height: int, width: int) -> tuple[ms.Tensor, ms.Tensor, ms.Tensor]:
        """Queries (B, N, D) and the, possibly compressed, keys and values (B, M, D)."""
        qkv = self.qkv(x)
        q, k, v = qkv[..., : self.size], qkv[..., self.size : 2 * self.size], qkv[..., 2 * self.size :]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, self.compress(k, height, width), self.compress(v, height, width)

    def compress(self, x: ms.Tensor, height: int, width: int) -> ms.Tensor:
        """Keys or values (B, N, D) on the shrunk grid: (B, M, D)."""
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
        self.q_linear, self.kv_linear, self.proj = (
            Linear(size, size),
            Linear(size, 2 * size),
            Linear(size, size),
        )
        self.hook_point = None  # as in SelfAttention

    def keys_values(self, caption: ms.Tensor) -> tuple[ms.Tensor, ms.Tensor]:
        """Projected caption (B, T, D) -> keys and values (B, H, T, d). They do not depend on the timestep."""
        kv = self.kv_linear(caption)
        return split_heads(kv[..., : self.size], self.heads), split_heads(kv[..., self.size :], self.heads)

    def construct(self, x: ms.Tensor, k: ms.Tensor, v: ms.Tensor, mask: ms.Tensor | None) -> ms.Tensor:
        """x (B, N, D), k and v of ``keys_values``, mask (B, T) bool or None -> (B, N, D)."""
        q = split_heads(self.q_linear(x), self.heads)
        return self.proj(merge_heads(attention(q, k, v, mask, hook_point=self.hook_point)))
