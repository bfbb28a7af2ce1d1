"""Drawn scenes: any size, seeded, positions that vary, captions that name everything; the shipped images."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.pixelart.captions import (
    COLOUR_SYNONYMS,
    OBJECT_SYNONYMS,
    as_captioned,
    caption,
    caption_words,
    named_scenes,
    scene_of,
    short_caption,
    with_article,
)
from pixart_nb.pixelart.datasets import TABLE, write_dataset, write_sample, write_scenes, write_training_scenes
from pixart_nb.pixelart.evaluator import SceneEvaluator
from pixart_nb.pixelart.objects import OBJECTS
from pixart_nb.pixelart.pool import PATCH, autoencoder_shard, write_pool
from pixart_nb.pixelart.render import MATERIALS, TEXTURES
from pixart_nb.pixelart.scenes import (
    COLOURS,
    POSITIONS,
    RELATIONS,
    SIZES,
    Scene,
    Thing,
    draw,
    draw_cells,
    draw_with_masks,
    one,
)
from pixart_nb.pixelart.settings import SETTINGS
from pixart_nb.pixelart.split import held_out_pairs, held_out_scenes, held_out_triples, is_held_out, training_scene
from pixart_nb.pixelart.synthetic import synthetic_image

NAMES = sorted(OBJECTS)
SHIPPED = Path(__file__).parents[2] / "data" / "pixelart"


def scenes(count, seed=0, things=1):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        chosen = tuple(Thing(NAMES[rng.integers(len(NAMES))], COLOURS[rng.integers(10)]) for _ in range(things))
        relation = RELATIONS[rng.integers(4)] if things == 2 else ""
        yield Scene(chosen, list(SETTINGS)[rng.integers(8)], relation)


def test_there_are_enough_objects_colours_and_settings():
    assert len(OBJECTS) >= 24 and len(COLOURS) == 10 and len(SETTINGS) == 8


def test_drawings_fill_the_unit_square_with_known_materials_and_textures():
    for name, parts in OBJECTS.items():
        points = np.concatenate([points for part in parts for points in part.shape.polygons])
        assert points.min() > -0.1 and points.max() < 1.1 and np.ptp(points, 0).max() > 0.8, name
        assert any(part.material == "main" for part in parts), name
        assert all(part.material in {"main", *MATERIALS} and part.texture in {"", *TEXTURES} for part in parts), name


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 36), (64, 48)])
def test_the_same_seed_gives_the_same_bytes_at_every_size(height, width):
    for scene in scenes(4, things=2):
        one, other = (draw_cells(scene, np.random.default_rng(5), height, width) for _ in range(2))
        assert one.pixels.tobytes() == other.pixels.tobytes() and one.pixels.shape == (height, width, 3)
        assert one.placements == other.placements
        assert all(mask.sum() > 4 for mask in one.masks) and not (one.masks[0] & one.masks[1]).any()


def test_more_cells_show_the_same_picture():
    alike, others, drawn = [], [], list(scenes(12))
    for k, scene in enumerate(drawn):
        small, other = (draw_cells(s, np.random.default_rng(k), 16, 16).pixels.ravel() for s in (scene, drawn[k - 1]))
        large = draw_cells(scene, np.random.default_rng(k), 64, 64).pixels.reshape(16, 4, 16, 4, 3).mean((1, 3)).ravel()
        alike.append(np.corrcoef(small, large)[0, 1])
        others.append(np.corrcoef(small, other)[0, 1])
    assert min(alike) > 0.4 and np.mean(alike) > np.mean(others) + 0.2


@pytest.mark.parametrize("things", [1, 2])
def test_a_mean_mask_does_not_tell_where_the_object_is(things):
    rng = np.random.default_rng(1)
    chosen = [training_scene(rng, things - 1) for _ in range(200)]
    masks = [m for k, s in enumerate(chosen) for m in draw_cells(s, np.random.default_rng(k), 24, 24).masks]
    mean = np.mean(masks, axis=0)
    overlaps = [
        np.mean([(m & (mean > t)).sum() / (m | (mean > t)).sum() for m in masks]) for t in np.linspace(0.05, 0.5, 10)
    ]
    assert max(overlaps) <= 0.36  # 0.35 over many scenes


def test_relations_are_those_of_the_placements():
    for k, scene in enumerate(scenes(60, 2, 2)):
        first, second = draw_cells(scene, np.random.default_rng(k), 16, 16).placements
        assert {"left of": first.x < second.x - 0.2, "right of": first.x > second.x + 0.2,
                "above": first.y < second.y - 0.3, "in front of": first.y > second.y}[scene.relation]  # fmt: skip


def test_captions_name_everything():
    scene = Scene((Thing("cat", "orange"), Thing("boat", "blue")), "beach", "left of")
    assert short_caption(scene) == "an orange cat left of a blue boat on a beach"
    texts = {caption(scene, np.random.default_rng(k)) for k in range(200)}
    assert len(texts) > 60
    assert all("orange" in t and "blue" in t and "beach" in t and ("left" in t or "right" in t) for t in texts)


def test_scenes_that_cannot_be_are_refused():
    cat = Thing("cat", "red")
    for things, relation in (((cat,) * 3, ""), ((cat, cat), ""), ((cat,), "above"), ((), "")):
        with pytest.raises(PixArtNBError, match="one object, or two and a relation"):
            Scene(things, "beach", relation)
    with pytest.raises(PixArtNBError, match="expected 16 to 512"):
        draw_cells(Scene((cat,), "beach"), np.random.default_rng(0), 8, 8)


def test_words_of_a_caption_belong_to_their_thing():
    scene = Scene((Thing("cat", "orange"), Thing("boat", "blue")), "beach", "above")
    for k in range(40):
        words = caption_words(scene, np.random.default_rng(k), ("foo", "bar"))
        first, second = ([word.strip(",") for word, thing in words if thing == n] for n in (0, 1))
        assert first == ["an", "orange", "foo"] and second == ["a", "blue", "bar"]
        assert " ".join(word for word, _ in words).count("  ") == 0


def test_held_out_scenes_are_new_combinations_of_known_parts():
    seen = [training_scene(np.random.default_rng(k)) for k in range(4000)]
    assert not any(is_held_out(scene) for scene in seen)
    triples = {(thing.object, thing.colour, scene.setting) for scene in seen for thing in scene.things}
    for name, colour, setting in held_out_triples()[:40]:
        assert any(t[:2] == (name, colour) for t in triples) and any(t[0] == name and t[2] == setting for t in triples)
    for things in (1, 2):
        scenes_ = held_out_scenes(90, things)
        assert all(is_held_out(scene) and len(scene.things) == things for scene in scenes_)
        assert scenes_ == held_out_scenes(90, things)
    assert len({frozenset(pair) for pair in held_out_pairs()}) == 45
    with pytest.raises(PixArtNBError, match="expected 1 to 240"):
        held_out_scenes(241)


def test_a_pool_depends_on_its_seed_alone_and_is_not_drawn_twice(tmp_path, monkeypatch):
    monkeypatch.setattr("pixart_nb.pixelart.pool.SHARD", 6)
    one, other = autoencoder_shard(3, 0), autoencoder_shard(3, 0)
    assert one["drawn"].shape == one["synthetic"].shape == (6, PATCH, PATCH, 3)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    paths = write_pool(tmp_path, 3, _numbered, processes=2)
    stamps = [path.stat().st_mtime_ns for path in paths]
    assert [int(np.load(path)["number"]) for path in write_pool(tmp_path, 3, _numbered, 2)] == [0, 1, 2]
    assert stamps == [path.stat().st_mtime_ns for path in paths]


def _numbered(number):
    return {"number": np.array(number)}


def test_synthetic_images_vary():
    images = np.stack([synthetic_image(64, np.random.default_rng(k)) for k in range(24)])
    assert images.shape == (24, 64, 64, 3) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 24 and np.std(images.mean((1, 2, 3))) > 20


def _names(text: str, name: str, synonyms: dict[str, tuple[str, ...]]) -> bool:
    return any(word in text for word in (name, *synonyms.get(name, ())))


def test_captions_always_name_object_colour_and_setting_and_no_other_colour():
    rng = np.random.default_rng(0)
    for scene in scenes(400, 3):
        text = caption(scene, rng)
        thing = scene.things[0]
        assert _names(text, thing.object, OBJECT_SYNONYMS), text
        assert _names(text, thing.colour, COLOUR_SYNONYMS), text
        assert scene.setting in text, text
        assert not set(text.replace(",", " ").split()) & (set(COLOURS) - {thing.colour}), text


def test_captions_use_the_right_article():
    rng = np.random.default_rng(0)
    for _ in range(800):
        words = caption(training_scene(rng), rng).replace(",", "").replace(":", "").split()
        for article, word in pairwise(words):
            assert article != "a" or word[0] not in "aeiou", words
            assert article != "an" or word[0] in "aeiou", words
    assert with_article("orange cat") == "an orange cat" and with_article("red cat") == "a red cat"


def test_a_canonical_caption_names_its_scene_and_no_other_text_does():
    rng = np.random.default_rng(4)
    for _ in range(300):
        scene = as_captioned(training_scene(rng), rng)
        assert scene_of(short_caption(scene)) == scene
    assert scene_of("a large red anchor on the left, on a beach") == one("anchor", "red", "beach", "large", "left")
    for text in ("a red hat", "red cat on grass", "a red cat  on grass", "a small red cat above a blue boat at night",
                 "a red castle on grass", "a red cat on grass.", "", "a red cat on the left on grass"):  # fmt: skip
        assert scene_of(text) is None, text
    with pytest.raises(PixArtNBError, match="'a castle' names no scene; expected such as 'a red mushroom on grass'"):
        named_scenes(["a red cat on grass", "a castle"])


def test_a_caption_names_size_and_place_unless_they_are_the_usual_ones():
    rng = np.random.default_rng(0)
    small, usual = one("cat", "red", "cave", "small", "left"), one("cat", "red", "cave", "large", "middle")
    texts = [caption(small, rng) for _ in range(100)]
    assert all("small" in text and "left" in text for text in texts) and len(set(texts)) > 50
    texts = [caption(usual, rng) for _ in range(400)]
    for words in (("large",), ("middle", "centre")):
        assert 0.4 < np.mean([any(word in text for word in words) for text in texts]) < 0.6
    assert short_caption(small) == "a small red cat on the left, in a cave"
    assert short_caption(one("cat", "red", "cave")) == "a red cat in a cave"
    drawn = [draw(scene, np.random.default_rng(0)) for scene in (usual, one("cat", "red", "cave"))]
    assert np.array_equal(*drawn)


def test_things_stand_where_their_scene_says():
    for size, share in SIZES.items():
        for position, across in POSITIONS.items():
            at = draw_cells(one("cat", "red", "cave", size, position), np.random.default_rng(0), 32, 32).placements[0]
            assert at.size == share and abs(at.x - share / 2 - across * (1 - share)) <= 1 / 16
            wide = draw_cells(one("cat", "red", "cave", size, position), np.random.default_rng(0), 32, 64).placements[0]
            assert wide.y == at.y and abs(wide.x - share / 2 - across * (2 - share)) <= 1 / 16


def test_the_square_in_the_middle_of_an_image_of_a_data_set_holds_its_thing(tmp_path):
    write_scenes(tmp_path, [one("cat", "red", "cave")] * 4, np.random.default_rng(0), [(384, 256), (256, 384)])
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as image:
            left, top = (image.width - 256) // 2, (image.height - 256) // 2
            square = np.asarray(image.crop((left, top, left + 256, top + 256)))
        assert SceneEvaluator().accuracy([square], [one("cat", "red", "cave")])["object"] == 1


def test_corners_stand_on_eighths_of_the_image():
    rng = np.random.default_rng(0)
    for _ in range(100):
        for at in draw_cells(training_scene(rng), rng, 16, 24).placements:
            assert (at.x - at.size / 2) * 8 % 1 == (at.y - at.size / 2) * 8 % 1 == 0


def test_an_image_has_cells_of_eight_pixels_at_every_size():
    scene = one("cat", "red", "cave")
    for height, width in ((128, 128), (256, 384), (512, 256)):
        drawing = draw_with_masks(scene, np.random.default_rng(0), height, width)
        cells = draw_cells(scene, np.random.default_rng(0), height // 8, width // 8)
        assert np.array_equal(drawing.pixels, cells.pixels.repeat(8, 0).repeat(8, 1))
        assert np.array_equal(drawing.masks[0], cells.masks[0].repeat(8, 0).repeat(8, 1))
        assert np.array_equal(draw(scene, np.random.default_rng(0), height, width), drawing.pixels)


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
    monkeypatch.setattr("pixart_nb.pixelart.datasets.long_caption", lambda scene, rng: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_dataset(tmp_path, count=3, seed=1)
    assert (tmp_path / "labels.json").read_bytes() == old


def test_a_sample_is_not_written_over_another_data_set(tmp_path):
    assert write_sample(tmp_path / "raw", count=4, side=128) == 13
    before = (tmp_path / "raw" / TABLE).read_bytes()
    with pytest.raises(PixArtNBError, match="--overwrite"):
        write_sample(tmp_path / "raw", count=8, side=128)
    assert (tmp_path / "raw" / TABLE).read_bytes() == before
    assert write_sample(tmp_path / "raw", count=8, side=128, overwrite=True) == 26


def test_training_scenes_are_written_with_their_captions_and_none_is_held_out(tmp_path):
    labels = json.loads(write_training_scenes(tmp_path / "a", 60, 128).read_text())
    named = [scene_of(label["prompt"]) for label in labels]
    assert not any(map(is_held_out, named)) and {len(scene.things) for scene in named} == {1, 2}
    assert any(scene.size for scene in named)
    labels = json.loads(write_training_scenes(tmp_path / "b", 20, 128, pair_share=0).read_text())
    assert all(len(scene_of(label["prompt"]).things) == 1 for label in labels)
    silent = json.loads(write_training_scenes(tmp_path / "c", 20, 128, pair_share=0, silent_prompts=True).read_text())
    assert all((scene.size, scene.position) == ("", "") for scene in (scene_of(label["prompt"]) for label in silent))
    assert [label["sharegpt4v"] for label in silent] == [label["sharegpt4v"] for label in labels]
    with pytest.raises(PixArtNBError, match="--overwrite"):
        write_training_scenes(tmp_path / "b", 5, 128)
    assert len(json.loads((tmp_path / "b" / "labels.json").read_text())) == 20


def test_the_shipped_images_are_those_the_code_draws(tmp_path):
    again = write_dataset(tmp_path, count=36, seed=0)
    assert (SHIPPED / "labels.json").read_text() == again.read_text()
    labels = json.loads(again.read_text())
    assert {(label["height"], label["width"]) for label in labels} >= {(256, 256), (256, 384), (384, 256), (512, 512)}
    for label in labels:
        with Image.open(SHIPPED / label["path"]) as shipped, Image.open(tmp_path / label["path"]) as drawn:
            assert np.array_equal(np.asarray(shipped), np.asarray(drawn)), label["path"]
