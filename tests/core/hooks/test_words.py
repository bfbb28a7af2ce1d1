"""Pieces become words, words are found, and nothing is lost between them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixart_nb.core.hooks.selection import MARK, Text, find_word, merge_pieces, text_of
from pixart_nb.core.sampling.text import TextTokenizer


@pytest.fixture(scope="module")
def tokenizer(project):
    return TextTokenizer(project / "data/tiny-sigma/tokenizer")


def words_of(tokenizer, prompt: str) -> list[str]:
    text = text_of(tokenizer, prompt, len(tokenizer.tokenizer(prompt)["input_ids"]))
    return [word.text for word in text.words]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a red mushroom on grass", ["a", "red", "mushroom", "on", "grass", "</s>"]),
        ("pixel art, red cup, desert", ["pixel", "art", ",", "red", "cup", ",", "desert", "</s>"]),
        ("a 16-bit game sprite", ["a", "16-bit", "game", "sprite", "</s>"]),
        ("", ["</s>"]),
    ],
)
def test_words_are_those_of_the_prompt_with_punctuation_apart(tokenizer, prompt, words):
    assert words_of(tokenizer, prompt) == words


@given(st.lists(st.text(alphabet=f"{MARK}ab,.-'é", min_size=1, max_size=4) | st.sampled_from(["</s>", "<unk>"])))
def test_every_token_belongs_to_exactly_one_word(pieces):
    words = merge_pieces(pieces)
    assert [token for word in words for token in word.tokens] == list(range(len(pieces)))
    assert "".join(word.text for word in words) == "".join(pieces).replace(MARK, "")


@given(st.text(max_size=40))
def test_every_word_of_any_prompt_is_found_again(tokenizer_of_any, prompt):
    ids = tokenizer_of_any.tokenizer(prompt)["input_ids"]
    text = text_of(tokenizer_of_any, prompt, len(ids))
    assert len(text.pieces) == len(ids)
    for number, word in enumerate(text.words):
        assert find_word(text, number) == word.tokens
        if word.text.strip() and " " not in word.text:
            assert set(word.tokens) <= set(find_word(text, word.text))


@pytest.fixture(scope="module")
def tokenizer_of_any(tokenizer):
    return tokenizer


def test_a_prompt_that_was_cut_keeps_its_end(tokenizer):
    text = text_of(tokenizer, "a red mushroom on grass", 4)
    assert len(text.pieces) == 4
    assert text.pieces[-1] == "</s>"


def test_a_word_that_occurs_twice_is_found_twice():
    text = Text("a red cat, a red hat", ("▁a", "▁red", "▁cat", ",", "▁a", "▁r", "ed", "▁hat", "</s>"))
    assert find_word(text, "red") == (1, 5, 6)
    assert find_word(text, "Red hat") == (5, 6, 7)
    assert find_word(text, ",") == (3,)
    assert find_word(text, 5) == (5, 6)
    with pytest.raises(ValueError, match=r"no word 'cat a'; the prompt 'a red cat, a red hat' has 0: 'a', "):
        find_word(text, "cat a")
    with pytest.raises(ValueError, match="no word ''"):
        find_word(text, "")
