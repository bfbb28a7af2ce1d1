"""Steps of one prompt, with the numbers of ``PixArt.denoise`` and less work.

What is the same for all rows or for all steps is computed once. A caption's cross-attention is two matrix products
with matrices made of its keys and values; over a caption of one token, such as an empty prompt, it is a constant.
Tokens stay rows of one matrix: heads are split and merged by gathering rows, which the CPU does ten times as fast
as transposing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from mindspore import mint, ops

from pixart_nb.core.backend import ms
from pixart_nb.core.models.attention import SelfAttention, attention, split_heads
from pixart_nb.core.models.kv_compression import shrink_cells
from pixart_nb.core.models.transformer import Block, PixArt, repeat_batch, trim_caption
from pixart_nb.core.operators import rows_like

#: Rows that go through a block's row-wise parts at a time. It bounds the memory of the MLP.
ROWS = 2048
_gather = ops.Gather()
_softmax = ops.Softmax(-1)
_matmul = ops.MatMul()


@dataclass(frozen=True)
class Group:
    """Neighbouring rows of a batch with one caption: rows ``start`` to ``stop``, its tokens (1, T, C)."""

    start: int
    stop: int
    caption: ms.Tensor

    @property
    def tokens(self) -> int:
        """Tokens of the caption."""
        return self.caption.shape[1]


def caption_groups(caption: ms.Tensor, mask: np.ndarray | ms.Tensor | None) -> list[Group]:
    """caption (B, T, C) and mask (B, T) bool or None, by neighbours with the same tokens; padding is left out."""
    values = caption.astype(ms.float32).asnumpy()
    seen = np.ones(values.shape[:2], bool) if mask is None else mask
    seen = np.asarray(seen.asnumpy() if isinstance(seen, ms.Tensor) else seen, bool)
    rows = [row[keep] for row, keep in zip(values, seen, strict=True)]
    starts = [0] + [i for i in range(1, len(rows)) if not np.array_equal(rows[i - 1], rows[i])] + [len(rows)]
    return [
        Group(a, b, ms.Tensor(rows[a][None]).astype(caption.dtype)) for a, b in itertools.pairwise(starts)
    ]


class ConstantCaption:
    """Cross-attention over one token: softmax over it is 1, so every query gets that token's projected value."""

    def __init__(self, block: Block, caption: ms.Tensor):
        layer = block.cross_attn
        self.row = layer.proj(layer.kv_linear(caption)[0, :, layer.size :].contiguous())

    def __call__(self, x: ms.Tensor) -> ms.Tensor:
        return rows_like(self.row, x)


class ShortCaption:
    """Cross-attention over T tokens as ``softmax(x K + b) V + c``: K (D, H T) is the query's projection and the keys,
    V (H T, D) the values and the output's projection. Less work than both where T is below the head size."""

    def __init__(self, block: Block, caption: ms.Tensor):
        layer = block.cross_attn
        heads, size = layer.heads, layer.size
        self.tokens, dtype = caption.shape[1], layer.q_linear.weight.dtype
        k, v = (part[0].astype(ms.float32) for part in layer.keys_values(caption))  # (H, T, d)
        k = k * (size // heads) ** -0.5
        by_head = layer.q_linear.matrix().astype(ms.float32).reshape(heads, size // heads, size)
        keys = ops.BatchMatMul()(k, by_head).reshape(heads * self.tokens, size)
        bias = ops.BatchMatMul()(k, layer.q_linear.bias.astype(ms.float32).reshape(heads, -1, 1))
        out = layer.proj.matrix().astype(ms.float32).asnumpy().reshape(size, heads, size // heads)
        out = ms.Tensor(np.ascontiguousarray(out.transpose(1, 2, 0)))  # (H, d, D)
        self.values = ops.BatchMatMul()(v, out).reshape(heads * self.tokens, size).astype(dtype)
        self.keys = ms.Tensor(np.ascontiguousarray(keys.asnumpy().T)).astype(dtype)
        self.bias, self.out_bias = bias.reshape(-1).astype(dtype), layer.proj.bias

    def __call__(self, x: ms.Tensor) -> ms.Tensor:
        scores = ops.bias_add(_matmul(x, self.keys), self.bias)
        weights = _softmax(scores.reshape(-1, self.tokens).astype(ms.float32)).astype(x.dtype)
        return ops.bias_add(_matmul(weights.reshape(scores.shape), self.values), self.out_bias)


class LongCaption:
    """Cross-attention by its own projections, with keys and values computed once."""

    def __init__(self, block: Block, caption: ms.Tensor):
        self.layer = block.cross_attn
        self.k, self.v = self.layer.keys_values(caption)

    def __call__(self, x: ms.Tensor) -> ms.Tensor:
        layer = self.layer
        q = layer.q_linear(x).reshape(-1, layer.size // layer.heads)
        q = _gather(q, head_rows(1, x.shape[0], layer.heads), 0).reshape(1, layer.heads, x.shape[0], -1)
        return layer.proj(merged(attention(q, self.k, self.v)))


def caption_layer(block: Block, caption: ms.Tensor) -> ConstantCaption | ShortCaption | LongCaption:
    """The cheapest of the three for a projected caption (1, T, D)."""
    layer = block.cross_attn
    if caption.shape[1] == 1:
        return ConstantCaption(block, caption)
    short = caption.shape[1] < layer.size // layer.heads
    return ShortCaption(block, caption) if short else LongCaption(block, caption)


_orders: dict[tuple, ms.Tensor] = {}


def _order(key: tuple, make) -> ms.Tensor:
    """Row numbers as a tensor, made once for a shape; the last few are kept."""
    if key not in _orders:
        if len(_orders) > 32:
            _orders.clear()
        _orders[key] = ms.Tensor(np.ascontiguousarray(make()).reshape(-1).astype(np.int32))
    return _orders[key]


def head_rows(batch: int, tokens: int, heads: int, parts: int = 1) -> ms.Tensor:
    """Which rows of (batch * tokens * parts * heads, d) make (parts, batch, heads, tokens, d)."""

    def make() -> np.ndarray:
        return (
            np.arange(batch * tokens * parts * heads)
            .reshape(batch, tokens, parts, heads)
            .transpose(2, 0, 3, 1)
        )

    return _order(("heads", batch, tokens, heads, parts), make)


def merged(x: ms.Tensor) -> ms.Tensor:
    """Heads (B, H, N, d) -> rows (B N, H d)."""
    batch, heads, tokens, size = x.shape
    order = _order(
        ("merge", batch, heads, tokens),
        lambda: np.arange(batch * heads * tokens).reshape(batch, heads, tokens).transpose(0, 2, 1),
    )
    return _gather(x.reshape(-1, size), order, 0).reshape(batch * tokens, heads * size)


def cell_rows(batch: int, height: int, width: int, ratio: int, places: int, part: int) -> list[ms.Tensor]:
    """For each of the first places of the R x R cells, its rows of (batch * tokens * 3, D): queries, keys, values."""

    def make(place: int) -> np.ndarray:
        grid = np.arange(batch * height * width).reshape(batch, height, width) * 3 + part
        down, across = divmod(place, ratio)
        return grid[:, down : height // ratio * ratio : ratio, across : width // ratio * ratio : ratio]

    key = ("cells", batch, height, width, ratio, part)
    return [_order((*key, place), lambda place=place: make(place)) for place in range(places)]


def self_attention(layer: SelfAttention, qkv: ms.Tensor, batch: int, height: int, width: int) -> ms.Tensor:
    """What the queries see, before the output's projection. qkv (B N, 3 D) -> (B N, D)."""
    heads, size, tokens = layer.heads, layer.size // layer.heads, height * width
    if layer.probe is not None:
        q, k, v = (_watched_part(layer, qkv, number, batch, height, width) for number in range(3))
        return merged(layer.probe.attend(q, k, v, None))
    if layer.ratio == 1 and layer.q_norm is None:
        rows = head_rows(batch, tokens, heads, 3)
        split = _gather(qkv.reshape(-1, size), rows, 0).reshape(3, batch, heads, tokens, size)
        return merged(attention(split[0], split[1], split[2]))
    q, k, v = (_part(layer, qkv, number, batch, height, width) for number in range(3))
    return merged(attention(q, k, v))


def _part(layer: SelfAttention, qkv: ms.Tensor, number: int, batch: int, height: int, width: int):
    """Queries (0), keys (1) or values (2), normed and compressed as the layer says, as heads (B, H, N or M, d)."""
    rows, ratio = qkv.reshape(-1, layer.size), layer.ratio if number else 1
    norm = (layer.q_norm, layer.k_norm, None)[number]
    if norm is not None and ratio > 1:  # the norm comes before the compression
        return _watched_part(layer, qkv, number, batch, height, width)
    places = ratio**2 if layer.operator in ("conv", "mean") else 1
    cells = [_gather(rows, order, 0) for order in cell_rows(batch, height, width, ratio, places, number)]
    x = cells[0] if ratio == 1 else shrink_cells(cells, layer.operator, layer.sr, layer.norm)
    x = x if norm is None else norm(x)
    tokens, size = x.shape[0] // batch, layer.size // layer.heads
    return _gather(x.reshape(-1, size), head_rows(batch, tokens, layer.heads), 0).reshape(
        batch, layer.heads, tokens, size
    )


def _watched_part(layer: SelfAttention, qkv: ms.Tensor, number: int, batch: int, height: int, width: int):
    """As ``_part``, by way of the full keys and values, which a probe wants to see."""
    rows = cell_rows(batch, height, width, 1, 1, number)[0]
    tokens = _gather(qkv.reshape(-1, layer.size), rows, 0)
    norm = (layer.q_norm, layer.k_norm, None)[number]
    tokens = (tokens if norm is None else norm(tokens)).reshape(batch, height * width, layer.size)
    return split_heads(layer.compress(tokens, height, width) if number else tokens, layer.heads)


class Denoiser:
    """``PixArt.denoise`` for one caption of each row and one timestep for all: ``step(latents, timestep)``.

    Made for one run: weights that change later are not seen by the cross-attention. caption (B, T, C), mask (B, T) bool
    or None. While the model is watched (``net.observer``) the probes are shown every attention; what they leave as
    it is, is computed in the same way as without them, so a trace does not change a bit.
    """

    def __init__(self, net: PixArt, caption: ms.Tensor, mask: np.ndarray | ms.Tensor | None):
        self.net, self.caption, self.mask = net, caption, mask
        self.shown = None  # keys, values and mask as probes know them
        self.groups = caption_groups(caption.astype(net.dtype), mask)
        projected = [net.y_embedder(group.caption) for group in self.groups]
        self.captions = [[caption_layer(block, text) for text in projected] for block in net.blocks]

    def __call__(self, latents: ms.Tensor, timestep: float) -> ms.Tensor:
        """latents (B, C, H, W) -> (B, out_channels, H, W)."""
        net, patch = self.net, self.net.config.patch_size
        batch, _, height, width = latents.shape
        grid = (height // patch, width // patch)
        if net.observer is not None:
            net.observer.step(ms.Tensor(np.full(batch, timestep, np.float32)), *grid)
            self._show()
        x = net.x_embedder(latents.astype(net.dtype)) + repeat_batch(net.positions(height, width), batch)
        x = x.reshape(-1, x.shape[-1])
        t = self._timestep(timestep, net.micro_conditions(latents))
        t0 = net.t_block[1](ops.silu(t)).reshape(6, -1)
        for number, block in enumerate(net.blocks):
            x = self._block(number, x, block.scale_shift_table + t0, grid)
        out = net.final_layer(
            x.reshape(batch, grid[0] * grid[1], -1), repeat_batch(t.reshape(1, 1, -1), batch)[:, 0]
        )
        return net.unpatchify(out, *grid)

    def _timestep(self, timestep: float, micro: ms.Tensor | None) -> ms.Tensor:
        """The embedding that all rows share: (1, D)."""
        net = self.net
        t = net.t_embedder(ms.Tensor(np.full(1, timestep, np.float32)))
        if micro is None:
            return t
        return t + mint.cat((net.csize_embedder(micro[:1, :2]), net.ar_embedder(micro[:1, 2:])), 1)

    def _block(self, number: int, x: ms.Tensor, modulation: ms.Tensor, grid: tuple[int, int]) -> ms.Tensor:
        """x (B N, D), modulation (6, D) -> (B N, D)."""
        block, tokens = self.net.blocks[number], grid[0] * grid[1]
        shift, scale, gate, *mlp = (modulation[i] for i in range(6))
        qkv = [block.attn.qkv(_modulated(block, x[rows], shift, scale)) for rows in row_parts(0, x.shape[0])]
        seen = self_attention(block.attn, _joined(qkv), x.shape[0] // tokens, *grid)
        del qkv
        places = [(g, rows) for g in self.groups for rows in row_parts(g.start * tokens, g.stop * tokens)]
        parts = [x[rows] + rows_like(gate, x[rows]) * block.attn.proj(seen[rows]) for _, rows in places]
        del seen
        instead = None
        if block.cross_attn.probe is not None:
            instead = self._watched_cross(number, _joined(parts))
        for place, (group, rows) in enumerate(places):
            caption = self.captions[number][self.groups.index(group)]
            read = caption(parts[place]) if instead is None else instead[rows]
            parts[place] = _mlp(block, parts[place] + read, *mlp)
        return _joined(parts)

    def _show(self) -> None:
        """Prepare what probes are shown of the captions."""
        if self.shown is None:
            caption, mask = self.caption, self.mask
            if mask is not None:
                caption, mask = trim_caption(caption, mask)
            self.shown = self.net.caption_keys_values(caption), mask

    def _watched_cross(self, number: int, x: ms.Tensor) -> ms.Tensor | None:
        """Let the probe see a cross-attention: what it makes of it, (B N, D), None where it leaves it as it is."""
        layer, (keys_values, mask) = self.net.blocks[number].cross_attn, self.shown
        q = layer.q_linear(x).reshape(self.caption.shape[0], -1, layer.size)
        out = layer.probe.attend(split_heads(q, layer.heads), *keys_values[number], mask)
        return layer.proj(merged(out)) if self.net.observer.changed else None


def row_parts(first: int, last: int) -> list[slice]:
    """Rows ``first`` to ``last`` in equal parts of at most ``ROWS``."""
    count = -(-(last - first) // ROWS)
    ends = [first + (last - first) * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def _joined(parts: list[ms.Tensor]) -> ms.Tensor:
    return parts[0] if len(parts) == 1 else mint.cat(parts, 0)


def _modulated(block: Block, x: ms.Tensor, shift: ms.Tensor, scale: ms.Tensor) -> ms.Tensor:
    return block.pre_norm(x) * rows_like(1 + scale, x) + rows_like(shift, x)


def _mlp(block: Block, x: ms.Tensor, shift: ms.Tensor, scale: ms.Tensor, gate: ms.Tensor) -> ms.Tensor:
    return x + rows_like(gate, x) * block.mlp(_modulated(block, x, shift, scale))
