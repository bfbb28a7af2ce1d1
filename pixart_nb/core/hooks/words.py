"""Tokens of a prompt and the words that they spell."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pixart_nb.core.errors import PixArtNBError

#: SentencePiece's mark of a word's beginning.
MARK = "\u2581"


@dataclass(frozen=True)
class Text:
    """A prompt as the model reads it: the text, and the piece of each token. Empty where only embeddings are known."""

    prompt: str = ""
    pieces: tuple[str, ...] = ()

    @property
    def words(self) -> list[Word]:
        """The words in their order, special tokens among them."""
        return merge_pieces(self.pieces)


@dataclass(frozen=True)
class Word:
    """A word or a special token, and the numbers of its tokens."""

    text: str
    tokens: tuple[int, ...]

    @property
    def is_special(self) -> bool:
        """Whether it is a token like </s>."""
        return is_special(self.text)


def text_of(tokenizer: Any, prompt: str | None, count: int) -> Text:
    """The text of a prompt of ``count`` tokens; of embeddings (None) or without a tokenizer, tokens by number."""
    if prompt is None or tokenizer is None:
        return Text("", tuple(f"<{number}>" for number in range(count)))
    ids = list(tokenizer.tokenizer(prompt)["input_ids"])
    if len(ids) > count:  # cut off, as TextTokenizer.tokenize does
        ids = [*ids[: count - 1], ids[-1]]
    return Text(prompt, tuple(tokenizer.pieces(ids)))


def is_special(piece: str) -> bool:
    """Whether a piece is no text: </s>, <unk>, <pad>, or the number of a token that is not known."""
    return len(piece) > 2 and piece[0] == "<" and piece[-1] == ">"


def merge_pieces(pieces: Sequence[str]) -> list[Word]:
    """SentencePiece tokens merged into words: a piece with the mark begins one.

    Punctuation before and after a word is a word of its own (``cup`` and ``,``), inside it is not (``16-bit``).
    """
    groups: list[list[int]] = []
    for number, piece in enumerate(pieces):
        starts = piece.startswith(MARK) or is_special(piece)
        if starts or not groups or is_special(pieces[groups[-1][-1]]):
            groups.append([])
        groups[-1].append(number)
    return [Word(_spell(pieces, part), tuple(part)) for group in groups for part in _split(pieces, group)]


def _split(pieces: Sequence[str], group: list[int]) -> list[list[int]]:
    """A word's tokens without the punctuation before and after it, which follow as parts of their own."""
    inner = [k for k, number in enumerate(group) if _strip(_spell(pieces, [number]))]
    if not inner:
        return [group]
    first, last = inner[0], inner[-1] + 1
    if not any(_spell(pieces, [number]) for number in group[:first]):
        first = 0  # the bare mark of a word's beginning belongs to the word
    return [part for part in (group[:first], group[first:last], group[last:]) if part]


def _spell(pieces: Sequence[str], tokens: Sequence[int]) -> str:
    return "".join(pieces[number] for number in tokens).replace(MARK, "")


def _strip(text: str) -> str:
    """Without punctuation before and after it; special tokens as they are."""
    if is_special(text):
        return text
    return text.strip("".join(c for c in text if unicodedata.category(c)[0] in "PSZ"))


def _normal(text: str) -> str:
    """For comparison: lower case, one Unicode form, without outer punctuation unless it is nothing else."""
    text = unicodedata.normalize("NFKC", text)
    return (_strip(text) or text).lower()


def find_word(text: Text, word: str | int) -> tuple[int, ...]:
    """Tokens of a word, or of several words in a row (``wizard hat``), wherever they occur; or of word number ``word``.

    Raises ValueError that lists the prompt's words.
    """
    words = text.words
    if isinstance(word, int):
        if not 0 <= word < len(words):
            raise PixArtNBError(f"there is no word number {word}; {_known(text)}")
        return words[word].tokens
    wanted, spelt = [_normal(part) for part in word.split()], [_normal(w.text) for w in words]
    starts = [k for k in range(len(spelt)) if wanted and spelt[k : k + len(wanted)] == wanted]
    if not starts:
        raise PixArtNBError(f"there is no word {word!r}; {_known(text)}")
    found = {t for k in starts for w in words[k : k + len(wanted)] for t in w.tokens}
    return tuple(sorted(found))


def _known(text: Text) -> str:
    words = text.words
    listed = ", ".join(f"{number}: {word.text!r}" for number, word in enumerate(words))
    if all(word.is_special for word in words):
        return f"the prompt {text.prompt!r} has no words, only {listed or 'nothing'}"
    return f"the prompt {text.prompt!r} has {listed}"
