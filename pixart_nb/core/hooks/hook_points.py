"""Hook points: attention layers of a transformer at which a ``Hook`` can read or change the computation.

A hook point has the name of its module in the transformer, such as ``blocks.14.attn`` or ``blocks.14.cross_attn``.
Nothing is installed until a hook is attached, and nothing stays when the last one is detached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mindspore import mint

from pixart_nb.core.backend import ms, to_numpy
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.hooks.selection import ATTENTION_MODULES, Numbers, Text, is_cross, step_numbers, text_of
from pixart_nb.core.models.attention import SelfAttention, attention
from pixart_nb.core.models.kv_compression import DepthwiseReduction, compress_tokens
from pixart_nb.core.models.layers import LayerNorm
from pixart_nb.core.models.transformer import PixArt


@dataclass
class HookedRun:
    """One run of the model and the step that it is at.

    ``timesteps`` are the planned ones, None if the model is called directly. The batch has ``rows`` images; with
    guidance the unconditional rows come before them. ``grid`` is (height, width) in tokens, ``length`` the largest
    number of prompt tokens. ``texts`` holds the prompt of each image, ``later_texts`` prompts that replace them.

    Some samplers call the model more than once in a step: ``first`` is True in the first call of each. ``over`` is True
    once the sampler has ended.
    """

    timesteps: np.ndarray | None
    rows: int
    guided: bool
    grid: tuple[int, int]
    length: int
    texts: list[Text] = field(default_factory=list)
    later_texts: list[Text] = field(default_factory=list)
    index: int = -1
    timestep: float = float("nan")
    first: bool = True
    over: bool = False
    sampler_step: int | None = None  # of a pipeline, which numbers the steps; otherwise each call is a step

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.rows * (2 if self.guided else 1)

    @property
    def conditional(self) -> range:
        """Rows of the batch that follow the prompt."""
        return range(self.batch - self.rows, self.batch)


@dataclass(frozen=True)
class LayerCompression:
    """Token compression of a layer; ``reduction`` and ``norm`` are the learned parts of ``conv``."""

    operator: str | None
    ratio: int
    reduction: DepthwiseReduction | None = None
    norm: LayerNorm | None = None

    @classmethod
    def of(cls, layer: Any) -> LayerCompression:
        """Return the compression that an attention layer has of its own."""
        if not isinstance(layer, SelfAttention) or layer.ratio == 1:
            return cls(None, 1)
        return cls(layer.operator, layer.ratio, layer.sr, layer.norm)

    def __call__(self, x: ms.Tensor, height: int, width: int) -> ms.Tensor:
        """Compress x (B, height * width, D) -> (B, (height // R) * (width // R), D)."""
        if self.ratio == 1:
            return x
        return compress_tokens(x, height, width, self.ratio, self.operator, self.reduction, self.norm)


@dataclass
class AttentionCall:
    """Inputs of one attention. A hook may replace the tensors.

    q (B, H, N, d), k and v (B, H, M, d), mask (B, M) bool, scale of the scores, and the bias of the scores of each
    key, (B, H, M) float32 or None. ``texts`` has the prompt of each batch row, None for unconditional rows, and
    ``attention`` is the function that computes it.
    """

    name: str
    run: HookedRun
    q: ms.Tensor
    k: ms.Tensor
    v: ms.Tensor
    mask: ms.Tensor | None
    scale: float
    compression: LayerCompression
    texts: list[Text | None]
    attention: Callable[..., ms.Tensor] = attention
    bias: np.ndarray | None = None

    def add_bias(self, bias: np.ndarray) -> None:
        """Add (B, H, M) to the scores of the keys."""
        self.bias = bias.astype(np.float32) if self.bias is None else self.bias + bias.astype(np.float32)

    def compute(self) -> ms.Tensor:
        """Return the attention, (B, H, N, d). A bias becomes one more component of the keys, which meets a one."""
        if self.bias is None:
            return self.attention(self.q, self.k, self.v, self.mask, self.scale)
        ones = mint.ones((*self.q.shape[:3], 1), dtype=self.q.dtype)
        q = mint.cat((self.q, ones / self.scale), -1)
        k = mint.cat((self.k, ms.Tensor(self.bias[..., None]).astype(self.k.dtype)), -1)
        v = mint.cat((self.v, mint.zeros((*self.v.shape[:3], 1), dtype=self.v.dtype)), -1)  # all of one size
        return attention(q, k, v, self.mask, self.scale)[..., :-1]


class Hook:
    """Base class: reads or changes the attention of layers (``names``) at steps (None is all).

    Override the methods that are needed.
    """

    #: Hooks run in this order: prompts are swapped (0), attention is changed (1), attention is recorded (2).
    order = 1
    #: Manager that the hook is attached to.
    manager: HookManager

    def __init__(self, names: Sequence[str] = (), steps: Numbers = None, description: str = ""):
        #: ``description`` of the change for a trace; empty if nothing is changed.
        self.names, self.steps, self.description = list(names), step_numbers(steps), description

    def applies(self, name: str, run: HookedRun) -> bool:
        """Return True if the hook is for this layer and the current step."""
        return name in self.names and (self.steps is None or run.index in self.steps)

    def on_plan(self, run: HookedRun) -> None:
        """Called before a run starts; an exception refuses the run."""
        if missing := [step for step in self.steps or () if step >= len(run.timesteps)]:
            raise PixArtNBError(f"the run has no steps {missing}; it has steps 0 to {len(run.timesteps) - 1}")
        self.check(run)

    def check(self, run: HookedRun) -> None:
        """Refuse a run by an exception; called before it starts and, as it may not be planned, before each step."""

    def on_prompts(self, run: HookedRun) -> None:
        """Called when the prompts of the run are encoded."""

    def on_step(self, run: HookedRun) -> None:
        """Called before the model is."""
        self.check(run)

    def compression(self, name: str, run: HookedRun) -> LayerCompression | None:
        """Return a compression that replaces the layer's own, or None."""

    def on_tokens(self, name: str, x: ms.Tensor) -> None:
        """Called with a layer's uncompressed keys, then with its uncompressed values, (B, N, D)."""

    def before(self, call: AttentionCall) -> None:
        """Called before an attention is computed."""

    def after(self, call: AttentionCall, out: ms.Tensor) -> ms.Tensor:
        """Return the output of an attention, (B, H, N, d), changed or not."""
        return out


class PerLayer(dict):
    """Cache of values made from tensors that are the same at every step, such as keys of a caption: one per layer."""

    def __call__(self, name: str, source: ms.Tensor, make: Callable[[], Any]) -> Any:
        """Return the layer's value; ``make`` is called again if ``source`` is another tensor object."""
        if name not in self or self[name][0] is not source:
            self[name] = source, make()
        return self[name][1]


@dataclass(frozen=True)
class HookPoint:
    """Installed in an attention layer: computes its attention with all hooks of the manager applied."""

    manager: HookManager
    name: str

    def compress(self, x: ms.Tensor, height: int, width: int) -> ms.Tensor:
        """Return keys or values (B, N, D) on the compressed grid."""
        for hook in self.manager.hooks:
            hook.on_tokens(self.name, x)
        return self.manager.compression(self.name, self.manager.run)(x, height, width)

    def __call__(self, q: ms.Tensor, k: ms.Tensor, v: ms.Tensor, mask: ms.Tensor | None) -> ms.Tensor:
        """Return the attention, (B, H, N, d)."""
        manager, run, cross = self.manager, self.manager.run, is_cross(self.name)
        texts = run.texts or [text_of(None, None, k.shape[2] if cross else 0)] * run.rows
        batch_texts = [None] * (run.batch - run.rows) + list(texts)
        compression = LayerCompression(None, 1) if cross else manager.compression(self.name, run)
        scale = q.shape[-1] ** -0.5
        call = AttentionCall(self.name, run, q, k, v, mask, scale, compression, batch_texts, manager.attention)
        for hook in manager.hooks:
            hook.before(call)
        out = computed = call.compute()
        for hook in manager.hooks:
            out = hook.after(call, out)
        same = call.bias is None and call.q is q and call.k is k and call.v is v and call.mask is mask
        manager.changed = out is not computed or not same
        return out


class HookManager:
    """All hooks of one transformer."""

    def __init__(self, net: PixArt):
        self.net, self.run, self.tokenizer = net, None, None
        self.hooks: list[Hook] = []
        self.attention = attention
        self.changed = False  # True if a hook changed the last attention rather than only read it
        self.layers = dict(attention_layers(net))

    def attach(self, hook: Hook, tokenizer: Any) -> None:
        """Attach a hook; the first one installs the hook points."""
        hook.manager, self.net.hook_manager = self, self
        for name, layer in self.layers.items():
            layer.hook_point = layer.hook_point or HookPoint(self, name)
        self.tokenizer = self.tokenizer or tokenizer
        self.hooks = sorted([*self.hooks, hook], key=lambda h: h.order)

    def detach(self, hook: Hook) -> None:
        """Detach a hook; with the last one the transformer is as it was."""
        self.hooks = [h for h in self.hooks if h is not hook]
        if not self.hooks:
            self.net.hook_manager = None
            for layer in self.layers.values():
                layer.hook_point = None

    # ---- called by the pipeline and the transformer

    def on_plan(self, timesteps, rows: int, guided: bool, height: int, width: int, length: int) -> None:
        """Announce a sampling run: latents height x width, ``rows`` images, prompts of at most ``length`` tokens."""
        patch = self.net.config.patch_size
        self.run = HookedRun(np.asarray(timesteps), rows, guided, (height // patch, width // patch), length)
        for hook in self.hooks:
            hook.on_plan(self.run)

    def on_prompts(self, condition: Any, height: int, width: int) -> None:
        """Announce the encoded prompts of a run of latents height x width; the run need not have been planned."""
        masks, patch = condition.prompt_attention_mask, self.net.config.patch_size
        grid, guided = (height // patch, width // patch), condition.negative_embeds is not None
        run = self.run
        if run is None or run.over or run.index >= 0 or (run.rows, run.guided, run.grid) != (len(masks), guided, grid):
            run = self.run = HookedRun(None, len(masks), guided, grid, masks.shape[1])
        strings = condition.texts or [None] * len(masks)
        run.texts = [text_of(self.tokenizer, s, int(m.sum())) for s, m in zip(strings, masks, strict=True)]
        for hook in self.hooks:
            hook.on_prompts(run)

    def numbered(self, steps: Iterator[Any]) -> Iterator[Any]:
        """Yield the steps of a sampler; all calls of the model until one is yielded belong to it."""
        run = self.run
        try:
            run.sampler_step = 0
            for number, step in enumerate(steps, 1):
                yield step
                run.sampler_step = number
        finally:
            run.over = True

    def on_step(self, timestep: ms.Tensor, height: int, width: int, attention: Callable = attention) -> None:
        """Announce a call of the model with timestep (B,) on height x width tokens, computed by ``attention``."""
        self.attention = attention
        values, run = to_numpy(timestep), self.run
        if run is None or run.over or (run.batch, run.grid) != (len(values), (height, width)):
            run = self.run = HookedRun(None, len(values), False, (height, width), self.net.config.model_max_length)
        index = run.index + 1 if run.sampler_step is None else run.sampler_step
        run.first, run.index, run.timestep = index != run.index, index, float(values[0])
        for hook in self.hooks:
            hook.on_step(run)

    def compression(self, name: str, run: HookedRun) -> LayerCompression:
        """Return the compression of a layer at this step of a run: the last hook decides."""
        for hook in reversed(self.hooks):
            if (compression := hook.compression(name, run)) is not None:
                return compression
        return LayerCompression.of(self.layers[name])


def attention_layers(net: PixArt) -> Iterator[tuple[str, Any]]:
    """Yield every attention layer with the name of its hook point."""
    for number, block in enumerate(net.blocks):
        for module in ATTENTION_MODULES.values():
            yield f"blocks.{number}.{module}", getattr(block, module)


def transformer_of(model: Any) -> PixArt:
    """Return the transformer of a pipeline, or the given transformer."""
    net = model if isinstance(model, PixArt) else getattr(model, "transformer", None)
    if not isinstance(net, PixArt):
        raise PixArtNBError(
            f"expected a pipeline with a transformer, or a PixArt transformer; got {type(model).__name__}"
        )
    return net


@contextmanager
def attached(model: Any, hook: Hook) -> Iterator[PixArt]:
    """Attach a hook to the transformer of a pipeline, or to a transformer, inside the ``with`` block."""
    net = transformer_of(model)
    manager = net.hook_manager or HookManager(net)
    try:
        manager.attach(hook, getattr(model, "tokenizer", None))
        yield net
    finally:
        manager.detach(hook)
