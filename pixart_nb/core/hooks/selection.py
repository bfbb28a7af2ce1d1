"""Layers, heads, steps and words as users name them, checked against a model, a run or a prompt."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixart_nb.core.errors import PixArtNBError, did_you_mean

#: Attention layers of a block by their kind; their names are those of the module in the transformer.
ATTENTION_MODULES = {"self": "attn", "cross": "cross_attn"}
Numbers = int | Sequence[int] | None
Layers = int | str | Sequence[int | str] | None
#: SentencePiece's mark of the beginning of a word.
MARK = "\u2581"


# ---- layers, heads and steps


def as_list(values: Any) -> list:
    """Return one value or several values as a list."""
    return [values] if isinstance(values, (int, float, str, np.number)) else list(values)


def is_cross(name: str) -> bool:
    """Return True for the name of a cross-attention."""
    return name.endswith("." + ATTENTION_MODULES["cross"])


def layer_number(name: str) -> int:
    """Return the block's number of a layer name: ``blocks.14.attn`` -> 14."""
    return int(name.split(".")[1])


def layer_names(depth: int, layers: Layers = None, attention: str | Sequence[str] = ("self", "cross")) -> list[str]:
    """Return the names of layers (numbers, or names such as ``blocks.14.attn``; None is all) in the model's order."""
    attention = as_list(attention)
    if not attention or not set(attention) <= set(ATTENTION_MODULES):
        raise PixArtNBError(f"attention is {attention}; expected 'self', 'cross' or both")
    modules = [module for name, module in ATTENTION_MODULES.items() if name in attention]
    names = [f"blocks.{number}.{module}" for number in range(depth) for module in modules]
    chosen: set[str] = set()
    for layer in range(depth) if layers is None else as_list(layers):
        number = str(layer)
        chosen |= {f"blocks.{number}.{module}" for module in modules} if number.isdigit() else {number}
    unknown = sorted(chosen - set(names))
    if unknown or not chosen:
        raise PixArtNBError(
            f"the model has no layers {unknown or '(none was given)'}; it has blocks.0 to blocks.{depth - 1}, each "
            f"with {' and '.join(modules)}{did_you_mean(unknown[0], names) if unknown else ''}"
        )
    return [name for name in names if name in chosen]


def head_numbers(count: int, heads: Numbers) -> list[int]:
    """Return head numbers in rising order; None is all ``count``."""
    numbers = list(range(count)) if heads is None else sorted({int(head) for head in as_list(heads)})
    if not numbers or numbers[0] < 0 or numbers[-1] >= count:
        raise PixArtNBError(f"heads is {heads!r}; the model has heads 0 to {count - 1}")
    return numbers


def step_numbers(steps: Numbers) -> list[int] | None:
    """Return step numbers, counted from 0; None stays None and means all steps."""
    if steps is None:
        return None
    numbers = [int(step) for step in as_list(steps)]
    if not numbers or min(numbers) < 0:
        raise PixArtNBError(f"steps is {steps!r}; expected step numbers, counted from 0")
    return numbers


def select(what: str, numbers: Numbers, available: Sequence[int]) -> list[int]:
    """Return the requested numbers of those that a trace has; None is all."""
    chosen = list(available) if numbers is None else as_list(numbers)
    missing = [number for number in chosen if number not in available]
    if missing or not chosen:
        raise PixArtNBError(f"the trace has no {what} {missing or '(none was given)'}; it has {list(available)}")
    return [int(number) for number in chosen]


# ---- words


@dataclass(frozen=True)
class Word:
    """A word or a special token, and the numbers of its tokens."""

    text: str
    tokens: tuple[int, ...]

    @property
    def is_special(self) -> bool:
        """True for </s>, <unk>, <pad>, or the number of an unknown token."""
        return is_special(self.text)


@dataclass(frozen=True)
class Text:
    """A tokenized prompt: the text and the piece of each token. The text is empty if only embeddings were given."""

    prompt: str = ""
    pieces: tuple[str, ...] = ()

    @property
    def words(self) -> list[Word]:
        """Words in their order, special tokens among them."""
        return merge_pieces(self.pieces)


def text_of(tokenizer: Any, prompt: str | None, count: int) -> Text:
    """Return the text of a prompt of ``count`` tokens; without a prompt or tokenizer, tokens are named by number."""
    if prompt is None or tokenizer is None:
        return Text("", tuple(f"<{number}>" for number in range(count)))
    ids = list(tokenizer.tokenizer(prompt)["input_ids"])
    if len(ids) > count:  # cut off, as TextTokenizer.tokenize does
        ids = [*ids[: count - 1], ids[-1]]
    return Text(prompt, tuple(tokenizer.pieces(ids)))


def is_special(piece: str) -> bool:
    """Return True for </s>, <unk>, <pad>, or the number of an unknown token."""
    return len(piece) > 2 and piece[0] == "<" and piece[-1] == ">"


def merge_pieces(pieces: Sequence[str]) -> list[Word]:
    """Merge SentencePiece tokens into words. Punctuation around a word, not inside it, is a word of its own."""
    groups: list[list[int]] = []
    for number, piece in enumerate(pieces):
        starts = piece.startswith(MARK) or is_special(piece)
        if starts or not groups or is_special(pieces[groups[-1][-1]]):
            groups.append([])
        groups[-1].append(number)
    return [Word(_spell(pieces, part), tuple(part)) for group in groups for part in _split(pieces, group)]


def _split(pieces: Sequence[str], group: list[int]) -> list[list[int]]:
    """Separate the punctuation before and after a word from the word's tokens."""
    inner = [k for k, number in enumerate(group) if _strip(_spell(pieces, [number]))]
    if not inner:
        return [group]
    first, last = inner[0], inner[-1] + 1
    if not any(_spell(pieces, [number]) for number in group[:first]):
        first = 0  # a bare mark belongs to the word
    return [part for part in (group[:first], group[first:last], group[last:]) if part]


def _spell(pieces: Sequence[str], tokens: Sequence[int]) -> str:
    return "".join(pieces[number] for number in tokens).replace(MARK, "")


def _strip(text: str) -> str:
    """Remove punctuation before and after a text; special tokens stay as they are."""
    return text if is_special(text) else text.strip("".join(c for c in text if unicodedata.category(c)[0] in "PSZ"))


def _normalize(text: str) -> str:
    """Return lower case, one Unicode form, without outer punctuation unless it is nothing else."""
    text = unicodedata.normalize("NFKC", text)
    return (_strip(text) or text).lower()


def find_word(text: Text, word: str | int) -> tuple[int, ...]:
    """Return the tokens of a word, or of several words in a row (``wizard hat``), wherever they occur.

    ``word`` may also be the number of a word. Raises PixArtNBError that lists the words of the prompt.
    """
    words = text.words
    if isinstance(word, int):
        if not 0 <= word < len(words):
            raise PixArtNBError(f"there is no word number {word}; {_listed(text)}")
        return words[word].tokens
    parts, spelled = [_normalize(part) for part in word.split()], [_normalize(w.text) for w in words]
    starts = [k for k in range(len(spelled)) if parts and spelled[k : k + len(parts)] == parts]
    if not starts:
        raise PixArtNBError(f"there is no word {word!r}; {_listed(text)}{did_you_mean(word.lower(), spelled)}")
    return tuple(sorted({t for k in starts for w in words[k : k + len(parts)] for t in w.tokens}))


def _listed(text: Text) -> str:
    words = text.words
    listed = ", ".join(f"{number}: {word.text!r}" for number, word in enumerate(words))
    if all(word.is_special for word in words):
        return f"the prompt {text.prompt!r} has no words, only {listed or 'nothing'}"
    return f"the prompt {text.prompt!r} has {listed}"
