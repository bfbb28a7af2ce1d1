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
from mindspore import mint

from pixart_nb.core import backend
from pixart_nb.core.backend import ms, to_numpy
from pixart_nb.core.fast.cpu_operators import (
    add_gated,
    attention_without_gradient,
    mlp_on_arrays,
    modulate,
    on_arrays,
    rounded,
    split,
    token_attention,
)
from pixart_nb.core.fast.cross_attention import (
    CaptionAttention,
    CaptionGroup,
    caption_attention,
    caption_groups,
    merge_small_groups,
)
from pixart_nb.core.models.attention import SelfAttention, split_heads
from pixart_nb.core.models.low_precision import BFloat16Linear
from pixart_nb.core.models.operators import merge_heads, silu
from pixart_nb.core.models.transformer import Block, PixArt, trim_caption
from pixart_nb.core.onednn import linear, rounded_bits

#: Largest number of tokens of a micro-batch. It bounds the memory of the MLP.
MICRO_BATCH = 2048


class CPUDenoiser:
    """``denoise(latents, timestep)`` of one run; see ``fast.denoiser``."""

    def __init__(self, model: Any, caption: ms.Tensor, mask: np.ndarray | ms.Tensor | None, prepare, finish):
        """``model`` is a ``PixArt`` or a ``models.controlnet.Controlled``."""
        backend.pin_threads()
        self.prepare, self.finish = prepare, finish
        self.model, self.caption, self.mask = model, caption, mask
        self.net = net = model if isinstance(model, PixArt) else model.net.base_model
        self.copies = () if isinstance(model, PixArt) else tuple(model.net.controlnet)
        self.blocks = [*net.blocks, *(copy.copied_block for copy in self.copies)]
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
        t0 = to_numpy(net.t_block[1](silu(t))).reshape(6, -1)
        strength, state = self.model.scale_at(timestep) if self.copies else 0.0, x
        for number in self._order(bool(strength)):
            copy, block = number - len(net.blocks), plan.blocks[number]
            if copy == 0:
                state = self._control_state(x)
            target = x if copy < 0 else state
            shift, scale, gate, *mlp = block.modulation + t0
            attended = self._attention(number, self._qkv(number, target, shift, scale), batch, *grid)
            for part, _ in plan.micro_batches:
                add_gated(target[part], gate, block.proj(attended[part]))
            del attended
            self._add_cross_attention(number, target)
            shift, scale, gate = mlp
            for part, _ in plan.micro_batches:
                add_gated(target[part], gate, block.mlp(modulate(target[part], block.eps, shift, scale)))
                if copy >= 0:
                    add_gated(x[part], np.float32(strength), plan.after_proj[copy](state[part]))
        shift, scale = to_numpy(net.final_layer.scale_shift_table + t)
        out = on_arrays(net.final_layer.linear)(modulate(x, net.final_layer.pre_norm.eps, shift, scale))
        out = net.unpatchify(ms.Tensor.from_numpy(out).reshape(batch, plan.tokens, -1), *grid)
        return self.finish(out, timestep)

    def _order(self, control: bool) -> list[int]:
        """Return the numbers of the blocks in their order: with ``control``, that of copy i is depth + i."""
        depth, copies = len(self.net.blocks), len(self.copies) if control else 0
        pairs = [[number, depth + number] for number in range(copies)]
        return [*itertools.chain.from_iterable(pairs), *range(copies, depth)]

    def _control_state(self, x: np.ndarray) -> np.ndarray:
        """Return what the first copied block of a ControlNet reads: x and the projected condition, (B N, D)."""
        if self.plan.control is None:
            tokens = self._embed(self.model.control)
            self.plan.control = on_arrays(self.copies[0].before_proj)(tokens)
        return (x.reshape(-1, *self.plan.control.shape) + self.plan.control).reshape(x.shape)

    def _plan(self, tokens: int) -> StepPlan:
        """Return what is computed once for images of ``tokens`` tokens."""
        if self.plan is not None and self.plan.tokens == tokens:
            return self.plan
        net = self.net
        head_size = net.config.hidden_size // net.config.num_heads
        groups = merge_small_groups(self.groups, tokens, head_size, MICRO_BATCH)
        captions = [(net.y_embedder(group.caption), group.mask) for group in groups]
        attentions = [[caption_attention(block, *caption) for caption in captions] for block in self.blocks]
        parts = [BlockParts.of(block) for block in self.blocks]
        after_proj = [on_arrays(copy.after_proj) for copy in self.copies]
        return StepPlan(tokens, micro_batches(groups, tokens), attentions, parts, after_proj)

    def _embed(self, latents: ms.Tensor) -> np.ndarray:
        """Latents (B, C, H, W) -> tokens with their positions, (B N, D)."""
        net, embedder, (height, width) = self.net, self.net.x_embedder, latents.shape[2:]
        patches = to_numpy(embedder.patches(latents)).reshape(-1, embedder.proj.weight[0].size)
        x = linear(patches, to_numpy(embedder.proj.matrix()), to_numpy(embedder.proj.bias))
        for image in x.reshape(latents.shape[0], -1, x.shape[1]):
            image += to_numpy(net.positions(height, width))[0]
        return x

    def _embed_timestep(self, timestep: float, micro: ms.Tensor | None) -> ms.Tensor:
        """Return the embedding that all images share: (1, D)."""
        net = self.net
        t = net.t_embedder(ms.Tensor(np.full(1, timestep, np.float32)))
        if micro is None:
            return t
        return t + mint.cat((net.csize_embedder(micro[:1, :2]), net.ar_embedder(micro[:1, 2:])), 1)

    def _qkv(self, number: int, x: np.ndarray, shift: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Return queries, keys and values: (B N, 3 D), bits of bfloat16 where nothing is done to them."""
        block, layer = self.plan.blocks[number], self.blocks[number].attn
        rounds = self.in_bfloat16 and layer.hook_point is None and layer.q_norm is None and layer.ratio == 1
        out = np.empty((len(x), 3 * x.shape[1]), np.uint16 if rounds else np.float32)
        for part, _ in self.plan.micro_batches:
            rows = block.qkv(modulate(x[part], block.eps, shift, scale))
            out[part] = rounded_bits(rows) if rounds else rows
        return out

    def _attention(self, number: int, qkv: np.ndarray, batch: int, height: int, width: int) -> np.ndarray:
        """Compute the self-attention of a block from ``_qkv``: (B N, D)."""
        layer = self.blocks[number].attn
        parts = [_tokens(layer, part, qkv, batch, height, width) for part in range(3)]
        if layer.hook_point is not None:
            heads = [split_heads(ms.Tensor(np.ascontiguousarray(x)), layer.heads) for x in parts]
            return to_numpy(merge_heads(layer.hook_point(*heads, None))).reshape(-1, layer.size)
        if self.in_bfloat16:
            parts = [x if x.dtype == np.uint16 else rounded(x) for x in parts]
        return token_attention(*(split(x, layer.heads) for x in parts))

    def _add_cross_attention(self, number: int, x: np.ndarray) -> None:
        """Add the cross-attention of a block to the tokens x (B N, D)."""
        layer = self.blocks[number].cross_attn
        changed = None if layer.hook_point is None else self._hooked_cross_attention(number, x)
        if changed is not None:
            x += changed
            return
        for part, captions in self.plan.micro_batches:
            for group, rows in captions:
                self.plan.cross_attentions[number][group].add_to(x[part][rows])

    def _hooked_cross_attention(self, number: int, x: np.ndarray) -> np.ndarray | None:
        """Pass a cross-attention to its hook point and return it, (B N, D), or None if no hook changed it."""
        if self._hooked_caption is None:
            caption, mask = self.caption, self.mask
            if mask is not None:
                caption, mask = trim_caption(caption, mask)
            self._hooked_caption = self.net.caption_keys_values(caption), mask
        keys_values, mask = self._hooked_caption
        layer = self.blocks[number].cross_attn
        q = on_arrays(layer.q_linear)(x).reshape(self.caption.shape[0], -1, layer.size)
        q = split_heads(ms.Tensor.from_numpy(q), layer.heads)
        out = layer.hook_point(q, *keys_values[number], mask)
        if not self.net.hook_manager.changed:
            return None
        return on_arrays(layer.proj)(to_numpy(merge_heads(out)).reshape(-1, layer.size))


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


class BlockParts(NamedTuple):
    """One block as functions of arrays: its table of the modulation (6, D), norms' epsilon, and layers."""

    modulation: np.ndarray
    eps: float
    qkv: Callable
    proj: Callable
    mlp: Callable

    @classmethod
    def of(cls, block: Block) -> BlockParts:
        """Return the parts of a block."""
        layers = on_arrays(block.attn.qkv), on_arrays(block.attn.proj), mlp_on_arrays(block.mlp)
        return cls(to_numpy(block.scale_shift_table), block.pre_norm.eps, *layers)


@dataclass
class StepPlan:
    """Work of a step for images of ``tokens`` tokens.

    Micro-batches; for each block, and each copied one of a ControlNet, its cross-attention to each caption group and
    its other parts; the projections after the copied blocks, and the projected condition (N tokens, D).
    """

    tokens: int
    micro_batches: list[MicroBatch]
    cross_attentions: list[list[CaptionAttention]]
    blocks: list[BlockParts]
    after_proj: list[Callable]
    control: np.ndarray | None = None


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
