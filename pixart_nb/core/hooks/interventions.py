"""Changes of a run: heads switched off, words weighed, compression replaced, prompts swapped.

Each is a context manager over a pipeline or a transformer; several may be open at once, in any order, together with a
``trace``, which then keeps the changed attention. When the block ends, also with an error, the model is as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from mindspore import mint, ops

from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.hooks.seam import (
    Call,
    Compression,
    Observer,
    Part,
    Remembered,
    Run,
    attached,
    own_compression,
    parts_of,
)
from pixart_nb.core.hooks.selection import (
    Layers,
    Numbers,
    check_steps,
    head_numbers,
    layer_names,
    step_numbers,
)
from pixart_nb.core.hooks.words import Text, find_word
from pixart_nb.core.models.kv_compression import DepthwiseReduction, check_compression
from pixart_nb.core.models.layers import LayerNorm

#: Added to a score to take a word's attention away altogether; finite, and within half precision.
NOTHING = -1e4


class _Change(Part):
    """A change of some layers at some steps."""

    def __init__(self, names: Sequence[str], steps: Numbers):
        self.names, self.steps = set(names), step_numbers(steps)

    def expect(self, run: Run, observer: Observer) -> None:
        check_steps(self.steps, run.timesteps)

    def touches(self, name: str, run: Run) -> bool:
        return name in self.names and (self.steps is None or run.index in self.steps)


# ---- heads


@contextmanager
def heads_off(
    model: Any,
    layers: Layers = None,
    heads: Numbers = None,
    kinds: Sequence[str] = ("self", "cross"),
    steps: Numbers = None,
) -> Iterator[None]:
    """Switch heads off: their output, the weighted sum of values, is zero; the projection's bias stays.

    layers, kinds and steps as those of ``trace``; None is all. All rows of the batch are changed. The attention maps of
    the heads are what they were, so a trace still has them.
    """
    net, _ = parts_of(model)
    names = layer_names(len(net.blocks), layers, kinds)
    with attached(model, HeadsOff(names, head_numbers(net.config.num_heads, heads), steps)):
        yield


class HeadsOff(_Change):
    """See ``heads_off``."""

    def __init__(self, names: Sequence[str], heads: list[int], steps: Numbers = None):
        super().__init__(names, steps)
        self.heads = heads
        self.description = f"heads {heads} off in {', '.join(names)}"

    def after(self, call: Call, out: ms.Tensor) -> ms.Tensor:
        if not self.touches(call.name, call.run):
            return out
        zero = mint.zeros((out.shape[0], 1, *out.shape[2:]), dtype=out.dtype)
        return mint.cat([zero if h in self.heads else out[:, h : h + 1] for h in range(out.shape[1])], 1)


# ---- words


@contextmanager
def scale_word(
    model: Any,
    word: str | int,
    factor: float,
    layers: Layers = None,
    heads: Numbers = None,
    steps: Numbers = None,
    renormalise: bool = True,
) -> Iterator[None]:
    """Scale the attention that the picture pays to a word of the prompt, in cross-attention.

    With ``renormalise`` log(factor) is added to the scores of the word's tokens: their weights are multiplied by
    ``factor`` and each row is normalised again, so the other words get less (or more). A factor of 0 takes it away.
    Without, the weights are multiplied and the rest stays as it is, so rows no longer sum to one (the re-weighting
    of Hertz et al. 2022, section 3); this is computed by scaling the word's values, so a trace shows the map as it was
    before, and the factor may be negative.

    ``word`` as in ``Trace.word_map``: a text, or the number of a word (of a token, where only embeddings are known).
    Rows that follow the prompt are changed; of several prompts those that have the word. None of them, or a factor
    that is no number, is a ValueError, raised before the run.
    """
    if not math.isfinite(factor) or (renormalise and factor < 0):
        raise PixArtNBError(
            f"factor is {factor}; expected a number" + (" of at least 0" if renormalise else "")
        )
    net, _ = parts_of(model)
    names = layer_names(len(net.blocks), layers, ("cross",))
    numbers = head_numbers(net.config.num_heads, heads)
    with attached(model, ScaleWord(names, word, factor, numbers, steps, renormalise)):
        yield


class ScaleWord(_Change):
    """See ``scale_word``."""

    def __init__(self, names, word, factor: float, heads: list[int], steps: Numbers, renormalise: bool):
        super().__init__(names, steps)
        self.word, self.factor, self.heads, self.renormalise = word, float(factor), heads, renormalise
        self.description = f"attention to {word!r} times {factor}" + (
            "" if renormalise else ", not renormalised"
        )
        self.values = Remembered()

    def begin(self, run: Run) -> None:
        """Refuse a word that no prompt has."""
        problems = []
        for text in [*run.texts, *run.later]:
            try:
                find_word(text, self.word)
                return
            except ValueError as error:
                problems.append(error)
        if problems:
            raise problems[0]

    def before(self, call: Call) -> None:
        if not self.touches(call.name, call.run):
            return
        if self.renormalise:
            call.add_bias(self._marks(call) * (math.log(self.factor) if self.factor else NOTHING))
        else:
            call.v = self.values(call.name, (call.v,), lambda: self._scaled(call))

    def _scaled(self, call: Call) -> ms.Tensor:
        factors = 1 + self._marks(call) * (self.factor - 1)
        factors = ms.Tensor(factors[..., None].astype(np.float32)).astype(call.v.dtype)
        return call.v * ops.tile(factors, (1, 1, 1, call.v.shape[3]))

    def _marks(self, call: Call) -> np.ndarray:
        """1 at the word's tokens, in the rows that have it and the heads that were asked for: (B, H, M)."""
        batch, heads, keys, _ = call.k.shape
        marks = np.zeros((batch, heads, keys))
        for row, text in enumerate(call.texts):
            for token in _tokens(text, self.word):
                marks[row, self.heads, token] = 1
        return marks


def _tokens(text: Text | None, word: str | int) -> tuple[int, ...]:
    try:
        return () if text is None else find_word(text, word)
    except ValueError:
        return ()


# ---- compression


@contextmanager
def replace_compression(
    model: Any, layers: Layers = None, ratio: int = 2, operator: str | None = "conv", steps: Numbers = None
) -> Iterator[None]:
    """Compress keys and values of self-attention layers by another ratio or operator; ratio 1 does not compress.

    ``operator`` is one of kv_compression.OPERATORS. ``conv`` takes the layer's own weights where it has them for this
    ratio; else the kernel is the average that training starts from, and the norm the layer's or a fresh one. Raises
    ValueError for what is not known, and, before the run, for a picture too small for the ratio.
    """
    net, _ = parts_of(model)
    names = layer_names(len(net.blocks), layers, ("self",))
    with attached(model, ReplaceCompression(net, names, ratio, operator, steps)):
        yield


class ReplaceCompression(_Change):
    """See ``replace_compression``."""

    def __init__(self, net, names: Sequence[str], ratio: int, operator: str | None, steps: Numbers = None):
        super().__init__(names, steps)
        check_compression(operator, ratio, tuple(range(len(net.blocks))), len(net.blocks))
        layers = {int(name.split(".")[1]): name for name in names}
        self.made = {
            name: made_compression(net.blocks[layer].attn, ratio, operator) for layer, name in layers.items()
        }
        self.ratio = ratio
        said = f"{operator} {ratio}x{ratio}" if ratio > 1 else "no"
        self.description = f"{said} compression in {', '.join(names)}"

    def expect(self, run: Run, observer: Observer) -> None:
        super().expect(run, observer)
        self.step(run, observer)

    def step(self, run: Run, observer: Observer) -> None:
        check_ratio(self.ratio, run.grid)

    def compression(self, name: str, run: Run) -> Compression | None:
        return self.made[name] if self.touches(name, run) else None


def check_ratio(ratio: int, grid: tuple[int, int]) -> None:
    """Refuse a ratio that leaves no key of a token grid."""
    if ratio > min(grid):
        raise PixArtNBError(
            f"compression ratio {ratio} leaves no key of {grid[0]}x{grid[1]} tokens; it may be 1 to {min(grid)}"
        )


def made_compression(layer: Any, ratio: int, operator: str | None) -> Compression:
    """A compression for a self-attention layer, with the layer's own weights where they fit."""
    own = own_compression(layer)
    if ratio == 1:
        return Compression(None, 1)
    if (own.operator, own.ratio) == (operator, ratio):
        return own
    if operator != "conv":
        return Compression(operator, ratio)
    reduction, norm = DepthwiseReduction(layer.size, ratio), own.norm
    norm = LayerNorm(layer.size) if norm is None else norm
    for weight in [*reduction.get_parameters(), *norm.get_parameters()]:
        weight.set_dtype(layer.qkv.dtype)
    return Compression(operator, ratio, reduction, norm)
