"""A change of a run: another prompt from some step on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from mindspore import mint, ops

from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.hooks.seam import Call, Observer, Part, Remembered, Run, attached, parts_of
from pixart_nb.core.hooks.selection import check_steps, is_cross
from pixart_nb.core.hooks.words import Text, text_of
from pixart_nb.core.sampling.conditioning import as_list, check_embeddings, embed, given_conditioning
from pixart_nb.core.sampling.text import prepare_prompt


@contextmanager
def swap_prompt(
    model: Any,
    at_step: int,
    prompt: str | Sequence[str] | None = None,
    *,
    prompt_embeds: ms.Tensor | None = None,
    prompt_attention_mask: Any = None,
    clean_caption: bool = True,
    max_sequence_length: int | None = None,
) -> Iterator[None]:
    """Let the rows that follow the prompt follow another one from step ``at_step`` on (counted from 0).

    The new prompt is encoded here, once, or given as the embeddings and mask of ``pipe.encode_prompt``. One is for
    all pictures; several are one for each. The unconditional rows stay. Raises ValueError for a step that the run does
    not have, and for a number of prompts that is not that of the pictures.
    """
    net, tokenizer = parts_of(model)
    if isinstance(at_step, bool) or not isinstance(at_step, (int, np.integer)) or at_step < 0:
        raise PixArtNBError(f"at_step is {at_step!r}; expected the number of a step, counted from 0")
    if (prompt is None) == (prompt_embeds is None):
        raise PixArtNBError("give either a prompt, or prompt_embeds and prompt_attention_mask")
    if prompt_embeds is None:
        prompts: list[str | None] = [prepare_prompt(text, clean_caption) for text in as_list(prompt)]
        length = max_sequence_length or getattr(model, "max_sequence_length", net.config.model_max_length)
        encoder = getattr(model, "text_encoder", None)
        embeds, mask = embed(tokenizer, encoder, as_list(prompt), clean_caption, length, trim=True)
    else:
        given = (prompt_embeds, prompt_attention_mask, None, None)
        check_embeddings(given, False, net.config.caption_channels)
        condition = given_conditioning(given, False)
        embeds, mask = condition.prompt_embeds, condition.prompt_attention_mask
        prompts = [None] * len(mask)
    texts = [text_of(tokenizer, text, int(m.sum())) for text, m in zip(prompts, mask, strict=True)]
    with attached(model, SwapPrompt(at_step, net.caption_keys_values(embeds), mask, texts)):
        yield


class SwapPrompt(Part):
    """See ``swap_prompt``. Comes first, so that what else changes attention finds the new prompt's tokens."""

    order = 0

    def __init__(
        self,
        at_step: int,
        keys_values: list[tuple[ms.Tensor, ms.Tensor]],
        mask: np.ndarray,
        texts: list[Text],
    ):
        self.at_step, self.keys_values, self.mask, self.texts = int(at_step), keys_values, mask, texts
        self.description = f"prompt {' | '.join(text.prompt for text in texts)!r} from step {at_step}"
        self.keys, self.values = Remembered(), Remembered()

    def expect(self, run: Run, observer: Observer) -> None:
        check_steps([self.at_step], run.timesteps)
        self.step(run, observer)

    def step(self, run: Run, observer: Observer) -> None:
        if len(self.texts) not in (1, run.rows):
            raise PixArtNBError(
                f"{len(self.texts)} prompts to swap in for {run.rows} pictures; give one, or one for each"
            )

    def begin(self, run: Run) -> None:
        run.later = run.later + self.texts

    def before(self, call: Call) -> None:
        if not is_cross(call.name) or call.run.index < self.at_step:
            return
        k, v = self.keys_values[int(call.name.split(".")[1])]
        call.mask = ms.Tensor(self._mask(call))
        call.k = self.keys(call.name, (call.k,), lambda: _swapped(call.k, k, call.run))
        call.v = self.values(call.name, (call.v,), lambda: _swapped(call.v, v, call.run))
        first = call.run.conditional[0]
        call.texts[first:] = self.texts * (call.run.rows // len(self.texts))

    def _mask(self, call: Call) -> np.ndarray:
        """(B, longest) bool: the old mask of the unconditional rows, the new one of the others."""
        old = (
            np.ones((call.run.batch, call.k.shape[2]), bool)
            if call.mask is None
            else call.mask.asnumpy().astype(bool)
        )
        mask = np.zeros((call.run.batch, max(old.shape[1], self.mask.shape[1])), bool)
        first = call.run.conditional[0]
        mask[:first, : old.shape[1]] = old[:first]
        mask[first:, : self.mask.shape[1]] = self.mask
        return mask


def _swapped(old: ms.Tensor, new: ms.Tensor, run: Run) -> ms.Tensor:
    """Keys or values (B, H, M, d) with those of the new prompt in the conditional rows, both padded to one length."""
    length, first = max(old.shape[2], new.shape[2]), run.conditional[0]
    new = ops.tile(new, (run.rows // new.shape[0], 1, 1, 1)).astype(old.dtype)
    parts = [_padded(new, length)]
    return mint.cat([_padded(old[:first], length), *parts], 0) if first else parts[0]


def _padded(x: ms.Tensor, length: int) -> ms.Tensor:
    """(B, H, M, d) with zeros up to ``length`` keys."""
    short = length - x.shape[2]
    if not short:
        return x
    return mint.cat((x, mint.zeros((*x.shape[:2], short, x.shape[3]), dtype=x.dtype)), 2)
