"""Prompts and their conditioning: caption cleaning as in the reference, tokenization, embeddings of one shape."""

from __future__ import annotations

import html
import os
import re
import urllib.parse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pixart_nb.core.backend import as_array, ms, to_numpy
from pixart_nb.core.errors import PixArtNBError, check_number
from pixart_nb.core.io import CheckpointError, check_file, copy_file, read_json
from pixart_nb.core.models.attention import check_mask
from pixart_nb.core.models.t5 import T5Encoder

_TOP_DOMAINS = "com|co|ru|net|org|edu|gov|it"
_DOMAIN = rf"[a-z0-9.\-]+[.](?:{_TOP_DOMAINS})[\w/-]*\b/?(?!@)"
_CJK = "\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff"
_DASHES = "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
_SYMBOLS = "#\u00ae\u2022\u00a9\u2122&@\u00b7\u00ba\u00bd\u00be\u00bf\u00a1\u00a7~)(\\][}{|\\\\/*"
_DASHES += "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"

#: Before mojibake is fixed: addresses, characters of other scripts, meaningless numbers and file names.
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
    (re.compile(f"[{_SYMBOLS}]+"), " "),
    (re.compile(r"\s+\.\s+"), " "),
]
#: After: leftovers of web pages, and superfluous white space.
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
_SPECIAL_TOKENS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
_JOINED = re.compile(r"(?:-|_)")
#: Most tokens of a prompt; the published models read 120 or 300.
_MOST_TOKENS = 2**14
#: Characters of a model card that are read for its header.
_LONGEST_CARD = 2**18


def clean_caption(text: str) -> str:
    """Run one pass of the reference's caption cleaning (DeepFloyd IF's rules); the pipeline runs two."""
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
    """Return the text that is tokenized: cleaned twice, or in lower case without outer white space."""
    return clean_caption(clean_caption(text)) if clean else text.lower().strip()


def removed_characters(text: str) -> str:
    """Return the Chinese characters, each once, that caption cleaning removes from a text."""
    return "".join(dict.fromkeys("".join(re.findall(f"[{_CJK}]+", text))))


def warn_of_lost_words(
    tokenizer: TextTokenizer | None, prompts: Sequence[str], clean: bool, adapted: bool = False
) -> None:
    """Warn of prompts that caption cleaning shortens to nothing or by Chinese characters, and of unknown words.

    ``adapted`` says that the model has an adapter, which may know other words.
    """
    prepared = [prepare_prompt(text, clean) for text in prompts]
    for prompt, text in zip(prompts, prepared, strict=True):
        removed = removed_characters(prompt) if clean else ""
        if prompt.strip() and not text:
            warnings.warn(
                f"prompt {prompt!r} is empty after caption cleaning, as in the reference, so the image is drawn "
                "without a prompt. Write it in English, or use clean_caption=False",
                stacklevel=4,
            )
        elif removed:
            warnings.warn(f"prompt {prompt!r}: caption cleaning removes {removed!r}", stacklevel=4)
    if tokenizer is None or adapted:
        return
    unseen, objects = tokenizer.unseen(prepared), tokenizer.too_many_objects(prepared)
    spelled = [word for word in tokenizer.spelled(prepared) if word not in unseen]
    if unseen:
        warnings.warn(_unseen_words(unseen), stacklevel=4)
    if objects:
        warnings.warn(
            f"a prompt names {_in_words(objects)}; the training images of this model have at most "
            f"{tokenizer.card.most_objects} objects, so that some may be missing or mixed",
            stacklevel=4,
        )
    if spelled:
        warnings.warn(
            f"the tokenizer spells {spelled} letter by letter; the model may not know these words", stacklevel=4
        )


def _unseen_words(words: Sequence[str]) -> str:
    """Say that words are not in the training captions.

    >>> _unseen_words(["castle", "glass"])
    "'castle' and 'glass' are not in the training captions of this model"
    """
    return f"{_in_words(words)} {'are' if len(words) > 1 else 'is'} not in the training captions of this model"


def _in_words(words: Sequence[str]) -> str:
    *others, last = map(repr, words)
    return f"{', '.join(others)} and {last}" if others else last


@dataclass(frozen=True)
class CardHeader:
    """Facts in the header of a model's card (``README.md``); none without a card, and in those of published models.

    ``vocabulary``: words of the training captions. ``objects``: those of them that name an object.
    ``most_objects``: largest number of objects in a training image. ``sizes``: sides of the images in pixels.
    """

    vocabulary: frozenset[str] = frozenset()
    objects: frozenset[str] = frozenset()
    most_objects: int = 0
    sizes: tuple[int, ...] = ()


def card_header(card: Path) -> CardHeader:
    """Read the header of a model's card. Values of other types than expected are left out."""
    try:
        with card.open(encoding="utf-8") as file:
            header = file.read(_LONGEST_CARD).split("\n---", 1)[0]
        values = dict(yaml.safe_load(header.removeprefix("---")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, ValueError, RecursionError):
        return CardHeader()
    lists = {key: value if isinstance(value, list) else [] for key, value in values.items()}
    words = {key: frozenset(w for w in lists.get(key, ()) if isinstance(w, str)) for key in ("vocabulary", "objects")}
    most, sizes = values.get("most_objects"), [n for n in lists.get("sizes", ()) if type(n) is int and n > 0]
    return CardHeader(**words, most_objects=most if type(most) is int else 0, sizes=tuple(sizes))


def _words(prompt: str) -> list[str]:
    return re.findall(r"[^\W_]+", prompt.lower())


def _check_settings(path: Path) -> None:
    """Refuse settings of a tokenizer with which other tokens than T5's would come out."""
    settings = read_json(path)
    for name, token in _SPECIAL_TOKENS.items():
        value = settings.get(name, token)
        value = value.get("content") if isinstance(value, dict) else value
        if value != token:
            raise CheckpointError(f"{path}: {name} is {settings[name]!r:.60}; a T5 tokenizer has {token!r}")
    extra = settings.get("extra_ids", 100)
    if type(extra) is not int or not 0 <= extra <= 10_000:
        raise CheckpointError(f"{path}: extra_ids is {extra!r:.60}; expected a whole number, 100 for T5")


def _load_tokenizer(folder: Path):
    """Load a T5 tokenizer. The imports are slow, so they wait until one is loaded; those of cleaning belong to it."""
    variable = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(variable)
    os.environ[variable] = "1"  # it need not find torch
    try:
        import bs4  # noqa: F401
        import ftfy  # noqa: F401
        from sentencepiece import SentencePieceProcessor
        from transformers import T5Tokenizer

        if not (folder / "tokenizer.json").is_file():
            # transformers takes an empty model for an empty vocabulary and continues; sentencepiece refuses it
            SentencePieceProcessor().LoadFromSerializedProto((folder / "spiece.model").read_bytes())
        return T5Tokenizer.from_pretrained(str(folder), local_files_only=True)
    except ImportError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception on damaged files
        raise CheckpointError(
            f"{folder}: its tokenizer cannot be read: {type(error).__name__}: {error}. Copy the folder again."
        ) from error
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


class TextTokenizer:
    """T5 tokenizer of a folder in the published layout (``spiece.model`` or ``tokenizer.json``), or of transformers.

    Calls and attributes that it does not have are those of the tokenizer of transformers.
    """

    def __init__(self, source: Any):
        self.folder, self.card = None, CardHeader()
        if not isinstance(source, str | Path):
            self.tokenizer = source
            return
        self.folder = folder = Path(source)
        if not any((self.folder / name).is_file() for name in ("spiece.model", "tokenizer.json")):
            raise CheckpointError(f"{folder} holds no tokenizer: expected spiece.model or tokenizer.json in it")
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            if (self.folder / name).is_file():
                _check_settings(self.folder / name)
        for name in ("spiece.model", "tokenizer.json"):
            if (self.folder / name).is_file():
                check_file(self.folder / name, "the model of a tokenizer")
        self.tokenizer = _load_tokenizer(self.folder)
        self.card = card_header(self.folder.parent / "README.md")

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the tokenizer of transformers."""
        return self.tokenizer(*args, **options)

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":  # not loaded yet
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer: the files it was loaded from, or those that transformers writes."""
        if self.folder is None:
            self.tokenizer.save_pretrained(str(folder))
        elif self.folder.resolve() != Path(folder).resolve():
            for path in filter(Path.is_file, self.folder.iterdir()):
                copy_file(path, Path(folder) / path.name)

    def tokenize(self, prompts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids (N, max_length) int32 and mask (N, max_length) bool, True = token.

        Warns of the text that is cut off a prompt that is too long, and of words that the tokenizer does not know.
        """
        check_number("max_sequence_length", max_length, 1, whole=True)
        if max_length > _MOST_TOKENS:
            raise PixArtNBError(f"max_sequence_length is {max_length}; expected at most {_MOST_TOKENS}")
        full = [self.tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
        self._warn(prompts, full, max_length)
        end = self.tokenizer.eos_token_id
        ids = np.full((len(full), max_length), self.tokenizer.pad_token_id, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, tokens in enumerate(full):
            kept = tokens if len(tokens) <= max_length else [*tokens[: max_length - 1], end]
            ids[row, : len(kept)], mask[row, : len(kept)] = kept, True
        return ids, mask

    def _warn(self, prompts: Sequence[str], full: Sequence[Sequence[int]], max_length: int) -> None:
        """Give one warning for all prompts that are too long, and one for all with unknown words."""
        long = [ids for ids in full if len(ids) > max_length]
        if long:
            cut = self.tokenizer.decode(long[0][max_length - 1 : -1])
            text = f"prompt has {len(long[0])} tokens, the model reads {max_length}; cut off: {cut!r}"
            warnings.warn(text + _others(long, prompts), stacklevel=4)
        unknown = [p for p, ids in zip(prompts, full, strict=True) if self.tokenizer.unk_token_id in ids]
        if unknown:
            words = self.unknown(unknown[0])
            text = f"prompt {unknown[0]!r}: the tokenizer does not know {words}{_others(unknown, prompts)}"
            warnings.warn(text, stacklevel=4)

    def unknown(self, prompt: str) -> list[str]:
        """Return the words of a prompt that the tokenizer maps to <unk>, in whole or in part."""
        unk = self.tokenizer.unk_token_id
        return [w for w in dict.fromkeys(prompt.split()) if unk in self.tokenizer(w)["input_ids"]]

    def unseen(self, prompts: Sequence[str]) -> list[str]:
        """Return the words that are not in the vocabulary of the model card, if the card has one."""
        words = dict.fromkeys(w for prompt in prompts for w in _words(prompt))
        return [w for w in words if w not in self.card.vocabulary] if self.card.vocabulary else []

    def too_many_objects(self, prompts: Sequence[str]) -> list[str]:
        """Return the objects of the first prompt that names more of them than a training image of the model has."""
        most = self.card.most_objects or np.inf
        named = (dict.fromkeys(w for w in _words(prompt) if w in self.card.objects) for prompt in prompts)
        return next((list(words) for words in named if len(words) > most), [])

    def spelled(self, prompts: Sequence[str]) -> list[str]:
        """Return the words of at least three letters of which the tokenizer has only pieces of one or two letters."""
        words = dict.fromkeys(w for prompt in prompts for w in prompt.split() if w.isalpha() and len(w) > 2)
        return [w for w in words if max(map(len, self._letters(w))) < 3 and len(self._letters(w)) > 2]

    def _letters(self, word: str) -> list[str]:
        return [piece.strip("\u2581") for piece in self.pieces(self.tokenizer(word)["input_ids"][:-1])]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token, with T5's mark of the beginning of a word."""
        return self.tokenizer.convert_ids_to_tokens([int(i) for i in ids])


def _others(affected: Sequence, prompts: Sequence) -> str:
    return f" (and {len(affected) - 1} more of {len(prompts)} prompts)" if len(affected) > 1 else ""


# ---- conditioning


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
    prompts = _texts(prompt)
    if not prompts:
        raise PixArtNBError(f"prompt is {prompt!r}; expected a text or a list of at least one text")
    return prompts


def _texts(prompt: Any) -> list[str] | None:
    """Return a text, or a list, tuple or array of texts, as a list; None for anything else."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple | np.ndarray) or not all(isinstance(text, str) for text in prompts):
        return None
    return [str(text) for text in prompts]


def per_prompt(negative: str | Sequence[str] | None, count: int) -> list[str]:
    """Return a negative prompt for each of ``count`` prompts; None is the empty one."""
    negatives = [negative or ""] * count if negative is None or isinstance(negative, str) else _texts(negative)
    if negatives is None:
        raise PixArtNBError(f"negative_prompt is {negative!r}; expected a text, or a list with one for each prompt")
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
    try:
        embeds = embeds if isinstance(embeds, ms.Tensor) else ms.Tensor(np.asarray(embeds, np.float32))
        values = as_array(mask).astype(np.float32)
    except (TypeError, ValueError):
        raise PixArtNBError(f"{name}_embeds and {name}_attention_mask must be arrays of numbers") from None
    mask = values == 1
    if not (mask | (values == 0)).all():
        raise PixArtNBError(f"{name}_attention_mask holds other values than 1 for a token and 0 for padding")
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
    padded = [np.pad(to_numpy(p), ((0, 0), (0, length - p.shape[1]), (0, 0))) for p in parts]
    mask = np.concatenate([np.pad(m, ((0, 0), (0, length - m.shape[1]))) for m in masks])
    return ms.Tensor(np.concatenate(padded)), mask
