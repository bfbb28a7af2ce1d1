"""Gradient checkpointing of a block on the CPU: the backward pass computes its activations again.

The input of each block and the output of its MLP are kept, so that the last matrix product is not computed twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mindspore.common._grad_function import _Function

from pixart_nb.core.backend import ms
from pixart_nb.core.fast.cpu_training import (
    AddLinear,
    AddMLP,
    Attention,
    LinearLayer,
    ModulatedLinear,
    TrainingBlock,
    block_steps,
)
from pixart_nb.core.models.transformer import Block


def recompute_activations(blocks: Iterable[Block]) -> None:
    """Enable gradient checkpointing of blocks: less memory, more time. Call it after ``use_fast_blocks``.

    Blocks with compressed keys or normalized queries, and those that ``TrainingBlock`` does not support, are recomputed
    whole by MindSpore (``Cell.recompute``).
    """
    for block in blocks:
        fast = block.fast
        if fast is not None and fast.has_plain_attention() and fast.supports(block.attn.proj.weight):
            block.fast = RecomputedBlock(block)
        else:
            block.recompute()


class RecomputedBlock(TrainingBlock):
    """``TrainingBlock`` with gradient checkpointing, for attention without normalized queries or compressed keys."""

    def __call__(self, x, kv, _, mask, t0, height: int, width: int) -> ms.Tensor:
        return RecomputedSteps.apply(x, kv, *self.inputs(mask, t0))


class RecomputedSteps(_Function):
    """``block_steps`` of x (B, N, D), keys and values of the caption (B, T, 2 D), modulation (B, 6, D) and weights."""

    @staticmethod
    def forward(ctx: Any, *inputs):
        contexts: list[_Context] = []

        def run(step: type[_Function], *values: Any) -> ms.Tensor:
            contexts[:] = [_Context()]  # that of the step before is freed
            return step.forward(contexts[0], *values)

        out = block_steps(run, _fused_qkv, *inputs)
        ctx.inputs, ctx.mlp_output = inputs, contexts[0].saved[-1]
        return out

    @staticmethod
    def backward(ctx: Any, dout):
        needed = {id(value): flag for value, flag in zip(ctx.inputs, ctx.needs_input_grad, strict=True)}
        contexts: list[_Context] = []

        def run(step: type[_Function], *values: Any) -> ms.Tensor:
            contexts.append(_Context([needed.get(id(value), True) for value in values]))
            kept = (ctx.mlp_output,) if step is AddMLP else ()
            return step.forward(contexts[-1], *values, *kept)

        block_steps(run, _fused_qkv, *ctx.inputs)
        return *_gradients(contexts, dout), None


class _Context:
    """Tensors that a step keeps for its gradient, in place of MindSpore's context."""

    def __init__(self, needs_input_grad: Sequence[bool] = ()):
        self.needs_input_grad = needs_input_grad


def _fused_qkv(qkv: ms.Tensor) -> tuple[ms.Tensor, None, None]:
    return qkv, None, None


def _gradients(contexts: Sequence[_Context], dout: ms.Tensor) -> tuple[ms.Tensor | None, ...]:
    """Return the gradients of ``block_steps`` by its tensors, from the contexts of its steps."""
    first, attention, proj, query, cross, out, mlp = contexts
    dx, dmodulation, *of_mlp = AddMLP.backward(mlp, dout)[:6]
    dx, dattended, _, *of_out = AddLinear.backward(out, dx)[:5]
    dq, dkv, *_ = Attention.backward(cross, dattended)
    further, *of_query = LinearLayer.backward(query, dq)
    dx, dattended, dgate, *of_proj = AddLinear.backward(proj, dx + further)[:5]
    dqkv, *_ = Attention.backward(attention, dattended)
    further, dfirst, *of_first = ModulatedLinear.backward(first, dqkv)[:4]
    return dx + further, dkv, dmodulation + dgate + dfirst, *of_first, *of_proj, *of_query, *of_out, *of_mlp
