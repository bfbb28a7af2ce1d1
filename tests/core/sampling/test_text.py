"""Prompts become the reference's tokens."""

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_data import diffusers

from pixart_nb.core.io import CheckpointError
from pixart_nb.core.sampling.text import TextTokenizer, clean_caption, prepare_prompt


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(diffusers("sigma")[0] / "tokenizer")


@pytest.mark.filterwarnings("ignore:prompt has")
@pytest.mark.parametrize("name", ["sigma", "alpha"])  # spiece.model and tokenizer.json
def test_token_ids_equal_the_reference(name):
    folder, call, golden = diffusers(name)
    ids, mask = TextTokenizer(folder / "tokenizer").tokenize(call["prompts"], call["max_sequence_length"])
    assert np.array_equal(ids, golden["input_ids"])
    assert np.array_equal(mask, golden["prompt_mask"].astype(bool))


def test_an_empty_prompt_is_one_token(tokenizer):
    ids, mask = tokenizer.tokenize([""], 5)
    assert ids.tolist() == [[1, 0, 0, 0, 0]]
    assert mask.tolist() == [[True, False, False, False, False]]


def test_unknown_characters_are_named_once(tokenizer):
    with pytest.warns(UserWarning, match=r"does not know \['漢'\]"):
        tokenizer.tokenize(["a red 漢 漢"], 20)


def test_many_prompts_give_one_warning_of_each_kind(tokenizer):
    with pytest.warns(UserWarning, match="of 3 prompts") as caught:
        tokenizer.tokenize(["a red 漢", "a blue 漢 on a field of grass", "a green 漢 on a field"], 6)
    told = [str(warning.message) for warning in caught]
    assert len(told) == 2
    assert "and 1 more of 3 prompts" in told[0]
    assert "does not know ['漢'] (and 2 more of 3 prompts)" in told[1]


@pytest.mark.filterwarnings("ignore:prompt")
@settings(max_examples=60)
@given(st.text(max_size=40), st.integers(1, 12))
def test_any_text_gives_a_row_that_ends_in_the_end_token(text, length):
    tokenizer = TextTokenizer(diffusers("sigma")[0] / "tokenizer")
    ids, mask = tokenizer.tokenize([text], length)
    count = int(mask.sum())
    assert ids.shape == mask.shape == (1, length)
    assert 1 <= count <= length
    assert mask[0, :count].all()
    assert ids[0, count - 1] == tokenizer.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ("A Red Mushroom", "a red mushroom"),
        ("a <b>red</b> mushroom", "a red mushroom"),
        ("red &amp;amp; blue", "red ; blue"),
        ("a cat @someone on grass", "a cat on grass"),
        ("see http://example.com/a now", "see now"),
        ("a — dash “quoted” word", 'a - dash "quoted" word'),
        ("photo 1234567 of a cat.jpg", "photo of a"),
        ("free shipping a red hat", "a red hat"),
        ("a_very_long_file_name", "a very long file name"),
        ("汉字 red", "red"),
        ("192.168.0.1 a key", "a key"),
        ("a cat : + http://example.com/a free shipping", "a cat"),
        ("a hat ' free download", "a hat"),
        ("j2d1a2a and 640x480 a key", "and a key"),
        ("640x480 _ “q” ' http://example.com/x 640x480", '"q"'),
    ],
)
def test_captions_are_cleaned_as_the_reference_does(given_, expected):
    assert prepare_prompt(given_, clean=True) == expected


@settings(max_examples=100)
@given(st.text(max_size=60))
def test_cleaning_takes_any_text(text):
    cleaned = clean_caption(text)
    assert cleaned == cleaned.strip()


def test_without_cleaning_only_case_and_outer_space_change():
    assert prepare_prompt("  A <b>Red</b> Hat ", clean=False) == "a <b>red</b> hat"


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"spiece\.model or tokenizer\.json"):
        TextTokenizer(tmp_path)


def test_a_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        TextTokenizer(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "cut", "changed"])
@pytest.mark.parametrize(("name", "file"), [("sigma", "spiece.model"), ("alpha", "tokenizer.json")])
def test_a_damaged_vocabulary_is_refused_and_never_gives_other_tokens(tmp_path, name, file, damage):
    folder = tmp_path / "tokenizer"
    shutil.copytree(diffusers(name)[0] / "tokenizer", folder)
    content = (folder / file).read_bytes()
    changed = {"empty": b"", "cut": content[: len(content) // 2], "changed": content[:9] + bytes(50) + content[59:]}
    (folder / file).write_bytes(changed[damage])
    with pytest.raises(CheckpointError, match=r"cannot be read.*Copy the folder again"):
        TextTokenizer(folder)


def test_a_prompt_that_is_too_long_shows_what_was_cut(tokenizer):
    with pytest.warns(UserWarning, match=r"prompt has \d+ tokens, the model reads 8; cut off: '.*grass'"):
        ids, mask = tokenizer.tokenize(["a red mushroom on grass"], 8)
    assert mask.all()
    assert ids[0, -1] == tokenizer.tokenizer.eos_token_id


def test_pieces_joined_are_the_prompt(tokenizer):
    ids, mask = tokenizer.tokenize(["a red mushroom on grass"], 40)
    pieces = tokenizer.pieces(ids[0][mask[0]])
    assert pieces[-1] == "</s>"
    assert "".join(pieces[:-1]).replace("\u2581", " ").strip() == "a red mushroom on grass"
