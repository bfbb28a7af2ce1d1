"""Steps of one prompt, with the numbers of ``PixArt.denoise`` and less work.

What is the same for all rows or for all steps is computed once. Tokens stay rows of one matrix.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from mindspore import mint, ops

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.fast.cross_attention import (
    CaptionLayer,
    Group,
    caption_groups,
    caption_layer,
    few_row_groups,
)
from pixart_nb.core.fast.normalization import normalised_rows
from pixart_nb.core.fast.row_orders import cell_rows, gather, head_rows, merged
from pixart_nb.core.models.attention import SelfAttention, attention, split_heads
from pixart_nb.core.models.kv_compression import places_used, shrink_cells, successive_ratios
from pixart_nb.core.models.layers import Linear
from pixart_nb.core.models.operators import gelu_tanh, rows_like, silu, transpose
from pixart_nb.core.models.transformer import Block, FinalLayer, PixArt, repeat_batch, trim_caption

#: Rows that go through a block's row-wise parts at a time. It bounds the memory of the MLP.
ROWS = 2048
#: Up to so many rows, weights of so many numbers or more are kept turned as well: their products are a tenth faster.
#: From 1024 rows on they are not.
TURNED_ROWS, TURNED_WEIGHT = 1023, 2**20
#: From so many rows on queries, keys and values are kept apart: one more copy, and less memory at a time.
APART_ROWS = 2**14
_product = ops.MatMul()


def self_attention(
    layer: SelfAttention, qkv: list[ms.Tensor], batch: int, height: int, width: int
) -> ms.Tensor:
    """What the queries see, before the output's projection: (B N, D).

    qkv: one matrix (B N, 3 D), or queries, keys and values, (B N, D) each. The list is emptied, as of a large picture
    every matrix is a good part of a gigabyte.
    """
    heads_of = _heads_of if layer.hook_point is None else _watched_part
    heads = []
    for number in range(3):
        x, of = (qkv[0], (3, number)) if qkv[0].shape[1] > layer.size else (qkv.pop(0), (1, 0))
        heads.append(heads_of(layer, x, of, number, batch, height, width))
    qkv.clear()
    del x
    return merged(attention(*heads, hook_point=layer.hook_point))


def _heads_of(
    layer: SelfAttention, x: ms.Tensor, of: tuple[int, int], number: int, batch: int, height: int, width: int
) -> ms.Tensor:
    """Queries (0), keys (1) or values (2), normed and compressed as the layer says, as heads (B, H, N or M, d).

    ``of``: parts of a token's row in x, and which of them is meant.
    """
    ratio, norm = layer.ratio if number else 1, (layer.q_norm, layer.k_norm, None)[number]
    if norm is not None:
        if ratio > 1:  # the norm comes before the compression
            return _watched_part(layer, x, of, number, batch, height, width)
        x, of = norm(_part_of(layer, x, of)), (1, 0)
    for step in successive_ratios(layer.operator, ratio) if ratio > 1 else ():
        orders = cell_rows(batch, height, width, step, places_used(layer.operator, step), *of)
        x = x.reshape(-1, layer.size)
        x = shrink_cells([gather(x, order, 0) for order in orders], layer.operator, layer.sr, layer.norm)
        height, width, of = height // step, width // step, (1, 0)
    size, tokens = layer.size // layer.heads, height * width
    heads = gather(x.reshape(-1, size), head_rows(batch, tokens, layer.heads, *of), 0)
    return heads.reshape(batch, layer.heads, tokens, size)


def _part_of(layer: SelfAttention, x: ms.Tensor, of: tuple[int, int]) -> ms.Tensor:
    """One part of every token's row: x (M, parts D) -> (M, D)."""
    return (
        x if of == (1, 0) else gather(x.reshape(-1, layer.size), cell_rows(1, x.shape[0], 1, 1, 1, *of)[0], 0)
    )


def _watched_part(
    layer: SelfAttention, x: ms.Tensor, of: tuple[int, int], number: int, batch: int, height: int, width: int
) -> ms.Tensor:
    """As ``_heads_of``, by way of the full keys and values, which a probe wants to see."""
    tokens, norm = _part_of(layer, x, of), (layer.q_norm, layer.k_norm, None)[number]
    tokens = (tokens if norm is None else norm(tokens)).reshape(batch, height * width, layer.size)
    return split_heads(layer.compress(tokens, height, width) if number else tokens, layer.heads)


class Denoiser:
    """``PixArt.denoise`` for one caption of each row and one timestep for all: ``step(latents, timestep)``.

    Made for one run: weights that change later are not seen everywhere. caption (B, T, C), mask (B, T) bool
    or None. While the model is watched (``net.hook_manager``) the probes are shown every attention; what they leave as
    it is, is computed in the same way as without them, so a trace does not change a bit.
    """

    def __init__(self, net: PixArt, caption: ms.Tensor, mask: np.ndarray | ms.Tensor | None):
        backend.settle_threads()
        self.net, self.caption, self.mask = net, caption, mask
        self.shown = None  # keys, values and mask as probes know them
        self.groups = caption_groups(caption.astype(net.dtype), mask)
        self.plan: Plan | None = None

    def _planned(self, tokens: int) -> Plan:
        """What is computed once for pictures of so many tokens."""
        if self.plan is None or self.plan.tokens != tokens:
            net = self.net
            head_size = net.config.hidden_size // net.config.num_heads
            groups = few_row_groups(self.groups, tokens, head_size, ROWS)
            texts = [(net.y_embedder(group.caption), group.seen) for group in groups]
            captions = [[caption_layer(block, *text) for text in texts] for block in net.blocks]
            places = row_places(groups, tokens)
            most = max(place.rows.stop - place.rows.start for place in places)
            layers = [RowLayers.of(block, most) for block in net.blocks]
            self.plan = Plan(tokens, places, captions, layers)
        return self.plan

    def __call__(self, latents: ms.Tensor, timestep: float) -> ms.Tensor:
        """latents (B, C, H, W) -> (B, out_channels, H, W)."""
        net, patch = self.net, self.net.config.patch_size
        batch, _, height, width = latents.shape
        grid = (height // patch, width // patch)
        if net.hook_manager is not None:
            net.hook_manager.on_step(ms.Tensor(np.full(batch, timestep, np.float32)), *grid)
            self._show()
        places = self._outer_places(batch, grid[0] * grid[1])
        x = self._embedded(latents, places)
        t = self._timestep(timestep, net.micro_conditions(latents))
        t0 = net.t_block[1](silu(t)).reshape(6, -1)
        for number, block in enumerate(net.blocks):
            x = self._block(number, x, block.scale_shift_table + t0, grid)
        out = self._final(x, net.final_layer.scale_shift_table + t, places)
        return net.unpatchify(out.reshape(batch, grid[0] * grid[1], -1), *grid)

    def _outer_places(self, batch: int, tokens: int) -> list[Place]:
        """Where the rows go around the blocks: all together, or in half precision, whose sums and products hold many
        times their own memory on the CPU, as in the blocks."""
        if self.net.dtype == ms.float16 and not backend.on_ascend():
            return self._planned(tokens).places
        return [Place(slice(0, batch * tokens), [])]

    def _embedded(self, latents: ms.Tensor, places: list[Place]) -> ms.Tensor:
        """Latents (B, C, H, W) -> tokens, with the embedding of where they are, (B N, D)."""
        net, (batch, _, height, width) = self.net, latents.shape
        tokens = net.x_embedder(latents.astype(net.dtype))
        positions = repeat_batch(net.positions(height, width), batch)
        rows, positions = (x.reshape(-1, x.shape[-1]) for x in (tokens, positions))
        return _joined([_part(rows, place.rows) + _part(positions, place.rows) for place in places])

    def _final(self, x: ms.Tensor, modulation: ms.Tensor, places: list[Place]) -> ms.Tensor:
        """The predictions of all patches: x (B N, D), modulation (2, D) -> (B N, p p out_channels)."""
        layer, (shift, scale) = self.net.final_layer, (modulation[i] for i in range(2))
        return _joined([layer.linear(_modulated(layer, _part(x, p.rows), shift, scale)) for p in places])

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
        plan = self._planned(tokens)
        layers = plan.layers[number]
        parts = [layers.qkv(_modulated(block, _part(x, p.rows), shift, scale)) for p in plan.places]
        seen = self_attention(block.attn, _qkv(block.attn, parts), x.shape[0] // tokens, *grid)
        parts = []
        for rows, _ in plan.places:
            out = layers.proj(_part(seen, rows))
            parts.append(_part(x, rows) + rows_like(gate, out) * out)
        del seen
        instead = None
        if block.cross_attn.hook_point is not None:
            instead = self._watched_cross(number, _joined(parts))
        for index, (rows, reads) in enumerate(plan.places):
            if instead is None:
                read = [plan.captions[number][n](_part(parts[index], piece)) for n, piece in reads]
            else:
                read = [parts[index] + _part(instead, rows)]
            parts[index] = _mlp(block, layers, _joined(read), *mlp)
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
        out = attention(split_heads(q, layer.heads), *keys_values[number], mask, hook_point=layer.hook_point)
        return layer.proj(merged(out)) if self.net.hook_manager.changed else None


@dataclass(frozen=True)
class Plan:
    """Where the rows of a batch of pictures of so many tokens go: places that are worked on one after the other, and
    each block's caption layers and products with weights."""

    tokens: int
    places: list[Place]
    captions: list[list[CaptionLayer]]
    layers: list[RowLayers]


class TurnedLinear:
    """A linear layer whose weight lies turned in memory, (in, out): the CPU multiplies few rows with it faster."""

    def __init__(self, layer: Linear):
        self.weight = transpose(layer.weight, 1, 0)
        self.bias = layer.bias

    def __call__(self, x: ms.Tensor) -> ms.Tensor:
        """x (M, in) -> (M, out)."""
        return ops.bias_add(_product(x, self.weight), self.bias)


class RowLayers(NamedTuple):
    """A block's products of rows with weights, each as it is fastest for so many rows."""

    qkv: Callable
    proj: Callable
    fc1: Callable
    fc2: Callable

    @classmethod
    def of(cls, block: Block, rows: int) -> RowLayers:
        """The block's own layers, or turned ones. A layer that is more than its weight, such as a LoRA's, stays.

        So does the MLP's first, which gains nothing.
        """
        qkv, proj, fc2 = (
            TurnedLinear(layer) if _to_turn(layer, rows) else layer
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc2)
        )
        return cls(qkv, proj, block.mlp.fc1, fc2)


def _to_turn(layer: Linear, rows: int) -> bool:
    plain = type(layer) is Linear and layer.dtype == ms.float32 and not backend.on_ascend()
    return plain and rows <= TURNED_ROWS and layer.weight.size >= TURNED_WEIGHT


def turned_numbers(size: int, depth: int, mlp_ratio: float, rows: int) -> int:
    """Numbers in the turned weights of ``depth`` blocks of width ``size``."""
    weights = 3 * size**2, size**2, size * int(size * mlp_ratio)
    return depth * sum(w for w in weights if w >= TURNED_WEIGHT and rows <= TURNED_ROWS)


class Place(NamedTuple):
    """Rows that go through a block's row-wise parts together, and which of them read which group's caption."""

    rows: slice
    reads: list[tuple[int, slice]]


def row_places(groups: list[Group], tokens: int) -> list[Place]:
    """The rows of all groups, ``tokens`` for each picture, in places of at most ``ROWS``."""
    found: list[Place] = []
    for number, group in enumerate(groups):
        for part in row_parts(group.start * tokens, group.stop * tokens):
            if found and part.stop - found[-1].rows.start <= ROWS:
                first = found[-1].rows.start
                reads = [*found[-1].reads, (number, slice(part.start - first, part.stop - first))]
                found[-1] = Place(slice(first, part.stop), reads)
            else:
                found.append(Place(part, [(number, slice(0, part.stop - part.start))]))
    return found


def row_parts(first: int, last: int) -> list[slice]:
    """Rows ``first`` to ``last`` in equal parts of at most ``ROWS``."""
    count = -(-(last - first) // ROWS)
    ends = [first + (last - first) * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def _part(x: ms.Tensor, rows: slice) -> ms.Tensor:
    return x if rows == slice(0, x.shape[0]) else x[rows]


def _joined(parts: list[ms.Tensor]) -> ms.Tensor:
    return parts[0] if len(parts) == 1 else mint.cat(parts, 0)


def _qkv(layer: SelfAttention, parts: list[ms.Tensor]) -> list[ms.Tensor]:
    """What ``self_attention`` takes, of the rows (M, 3 D) of all places. The list is emptied."""
    if sum(part.shape[0] for part in parts) < APART_ROWS:
        joined = [_joined(parts)]
        parts.clear()
        return joined
    apart = [], [], []
    while parts:
        part = parts.pop(0)
        for number, rows in enumerate(apart):
            rows.append(_part_of(layer, part, (3, number)))
    found = []
    for rows in apart:
        found.append(_joined(rows))
        rows.clear()
    return found


def _modulated(layer: Block | FinalLayer, x: ms.Tensor, shift: ms.Tensor, scale: ms.Tensor) -> ms.Tensor:
    return normalised_rows(layer.pre_norm, x) * rows_like(1 + scale, x) + rows_like(shift, x)


def _mlp(
    block: Block, layers: RowLayers, x: ms.Tensor, shift: ms.Tensor, scale: ms.Tensor, gate: ms.Tensor
) -> ms.Tensor:
    hidden = gelu_tanh(layers.fc1(_modulated(block, x, shift, scale)))
    return x + rows_like(gate, x) * layers.fc2(hidden)
