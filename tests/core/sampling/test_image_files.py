"""A PNG gives back the pixels and the parameters that it was written with."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from pixart_nb.core.sampling import images
from pixart_nb.core.sampling.images import KEYWORD, read_parameters, write_image

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
TEXTS = st.text(st.characters(exclude_categories=()))  # lone surrogates and NUL included
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


def outcome(path):
    """The parameters of a file, or what the error says."""
    try:
        return read_parameters(path)
    except ValueError as error:
        return str(error)


@given(parameters=st.dictionaries(TEXTS, VALUES, max_size=6))
def test_parameters_come_back_as_they_were_given(parameters, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round_trip.png"
    write_image(path, PIXELS, parameters)
    assert read_parameters(path) == parameters


def test_pixels_come_back_and_the_folder_is_made(tmp_path):
    path = tmp_path / "a" / "b" / "picture.png"
    write_image(path, PIXELS, {"prompt": ["ein roter Pilz, größer"], "seed": 3})
    assert np.array_equal(np.asarray(Image.open(path)), PIXELS)
    assert [found.name for found in path.parent.iterdir()] == ["picture.png"]


def test_any_reader_of_png_finds_the_parameters_as_json(tmp_path):
    write_image(tmp_path / "picture.png", PIXELS, {"seed": 3})
    with Image.open(tmp_path / "picture.png") as image:
        assert json.loads(image.info[KEYWORD]) == {"seed": 3}
    assert b"tEXtparameters\0" in (tmp_path / "picture.png").read_bytes()


@pytest.mark.parametrize(
    ("pixels", "parameters", "message"),
    [
        (PIXELS[..., 0], {}, r"\(16, 24\) uint8"),
        (PIXELS[..., :2], {}, r"\(16, 24, 2\) uint8"),
        (PIXELS / 255, {}, r"float64; to_uint8"),
        (PIXELS[:0], {}, r"\(0, 24, 3\)"),
        (PIXELS, {"seed": np.int64(3)}, "int64 is not JSON serializable"),
        (PIXELS, {"scale": float("nan")}, "finite numbers"),
        (PIXELS, {"prompt": "a" * 2**20}, "take 1048590 bytes as JSON; at most 1048576"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_the_old_file(tmp_path, pixels, parameters, message):
    path = tmp_path / "picture.png"
    write_image(path, PIXELS, {"seed": 1})
    with pytest.raises(ValueError, match=message):
        write_image(path, pixels, parameters)
    assert read_parameters(path) == {"seed": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["picture.png"]


def test_parameters_up_to_the_limit_can_be_read(tmp_path):
    parameters = {"prompt": "a" * (images.MOST_BYTES - len('{"prompt": ""}'))}
    write_image(tmp_path / "picture.png", PIXELS, parameters)
    assert read_parameters(tmp_path / "picture.png") == parameters


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist; expected an image"):
        read_parameters(tmp_path / "none.png")


def test_a_picture_of_another_program_is_told_from_one_of_this_project(tmp_path):
    path = tmp_path / "other.png"
    Image.fromarray(PIXELS).save(path)
    with pytest.raises(ValueError, match=r"other\.png is a PNG without 'parameters'"):
        read_parameters(path)
    for text in ("steps: 20, seed: 3", "[1, 2]"):
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(KEYWORD, text)
        Image.fromarray(PIXELS).save(path, pnginfo=chunks)
        with pytest.raises(ValueError, match="expected a JSON object, so another program wrote them"):
            read_parameters(path)


def test_a_file_that_is_no_png_is_named(tmp_path):
    path = tmp_path / "picture.png"
    for content in (b"", b"hello", b"\x89PNG\r\n\x1a\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as a PNG"):
            read_parameters(path)
    Image.fromarray(PIXELS).save(path, format="JPEG")
    with pytest.raises(ValueError, match="cannot be read as a PNG"):
        read_parameters(path)


def test_a_cut_or_mutated_file_is_an_error_or_the_same_parameters(tmp_path):
    path = tmp_path / "picture.png"
    write_image(path, PIXELS, {"prompt": "a red mushroom"})
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for trial in range(300):
        content = bytearray(whole[: rng.integers(len(whole))] if trial % 2 else whole)
        for place in rng.integers(0, max(len(content), 1), 3) if trial % 3 else ():
            content[place : place + 1] = bytes([rng.integers(256)])
        path.write_bytes(content)
        answer = outcome(path)
        assert isinstance(answer, dict) or str(path) in answer
