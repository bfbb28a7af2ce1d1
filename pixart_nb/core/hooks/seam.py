"""Where attention is watched and changed: a probe on each attention layer, and one observer that they report to.

Nothing is installed until a part (a trace, an intervention) is attached, and nothing stays when the last one leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mindspore import mint

from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.hooks.selection import KINDS, is_cross
from pixart_nb.core.hooks.words import Text, text_of
from pixart_nb.core.models.attention import SelfAttention, attention
from pixart_nb.core.models.kv_compression import DepthwiseReduction, compress_tokens
from pixart_nb.core.models.layers import LayerNorm
from pixart_nb.core.models.transformer import PixArt


@dataclass
class Run:
    """One run of the model: what is known before it starts, and the step that it is at.

    ``timesteps`` are the planned ones, None when the model is called by itself. The batch has ``rows`` pictures; with
    guidance the unconditional rows come before them. ``grid`` is (height, width) in tokens, ``length`` the most tokens
    that a prompt may have. ``texts`` has the prompt of each picture, ``later`` those that will take their place.
    """

    timesteps: np.ndarray | None
    rows: int
    guided: bool
    grid: tuple[int, int]
    length: int
    texts: list[Text] = field(default_factory=list)
    later: list[Text] = field(default_factory=list)
    index: int = -1
    timestep: float = float("nan")

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.rows * (2 if self.guided else 1)

    @property
    def conditional(self) -> range:
        """Rows of the batch that follow the prompt."""
        return range(self.batch - self.rows, self.batch)


@dataclass(frozen=True)
class Compression:
    """How a layer's keys and values are shrunk; ``reduction`` and ``norm`` are the learned parts of ``conv``."""

    operator: str | None
    ratio: int
    reduction: DepthwiseReduction | None = None
    norm: LayerNorm | None = None

    def __call__(self, x: ms.Tensor, height: int, width: int) -> ms.Tensor:
        """x (B, height * width, D) -> (B, (height // R) * (width // R), D)."""
        if self.ratio == 1:
            return x
        return compress_tokens(x, height, width, self.ratio, self.operator, self.reduction, self.norm)


@dataclass
class Call:
    """One attention, about to be computed. Parts may replace the tensors.

    q (B, H, N, d), k and v (B, H, M, d), mask (B, M) bool, scale of the scores, and what is added to the scores of each
    key, (B, H, M) float32 or None. ``texts`` has the prompt of each batch row, None for unconditional rows.
    """

    name: str
    run: Run
    q: ms.Tensor
    k: ms.Tensor
    v: ms.Tensor
    mask: ms.Tensor | None
    scale: float
    compression: Compression
    texts: list[Text | None]
    bias: np.ndarray | None = None

    def add_bias(self, bias: np.ndarray) -> None:
        """Add (B, H, M) to the scores of the keys."""
        self.bias = bias.astype(np.float32) if self.bias is None else self.bias + bias.astype(np.float32)

    def compute(self) -> ms.Tensor:
        """The attention: (B, H, N, d). A bias goes in as one more component of the keys, which meets a one."""
        if self.bias is None:
            return attention(self.q, self.k, self.v, self.mask, self.scale)
        ones = mint.ones((*self.q.shape[:3], 1), dtype=self.q.dtype)
        q = mint.cat((self.q, ones / self.scale), -1)
        k = mint.cat((self.k, ms.Tensor(self.bias[..., None]).astype(self.k.dtype)), -1)
        v = mint.cat((self.v, mint.zeros((*self.v.shape[:3], 1), dtype=self.v.dtype)), -1)  # all of one size
        return attention(q, k, v, self.mask, self.scale)[..., :-1]


class Part:
    """Something that watches or changes attention. Every method may be left as it is."""

    #: Parts have their say in this order: prompts are swapped, then attention is changed, then it is watched.
    order = 1
    #: What it does, for whoever looks at a trace later; empty for what changes nothing.
    description = ""

    def expect(self, run: Run, observer: Observer) -> None:
        """A run is about to start; the place to refuse it."""

    def begin(self, run: Run) -> None:
        """The prompts of the run are known."""

    def step(self, run: Run, observer: Observer) -> None:
        """The model is about to be called."""

    def compression(self, name: str, run: Run) -> Compression | None:
        """What compresses a layer instead of what the layer has."""

    def uncompressed(self, name: str, x: ms.Tensor) -> None:
        """A layer's full keys, then its full values, (B, N, D)."""

    def before(self, call: Call) -> None:
        """An attention is about to be computed."""

    def after(self, call: Call, out: ms.Tensor) -> ms.Tensor:
        """Its output (B, H, N, d)."""
        return out


class Remembered:
    """Tensors made of a caption's keys and values, which are the same at every step: made once for each layer."""

    def __init__(self):
        self.made: dict[str, tuple[tuple, Any]] = {}

    def __call__(self, name: str, sources: tuple, make: Callable[[], Any]) -> Any:
        known = self.made.get(name)
        if known is None or any(a is not b for a, b in zip(known[0], sources, strict=True)):
            known = self.made[name] = (sources, make())
        return known[1]


class Probe:
    """Stands in an attention layer and passes on what happens there, with the layer's name."""

    def __init__(self, observer: Observer, name: str, layer: Any):
        self.observer, self.name, self.layer = observer, name, layer

    def attend(self, q: ms.Tensor, k: ms.Tensor, v: ms.Tensor, mask: ms.Tensor | None) -> ms.Tensor:
        return self.observer.attend(self.name, q, k, v, mask)

    def compress(self, layer: SelfAttention, x: ms.Tensor, height: int, width: int) -> ms.Tensor:
        return self.observer.compress(self.name, x, height, width)


class Observer:
    """All parts that watch or change one model."""

    def __init__(self, net: PixArt):
        self.net, self.run, self.tokenizer = net, None, None
        self.parts: list[Part] = []
        self.changed = False  # whether a part changed the last attention, rather than watched it
        self.layers = dict(attention_layers(net))

    def add(self, part: Part, tokenizer: Any) -> None:
        """Attach a part; the first one installs the probes."""
        if not self.parts:
            self.net.observer = self
            for name, layer in self.layers.items():
                layer.probe = Probe(self, name, layer)
        self.tokenizer = self.tokenizer or tokenizer
        self.parts = sorted([*self.parts, part], key=lambda p: p.order)

    def remove(self, part: Part) -> None:
        """Detach a part; with the last one the model is as it was."""
        self.parts = [p for p in self.parts if p is not part]
        if not self.parts:
            self.net.observer = None
            for layer in self.layers.values():
                layer.probe = None

    # ---- what the pipeline and the model report

    def expect(self, timesteps, rows: int, guided: bool, height: int, width: int, length: int) -> None:
        """A sampling run of latents height x width was asked for: ``rows`` pictures, prompts of ``length`` at most."""
        patch = self.net.config.patch_size
        self.run = Run(np.asarray(timesteps), rows, guided, (height // patch, width // patch), length)
        for part in self.parts:
            part.expect(self.run, self)

    def begin(self, condition: Any, height: int, width: int) -> None:
        """The prompts of a run of latents height x width are encoded; it need not have been expected."""
        masks, patch = condition.prompt_attention_mask, self.net.config.patch_size
        grid, guided = (height // patch, width // patch), condition.negative_embeds is not None
        run = self.run
        if run is None or run.index >= 0 or (run.rows, run.guided, run.grid) != (len(masks), guided, grid):
            run = self.run = Run(None, len(masks), guided, grid, masks.shape[1])
        strings = condition.texts or [None] * len(masks)
        run.texts = [text_of(self.tokenizer, s, int(m.sum())) for s, m in zip(strings, masks, strict=True)]
        for part in self.parts:
            part.begin(run)

    def step(self, timestep: ms.Tensor, height: int, width: int) -> None:
        """The model is called with timestep (B,) on height x width tokens."""
        values = timestep.astype(ms.float32).asnumpy()
        if not self._continues(len(values), (height, width)):
            self.run = Run(None, len(values), False, (height, width), self.net.config.model_max_length)
        self.run.index += 1
        self.run.timestep = float(values[0])
        for part in self.parts:
            part.step(self.run, self)

    def _continues(self, batch: int, grid: tuple[int, int]) -> bool:
        run = self.run
        if run is None or (run.batch, run.grid) != (batch, grid):
            return False
        return run.timesteps is None or run.index + 1 < len(run.timesteps)

    # ---- what the probes report

    def compression(self, name: str, run: Run) -> Compression:
        """What compresses a layer at this step of a run: the part that came last decides."""
        for part in reversed(self.parts):
            if (found := part.compression(name, run)) is not None:
                return found
        return own_compression(self.layers[name])

    def compress(self, name: str, x: ms.Tensor, height: int, width: int) -> ms.Tensor:
        """Keys or values (B, N, D) on the grid that this run gives them."""
        for part in self.parts:
            part.uncompressed(name, x)
        return self.compression(name, self.run)(x, height, width)

    def attend(self, name: str, q: ms.Tensor, k: ms.Tensor, v: ms.Tensor, mask: ms.Tensor | None):
        """The attention of a layer, with every part's say: (B, H, N, d)."""
        run = self.run
        texts = run.texts or [text_of(None, None, k.shape[2] if is_cross(name) else 0)] * run.rows
        kept = Compression(None, 1) if is_cross(name) else self.compression(name, run)
        every = [None] * (run.batch - run.rows) + list(texts)
        call = Call(name, run, q, k, v, mask, q.shape[-1] ** -0.5, kept, every)
        for part in self.parts:
            part.before(call)
        out = computed = call.compute()
        for part in self.parts:
            out = part.after(call, out)
        kept = call.bias is None and call.q is q and call.k is k and call.v is v and call.mask is mask
        self.changed = out is not computed or not kept
        return out


def own_compression(layer: Any) -> Compression:
    """The compression that an attention layer has of itself."""
    if not isinstance(layer, SelfAttention) or layer.ratio == 1:
        return Compression(None, 1)
    return Compression(layer.operator, layer.ratio, layer.sr, layer.norm)


def attention_layers(net: PixArt) -> Iterator[tuple[str, Any]]:
    """Every attention layer by its stable name: ``blocks.14.attn``, ``blocks.14.cross_attn``."""
    for number, block in enumerate(net.blocks):
        for part in KINDS.values():
            yield f"blocks.{number}.{part}", getattr(block, part)


def parts_of(model: Any) -> tuple[PixArt, Any]:
    """The transformer of a pipeline or of itself, and the pipeline's tokenizer (None without one)."""
    if isinstance(model, PixArt):
        return model, None
    net = getattr(model, "transformer", None)
    if not isinstance(net, PixArt):
        raise PixArtNBError(
            f"expected a pipeline with a transformer, or a PixArt transformer; got {type(model).__name__}"
        )
    return net, model.tokenizer


@contextmanager
def attached(model: Any, part: Part) -> Iterator[PixArt]:
    """Attach a part to a pipeline's transformer, or to a transformer, for the length of the block."""
    net, tokenizer = parts_of(model)
    observer = net.observer or Observer(net)
    observer.add(part, tokenizer)
    try:
        yield net
    finally:
        observer.remove(part)
