"""Drawn scenes, their captions and the shipped images."""

import json
from itertools import combinations, pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.pixelart.captions import (
    COLOUR_SYNONYMS,
    OBJECT_SYNONYMS,
    SHORT_FORMS,
    caption,
    long_caption,
    short_caption,
    with_article,
)
from pixart_nb.pixelart.datasets import TABLE, write_dataset, write_sample
from pixart_nb.pixelart.scenes import (
    COLOURS,
    OBJECTS,
    RAMPS,
    SETTINGS,
    Scene,
    all_scenes,
    draw,
    draw_grid,
    draw_with_mask,
    grid_size,
    split_scenes,
    sprite_mask,
)
from pixart_nb.pixelart.shapes import MIRRORED, SHAPE_SIZE, SHAPES

SHIPPED = Path(__file__).parents[2] / "data" / "pixelart"
MUSHROOM = Scene("mushroom", "red", "grass")


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def some_scenes(count: int, seed: int = 0) -> list[Scene]:
    scenes = all_scenes()
    return [scenes[k] for k in generator(seed).integers(len(scenes), size=count)]


def test_there_are_enough_objects_colours_and_settings():
    assert len(OBJECTS) >= 24 and len(COLOURS) == 10 and len(SETTINGS) == 8
    assert len(set(all_scenes())) == len(OBJECTS) * 80


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others():
    for scene in some_scenes(20):
        assert draw(scene, generator(7)).tobytes() == draw(scene, generator(7)).tobytes()
        assert draw(scene, generator(7)).tobytes() != draw(scene, generator(8)).tobytes()


@pytest.mark.parametrize(
    ("names", "valid"),
    [(("sofa", "red", "grass"), "mushroom"), (("cat", "mauve", "grass"), "teal"), (("cat", "red", "moon"), "lava")],
)
def test_an_unknown_name_is_refused_with_the_valid_ones(names, valid):
    wrong = next(name for name in names if name in ("sofa", "mauve", "moon"))
    with pytest.raises(ValueError, match=f"'{wrong}'.*{valid}"):
        Scene(*names)


def test_too_small_an_image_or_grid_is_refused():
    with pytest.raises(ValueError, match="15x128"):
        draw(MUSHROOM, generator(), 15, 128)
    with pytest.raises(ValueError, match="16x12"):
        draw_grid(MUSHROOM, generator(), 16, 12)


@settings(deadline=None, max_examples=60)
@given(st.integers(16, 300), st.integers(16, 300), st.integers(0, 2**31))
def test_any_size_shows_the_whole_object_near_the_middle(height, width, seed):
    scene = some_scenes(1, seed)[0]
    image = draw_with_mask(scene, generator(seed), height, width)
    assert image.pixels.shape == (height, width, 3) and image.pixels.dtype == np.uint8
    assert image.mask.shape == (height, width) and image.mask.any()
    assert np.array_equal(image.pixels, draw(scene, generator(seed), height, width))
    cells = grid_size(height, width)
    assert min(cells) == 16
    for first, size in zip((image.placement.row, image.placement.column), cells, strict=True):
        assert abs(first - (size - SHAPE_SIZE) // 2) <= 1


def test_an_image_of_twice_the_size_shows_the_same_scene_scaled():
    for scene in some_scenes(10):
        small = draw(scene, generator(3))
        assert np.array_equal(draw(scene, generator(3), 256, 256), small.repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize(("height", "width"), [(128, 128), (128, 192), (192, 128), (256, 256), (64, 64)])
def test_an_object_has_as_many_cells_at_every_size(height, width):
    for scene in some_scenes(10):
        mask = draw_with_mask(scene, generator(1), height, width).mask
        assert mask.sum() == sprite_mask(scene.object).sum() * (min(height, width) // 16) ** 2


def test_the_grid_is_the_image_at_one_value_per_cell():
    assert np.array_equal(draw(MUSHROOM, generator(4), 128, 192)[4::8, 4::8], draw_grid(MUSHROOM, generator(4), 16, 24))


def test_objects_take_all_nine_places_and_only_some_are_mirrored():
    for name in OBJECTS:
        placements = [draw_with_mask(Scene(name, "red", "cave"), generator(k), 16, 16).placement for k in range(120)]
        assert {(p.row, p.column) for p in placements} == set(product((1, 2, 3), repeat=2))
        assert {p.mirrored for p in placements} == ({False, True} if name in MIRRORED else {False})


def test_most_lit_pixels_of_an_object_are_nearest_to_its_own_colour():
    shades = np.array([RAMPS[colour][1:4] for colour in COLOURS], dtype=float).reshape(-1, 3)
    for name, (number, colour) in product(OBJECTS, enumerate(COLOURS)):
        image = draw_with_mask(Scene(name, colour, "cave"), generator(number), 64, 64)
        pixels = image.pixels[image.mask].astype(float)
        lit = pixels[pixels.max(axis=1) > 100]
        nearest = np.square(lit[:, None] - shades).sum(axis=-1).argmin(axis=1) // 3
        assert np.bincount(nearest).argmax() == number, (name, colour)


def test_colours_are_far_apart_and_their_shades_grow_lighter():
    for one, other in combinations(COLOURS, 2):
        assert np.linalg.norm(np.subtract(RAMPS[one][2], RAMPS[other][2])) > 60, (one, other)
    for colour in COLOURS:
        assert (np.diff(np.sum(RAMPS[colour], axis=1)) > 0).all(), colour


def test_every_object_stands_out_from_every_setting():
    for name, colour, setting in product(OBJECTS, COLOURS, SETTINGS):
        image = draw_with_mask(Scene(name, colour, setting), generator(2), 16, 16)
        rows = [row[~gone].mean(axis=0) for row, gone in zip(image.pixels, image.mask, strict=True)]
        off = image.pixels - np.array(rows)[:, None]
        assert np.sqrt(np.square(off[image.mask]).mean()) > 35, (name, colour, setting)


def _least_difference(one: np.ndarray, other: np.ndarray) -> float:
    """Share of covered cells that differ at the best of the shifts by up to two cells."""
    fixed = np.pad(one, 2)
    shares = []
    for down, right in product(range(5), repeat=2):
        moved = np.zeros_like(fixed)
        moved[down : down + SHAPE_SIZE, right : right + SHAPE_SIZE] = other
        shares.append((fixed != moved)[(fixed > 0) | (moved > 0)].mean())
    return min(shares)


def test_no_two_objects_look_alike():
    for one, other in combinations(OBJECTS, 2):
        assert _least_difference(SHAPES[one], SHAPES[other]) > 0.25, (one, other)
        assert _least_difference((SHAPES[one] > 0) * 1, (SHAPES[other] > 0) * 1) > 0.01, (one, other)


def test_settings_differ_in_their_corners():
    corners = {
        setting: np.mean(
            [draw_grid(Scene("key", "red", setting), generator(k))[[0, -1], 0].ravel() for k in range(40)], axis=0
        )
        for setting in SETTINGS
    }
    for one, other in combinations(SETTINGS, 2):
        assert np.linalg.norm(corners[one] - corners[other]) > 40, (one, other)


def test_the_split_keeps_every_pair_in_training():
    train, held_out = split_scenes()
    assert len(held_out) == 240 and not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(all_scenes())
    assert {(s.object, s.colour) for s in train} == set(product(OBJECTS, COLOURS))
    assert {(s.object, s.setting) for s in train} == set(product(OBJECTS, SETTINGS))
    assert {(s.colour, s.setting) for s in train} == set(product(COLOURS, SETTINGS))


def test_the_split_keeps_every_pair_even_at_its_limit_and_refuses_more():
    train, _ = split_scenes(held_out=2000)
    assert {(s.object, s.colour) for s in train} == set(product(OBJECTS, COLOURS))
    assert {(s.object, s.setting) for s in train} == set(product(OBJECTS, SETTINGS))
    with pytest.raises(ValueError, match="2390"):
        split_scenes(held_out=2390)


def test_the_split_depends_only_on_its_seed():
    assert split_scenes(3) == split_scenes(3) and split_scenes(3) != split_scenes(4)


def _names(text: str, name: str, synonyms: dict[str, tuple[str, ...]]) -> bool:
    return any(word in text for word in (name, *synonyms.get(name, ())))


def test_captions_always_name_object_colour_and_setting_and_no_other_colour():
    rng = generator()
    for scene in all_scenes():
        text = caption(scene, rng)
        assert _names(text, scene.object, OBJECT_SYNONYMS), text
        assert _names(text, scene.colour, COLOUR_SYNONYMS), text
        assert scene.setting in text, text
        words = text.replace(",", " ").split()
        assert not set(words) & (set(COLOURS) - {scene.colour}), text


def test_canonical_words_occur_in_most_captions():
    rng = generator()
    scenes = [Scene("mushroom", "red", "lava"), Scene("cup", "teal", "cave"), Scene("tree", "purple", "snow")]
    for scene in scenes:
        texts = [caption(scene, rng) for _ in range(400)]
        for word in (scene.object, scene.colour):
            share = np.mean([word in text.replace(",", " ").split() for text in texts])
            assert share > 0.85, (word, share)
        assert any("crimson" in text for text in texts) == (scene.colour == "red")


def test_captions_use_the_right_article():
    rng = generator()
    for scene in some_scenes(1500):
        words = caption(scene, rng).replace(",", "").replace(":", "").split()
        for article, word in pairwise(words):
            assert article != "a" or word[0] not in "aeiou", words
            assert article != "an" or word[0] in "aeiou", words
    assert with_article("orange cat") == "an orange cat" and with_article("red cat") == "a red cat"


def test_captions_come_in_many_wordings_short_and_long():
    rng = generator()
    texts = {caption(MUSHROOM, rng) for _ in range(600)}
    lengths = [len(text.split()) for text in texts]
    assert len(texts) > 50 and min(lengths) <= 4 and max(lengths) >= 15
    assert len(SHORT_FORMS) >= 8


def test_the_short_caption_is_the_canonical_one_and_the_long_one_is_longer():
    assert short_caption(MUSHROOM) == "a red mushroom on grass"
    assert short_caption(Scene("umbrella", "orange", "night")) == "an orange umbrella at night"
    for scene in some_scenes(50):
        assert len(long_caption(scene, generator())) > len(short_caption(scene))
        assert long_caption(scene, generator(5)) == long_caption(scene, generator(5))


def test_a_written_dataset_has_complete_labels_and_nothing_unfinished(tmp_path):
    path = write_dataset(tmp_path / "new", count=11, seed=2)
    labels = json.loads(path.read_text())
    assert len(labels) == 11
    for label in labels:
        assert set(label) == {"path", "prompt", "sharegpt4v", "height", "width", "ratio"}
        with Image.open(path.parent / label["path"]) as image:
            assert image.size == (label["width"], label["height"]) and image.mode == "RGB"
        assert label["ratio"] == label["height"] / label["width"]
    assert {p.name for p in path.parent.iterdir()} == {label["path"] for label in labels} | {"labels.json"}


def test_an_interrupted_rewrite_leaves_the_old_labels(tmp_path, monkeypatch):
    old = write_dataset(tmp_path, count=2).read_bytes()
    monkeypatch.setattr("pixart_nb.pixelart.datasets.short_caption", lambda scene: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_dataset(tmp_path, count=3, seed=1)
    assert (tmp_path / "labels.json").read_bytes() == old


def test_a_sample_is_not_written_over_another_data_set(tmp_path):
    assert write_sample(tmp_path / "raw", count=4, side=16) == 13
    before = (tmp_path / "raw" / TABLE).read_bytes()
    with pytest.raises(PixArtNBError, match="--overwrite"):
        write_sample(tmp_path / "raw", count=8, side=16)
    assert (tmp_path / "raw" / TABLE).read_bytes() == before
    assert write_sample(tmp_path / "raw", count=8, side=16, overwrite=True) == 26


def test_the_shipped_images_are_those_the_code_draws(tmp_path):
    again = write_dataset(tmp_path, count=36, seed=0)
    assert (SHIPPED / "labels.json").read_text() == again.read_text()
    labels = json.loads(again.read_text())
    assert {(label["height"], label["width"]) for label in labels} >= {(128, 128), (128, 192), (192, 128), (256, 256)}
    for label in labels:
        with Image.open(SHIPPED / label["path"]) as shipped, Image.open(tmp_path / label["path"]) as drawn:
            assert np.array_equal(np.asarray(shipped), np.asarray(drawn)), label["path"]
