"""Denoising steps on the CPU: the numbers of ``PixArt.denoise`` with less work.

What is the same for all images or for all steps is computed once. The tokens of a batch stay the rows of one matrix
(B N, D), and go through the linear layers of a block in micro-batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from mindspore import mint, ops

from pixart_nb.core import backend
from pixart_nb.core.backend import ms, to_numpy
from pixart_nb.core.fast.cpu_attention import attention_without_gradient, rounded, split, token_attention
from pixart_nb.core.fast.cpu_operators import add_gated, gelu_tanh, modulate
from pixart_nb.core.fast.cross_attention import (
    CaptionAttention,
    CaptionGroup,
    caption_attention,
    caption_groups,
    merge_small_groups,
)
from pixart_nb.core.models.attention import SelfAttention, split_heads
from pixart_nb.core.models.layers import Linear
from pixart_nb.core.models.low_precision import BFloat16Linear, bfloat16_mlp
from pixart_nb.core.models.operators import merge_heads, silu, transpose
from pixart_nb.core.models.transformer import Block, PixArt, PixArtConfig, repeat_batch, trim_caption

#: Largest number of tokens of a micro-batch. It bounds the memory of the MLP.
MICRO_BATCH = 2048
#: Micro-batches of up to TRANSPOSED_TOKENS use a transposed copy of weights of at least TRANSPOSED_WEIGHT elements:
#: their products are a tenth faster. From 1024 tokens on they are not.
TRANSPOSED_TOKENS, TRANSPOSED_WEIGHT = 1023, 2**20
_matmul = ops.MatMul()


class CPUDenoiser:
    """``denoise(latents, timestep)`` of one run; see ``fast.denoiser``."""

    def __init__(self, net: PixArt, caption: ms.Tensor, mask: np.ndarray | ms.Tensor | None, prepare, finish):
        backend.pin_threads()
        self.prepare, self.finish = prepare, finish
        self.net, self.caption, self.mask = net, caption, mask
        self.in_bfloat16 = isinstance(net.blocks[0].attn.proj, BFloat16Linear)
        self.groups = caption_groups(caption.astype(net.dtype), mask)
        self.plan: StepPlan | None = None
        self._hooked_caption = None  # keys, values and mask as ``PixArt.denoise`` has them, for the hooks

    def __call__(self, latents: Any, timestep: float) -> Any:
        """latents (B, C, H, W) -> (B, out_channels, H, W)."""
        latents = self.prepare(latents)
        net, patch = self.net, self.net.config.patch_size
        batch, _, height, width = latents.shape
        grid = height // patch, width // patch
        if net.hook_manager is not None:
            timesteps = ms.Tensor(np.full(batch, timestep, np.float32))
            attention = partial(attention_without_gradient, in_bfloat16=self.in_bfloat16)
            net.hook_manager.on_step(timesteps, *grid, attention)
        plan = self.plan = self._plan(grid[0] * grid[1])
        x = self._embed(latents)
        t = self._embed_timestep(timestep, net.micro_conditions(latents))
        t0 = net.t_block[1](silu(t)).reshape(6, -1)
        for number, block in enumerate(net.blocks):
            modulation = block.scale_shift_table + t0
            shift, scale, gate, *mlp = (modulation[i] for i in range(6))
            attended = self._attention(number, self._qkv(number, x, shift, scale), batch, *grid)
            parts = self._add_projected(number, x, attended, gate)
            del attended
            x = self._cross_attention_and_mlp(number, parts, *mlp)
        out = self._final(x, net.final_layer.scale_shift_table + t)
        out = net.unpatchify(out.reshape(batch, plan.tokens, -1), *grid)
        return self.finish(out, timestep)

    def _plan(self, tokens: int) -> StepPlan:
        """Return what is computed once for images of ``tokens`` tokens."""
        if self.plan is not None and self.plan.tokens == tokens:
            return self.plan
        net = self.net
        head_size = net.config.hidden_size // net.config.num_heads
        groups = merge_small_groups(self.groups, tokens, head_size, MICRO_BATCH)
        captions = [(net.y_embedder(group.caption), group.mask) for group in groups]
        attentions = [[caption_attention(block, *caption) for caption in captions] for block in net.blocks]
        batches = micro_batches(groups, tokens)
        largest = max(batch.tokens.stop - batch.tokens.start for batch in batches)
        return StepPlan(tokens, batches, attentions, [BlockLinears.of(block, largest) for block in net.blocks])

    def _embed(self, latents: ms.Tensor) -> ms.Tensor:
        """Latents (B, C, H, W) -> tokens with their positions, (B N, D)."""
        net, (batch, _, height, width) = self.net, latents.shape
        tokens = net.x_embedder(latents.astype(net.dtype))
        positions = repeat_batch(net.positions(height, width), batch)
        x, positions = (rows.reshape(-1, rows.shape[-1]) for rows in (tokens, positions))
        return x + positions

    def _embed_timestep(self, timestep: float, micro: ms.Tensor | None) -> ms.Tensor:
        """Return the embedding that all images share: (1, D)."""
        net = self.net
        t = net.t_embedder(ms.Tensor(np.full(1, timestep, np.float32)))
        if micro is None:
            return t
        return t + mint.cat((net.csize_embedder(micro[:1, :2]), net.ar_embedder(micro[:1, 2:])), 1)

    def _qkv(self, number: int, x: ms.Tensor, shift: ms.Tensor, scale: ms.Tensor) -> np.ndarray:
        """Return queries, keys and values: (B N, 3 D)."""
        block, linear = self.net.blocks[number], self.plan.linears[number].qkv
        out = None
        for part, _ in self.plan.micro_batches:
            rows = to_numpy(linear(modulate(block.pre_norm, _rows(x, part), shift, scale)))
            if len(self.plan.micro_batches) == 1:
                return rows
            out = np.empty((x.shape[0], rows.shape[1]), rows.dtype) if out is None else out
            out[part] = rows
        return out

    def _attention(self, number: int, qkv: np.ndarray, batch: int, height: int, width: int) -> ms.Tensor:
        """Compute the self-attention of a block from ``_qkv``: (B N, D)."""
        layer = self.net.blocks[number].attn
        parts = [_tokens(layer, part, qkv, batch, height, width) for part in range(3)]
        if layer.hook_point is not None:
            heads = [split_heads(ms.Tensor(np.ascontiguousarray(x)), layer.heads) for x in parts]
            return merge_heads(layer.hook_point(*heads, None)).reshape(-1, layer.size)
        parts = [rounded(x) for x in parts] if self.in_bfloat16 else parts
        return ms.Tensor.from_numpy(token_attention(*(split(x, layer.heads) for x in parts)))

    def _add_projected(self, number: int, x: ms.Tensor, attended: ms.Tensor, gate: ms.Tensor) -> list[ms.Tensor]:
        """Add the output projection of the self-attention to x (B N, D): one tensor for each micro-batch."""
        parts = []
        for part, _ in self.plan.micro_batches:
            out = self.plan.linears[number].proj(_rows(attended, part))
            parts.append(add_gated(_rows(x, part), gate, out))
        return parts

    def _cross_attention_and_mlp(self, number: int, parts: list[ms.Tensor], shift, scale, gate) -> ms.Tensor:
        """Finish a block for the tokens of each micro-batch: (B N, D). The list is emptied of its tensors."""
        block, linears = self.net.blocks[number], self.plan.linears[number]
        attentions, changed = self.plan.cross_attentions[number], None
        if block.cross_attn.hook_point is not None:
            changed = self._hooked_cross_attention(number, _concat(parts))
        for index, (part, captions) in enumerate(self.plan.micro_batches):
            if changed is None:
                x = _concat([attentions[group](_rows(parts[index], rows)) for group, rows in captions])
            else:
                x = parts[index] + _rows(changed, part)
            parts[index] = add_gated(x, gate, linears.mlp(modulate(block.pre_norm, x, shift, scale)))
        return _concat(parts)

    def _hooked_cross_attention(self, number: int, x: ms.Tensor) -> ms.Tensor | None:
        """Pass a cross-attention to its hook point and return it, (B N, D), or None if no hook changed it."""
        if self._hooked_caption is None:
            caption, mask = self.caption, self.mask
            if mask is not None:
                caption, mask = trim_caption(caption, mask)
            self._hooked_caption = self.net.caption_keys_values(caption), mask
        keys_values, mask = self._hooked_caption
        layer = self.net.blocks[number].cross_attn
        q = layer.q_linear(x).reshape(self.caption.shape[0], -1, layer.size)
        q = split_heads(q, layer.heads)
        out = layer.hook_point(q, *keys_values[number], mask)
        return layer.proj(merge_heads(out).reshape(-1, layer.size)) if self.net.hook_manager.changed else None

    def _final(self, x: ms.Tensor, modulation: ms.Tensor) -> ms.Tensor:
        """Predict all patches: x (B N, D), modulation (2, D) -> (B N, p p out_channels)."""
        layer, (shift, scale) = self.net.final_layer, (modulation[i] for i in range(2))
        return layer.linear(modulate(layer.pre_norm, x, shift, scale))


def _tokens(layer: SelfAttention, part: int, qkv: np.ndarray, batch: int, height: int, width: int) -> np.ndarray:
    """Return queries (0), keys (1) or values (2), normalized and compressed: (B, N or M, D).

    A view of qkv (B N, 3 D) where they are neither.
    """
    x = qkv[:, part * layer.size : (part + 1) * layer.size].reshape(batch, height * width, layer.size)
    norm = (layer.q_norm, layer.k_norm, None)[part]
    compressed = part > 0 and (layer.ratio > 1 or layer.hook_point is not None)
    if norm is None and not compressed:
        return x
    tokens = ms.Tensor(np.ascontiguousarray(x))
    tokens = tokens if norm is None else norm(tokens)
    return to_numpy(layer.compress(tokens, height, width) if compressed else tokens)


class MicroBatch(NamedTuple):
    """Tokens that go through a block's linear layers together, and which of them attend to which caption group."""

    tokens: slice
    captions: list[tuple[int, slice]]


@dataclass(frozen=True)
class StepPlan:
    """Work of a step for images of ``tokens`` tokens: micro-batches, and for each block its cross-attention to each
    caption group and its linear layers."""

    tokens: int
    micro_batches: list[MicroBatch]
    cross_attentions: list[list[CaptionAttention]]
    linears: list[BlockLinears]


class TransposedLinear:
    """A linear layer with a transposed weight (in, out), with which the CPU multiplies few tokens faster."""

    def __init__(self, layer: Linear):
        self.weight = transpose(layer.weight, 1, 0)
        self.bias = layer.bias

    def __call__(self, x: ms.Tensor) -> ms.Tensor:
        """x (M, in) -> (M, out)."""
        return ops.bias_add(_matmul(x, self.weight), self.bias)


class BlockLinears(NamedTuple):
    """Linear layers of one block, in the layout that is fastest for the given number of tokens."""

    qkv: Callable
    proj: Callable
    fc1: Callable
    fc2: Callable

    def mlp(self, x: ms.Tensor) -> ms.Tensor:
        """Return ``fc2(gelu(fc1(x)))`` of x (M, D)."""
        if type(self.fc1) is type(self.fc2) is BFloat16Linear:
            return bfloat16_mlp(x, self.fc1, self.fc2)
        return self.fc2(gelu_tanh(self.fc1(x)))

    @classmethod
    def of(cls, block: Block, tokens: int) -> BlockLinears:
        """Return the layers of a block, transposed where that is faster: not LoRA layers, nor fc1 (no gain)."""
        qkv, proj, fc2 = (
            TransposedLinear(layer)
            if type(layer) is Linear
            and layer.dtype == ms.float32
            and tokens <= TRANSPOSED_TOKENS
            and layer.weight.size >= TRANSPOSED_WEIGHT
            else layer
            for layer in (block.attn.qkv, block.attn.proj, block.mlp.fc2)
        )
        return cls(qkv, proj, block.mlp.fc1, fc2)


def transposed_elements(config: PixArtConfig, tokens: int) -> int:
    """Return the number of elements of all transposed weights for a batch of ``tokens`` tokens in float32."""
    size = config.hidden_size
    weights = 3 * size**2, size**2, size * int(size * config.mlp_ratio)
    return config.depth * sum(w for w in weights if w >= TRANSPOSED_WEIGHT and tokens <= TRANSPOSED_TOKENS)


def micro_batches(groups: list[CaptionGroup], tokens: int) -> list[MicroBatch]:
    """Split the tokens of a batch, ``tokens`` for each image, into micro-batches that are processed in turn."""
    batches: list[MicroBatch] = []
    for number, group in enumerate(groups):
        for part in _split(group.start * tokens, group.stop * tokens):
            if batches and part.stop - batches[-1].tokens.start <= MICRO_BATCH:
                first = batches[-1].tokens.start
                captions = [*batches[-1].captions, (number, slice(part.start - first, part.stop - first))]
                batches[-1] = MicroBatch(slice(first, part.stop), captions)
            else:
                batches.append(MicroBatch(part, [(number, slice(0, part.stop - part.start))]))
    return batches


def _split(first: int, last: int) -> list[slice]:
    """Split a range into equal parts of at most MICRO_BATCH."""
    count = -(-(last - first) // MICRO_BATCH)
    ends = [first + (last - first) * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


def _rows(x: ms.Tensor, part: slice) -> ms.Tensor:
    return x if part == slice(0, x.shape[0]) else x[part]


def _concat(parts: list[ms.Tensor]) -> ms.Tensor:
    return parts[0] if len(parts) == 1 else mint.cat(parts, 0)
