"""Prompts: cleaned as the reference cleans them, cut into tokens, padded."""

from __future__ import annotations

import html
import os
import re
import urllib.parse
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import CheckpointError

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault(
    "TRANSFORMERS_VERBOSITY", "error"
)  # only its tokenizers are used; it need not find torch

_TOP_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_DOMAIN = rf"[a-z0-9.\-]+[.](?:{_TOP_DOMAINS})[\w/-]*\b/?(?!@)"
_CJK = "\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff"
_DASHES = "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
_DASHES += "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"

#: Before mojibake is mended: addresses, characters of other scripts, numbers and file names that say nothing.
FIRST_RULES = [
    (re.compile(rf"\b(?:https?:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})"), ""),
    (re.compile(rf"\b(?:www:(?:/{{1,3}}|[a-z0-9%])|{_DOMAIN})"), ""),
    (re.compile(r"@[\w\d]+\b"), ""),
    (re.compile(f"[{_CJK}]+"), ""),
    (re.compile(f"[{_DASHES}]+"), "-"),
    (re.compile("[`\u00b4\u00ab\u00bb\u201c\u201d\u00a8]"), '"'),
    (re.compile("[\u2018\u2019]"), "'"),
    (re.compile(r"&quot;?"), ""),
    (re.compile(r"&amp"), ""),
    (re.compile(r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}"), " "),
    (re.compile(r"\d:\d\d\s+$"), ""),
    (re.compile(r"\\n"), " "),
    (re.compile(r"#\d{1,3}\b"), ""),
    (re.compile(r"#\d{5,}\b"), ""),
    (re.compile(r"\b\d{6,}\b"), ""),
    (re.compile(r"[\S]+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"), ""),
    (re.compile(r"[\"']{2,}"), '"'),
    (re.compile(r"[.]{2,}"), " "),
    (
        re.compile(
            "[#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~)(\\][}{|\\\\/*]+"
        ),
        " ",
    ),
    (re.compile(r"\s+\.\s+"), " "),
]
#: After: leftovers of web pages, and the white space that all this leaves.
LAST_RULES = [
    (re.compile(r"\b[a-zA-Z]{1,3}\d{3,15}\b"), ""),
    (re.compile(r"\b[a-zA-Z]+\d+[a-zA-Z]+\b"), ""),
    (re.compile(r"\b\d+[a-zA-Z]+\d+\b"), ""),
    (re.compile(r"(worldwide\s+)?(free\s+)?shipping"), ""),
    (re.compile(r"(free\s)?download(\sfree)?"), ""),
    (re.compile(r"\bclick\b\s(?:for|on)\s\w+"), ""),
    (re.compile(r"\b(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)(\simage[s]?)?"), ""),
    (re.compile(r"\bpage\s+\d+\b"), ""),
    (re.compile(r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b"), " "),
    (re.compile(r"\b\d+\.?\d*[x\u0445\u00d7]\d+\.?\d*\b"), ""),
    (re.compile(r"\b\s+:\s+"), ": "),
    (re.compile(r"(\D[,./])\b"), r"\1 "),
    (re.compile(r"\s+"), " "),
]
_JOINED = re.compile(r"(?:-|_)")


def clean_caption(text: str) -> str:
    """One pass of the reference's caption cleaning (DeepFloyd IF's rules); the pipeline does two."""
    import ftfy
    from bs4 import BeautifulSoup

    text = urllib.parse.unquote_plus(str(text)).strip().lower().replace("<person>", "person")
    text = BeautifulSoup(_apply(FIRST_RULES[:2], text), features="html.parser").text
    text = _apply(FIRST_RULES[2:], text)
    if len(_JOINED.findall(text)) > 3:
        text = _JOINED.sub(" ", text)
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = _apply(LAST_RULES, text)  # not stripped, as in the reference: a quote after a space stays
    for pattern, replacement in (
        (r"^[\"'](.+)[\"']$", r"\1"),
        (r"^['_,\-:;]", ""),
        (r"['_,\-:\-+]$", ""),
        (r"^\.\S+$", ""),
    ):
        text = re.sub(pattern, replacement, text)
    return text.strip()


def _apply(rules, text: str) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text


def prepare_prompt(text: str, clean: bool) -> str:
    """What is tokenized of a prompt: cleaned twice, or lower case without outer white space."""
    return clean_caption(clean_caption(text)) if clean else text.lower().strip()


def _load_tokenizer(folder: Path):
    # Slow to import, so only when a tokenizer is wanted; what cleans the first caption, too, belongs to loading.
    import bs4  # noqa: F401
    import ftfy  # noqa: F401
    from sentencepiece import SentencePieceProcessor
    from transformers import T5Tokenizer

    try:
        if not (folder / "tokenizer.json").is_file():
            # transformers takes an empty model for an empty vocabulary and goes on; sentencepiece refuses it.
            SentencePieceProcessor().LoadFromSerializedProto((folder / "spiece.model").read_bytes())
        return T5Tokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception on damaged files
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be read: {type(error).__name__}: {error}. Copy the folder again."
        ) from error


def _others(found: Sequence, prompts: Sequence) -> str:
    """What a warning about the first prompt says of the others."""
    return f" (so it is with {len(found)} of {len(prompts)} prompts)" if len(found) > 1 else ""


class TextTokenizer:
    """A T5 tokenizer of a folder in the published layout (``spiece.model`` or ``tokenizer.json``)."""

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        if not any((folder / name).is_file() for name in ("spiece.model", "tokenizer.json")):
            raise CheckpointError(
                f"{folder} holds no tokenizer: expected spiece.model or tokenizer.json in it"
            )
        self.tokenizer = _load_tokenizer(folder)

    def tokenize(self, prompts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids (N, max_length) int32 and mask (N, max_length) bool, True = token.

        Warns of what was cut from a prompt that is too long, and of characters that the tokenizer does not know.
        """
        if max_length < 1:
            raise PixArtNBError(f"max_sequence_length is {max_length}; expected at least 1")
        full = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        self._warn(prompts, full, max_length)
        end = self.tokenizer.eos_token_id
        ids = np.full((len(full), max_length), self.tokenizer.pad_token_id, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, tokens in enumerate(full):
            kept = tokens if len(tokens) <= max_length else [*tokens[: max_length - 1], end]
            ids[row, : len(kept)], mask[row, : len(kept)] = kept, True
        return ids, mask

    def _warn(self, prompts: Sequence[str], full: Sequence[Sequence[int]], max_length: int) -> None:
        """One warning for all prompts that are too long, and one for all with unknown characters."""
        long = [ids for ids in full if len(ids) > max_length]
        if long:
            cut = self.tokenizer.decode(long[0][max_length - 1 : -1])
            told = f"prompt has {len(long[0])} tokens, the model reads {max_length}; cut off: {cut!r}"
            warnings.warn(told + _others(long, prompts), stacklevel=4)
        strange = [p for p, ids in zip(prompts, full, strict=True) if self.tokenizer.unk_token_id in ids]
        if strange:
            unknown, others = self.unknown(strange[0]), _others(strange, prompts)
            warnings.warn(
                f"prompt {strange[0]!r}: the tokenizer does not know {unknown}{others}", stacklevel=4
            )

    def unknown(self, prompt: str) -> list[str]:
        """Characters of a prompt that the tokenizer maps to <unk>."""
        unk = self.tokenizer.unk_token_id
        return sorted({c for c in prompt if not c.isspace() and unk in self.tokenizer(c)["input_ids"]})

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Text of each token, with T5's mark of a word's beginning."""
        return self.tokenizer.convert_ids_to_tokens([int(i) for i in ids])
