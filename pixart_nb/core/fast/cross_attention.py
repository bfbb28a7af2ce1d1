"""Cross-attention of one run: what depends on the captions alone is computed once, not at every step.

A short caption's cross-attention is two matrix products with matrices made of its keys and values; over a caption of
one token, such as an empty prompt, it is a constant.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from mindspore import ops

from pixart_nb.core.backend import ms
from pixart_nb.core.fast.row_orders import gather, head_rows, merged
from pixart_nb.core.models.attention import MASKED_SCORE, attention
from pixart_nb.core.models.operators import repeat_rows
from pixart_nb.core.models.transformer import Block

_softmax = ops.Softmax(-1)
_matmul = ops.MatMul()
_batched = ops.BatchMatMul()


@dataclass(frozen=True)
class Group:
    """Neighbouring rows of a batch, ``start`` to ``stop``, and their captions: (G, T, C), each of as many rows.

    ``seen`` (G, T) bool tells tokens from padding.
    """

    start: int
    stop: int
    caption: ms.Tensor
    seen: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens of the longest caption."""
        return self.caption.shape[1]


def caption_groups(caption: ms.Tensor, mask: np.ndarray | ms.Tensor | None) -> list[Group]:
    """caption (B, T, C) and mask (B, T) bool or None, by neighbours with the same tokens; padding is left out."""
    values = caption.astype(ms.float32).asnumpy()
    seen = np.ones(values.shape[:2], bool) if mask is None else mask
    seen = np.asarray(seen.asnumpy() if isinstance(seen, ms.Tensor) else seen, bool)
    rows = [row[keep] for row, keep in zip(values, seen, strict=True)]
    starts = [0] + [i for i in range(1, len(rows)) if not np.array_equal(rows[i - 1], rows[i])] + [len(rows)]
    return [_group(a, b, [rows[a]], caption.dtype) for a, b in itertools.pairwise(starts)]


def _group(start: int, stop: int, captions: list[np.ndarray], dtype: ms.Type) -> Group:
    """Captions (T, C) of different lengths as one group, padded with zeros."""
    length = max(map(len, captions))
    padded = [np.pad(text, ((0, length - len(text)), (0, 0))) for text in captions]
    seen = np.arange(length) < np.array([len(text) for text in captions])[:, None]
    return Group(start, stop, ms.Tensor(np.stack(padded)).astype(dtype), seen)


def few_row_groups(groups: list[Group], tokens: int, head_size: int, most: int) -> list[Group]:
    """The groups, with neighbours of few rows together: batched products instead of many small ones.

    ``tokens`` are those of a picture, ``most`` the rows that go together. Captions of one token stay alone, and so do
    short ones among long ones.
    """
    found: list[list[Group]] = []
    for group in groups:
        last = found[-1] if found else []
        count = group.stop - group.start
        fits = count * tokens * (len(last) + 1) <= most and group.tokens > 1
        alike = [(g.stop - g.start, g.tokens < head_size) for g in last[:1]] == [
            (count, group.tokens < head_size)
        ]
        if fits and alike and last[0].tokens > 1:
            last.append(group)
        else:
            found.append([group])
    return [g[0] if len(g) == 1 else _together(g) for g in found]


def _together(groups: list[Group]) -> Group:
    captions = [group.caption.astype(ms.float32).asnumpy()[0] for group in groups]
    return _group(groups[0].start, groups[-1].stop, captions, groups[0].caption.dtype)


class ConstantCaption:
    """Cross-attention over one token: softmax over it is 1, so every query gets that token's projected value."""

    def __init__(self, block: Block, caption: ms.Tensor):
        layer = block.cross_attn
        self.row = layer.proj(layer.kv_linear(caption)[0, :, layer.size :].contiguous()).reshape(-1)

    def __call__(self, x: ms.Tensor) -> ms.Tensor:
        """x (M, D) -> x and what it reads, the same shape."""
        return ops.bias_add(x, self.row)


class ShortCaption:
    """Cross-attention over T tokens as ``softmax(x K + b) V + c``: K (D, H T) is the query's projection and the keys,
    V (H T, D) the values and the output's projection. Less work than both where T is below the head size.

    Of G captions (G, T, D) there are as many K and V, each for as many rows of x."""

    def __init__(self, block: Block, caption: ms.Tensor, seen: np.ndarray):
        layer = block.cross_attn
        heads, size, dtype = layer.heads, layer.size, layer.q_linear.weight.dtype
        self.captions, self.tokens, _ = caption.shape
        by_head = layer.q_linear.matrix().astype(ms.float32).reshape(heads, size // heads, size)
        out = layer.proj.matrix().astype(ms.float32).asnumpy().reshape(size, heads, size // heads)
        k, v = (self._by_head(part) for part in layer.keys_values(caption))  # (H, G T, d)
        k = k * (size // heads) ** -0.5
        keys = self._of_captions(ops.BatchMatMul()(k, by_head))
        bias = self._of_captions(
            ops.BatchMatMul()(k, layer.q_linear.bias.astype(ms.float32).reshape(heads, -1, 1))
        )
        bias = bias + np.where(seen, 0.0, MASKED_SCORE)[:, None, :, None]
        values = ops.BatchMatMul(transpose_b=True)(v, ms.Tensor(np.ascontiguousarray(out.transpose(1, 0, 2))))
        self.keys = self._tensor(keys.transpose(0, 3, 1, 2), size, -1).astype(dtype)
        self.values = self._tensor(self._of_captions(values), -1, size).astype(dtype)
        self.bias, self.out_bias = self._tensor(bias, 1, -1), layer.proj.bias

    def _by_head(self, x: ms.Tensor) -> ms.Tensor:
        """(G, H, T, d) -> (H, G T, d) float32."""
        array = x.astype(ms.float32).asnumpy().transpose(1, 0, 2, 3)
        return ms.Tensor(np.ascontiguousarray(array).reshape(array.shape[0], -1, array.shape[3]))

    def _of_captions(self, x: ms.Tensor) -> np.ndarray:
        """(H, G T, n) -> (G, H, T, n)."""
        heads, _, size = x.shape
        return x.asnumpy().reshape(heads, self.captions, self.tokens, size).transpose(1, 0, 2, 3)

    def _tensor(self, x: np.ndarray, *shape: int) -> ms.Tensor:
        """The numbers of all captions in matrices of this shape."""
        return ms.Tensor(np.ascontiguousarray(x, np.float32).reshape(self.captions, *shape))

    def __call__(self, x: ms.Tensor) -> ms.Tensor:
        """x (M, D), M / G rows for each caption -> x and what it reads, the same shape."""
        scores = self._product(x, self.keys).astype(ms.float32)
        scores = scores + repeat_rows(self.bias, x.shape[0] // self.captions).reshape(scores.shape)
        weights = _softmax(scores.reshape(-1, self.tokens)).astype(x.dtype)
        return x + ops.bias_add(self._product(weights.reshape(scores.shape), self.values), self.out_bias)

    def _product(self, x: ms.Tensor, matrices: ms.Tensor) -> ms.Tensor:
        """Rows (M, n) times their caption's matrix, matrices (G, n, m) -> (M, m)."""
        if self.captions == 1:
            return _matmul(x, matrices[0])
        rows = x.reshape(self.captions, -1, x.shape[1])
        return _batched(rows, matrices).reshape(x.shape[0], -1)


class LongCaption:
    """Cross-attention by its own projections, with keys and values computed once. caption (G, T, D)."""

    def __init__(self, block: Block, caption: ms.Tensor, seen: np.ndarray):
        self.layer = block.cross_attn
        self.k, self.v = self.layer.keys_values(caption)
        self.mask = None if seen.all() else ms.Tensor(seen)

    def __call__(self, x: ms.Tensor) -> ms.Tensor:
        """x (M, D), M / G rows for each caption -> x and what it reads, the same shape."""
        heads, captions = self.layer.heads, self.k.shape[0]
        q = self.layer.q_linear(x).reshape(-1, self.layer.size // heads)
        tokens = x.shape[0] // captions
        q = gather(q, head_rows(captions, tokens, heads), 0).reshape(captions, heads, tokens, -1)
        return x + self.layer.proj(merged(attention(q, self.k, self.v, self.mask)))


CaptionLayer = ConstantCaption | ShortCaption | LongCaption


def caption_layer(block: Block, caption: ms.Tensor, seen: np.ndarray) -> CaptionLayer:
    """The cheapest of the three for projected captions (G, T, D)."""
    layer = block.cross_attn
    if caption.shape[:2] == (1, 1):
        return ConstantCaption(block, caption)
    short = caption.shape[1] < layer.size // layer.heads
    return (ShortCaption if short else LongCaption)(block, caption, seen)
