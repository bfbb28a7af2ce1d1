"""Cross-attention of one run: what depends on the captions alone is computed once instead of at every step.

The cross-attention to a short caption is two products with matrices made of its keys and values; to a caption of one
token, such as an empty prompt, it is a constant.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from mindspore import ops

from pixart_nb.core.backend import as_array, ms, to_numpy
from pixart_nb.core.fast.cpu_attention import mask_column, rounded, split, token_attention
from pixart_nb.core.models.attention import MASKED_SCORE
from pixart_nb.core.models.low_precision import BFloat16Linear
from pixart_nb.core.models.operators import merge_heads, repeat_tokens
from pixart_nb.core.models.transformer import Block

_softmax = ops.Softmax(-1)
_matmul = ops.MatMul()
_batched = ops.BatchMatMul()


@dataclass(frozen=True)
class CaptionGroup:
    """Images ``start`` to ``stop`` of a batch and their captions (G, T, C), each for equally many images.

    ``mask`` (G, T) bool is True for tokens and False for padding.
    """

    start: int
    stop: int
    caption: ms.Tensor
    mask: np.ndarray

    @property
    def tokens(self) -> int:
        """Number of tokens of the longest caption."""
        return self.caption.shape[1]


def caption_groups(caption: ms.Tensor, mask: np.ndarray | ms.Tensor | None) -> list[CaptionGroup]:
    """Group neighbours with the same tokens, without padding: caption (B, T, C), mask (B, T) bool or None."""
    values = to_numpy(caption)
    mask = np.ones(values.shape[:2], bool) if mask is None else mask
    mask = as_array(mask).astype(bool)
    rows = [row[keep] for row, keep in zip(values, mask, strict=True)]
    starts = [0] + [i for i in range(1, len(rows)) if not np.array_equal(rows[i - 1], rows[i])] + [len(rows)]
    return [_padded_group(a, b, [rows[a]], caption.dtype) for a, b in itertools.pairwise(starts)]


def _padded_group(start: int, stop: int, captions: list[np.ndarray], dtype: ms.Type) -> CaptionGroup:
    """Make a group of captions (T, C) of different lengths, padded with zeros."""
    length = max(map(len, captions))
    padded = [np.pad(caption, ((0, length - len(caption)), (0, 0))) for caption in captions]
    mask = np.arange(length) < np.array([len(caption) for caption in captions])[:, None]
    return CaptionGroup(start, stop, ms.Tensor(np.stack(padded)).astype(dtype), mask)


def merge_small_groups(groups: list[CaptionGroup], tokens: int, head_size: int, limit: int) -> list[CaptionGroup]:
    """Merge neighbouring groups of few tokens: batched products instead of many small ones.

    ``tokens`` are those of an image, ``limit`` the largest number of tokens of a merged group. Captions of one token
    are not merged, nor are short captions (fewer tokens than the head size) with long ones.
    """
    runs: list[list[CaptionGroup]] = []
    for group in groups:
        count, run = group.stop - group.start, runs[-1] if runs else []
        fits = count * tokens * (len(run) + 1) <= limit and group.tokens > 1
        alike = [(g.stop - g.start, g.tokens < head_size) for g in run[:1]] == [(count, group.tokens < head_size)]
        if fits and alike and run[0].tokens > 1:
            run.append(group)
        else:
            runs.append([group])
    return [run[0] if len(run) == 1 else _merge(run) for run in runs]


def _merge(groups: list[CaptionGroup]) -> CaptionGroup:
    captions = [to_numpy(group.caption)[0] for group in groups]
    return _padded_group(groups[0].start, groups[-1].stop, captions, groups[0].caption.dtype)


class OneTokenAttention:
    """Cross-attention to one token: softmax over it is 1, so every query gets the token's projected value."""

    def __init__(self, block: Block, caption: ms.Tensor):
        layer = block.cross_attn
        self.value = layer.proj(layer.kv_linear(caption)[0, :, layer.size :].contiguous()).reshape(-1)

    def __call__(self, x: ms.Tensor) -> ms.Tensor:
        """Add the attention to x (M, D)."""
        return ops.bias_add(x, self.value)


class ShortCaptionAttention:
    """Cross-attention to T tokens as ``softmax(x K + b) V + c``: less work where T is below the head size.

    K (D, H T) is the query projection times the keys, V (H T, D) the values times the output projection. G captions
    (G, T, D) have as many K and V, each for equally many tokens of x.
    """

    def __init__(self, block: Block, caption: ms.Tensor, mask: np.ndarray):
        layer = block.cross_attn
        heads, size, dtype = layer.heads, layer.size, layer.q_linear.dtype
        self.captions, self.tokens, _ = caption.shape
        q_matrix = layer.q_linear.matrix().astype(ms.float32).reshape(heads, size // heads, size)
        q_bias = layer.q_linear.bias.astype(ms.float32).reshape(heads, -1, 1)
        out = to_numpy(layer.proj.matrix()).reshape(size, heads, size // heads)
        k, v = (self._by_head(x) for x in layer.keys_values(caption))  # (H, G T, d)
        k = k * (size // heads) ** -0.5
        keys, bias = (self._by_caption(_batched(k, x)) for x in (q_matrix, q_bias))
        bias = bias + np.where(mask, 0.0, MASKED_SCORE)[:, None, :, None]
        values = ops.BatchMatMul(transpose_b=True)(v, ms.Tensor(np.ascontiguousarray(out.transpose(1, 0, 2))))
        self.keys = self._tensor(keys.transpose(0, 3, 1, 2), size, -1).astype(dtype)
        self.values = self._tensor(self._by_caption(values), -1, size).astype(dtype)
        self.bias, self.out_bias = self._tensor(bias, 1, -1), layer.proj.bias

    def _by_head(self, x: ms.Tensor) -> ms.Tensor:
        """(G, H, T, d) -> (H, G T, d) float32."""
        array = to_numpy(x).transpose(1, 0, 2, 3)
        return ms.Tensor(np.ascontiguousarray(array).reshape(array.shape[0], -1, array.shape[3]))

    def _by_caption(self, x: ms.Tensor) -> np.ndarray:
        """(H, G T, n) -> (G, H, T, n)."""
        heads, _, size = x.shape
        return x.asnumpy().reshape(heads, self.captions, self.tokens, size).transpose(1, 0, 2, 3)

    def _tensor(self, x: np.ndarray, *shape: int) -> ms.Tensor:
        return ms.Tensor(np.ascontiguousarray(x, np.float32).reshape(self.captions, *shape))

    def __call__(self, x: ms.Tensor) -> ms.Tensor:
        """Add the attention to x (M, D), M / G tokens for each caption."""
        scores = self._product(x, self.keys).astype(ms.float32)
        scores = scores + repeat_tokens(self.bias, x.shape[0] // self.captions).reshape(scores.shape)
        weights = _softmax(scores.reshape(-1, self.tokens)).astype(x.dtype)
        return x + ops.bias_add(self._product(weights.reshape(scores.shape), self.values), self.out_bias)

    def _product(self, x: ms.Tensor, matrices: ms.Tensor) -> ms.Tensor:
        """Multiply x (M, n) by the matrix of its caption, matrices (G, n, m) -> (M, m)."""
        if self.captions == 1:
            return _matmul(x, matrices[0])
        rows = x.reshape(self.captions, -1, x.shape[1])
        return _batched(rows, matrices).reshape(x.shape[0], -1)


class LongCaptionAttention:
    """Cross-attention by the layer's own projections, with keys and values computed once. caption (G, T, D)."""

    def __init__(self, block: Block, caption: ms.Tensor, mask: np.ndarray):
        self.layer = block.cross_attn
        self.in_bfloat16 = isinstance(self.layer.q_linear, BFloat16Linear)
        self.keys_values = [self._heads(merge_heads(x)) for x in self.layer.keys_values(caption)]
        self.column = None if mask.all() else mask_column(mask)

    def __call__(self, x: ms.Tensor) -> ms.Tensor:
        """Add the attention to x (M, D), M / G tokens for each caption."""
        q = self._heads(self.layer.q_linear(x).reshape(len(self.keys_values[0]), -1, self.layer.size))
        attended = token_attention(q, *self.keys_values, self.column)
        return x + self.layer.proj(ms.Tensor.from_numpy(attended))

    def _heads(self, x: ms.Tensor) -> np.ndarray:
        """(G, N, D) -> (G, H, N, d)."""
        tokens = to_numpy(x)
        return split(rounded(tokens) if self.in_bfloat16 else tokens, self.layer.heads)


CaptionAttention = OneTokenAttention | ShortCaptionAttention | LongCaptionAttention


def caption_attention(block: Block, caption: ms.Tensor, mask: np.ndarray) -> CaptionAttention:
    """Return the cheapest cross-attention to projected captions (G, T, D) with mask (G, T)."""
    if caption.shape[:2] == (1, 1):
        return OneTokenAttention(block, caption)
    short = caption.shape[1] < block.cross_attn.size // block.cross_attn.heads
    return (ShortCaptionAttention if short else LongCaptionAttention)(block, caption, mask)
