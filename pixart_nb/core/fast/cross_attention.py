"""Cross-attention of one run: what depends on the captions alone is computed once instead of at every step.

The cross-attention to a short caption is two products with matrices made of its keys and values; to a caption of one
token, such as an empty prompt, it is a constant.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

import numpy as np

from pixart_nb.core.backend import as_array, ms, to_numpy
from pixart_nb.core.fast.cpu_operators import (
    add_gated,
    by_rows,
    mask_column,
    on_arrays,
    rounded,
    split,
    token_attention,
)
from pixart_nb.core.models.attention import MASKED_SCORE
from pixart_nb.core.models.low_precision import BFloat16Linear
from pixart_nb.core.models.operators import merge_heads
from pixart_nb.core.models.transformer import Block
from pixart_nb.core.onednn import linear, multiply, softmax


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
        self.value = to_numpy(layer.proj(layer.kv_linear(caption)[0, :, layer.size :].contiguous())).reshape(-1)

    def add_to(self, x: np.ndarray) -> None:
        """Add the attention to x (M, D)."""
        x += self.value


class ShortCaptionAttention:
    """Cross-attention to T tokens as ``softmax(x K + b) V + c``: less work where T is below the head size.

    K (H T, D) is the keys times the query projection, V (D, H T) the output projection times the values. Each of G
    captions (G, T, D) has its own, for equally many tokens of x.
    """

    def __init__(self, block: Block, caption: ms.Tensor, mask: np.ndarray):
        layer = block.cross_attn
        heads, size = layer.heads, layer.size
        self.tokens, self.out_bias = caption.shape[1], to_numpy(layer.proj.bias)
        query = to_numpy(layer.q_linear.matrix()).reshape(heads, -1, size)
        query_bias = to_numpy(layer.q_linear.bias).reshape(heads, -1, 1)
        out = to_numpy(layer.proj.matrix()).reshape(size, heads, -1).transpose(1, 0, 2)
        self.captions = []
        for keys, values, tokens in zip(*map(to_numpy, layer.keys_values(caption)), mask, strict=True):  # (H, T, d)
            keys = keys * np.float32((size // heads) ** -0.5)
            bias = _product(keys, query_bias)[..., 0] + np.where(tokens, 0, np.float32(MASKED_SCORE))
            value = _product(out, values.transpose(0, 2, 1)).transpose(1, 0, 2)  # (D, H, T)
            folded = _product(keys, query).reshape(-1, size)
            self.captions.append((folded, bias.reshape(-1), np.ascontiguousarray(value).reshape(size, -1)))

    def add_to(self, x: np.ndarray) -> None:
        """Add the attention to x (M, D), M / G tokens for each caption."""
        for rows, (keys, bias, values) in zip(np.split(x, len(self.captions)), self.captions, strict=True):
            weights = linear(rows, keys, bias)
            by_head = weights.reshape(-1, self.tokens)
            by_rows(partial(_softmax, by_head), len(by_head))
            add_gated(rows, None, linear(weights, values, self.out_bias))


class LongCaptionAttention:
    """Cross-attention by the layer's own projections, with keys and values computed once. caption (G, T, D)."""

    def __init__(self, block: Block, caption: ms.Tensor, mask: np.ndarray):
        layer = block.cross_attn
        self.heads, self.query, self.out = layer.heads, on_arrays(layer.q_linear), on_arrays(layer.proj)
        self.in_bfloat16 = isinstance(layer.q_linear, BFloat16Linear)
        self.keys_values = [self._heads(to_numpy(merge_heads(x))) for x in layer.keys_values(caption)]
        self.column = None if mask.all() else mask_column(mask)

    def add_to(self, x: np.ndarray) -> None:
        """Add the attention to x (M, D), M / G tokens for each caption."""
        q = self._heads(self.query(x).reshape(len(self.keys_values[0]), -1, x.shape[1]))
        add_gated(x, None, self.out(token_attention(q, *self.keys_values, self.column)))

    def _heads(self, tokens: np.ndarray) -> np.ndarray:
        """(G, N, D) -> (G, H, N, d)."""
        return split(rounded(tokens) if self.in_bfloat16 else tokens, self.heads)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    out = np.empty((*a.shape[:2], b.shape[2]), np.float32)
    multiply(a, b, out)
    return out


def _softmax(x: np.ndarray, rows: slice) -> None:
    softmax(x[rows], x[rows])


CaptionAttention = OneTokenAttention | ShortCaptionAttention | LongCaptionAttention


def caption_attention(block: Block, caption: ms.Tensor, mask: np.ndarray) -> CaptionAttention:
    """Return the cheapest cross-attention to projected captions (G, T, D) with mask (G, T)."""
    if caption.shape[:2] == (1, 1):
        return OneTokenAttention(block, caption)
    short = caption.shape[1] < block.cross_attn.size // block.cross_attn.heads
    return (ShortCaptionAttention if short else LongCaptionAttention)(block, caption, mask)
