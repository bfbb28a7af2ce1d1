"""Interventions on a run: ablate heads, reweight tokens, replace the compression, swap the prompt.

Each returns a context manager over a pipeline or a transformer. Several may be open at once, in any order, together
with a ``trace``, which then records the changed attention. When the block ends, also by an exception, the model is as
it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from mindspore import mint, ops

from pixart_nb.core.backend import ms
from pixart_nb.core.cost import key_count
from pixart_nb.core.errors import PixArtNBError, check_number
from pixart_nb.core.hooks import selection
from pixart_nb.core.hooks.hook_points import (
    AttentionCall,
    Hook,
    HookedRun,
    LayerCompression,
    PerLayer,
    attached,
    transformer_of,
)
from pixart_nb.core.hooks.selection import Layers, Numbers, Text, layer_names, layer_number
from pixart_nb.core.models.kv_compression import DepthwiseReduction, check_compression
from pixart_nb.core.models.layers import LayerNorm
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.sampling.text import as_list, check_embeddings, embed, prepare_prompt

#: Bias of a score that takes all attention away from a token; finite, and within half precision.
NO_ATTENTION = -1e4


# ---- heads


def ablate_heads(
    model: Any,
    layers: Layers = None,
    heads: Numbers = None,
    attention: str | Sequence[str] = ("self", "cross"),
    steps: Numbers = None,
) -> AbstractContextManager:
    """Set the output of heads (the weighted sum of values) to zero; the bias of the projection stays.

    Layers, attention and steps as in ``trace``; None is all. All rows of the batch are changed. The attention maps of
    the heads stay what they are, so a trace still has them.
    """
    net = transformer_of(model)
    names = layer_names(len(net.blocks), layers, attention)
    return attached(model, HeadAblation(names, selection.head_numbers(net.config.num_heads, heads), steps))


class HeadAblation(Hook):
    """Hook of ``ablate_heads``."""

    def __init__(self, names: Sequence[str], heads: list[int], steps: Numbers = None):
        super().__init__(names, steps, f"heads {heads} off in {', '.join(names)}")
        self.heads = heads

    def after(self, call: AttentionCall, out: ms.Tensor) -> ms.Tensor:
        if not self.applies(call.name, call.run):
            return out
        zero = mint.zeros((out.shape[0], 1, *out.shape[2:]), dtype=out.dtype)
        return mint.cat([zero if h in self.heads else out[:, h : h + 1] for h in range(out.shape[1])], 1)


# ---- words


def reweight_token(
    model: Any,
    word: str | int,
    factor: float,
    layers: Layers = None,
    heads: Numbers = None,
    steps: Numbers = None,
    renormalize: bool = True,
) -> AbstractContextManager:
    """Multiply the cross-attention that the image pays to a word of the prompt.

    With ``renormalize`` log(factor) is added to the scores of the word's tokens: their weights are multiplied by
    ``factor`` and each row is normalized again. A factor of 0 removes the word. Without, the weights are multiplied
    and the others stay, so rows no longer sum to one (attention re-weighting, Hertz et al. 2022, section 3); this is
    computed by scaling the word's values, so a trace has the map from before, and the factor may be negative.

    ``word`` as in ``Trace.word_map``. Rows that follow the prompt are changed; of several prompts those that have the
    word. If none has it, or the factor is not a number, PixArtNBError is raised before the run.
    """
    check_number("factor", factor, 0 if renormalize else -math.inf)
    net = transformer_of(model)
    names = layer_names(len(net.blocks), layers, "cross")
    numbers = selection.head_numbers(net.config.num_heads, heads)
    return attached(model, TokenReweighting(names, word, factor, numbers, steps, renormalize))


class TokenReweighting(Hook):
    """Hook of ``reweight_token``."""

    def __init__(self, names, word, factor: float, heads: list[int], steps: Numbers, renormalize: bool):
        suffix = "" if renormalize else ", not renormalized"
        super().__init__(names, steps, f"attention to {word!r} times {factor}{suffix}")
        self.word, self.factor, self.heads, self.renormalize = word, float(factor), heads, renormalize
        self.values = PerLayer()

    def on_prompts(self, run: HookedRun) -> None:
        """Refuse a word that no prompt has."""
        texts = [*run.texts, *run.later_texts]
        if texts and not any(self._tokens(text) for text in texts):
            selection.find_word(texts[0], self.word)

    def before(self, call: AttentionCall) -> None:
        if not self.applies(call.name, call.run):
            return
        if self.renormalize:
            call.add_bias(self._marks(call) * (math.log(self.factor) if self.factor else NO_ATTENTION))
        else:
            call.v = self.values(call.name, call.v, lambda: self._scaled_values(call))

    def _scaled_values(self, call: AttentionCall) -> ms.Tensor:
        factors = 1 + self._marks(call) * (self.factor - 1)
        factors = ms.Tensor(factors[..., None].astype(np.float32)).astype(call.v.dtype)
        return call.v * ops.tile(factors, (1, 1, 1, call.v.shape[3]))

    def _marks(self, call: AttentionCall) -> np.ndarray:
        """Return 1 at the word's tokens in the chosen heads, else 0: (B, H, M)."""
        marks = np.zeros(call.k.shape[:3])
        for row, text in enumerate(call.texts):
            for token in self._tokens(text):
                marks[row, self.heads, token] = 1
        return marks

    def _tokens(self, text: Text | None) -> tuple[int, ...]:
        try:
            return () if text is None else selection.find_word(text, self.word)
        except PixArtNBError:
            return ()


# ---- compression


def replace_compression(
    model: Any, layers: Layers = None, ratio: int = 2, operator: str | None = "conv", steps: Numbers = None
) -> AbstractContextManager:
    """Compress keys and values of self-attention layers with another ratio or operator; ratio 1 does not compress.

    ``operator`` is one of ``kv_compression.OPERATORS``. ``conv`` uses the layer's own weights if it has them for this
    ratio; else the kernel is the average that training starts from, and the norm the layer's own or a new one. An image
    that is too small for the ratio is refused before the run.
    """
    net = transformer_of(model)
    names = layer_names(len(net.blocks), layers, "self")
    return attached(model, CompressionReplacement(net, names, ratio, operator, steps))


class CompressionReplacement(Hook):
    """Hook of ``replace_compression``."""

    def __init__(self, net: PixArt, names: Sequence[str], ratio: int, operator: str | None, steps: Numbers = None):
        label = f"{operator} {ratio}x{ratio}" if ratio > 1 else "no"
        super().__init__(names, steps, f"{label} compression in {', '.join(names)}")
        self.ratio, self.compressions = ratio, compressions_of(net, names, ratio, operator)

    def check(self, run: HookedRun) -> None:
        key_count(run.grid, self.ratio)  # refuses a ratio that leaves no key

    def compression(self, name: str, run: HookedRun) -> LayerCompression | None:
        return self.compressions[name] if self.applies(name, run) else None


def compressions_of(net: PixArt, names: Sequence[str], ratio: int, operator: str | None) -> dict[str, LayerCompression]:
    """Return a compression for each self-attention layer, with the layer's own weights where they fit."""
    layers = list(range(len(net.blocks)))
    check_compression({"sampling": operator, "scale_factor": ratio, "kv_compress_layer": layers}, len(layers))
    return {name: _compression(net.blocks[layer_number(name)].attn, ratio, operator) for name in names}


def _compression(layer: Any, ratio: int, operator: str | None) -> LayerCompression:
    own = LayerCompression.of(layer)
    if ratio == 1:
        return LayerCompression(None, 1)
    if (own.operator, own.ratio) == (operator, ratio):
        return own
    if operator != "conv":
        return LayerCompression(operator, ratio)
    reduction = DepthwiseReduction(layer.size, ratio)
    norm = LayerNorm(layer.size) if own.norm is None else own.norm
    for weight in [*reduction.get_parameters(), *norm.get_parameters()]:
        weight.set_dtype(layer.qkv.dtype)
    return LayerCompression(operator, ratio, reduction, norm)


# ---- prompts


def swap_prompt(
    model: Any,
    at_step: int,
    prompt: str | Sequence[str] | None = None,
    *,
    prompt_embeds: ms.Tensor | None = None,
    prompt_attention_mask: Any = None,
    clean_caption: bool = True,
    max_sequence_length: int | None = None,
) -> AbstractContextManager:
    """Replace the prompt from step ``at_step`` on (counted from 0); unconditional rows stay.

    The new prompt is encoded once, when this is called, or given as embeddings and mask of ``pipe.encode_prompt``. Give
    one for all images, or one for each. Another number of prompts, or a step that the run does not have, is refused.
    """
    net, tokenizer = transformer_of(model), getattr(model, "tokenizer", None)
    if isinstance(at_step, bool) or not isinstance(at_step, (int, np.integer)) or at_step < 0:
        raise PixArtNBError(f"at_step is {at_step!r}; expected a step number, counted from 0")
    if (prompt is None) == (prompt_embeds is None):
        raise PixArtNBError("give either a prompt, or prompt_embeds and prompt_attention_mask")
    if prompt_embeds is None:
        prompts: list[str | None] = [prepare_prompt(text, clean_caption) for text in as_list(prompt)]
        length = max_sequence_length or getattr(model, "max_sequence_length", net.config.model_max_length)
        encoder = getattr(model, "text_encoder", None)
        embeds, mask = embed(tokenizer, encoder, as_list(prompt), clean_caption, length, trim=True)
    else:
        embeds, mask = check_embeddings(prompt_embeds, prompt_attention_mask, None, net.config.caption_channels)
        prompts = [None] * len(mask)
    texts = [selection.text_of(tokenizer, text, int(m.sum())) for text, m in zip(prompts, mask, strict=True)]
    return attached(model, PromptSwap(int(at_step), net.caption_keys_values(embeds), mask, texts))


class PromptSwap(Hook):
    """Hook of ``swap_prompt``. Runs first, so that other hooks see the tokens of the new prompt."""

    order = 0

    def __init__(self, at_step: int, keys_values: list, mask: np.ndarray, texts: list[Text]):
        super().__init__((), at_step, f"prompt {' | '.join(text.prompt for text in texts)!r} from step {at_step}")
        self.at_step, self.keys_values, self.mask, self.texts = at_step, keys_values, mask, texts
        self.keys, self.values = PerLayer(), PerLayer()

    def check(self, run: HookedRun) -> None:
        if len(self.texts) not in (1, run.rows):
            problem = f"{len(self.texts)} prompts to swap in for {run.rows} images"
            raise PixArtNBError(f"{problem}; give one, or one for each")

    def on_prompts(self, run: HookedRun) -> None:
        run.later_texts = run.later_texts + self.texts

    def before(self, call: AttentionCall) -> None:
        if not selection.is_cross(call.name) or call.run.index < self.at_step:
            return
        k, v = self.keys_values[layer_number(call.name)]
        call.mask = ms.Tensor(self._mask(call))
        call.k = self.keys(call.name, call.k, lambda: _swapped(call.k, k, call.run))
        call.v = self.values(call.name, call.v, lambda: _swapped(call.v, v, call.run))
        first = call.run.conditional[0]
        call.texts[first:] = self.texts * (call.run.rows // len(self.texts))

    def _mask(self, call: AttentionCall) -> np.ndarray:
        """Return the old mask of the unconditional rows and the new one of the others: (B, longest) bool."""
        batch, keys, first = call.run.batch, call.k.shape[2], call.run.conditional[0]
        mask = np.zeros((batch, max(keys, self.mask.shape[1])), bool)
        mask[:first, :keys] = True if call.mask is None else call.mask.asnumpy()[:first]
        mask[first:, : self.mask.shape[1]] = self.mask
        return mask


def _swapped(old: ms.Tensor, new: ms.Tensor, run: HookedRun) -> ms.Tensor:
    """Return keys or values (B, H, M, d) with the new prompt's in the conditional rows, padded to one length."""
    length, first = max(old.shape[2], new.shape[2]), run.conditional[0]
    new = _padded(ops.tile(new, (run.rows // new.shape[0], 1, 1, 1)).astype(old.dtype), length)
    return mint.cat([_padded(old[:first], length), new], 0) if first else new


def _padded(x: ms.Tensor, length: int) -> ms.Tensor:
    missing = length - x.shape[2]
    if not missing:
        return x
    return mint.cat((x, mint.zeros((*x.shape[:2], missing, x.shape[3]), dtype=x.dtype)), 2)
