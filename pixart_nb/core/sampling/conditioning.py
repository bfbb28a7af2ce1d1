"""What a picture is conditioned on: prompts or embeddings, checked and brought into one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.attention import check_mask
from pixart_nb.core.models.t5 import T5Encoder
from pixart_nb.core.sampling.text import TextTokenizer, prepare_prompt


@dataclass(frozen=True)
class Conditioning:
    """What the text encoder made of the prompts: embeddings (N, T, C) and masks (N, T) bool, True = token.

    The negative ones are None without guidance. ``texts`` are the prompts as they were tokenized, one for each row,
    None where embeddings were given.
    """

    prompt_embeds: ms.Tensor
    prompt_attention_mask: np.ndarray
    negative_embeds: ms.Tensor | None
    negative_mask: np.ndarray | None
    texts: tuple[str, ...] | None = None


def check_embeddings(given: tuple, guided: bool, channels: int) -> None:
    """Refuse embeddings (N, T, channels) and masks (N, T) that are incomplete or do not fit each other."""
    embeds, mask, negative, negative_mask = given
    if mask is None or (guided and (negative is None or negative_mask is None)):
        raise PixArtNBError(
            "prompt_embeds needs prompt_attention_mask and, with guidance above 1, negative_prompt_embeds and "
            "negative_prompt_attention_mask"
        )
    pairs = [("prompt", embeds, mask)] + ([("negative_prompt", negative, negative_mask)] if guided else [])
    for name, values, seen in pairs:
        expected = (embeds.shape[0], values.shape[1] if values.ndim == 3 else "T", channels)
        if values.ndim != 3 or tuple(values.shape) != expected:
            raise PixArtNBError(f"{name}_embeds have shape {tuple(values.shape)}; expected {expected}")
        if tuple(seen.shape) != tuple(values.shape[:2]):
            raise PixArtNBError(
                f"{name}_attention_mask has shape {tuple(seen.shape)}; expected {tuple(values.shape[:2])}"
            )


def as_list(prompt: str | Sequence[str] | None) -> list[str]:
    """One prompt or several as a list; none at all is an error."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise PixArtNBError(f"prompt is {prompt!r}; expected a text or a list of at least one text")
    return prompts


def per_prompt(negative: str | Sequence[str] | None, count: int) -> list[str]:
    """A negative prompt for each of ``count`` prompts; None is the empty one."""
    negatives = [negative or ""] * count if negative is None or isinstance(negative, str) else list(negative)
    if len(negatives) != count:
        raise PixArtNBError(
            f"{len(negatives)} negative prompts for {count} prompts; give one text, or one for each"
        )
    return negatives


def embed(
    tokenizer: TextTokenizer | None,
    text_encoder: T5Encoder | None,
    prompts: Sequence[str],
    clean: bool,
    length: int,
    trim: bool = False,
) -> tuple[ms.Tensor, np.ndarray]:
    """Embeddings (N, T, C) and mask (N, T) of prompts; with ``trim`` T is the longest prompt's, else ``length``."""
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
    """Every row ``copies`` times, the copies of a prompt side by side."""
    return (embeds.repeat_interleave(copies, 0), mask.repeat(copies, 0)) if copies > 1 else (embeds, mask)


def _mask_array(mask) -> np.ndarray:
    array = np.asarray(mask.asnumpy() if isinstance(mask, ms.Tensor) else mask).astype(bool)
    check_mask(array)
    return array


def given_conditioning(given: tuple, guided: bool, copies: int = 1) -> Conditioning:
    """The conditioning of embeddings that the caller gave, each row ``copies`` times."""
    embeds, mask, negative, negative_mask = given
    positive = repeat_rows(embeds, _mask_array(mask), copies)
    unwanted = repeat_rows(negative, _mask_array(negative_mask), copies) if guided else (None, None)
    return Conditioning(*positive, *unwanted)


def both_rows(condition: Conditioning) -> tuple[ms.Tensor, np.ndarray]:
    """Negative rows, then prompt rows, padded to one length: embeddings (2N, T, C) and mask (2N, T)."""
    parts = (condition.negative_embeds, condition.prompt_embeds)
    masks = (condition.negative_mask, condition.prompt_attention_mask)
    length = max(mask.shape[1] for mask in masks)
    padded = [
        np.pad(p.astype(ms.float32).asnumpy(), ((0, 0), (0, length - p.shape[1]), (0, 0))) for p in parts
    ]
    mask = np.concatenate([np.pad(m, ((0, 0), (0, length - m.shape[1]))) for m in masks])
    return ms.Tensor(np.concatenate(padded)), mask
