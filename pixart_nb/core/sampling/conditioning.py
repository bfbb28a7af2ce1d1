"""Text conditioning: prompts or given embeddings, validated and brought to one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.attention import check_mask
from pixart_nb.core.models.t5 import T5Encoder
from pixart_nb.core.sampling.text import TextTokenizer, prepare_prompt


@dataclass(frozen=True)
class Conditioning:
    """Embeddings (N, T, C) of the prompts, and masks (N, T) bool, True = token.

    The negative ones are None without guidance. ``texts`` are the prompts as they were tokenized, one for each row, or
    None where embeddings were given.
    """

    prompt_embeds: ms.Tensor
    prompt_attention_mask: np.ndarray
    negative_embeds: ms.Tensor | None
    negative_mask: np.ndarray | None
    texts: tuple[str, ...] | None = None


def as_list(prompt: str | Sequence[str] | None) -> list[str]:
    """Return one prompt or several as a list. No prompt is an error."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise PixArtNBError(f"prompt is {prompt!r}; expected a text or a list of at least one text")
    return prompts


def per_prompt(negative: str | Sequence[str] | None, count: int) -> list[str]:
    """Return a negative prompt for each of ``count`` prompts; None is the empty one."""
    negatives = [negative or ""] * count if negative is None or isinstance(negative, str) else list(negative)
    if len(negatives) != count:
        raise PixArtNBError(f"{len(negatives)} negative prompts for {count} prompts; give one text, or one for each")
    return negatives


def embed(
    tokenizer: TextTokenizer | None,
    text_encoder: T5Encoder | None,
    prompts: Sequence[str],
    clean: bool,
    length: int,
    trim: bool = False,
) -> tuple[ms.Tensor, np.ndarray]:
    """Return embeddings (N, T, C) and mask (N, T) of prompts; T is ``length``, with ``trim`` the longest prompt's."""
    if tokenizer is None or text_encoder is None:
        raise PixArtNBError(
            "this pipeline has no text encoder or no tokenizer; give prompt_embeds and prompt_attention_mask, and the "
            "same two for the negative prompt"
        )
    ids, mask = tokenizer.tokenize([prepare_prompt(text, clean) for text in prompts], length)
    if trim:
        longest = int(mask.sum(1).max())
        ids, mask = ids[:, :longest], mask[:, :longest]
    return text_encoder(ids, mask), mask


def repeat_rows(embeds: ms.Tensor, mask: np.ndarray, copies: int) -> tuple[ms.Tensor, np.ndarray]:
    """Return every row ``copies`` times, the copies of a prompt side by side."""
    return (embeds.repeat_interleave(copies, 0), mask.repeat(copies, 0)) if copies > 1 else (embeds, mask)


def check_embeddings(
    embeds: Any, mask: Any, rows: int | None, channels: int | None, name: str = "prompt"
) -> tuple[ms.Tensor, np.ndarray]:
    """Return given embeddings (N, T, channels) as a tensor and their mask (N, T) as bool, or say what is wrong.

    ``rows``: N, if it is known. ``name``: prompt or negative_prompt, for the message.
    """
    if mask is None:
        raise PixArtNBError(f"{name}_embeds needs {name}_attention_mask, (N, T) with 1 for a token and 0 for padding")
    embeds = embeds if isinstance(embeds, ms.Tensor) else ms.Tensor(np.asarray(embeds, np.float32))
    mask = np.asarray(mask.asnumpy() if isinstance(mask, ms.Tensor) else mask).astype(bool)
    channels = channels or embeds.shape[-1]
    expected = (rows or embeds.shape[0], embeds.shape[1] if embeds.ndim == 3 else "T", channels)
    if embeds.ndim != 3 or tuple(embeds.shape) != expected:
        raise PixArtNBError(f"{name}_embeds have shape {tuple(embeds.shape)}; expected {expected}")
    if mask.shape != tuple(embeds.shape[:2]):
        raise PixArtNBError(f"{name}_attention_mask has shape {mask.shape}; expected {tuple(embeds.shape[:2])}")
    check_mask(mask)
    return embeds, mask


def stack_rows(condition: Conditioning) -> tuple[ms.Tensor, np.ndarray]:
    """Return negative rows, then prompt rows, padded to one length: embeddings (2N, T, C) and mask (2N, T)."""
    parts = (condition.negative_embeds, condition.prompt_embeds)
    masks = (condition.negative_mask, condition.prompt_attention_mask)
    length = max(mask.shape[1] for mask in masks)
    padded = [np.pad(p.astype(ms.float32).asnumpy(), ((0, 0), (0, length - p.shape[1]), (0, 0))) for p in parts]
    mask = np.concatenate([np.pad(m, ((0, 0), (0, length - m.shape[1]))) for m in masks])
    return ms.Tensor(np.concatenate(padded)), mask
