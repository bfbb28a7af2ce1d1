"""Denoising steps on Ascend: the numbers of ``PixArt.denoise`` in about 16 operators for each block.

LayerNormExt takes the modulation as its weight and bias; the heads of the projections are padded to a multiple of 16 in
the weights, once for each run; FlashAttentionScore takes tokens as the projections give them (layout BSH). In float32,
which it does not take, attention is the exact one of ``models.attention``. With ``backend.set_graph_mode`` each block
is a compiled graph that takes its weights as arguments, so that all blocks of a kind share it. **Not run on Ascend.**
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from mindspore import mint

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.models import ascend_operators
from pixart_nb.core.models.attention import IdentityAttention, attention, merge_heads, split_heads
from pixart_nb.core.models.controlnet import Controlled
from pixart_nb.core.models.kv_compression import convolve_cells, mean_kernel
from pixart_nb.core.models.operators import gelu_tanh, linear, silu
from pixart_nb.core.models.transformer import Block, PixArt, trim_caption

#: Epsilon of the norms before attention and MLP, of those of queries and keys, and of the one after compression.
MODULATED_EPS, NORM_EPS = 1e-6, 1e-5


class AscendDenoiser:
    """``denoise(latents, timestep)`` of one run; see ``fast.denoiser``.

    The copied blocks of a ControlNet run as the blocks that they are copies of. A block that ``IdentityAttention`` is
    set in when the denoiser is made has only the values of its self-attention. Other hooks take the layers themselves.
    """

    def __init__(self, model: PixArt | Controlled, caption: ms.Tensor, mask: np.ndarray | ms.Tensor | None):
        self.model, self.compiled = model, backend.graph_mode()
        self.net = net = model if isinstance(model, PixArt) else model.net.base_model
        self.copies = () if isinstance(model, PixArt) else tuple(model.net.controlnet)
        head_size = net.config.hidden_size // net.config.num_heads
        self.fused = ascend_operators.flash_supports(head_size, net.dtype)
        if mask is not None:
            caption, mask = trim_caption(caption, mask)
        self.caption, self.mask = caption, mask
        if self.compiled:  # one length for all captions, so that one graph serves them all
            caption, mask = _padded_caption(caption, mask, net.config.model_max_length)
        projected, self.identity = net.y_embedder(caption.astype(net.dtype)), _identity_layers(net) or frozenset()
        blocks = [*net.blocks, *(copy.copied_block for copy in self.copies)]
        self.tensors = [block_tensors(b, projected, self.fused, i in self.identity) for i, b in enumerate(blocks)]
        ones = ms.Tensor(np.array([0, 1, 0, 0, 1, 0], np.float32).reshape(1, 6, 1)).astype(net.dtype)
        self.tables = mint.cat([block.scale_shift_table.expand_dims(0) for block in blocks]) + ones
        self.final_table = net.final_layer.scale_shift_table + ones[0, :2]
        self._caption_mask, self._shape, self._of_shape = mask, None, None
        self._by_layers = None

    def __call__(self, latents: ms.Tensor, timestep: float) -> ms.Tensor:
        """latents (B, C, H, W) -> (B, out_channels, H, W)."""
        net, (height, width) = self.net, latents.shape[2:]
        if _identity_layers(net) != self.identity:  # traced or changed
            return self._denoise_by_layers(latents, timestep)
        grid = height // net.config.patch_size, width // net.config.patch_size
        functions, mask, positions, micro, control = self._constants(latents, grid)
        x = net.x_embedder(latents.astype(net.dtype)) + positions
        t = net.t_embedder(ms.Tensor(np.full(1, timestep, np.float32)))
        t = t if micro is None else t + micro
        modulation = self.tables + net.t_block[1](silu(t)).reshape(1, 6, -1)
        rows = mint.split(modulation.reshape(-1), net.config.hidden_size)  # six for each block

        def run(function: Callable, number: int, x: ms.Tensor) -> ms.Tensor:
            return function(x, *rows[6 * number : 6 * number + 6], mask, *self.tensors[number])

        strength, state = self.model.scale_at(timestep) if self.copies else 0.0, None
        for number, function in enumerate(functions):
            if strength and 0 < number <= len(self.copies):
                state = x + control if state is None else state
                state = run(functions[number - 1], net.config.depth + number - 1, state)
                x = mint.add(x, self.copies[number - 1].after_proj(state), alpha=strength)
            x = run(function, number, x)
        shift, scale = mint.split((self.final_table + t).reshape(-1), net.config.hidden_size)
        out = net.final_layer.linear(layer_norm(x, scale, shift, MODULATED_EPS))
        return net.unpatchify(out, *grid)

    def _constants(self, latents: ms.Tensor, grid: tuple[int, int]) -> tuple:
        """Return what all steps of a shape share: functions of the blocks, mask, positions, micro conditions, control.

        ``control`` (B, N, D) is what the first copied block reads beside the image.
        """
        net, (batch, _, height, width) = self.net, latents.shape
        if self._shape != latents.shape:
            mask = self._caption_mask
            options = [BlockOptions.of(block, grid, self.fused) for block in net.blocks]
            functions = [block_function(of_layer, self.compiled) for of_layer in options]
            if mask is not None and self.fused:
                mask = ascend_operators.discard_mask(mask, grid[0] * grid[1])
            micro, positions, control = net.micro_conditions(latents), net.positions(height, width), None
            if micro is not None:
                micro = mint.cat((net.csize_embedder(micro[:1, :2]), net.ar_embedder(micro[:1, 2:])), 1)
            if self.copies:
                control = net.x_embedder(self.model.repeated(batch).astype(net.dtype)) + positions
                control = self.copies[0].before_proj(control)
            self._shape, self._of_shape = latents.shape, (functions, mask, positions, micro, control)
        return self._of_shape

    def _denoise_by_layers(self, latents: ms.Tensor, timestep: float) -> ms.Tensor:
        if self._by_layers is None:
            self._by_layers = LayerDenoiser(self.model, self.caption, self.mask)
        return self._by_layers(latents, timestep)


class LayerDenoiser:
    """Denoising steps of a run by the layers of the networks themselves, for hooks."""

    def __init__(self, model: PixArt | Controlled, caption: ms.Tensor, mask: np.ndarray | ms.Tensor | None):
        if mask is not None:
            caption, mask = trim_caption(caption, mask)
        self.controlled = None if isinstance(model, PixArt) else model
        self.net = model if isinstance(model, PixArt) else model.net
        self.mask, self.keys_values = mask, self.net.caption_keys_values(caption)

    def __call__(self, latents: ms.Tensor, timestep: float) -> ms.Tensor:
        """latents (B, C, H, W) -> (B, out_channels, H, W)."""
        net, (batch, _, height, width), control = self.net, latents.shape, ()
        base = net if self.controlled is None else net.base_model
        if self.controlled is not None and (scale := self.controlled.scale_at(timestep)):
            control = self.controlled.repeated(batch), scale
        timesteps = ms.Tensor(np.full(batch, timestep, np.float32))
        positions, micro = base.positions(height, width), base.micro_conditions(latents)
        return net.denoise(latents, timesteps, self.keys_values, self.mask, positions, micro, *control)


def _identity_layers(net: PixArt) -> frozenset[int] | None:
    """Return the blocks whose self-attention is the identity, or None if hooks read or change an attention."""
    points = [layer.hook_point for block in net.blocks for layer in (block.attn, block.cross_attn)]
    if not all(point is None or isinstance(point, IdentityAttention) for point in points):
        return None
    return frozenset(number for number, block in enumerate(net.blocks) if block.attn.hook_point is not None)


def _padded_caption(caption: ms.Tensor, mask: ms.Tensor | None, length: int) -> tuple[ms.Tensor, ms.Tensor]:
    """Pad a caption (B, T, C) and its mask to ``length`` tokens, or leave a longer one."""
    batch, tokens, channels = caption.shape
    keep = np.ones((batch, tokens), bool) if mask is None else mask.asnumpy()
    extra = max(0, length - tokens)
    if extra:
        caption = mint.cat((caption, mint.zeros((batch, extra, channels), dtype=caption.dtype)), 1)
    return caption, ms.Tensor(np.pad(keep, ((0, 0), (0, extra))))


class BlockTensors(NamedTuple):
    """Weights and caption of one block, in the order in which the function of a block takes them.

    With flash attention the heads of queries, keys, values and of the inputs of the output projections are padded.
    A block whose self-attention is the identity has no ``query`` and no ``key``.
    ``key`` of a block that compresses by convolution holds the weights of keys and values, unpadded, one above the
    other; ``value`` is None there. ``caption_key`` and ``caption_value`` are (B, T, H d).
    """

    query: ms.Tensor | None
    query_bias: ms.Tensor | None
    key: ms.Tensor | None
    key_bias: ms.Tensor | None
    value: ms.Tensor | None
    value_bias: ms.Tensor | None
    out: ms.Tensor
    out_bias: ms.Tensor
    caption_query: ms.Tensor
    caption_query_bias: ms.Tensor
    caption_key: ms.Tensor
    caption_value: ms.Tensor
    caption_out: ms.Tensor
    caption_out_bias: ms.Tensor
    fc1: ms.Tensor
    fc1_bias: ms.Tensor
    fc2: ms.Tensor
    fc2_bias: ms.Tensor
    query_norm: ms.Tensor | None = None
    query_norm_bias: ms.Tensor | None = None
    key_norm: ms.Tensor | None = None
    key_norm_bias: ms.Tensor | None = None
    kernel: ms.Tensor | None = None
    kernel_bias: ms.Tensor | None = None
    cell_norm: ms.Tensor | None = None
    cell_norm_bias: ms.Tensor | None = None


def block_tensors(block: Block, caption: ms.Tensor, fused: bool, identity: bool = False) -> BlockTensors:
    """Return the tensors of one block; caption (B, T, D) is projected already. Adapters are merged into the weights.

    With ``identity`` each token attends to itself alone.
    """
    attn, cross, mlp, size = block.attn, block.cross_attn, block.mlp, block.attn.size

    def pad(x: ms.Tensor, axis: int) -> ms.Tensor:
        return ascend_operators.padded_heads(x, attn.heads, axis) if fused else x

    def parts(layer, count: int) -> list[tuple[ms.Tensor, ms.Tensor]]:
        weight, bias = layer.matrix(), layer.bias
        return [(weight[i * size : (i + 1) * size], bias[i * size : (i + 1) * size]) for i in range(count)]

    query, key, value = parts(attn.qkv, 3)
    optional = {}
    if identity:
        query, key = (None, None), (None, None)
    elif attn.q_norm is None:
        query = tuple(pad(x, 0) for x in query)
    else:  # the norm comes first
        optional = dict(zip(BlockTensors._fields[18:22], _affine(attn.q_norm) + _affine(attn.k_norm), strict=True))
    if attn.ratio > 1 and attn.operator in ("conv", "mean") and not identity:
        key, value = tuple(mint.cat(pair) for pair in zip(key, value, strict=True)), (None, None)
        optional |= _cell_tensors(attn)
    else:
        key = key if optional or identity else tuple(pad(x, 0) for x in key)
        value = tuple(pad(x, 0) for x in value)
    (cross_query,) = parts(cross.q_linear, 1)
    caption_keys = [pad(linear(caption, *part), -1) for part in parts(cross.kv_linear, 2)]
    outs = [(pad(layer.matrix(), 1), layer.bias) for layer in (attn.proj, cross.proj)]
    fc1, fc2 = ((layer.matrix(), layer.bias) for layer in (mlp.fc1, mlp.fc2))
    cross_query = (pad(x, 0) for x in cross_query)
    return BlockTensors(
        *query, *key, *value, *outs[0], *cross_query, *caption_keys, *outs[1], *fc1, *fc2, **optional
    )  # fmt: skip


def _affine(norm) -> list[ms.Tensor]:
    return [norm.weight, norm.bias]


def _cell_tensors(attn) -> dict[str, ms.Tensor | None]:
    """Return the depthwise convolution of keys and values together, and the norm after it."""
    if attn.operator == "mean":
        return {"kernel": mean_kernel(2 * attn.size, attn.ratio, attn.qkv.weight.dtype)}
    weight, bias = attn.sr.weight, attn.sr.bias
    norm, norm_bias = _affine(attn.norm)
    return {
        "kernel": mint.cat((weight, weight)), "kernel_bias": mint.cat((bias, bias)),
        "cell_norm": norm, "cell_norm_bias": norm_bias,
    }  # fmt: skip


class BlockOptions(NamedTuple):
    """Options of the function of a block.

    ``operator``, ``ratio`` and ``grid``, the token grid (height, width), are those of KV compression, or None, 1, None.
    ``fused`` blocks use flash attention.
    """

    heads: int
    head_size: int
    operator: str | None
    ratio: int
    grid: tuple[int, int] | None
    fused: bool

    @classmethod
    def of(cls, block: Block, grid: tuple[int, int], fused: bool) -> BlockOptions:
        """Return the options of a block."""
        attn = block.attn
        compression = (attn.operator, attn.ratio, grid) if attn.ratio > 1 else (None, 1, None)
        return cls(attn.heads, attn.size // attn.heads, *compression, fused)


def _keys_values_function(options: BlockOptions, pad: Callable) -> Callable:
    """Return a function from the normalized tokens (B, N, D) and weights to keys and values, each (B, M, H d)."""
    operator, ratio, grid, size = options.operator, options.ratio, options.grid, options.heads * options.head_size

    def first_of_cells(x):
        if operator is None:
            return x
        height, width = grid[0] // ratio * ratio, grid[1] // ratio * ratio
        tokens = x.reshape(x.shape[0], *grid, size)[:, :height:ratio, :width:ratio].contiguous()
        return tokens.reshape(x.shape[0], -1, size)

    def keys_values(x, key, key_bias, value, value_bias, key_norm, key_norm_bias, kernel, kernel_bias, norm, norm_bias):
        if kernel is None:
            tokens = first_of_cells(x)
            k, v = linear(tokens, key, key_bias), linear(tokens, value, value_bias)
            return k if key_norm is None else pad(layer_norm(k, key_norm, key_norm_bias, NORM_EPS)), v
        both = linear(x, key, key_bias)  # (B, N, 2 D)
        if key_norm is not None:
            both = mint.cat((layer_norm(both[..., :size], key_norm, key_norm_bias, NORM_EPS), both[..., size:]), -1)
        both = convolve_cells(both, *grid, kernel, kernel_bias).reshape(both.shape[0], 2, size, -1)
        both = mint.permute(both, (1, 0, 3, 2)).contiguous()
        both = pad(both if norm is None else layer_norm(both, norm, norm_bias, NORM_EPS))
        return both[0], both[1]

    return keys_values


@lru_cache(maxsize=64)
def block_function(options: BlockOptions, compiled: bool) -> Callable[..., ms.Tensor]:
    """Return the function of a block: ``(x (B, N, D), six rows of modulation (D,), mask, *BlockTensors) -> (B, N, D)``.

    The scales have their one added. ``mask`` is that of ``discard_mask`` for flash attention, otherwise (B, T) bool.
    """
    heads, scale, fused = options.heads, options.head_size**-0.5, options.fused

    def attention_of_rows(q, k, v, mask):
        if fused:
            return ascend_operators.flash_attention_score(q, k, v, heads, mask, scale, "BSH")
        q, k, v = split_heads(q, heads), split_heads(k, heads), split_heads(v, heads)
        return merge_heads(attention(q, k, v, mask))

    def pad(x):
        return ascend_operators.padded_heads(x, heads, -1) if fused else x

    keys_values = _keys_values_function(options, pad)

    def block(
        x, shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, mask,
        query, query_bias, key, key_bias, value, value_bias, out, out_bias,
        caption_query, caption_query_bias, caption_key, caption_value, caption_out, caption_out_bias,
        fc1, fc1_bias, fc2, fc2_bias, query_norm, query_norm_bias, key_norm, key_norm_bias,
        kernel, kernel_bias, cell_norm, cell_norm_bias,
    ):  # fmt: skip
        hidden = layer_norm(x, scale, shift, MODULATED_EPS)
        if query is None:  # the identity
            attended = linear(hidden, value, value_bias)
        else:
            q = linear(hidden, query, query_bias)
            if query_norm is not None:
                q = pad(layer_norm(q, query_norm, query_norm_bias, NORM_EPS))
            k, v = keys_values(
                hidden, key, key_bias, value, value_bias, key_norm, key_norm_bias,
                kernel, kernel_bias, cell_norm, cell_norm_bias,
            )  # fmt: skip
            attended = attention_of_rows(q, k, v, None)
        x = addcmul(x, gate, linear(attended, out, out_bias))
        q = linear(x, caption_query, caption_query_bias)
        x = x + linear(attention_of_rows(q, caption_key, caption_value, mask), caption_out, caption_out_bias)
        hidden = layer_norm(x, mlp_scale, mlp_shift, MODULATED_EPS)
        return addcmul(x, mlp_gate, linear(gelu_tanh(linear(hidden, fc1, fc1_bias)), fc2, fc2_bias))

    return ms.jit(block, jit_level="O0") if compiled else block


def layer_norm(x: ms.Tensor, weight: ms.Tensor, bias: ms.Tensor, eps: float) -> ms.Tensor:
    """Call the operator by its name in its module, where tests replace it."""
    return ascend_operators.layer_norm(x, weight, bias, eps)


def addcmul(x: ms.Tensor, gate: ms.Tensor, y: ms.Tensor) -> ms.Tensor:
    """Call the operator by its name in its module, where tests replace it."""
    return ascend_operators.addcmul(x, gate, y)
