"""Blocks of the transformer in training on the CPU: outputs and gradients of ``models.transformer.Block``, faster.

MindSpore passes over the whole memory for each operator. Here a chunk of the tokens goes through a norm, its modulation
and a matrix product while it is in the cache of a core, by as many threads as there are cores. Gradients are written by
hand, and sums are added in an order that does not depend on the threads. Not inside compiled graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from mindspore import nn
from mindspore.common._grad_function import _Function

from pixart_nb.core import backend
from pixart_nb.core.backend import in_threads, ms
from pixart_nb.core.fast.chunks import Chunk, ModulatedNorm, Sums, chunks_of, rows_of, weight_gradient
from pixart_nb.core.fast.cpu_operators import attention_forward, attention_gradient, mask_column, split
from pixart_nb.core.models.layers import Linear
from pixart_nb.core.models.operators import split_parts
from pixart_nb.core.models.transformer import Block, FinalLayer
from pixart_nb.core.onednn import gelu, gelu_gradient, multiply, write_linear

#: Largest weight of a layer with an adapter. In a large one, the gradient of the whole matrix costs more than it gains.
SMALL_WEIGHT = 2**18


def use_fast_blocks(network: nn.Cell, fast: bool) -> None:
    """Let the blocks of a network compute a training step by this module, where it can, or by MindSpore's operators."""
    for _, cell in network.cells_and_names():
        replacement = {Block: TrainingBlock, FinalLayer: TrainingFinalLayer}.get(type(cell))
        if replacement is not None:
            cell.fast = replacement(cell) if fast else None


@contextmanager
def layer_by_layer(network: nn.Cell) -> Iterator[None]:
    """Let every layer of a network run, and its hooks with it, inside the block."""
    before = [(cell, cell.fast) for _, cell in network.cells_and_names() if isinstance(cell, Block | FinalLayer)]
    use_fast_blocks(network, False)
    try:
        yield
    finally:
        for cell, fast in before:
            cell.fast = fast


class TrainingBlock:
    """``Block.construct`` of one block."""

    def __init__(self, block: Block):
        self.block = block

    def supports(self, x: ms.Tensor) -> bool:
        """Return whether the block computes in float32 on the CPU, without hooks, and adapters only if it is small."""
        attn, cross, mlp = self.block.attn, self.block.cross_attn, self.block.mlp
        linears = attn.qkv, attn.proj, cross.q_linear, cross.kv_linear, cross.proj, mlp.fc1, mlp.fc2
        hooked = attn.hook_point is not None or cross.hook_point is not None
        return _is_float32(x) and not hooked and all(map(_is_product, linears))

    def keys_values(self, caption: ms.Tensor) -> tuple[ms.Tensor, None]:
        """Return keys and values of the caption in one tensor, (B, T, 2 D)."""
        layer = self.block.cross_attn.kv_linear
        return LinearLayer.apply(caption, layer.matrix(), layer.bias), None

    def __call__(self, x, kv, _, mask, t0, height: int, width: int) -> ms.Tensor:
        split, run = partial(self._split, height=height, width=width), lambda step, *values: step.apply(*values)
        return block_steps(run, split, x, kv, *self.inputs(mask, t0))

    def inputs(self, mask: ms.Tensor | None, t0: ms.Tensor) -> tuple:
        """Return what ``block_steps`` takes after x and kv: modulation (B, 6, D), 12 weights and biases, settings."""
        block, attn, cross, mlp = self.block, self.block.attn, self.block.cross_attn, self.block.mlp
        modulation = block.scale_shift_table.reshape(1, 6, -1) + t0
        column = None if mask is None else mask_column(mask.asnumpy())
        layers = attn.qkv, attn.proj, cross.q_linear, cross.proj, mlp.fc1, mlp.fc2
        weights = [tensor for layer in layers for tensor in (layer.matrix(), layer.bias)]
        return modulation, *weights, (column, attn.heads, cross.heads, block.pre_norm.eps)

    def has_plain_attention(self) -> bool:
        """Return whether queries are not normalized and keys not compressed."""
        return self.block.attn.q_norm is None and self.block.attn.ratio == 1

    def _split(self, qkv: ms.Tensor, height: int, width: int) -> tuple[ms.Tensor | None, ...]:
        """Return queries (B, N, D), keys and values (B, M, D), or all of them in one (B, N, 3 D), None and None."""
        if self.has_plain_attention():
            return qkv, None, None
        attn = self.block.attn
        q, k, v = (chunk.reshape(*qkv.shape[:2], attn.size) for chunk in split_parts(qkv, 3, 1))
        if attn.q_norm is not None:
            q, k = attn.q_norm(q), attn.k_norm(k)
        return q, attn.compress(k, height, width), attn.compress(v, height, width)


def block_steps(run: Callable, split: Callable, x, kv, modulation, *rest) -> ms.Tensor:
    """Compute a block: x (B, N, D) -> (B, N, D). ``run(step, *values)`` runs a function of this module.

    ``split`` gives what ``Attention`` takes. ``modulation`` and ``rest`` are those of ``TrainingBlock.inputs``.
    """
    *weights, (column, heads, cross_heads, eps) = rest
    qkv = run(ModulatedLinear, x, modulation, *weights[:2], (0, 1), eps)
    x = run(AddLinear, x, run(Attention, *split(qkv), None, heads), modulation, *weights[2:4], 2)
    q = run(LinearLayer, x, *weights[4:6])
    x = run(AddLinear, x, run(Attention, q, kv, None, column, cross_heads), None, *weights[6:8], None)
    return run(AddMLP, x, modulation, *weights[8:], (3, 4, 5), eps)


class TrainingFinalLayer:
    """``FinalLayer.construct``."""

    def __init__(self, layer: FinalLayer):
        self.layer = layer

    def supports(self, x: ms.Tensor) -> bool:
        """Return whether the layer computes in float32 on the CPU, with an adapter only if it is small."""
        return _is_float32(x) and _is_product(self.layer.linear)

    def __call__(self, x: ms.Tensor, t: ms.Tensor) -> ms.Tensor:
        layer, linear = self.layer, self.layer.linear
        modulation = layer.scale_shift_table.reshape(1, 2, -1) + t.reshape(t.shape[0], 1, -1)
        return ModulatedLinear.apply(x, modulation, linear.matrix(), linear.bias, (0, 1), layer.pre_norm.eps)


def _is_product(layer: nn.Cell) -> bool:
    """Return whether a layer is a product with its ``matrix()``, which takes no time worth mentioning."""
    if layer.weight.dtype != ms.float32:
        return False
    return type(layer) is Linear or (layer.is_product and layer.weight.size <= SMALL_WEIGHT)


def _is_float32(x: ms.Tensor) -> bool:
    return x.dtype == ms.float32 and not backend.on_ascend()


def _arrays(*tensors: ms.Tensor | None) -> list[np.ndarray | None]:
    """Return the memory of tensors as arrays."""
    return [None if tensor is None else np.ascontiguousarray(tensor.asnumpy()) for tensor in tensors]


def _tensors(*arrays: np.ndarray | None) -> tuple[ms.Tensor | None, ...]:
    return tuple(None if array is None else ms.Tensor.from_numpy(array) for array in arrays)


class ModulatedLinear(_Function):
    """``linear(norm(x) (1 + scale) + shift)``: x (B, N, D), modulation (B, count, D), weight (out, D) -> (B, N, out).

    ``rows`` are the numbers of shift and scale in the modulation.
    """

    @staticmethod
    def forward(ctx: Any, x, modulation, weight, bias, rows: tuple[int, int], eps: float):
        x, modulation, weight, bias = _arrays(x, modulation, weight, bias)
        norm, out = ModulatedNorm(x, modulation, rows, eps), np.empty((*x.shape[:2], len(weight)), np.float32)
        in_threads(lambda p: write_linear(norm.forward(p), weight, bias, rows_of(out, p)), chunks_of(*x.shape[:2]))
        ctx.norm, ctx.weight, ctx.rows, ctx.count = norm, weight, rows, modulation.shape[1]
        return ms.Tensor.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, dout):
        (dout,), norm, weight = _arrays(dout), ctx.norm, ctx.weight
        chunks = chunks_of(*dout.shape[:2])
        sums, bias = Sums(chunks, len(dout), ctx.count, weight.shape[1]), Sums(chunks, len(dout), 1, len(weight))
        inputs, dx = np.empty_like(norm.x), np.zeros_like(norm.x)

        def work(chunk: Chunk) -> None:
            rows = rows_of(dout, chunk)
            bias.add(chunk, 0, rows)
            rows_of(inputs, chunk)[...] = norm.modulated(chunk)
            dm = np.empty((len(rows), weight.shape[1]), np.float32)
            multiply(rows, weight, dm)
            norm.backward(chunk, dm, rows_of(dx, chunk), sums, ctx.rows)

        in_threads(work, chunks)
        dweight = weight_gradient(dout, inputs) if ctx.needs_input_grad[2] else None
        return *_tensors(dx, sums.rows, dweight, bias.total), None, None


class LinearLayer(_Function):
    """``linear(x)``: x (B, N, D), weight (out, D) -> (B, N, out)."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias):
        x, weight, bias = _arrays(x, weight, bias)
        out = np.empty((*x.shape[:2], len(weight)), np.float32)
        in_threads(lambda p: write_linear(rows_of(x, p), weight, bias, rows_of(out, p)), chunks_of(*x.shape[:2]))
        ctx.saved = x, weight
        return ms.Tensor.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, dout):
        (dout,), (x, weight) = _arrays(dout), ctx.saved
        chunks, dx = chunks_of(*dout.shape[:2]), np.empty_like(x)
        bias = Sums(chunks, len(dout), 1, len(weight))

        def work(chunk: Chunk) -> None:
            bias.add(chunk, 0, rows_of(dout, chunk))
            multiply(rows_of(dout, chunk), weight, rows_of(dx, chunk))

        in_threads(work, chunks)
        return _tensors(dx, weight_gradient(dout, x) if ctx.needs_input_grad[1] else None, bias.total)


class AddLinear(_Function):
    """``x + gate linear(a)``: x and a (B, N, D). ``row`` is the number of the gate in the modulation, None for 1."""

    @staticmethod
    def forward(ctx: Any, x, a, modulation, weight, bias, row: int | None):
        x, a, modulation, weight, bias = _arrays(x, a, modulation, weight, bias)
        gate = None if row is None else modulation[:, None, row]
        out, product = np.empty_like(x), None if row is None else np.empty_like(x)

        def work(chunk: Chunk) -> None:
            target = rows_of(out if gate is None else product, chunk)
            write_linear(rows_of(a, chunk), weight, bias, target)
            _add_gated(chunk, x, gate, product, out)

        in_threads(work, chunks_of(*x.shape[:2]))
        ctx.saved, ctx.row, ctx.count = (a, weight, gate, product), row, 0 if row is None else modulation.shape[1]
        return ms.Tensor.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, dout):
        (dout,), (a, weight, gate, product) = _arrays(dout), ctx.saved
        chunks = chunks_of(*dout.shape[:2])
        sums, bias = Sums(chunks, len(dout), ctx.count, len(weight)), Sums(chunks, len(dout), 1, len(weight))
        da, dproduct = np.empty_like(a), dout if gate is None else np.empty_like(dout)

        def work(chunk: Chunk) -> None:
            if gate is not None:
                _gate_gradient(chunk, dout, gate, product, dproduct, sums, ctx.row)
            rows = rows_of(dproduct, chunk)
            bias.add(chunk, 0, rows)
            multiply(rows, weight, rows_of(da, chunk))

        in_threads(work, chunks)
        dweight = weight_gradient(dproduct, a) if ctx.needs_input_grad[3] else None
        dmodulation = None if gate is None else sums.rows
        return *_tensors(dout, da, dmodulation, dweight, bias.total), None


def _add_gated(chunk: Chunk, x: np.ndarray, gate: np.ndarray | None, product: np.ndarray, out: np.ndarray) -> None:
    """Write x + gate product of a chunk to ``out``; without a gate, add x to ``out``."""
    target = out[chunk.images, chunk.tokens]
    if gate is not None:
        np.multiply(product[chunk.images, chunk.tokens], gate[chunk.images], out=target)
    target += x[chunk.images, chunk.tokens]


def _gate_gradient(chunk: Chunk, dout, gate, product, dproduct, sums: Sums, row: int) -> None:
    """Write dout gate of a chunk to ``dproduct``, and add dout product, the gradient of the gate, to ``sums``."""
    index = chunk.images, chunk.tokens
    np.multiply(dout[index], gate[chunk.images], out=dproduct[index])
    sums.add(chunk, row, rows_of(dout, chunk) * rows_of(product, chunk))


class AddMLP(_Function):
    """``x + gate mlp(norm(x) (1 + scale) + shift)``: x (B, N, D), modulation (B, count, D).

    ``rows`` are the numbers of shift, scale and gate in the modulation. An ``mlp_output`` (B, N, D) of an earlier
    forward pass is not computed again.
    """

    @staticmethod
    def forward(
        ctx: Any, x, modulation, weight1, bias1, weight2, bias2, rows: tuple[int, ...], eps: float, mlp_output=None
    ):
        x, modulation, *weights = _arrays(x, modulation, weight1, bias1, weight2, bias2)
        norm, gate = ModulatedNorm(x, modulation, rows[:2], eps), modulation[:, None, rows[2]]
        hidden = np.empty((*x.shape[:2], len(weights[0])), np.float32)
        activated = np.empty_like(hidden)
        product, out = np.empty_like(x) if mlp_output is None else mlp_output, np.empty_like(x)

        def work(chunk: Chunk) -> None:
            inner = rows_of(hidden, chunk)
            write_linear(norm.forward(chunk), weights[0], weights[1], inner)
            gelu(inner, rows_of(activated, chunk))
            if mlp_output is None:
                write_linear(rows_of(activated, chunk), weights[2], weights[3], rows_of(product, chunk))
            _add_gated(chunk, x, gate, product, out)

        in_threads(work, chunks_of(*x.shape[:2]))
        ctx.saved, ctx.rows, ctx.count = (norm, gate, weights, hidden, activated, product), rows, modulation.shape[1]
        return ms.Tensor.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, dout):
        (dout,), (norm, gate, weights, hidden, activated, product) = _arrays(dout), ctx.saved
        chunks, size, width = chunks_of(*dout.shape[:2]), dout.shape[2], hidden.shape[2]
        sums, bias1, bias2 = (Sums(chunks, len(dout), *shape) for shape in ((ctx.count, size), (1, width), (1, size)))
        dproduct, dx, inputs = np.empty_like(dout), dout.copy(), np.empty_like(dout)
        dhidden = np.empty_like(hidden)

        def work(chunk: Chunk) -> None:
            _gate_gradient(chunk, dout, gate, product, dproduct, sums, ctx.rows[2])
            rows, dinner = rows_of(dproduct, chunk), rows_of(dhidden, chunk)
            bias2.add(chunk, 0, rows)
            multiply(rows, weights[2], dinner)
            gelu_gradient(rows_of(hidden, chunk), dinner)
            bias1.add(chunk, 0, dinner)
            rows_of(inputs, chunk)[...] = norm.modulated(chunk)
            dm = np.empty((len(rows), size), np.float32)
            multiply(dinner, weights[0], dm)
            norm.backward(chunk, dm, rows_of(dx, chunk), sums, ctx.rows[:2])

        in_threads(work, chunks)
        needed = ctx.needs_input_grad
        dweight1 = weight_gradient(dhidden, inputs) if needed[2] else None
        dweight2 = weight_gradient(dproduct, activated) if needed[4] else None
        return *_tensors(dx, sums.rows, dweight1, bias1.total, dweight2, bias2.total), None, None


class Attention(_Function):
    """``softmax(q k^T / sqrt(d) + column) v``: q (B, N, D), k and v (B, M, D) -> (B, N, D).

    Without v, k is (B, M, 2 D): keys and values. Without both, q is (B, N, 3 D): queries, keys and values. ``column``
    (B, M) or None is added to the scores.
    """

    @staticmethod
    def forward(ctx: Any, q, k, v, column: np.ndarray | None, heads: int):
        arrays = _arrays(q, k, v)
        q, k, v = _heads(arrays, heads)
        out = np.empty((q.shape[0], q.shape[2], heads * q.shape[3]), np.float32)
        attention_forward(q, k, v, column, split(out, heads))
        ctx.saved, ctx.column, ctx.heads = arrays, column, heads
        return ms.Tensor.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, dout):
        (dout,), arrays, heads = _arrays(dout), ctx.saved, ctx.heads
        gradients = [None if array is None else np.empty_like(array) for array in arrays]
        inputs, targets = _heads(arrays, heads), _heads(gradients, heads)
        attention_gradient(*inputs, ctx.column, split(dout, heads), targets)
        return *_tensors(*gradients), None, None


def _heads(arrays: list[np.ndarray | None], heads: int) -> list[np.ndarray]:
    """Return views (B, H, N or M, d) of queries, keys and values."""
    missing = sum(array is None for array in arrays)
    *first, last = (array for array in arrays if array is not None)
    return [split(chunk, heads) for chunk in (*first, *np.split(last, missing + 1, axis=2))]
