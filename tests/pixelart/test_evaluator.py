"""The evaluator of the drawn world, on scenes that nobody fitted it to."""

import numpy as np
import pytest

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.pixelart.evaluator import SceneEvaluator, compare
from pixart_nb.pixelart.objects import OBJECTS, UNSEEN_OBJECTS
from pixart_nb.pixelart.scenes import Scene, Thing, draw, draw_cells, draw_with_masks, one
from pixart_nb.pixelart.split import training_scene


def drawn(count, cells, pair_share, seed, cell=8, width=None):
    rng = np.random.default_rng(seed)
    scenes = [training_scene(rng, pair_share) for _ in range(count)]
    drawings = [draw_cells(scene, rng, cells, width or cells) for scene in scenes]
    return scenes, [d.pixels.repeat(cell, 0).repeat(cell, 1) for d in drawings], drawings


@pytest.mark.parametrize(
    ("cells", "things", "count", "least"),
    [
        (32, 1, 5, 1.0),
        (32, 2, 4, 1.0),
        pytest.param(128, 1, 8, 1.0, marks=pytest.mark.slow),
        pytest.param(16, 1, 40, 0.9, marks=pytest.mark.slow),
        pytest.param(32, 1, 60, 0.99, marks=pytest.mark.slow),
        pytest.param(32, 2, 40, 0.97, marks=pytest.mark.slow),
        pytest.param(64, 1, 24, 0.99, marks=pytest.mark.slow),
        pytest.param(64, 2, 40, 0.97, marks=pytest.mark.slow),
    ],
)
def test_everything_is_read_from_fresh_scenes(cells, things, count, least):
    scenes, images, _ = drawn(count, cells, things - 1, 1000 + cells + things)
    accuracy = SceneEvaluator().accuracy(images, scenes)
    named = {"relation"} if things == 2 else {"size", "position"}
    assert set(accuracy) == {"object", "colour", "setting", "all"} | named
    assert accuracy["all"] >= least, accuracy


def test_other_captions_are_right_by_chance():
    scenes, images, _ = drawn(16, 32, 0.0, 5)
    accuracy = SceneEvaluator().accuracy(images, scenes[1:] + scenes[:1])
    assert accuracy["all"] <= 0.1 and accuracy["object"] <= 0.3 and accuracy["setting"] <= 0.5


def test_blurred_and_noisy_images_are_read():
    scenes, images, _ = drawn(6, 32, 0.0, 6)
    rng = np.random.default_rng(0)
    noisy = [
        np.clip(
            sum(np.roll(image.astype(float), k, 1) for k in (-1, 0, 1)) / 3 + rng.normal(0, 12, image.shape), 0, 255
        )
        for image in images
    ]
    assert SceneEvaluator().accuracy([image.astype(np.uint8) for image in noisy], scenes)["all"] >= 0.8


def test_number_places_and_masks_of_things_are_found():
    scenes, images, drawings = drawn(6, 32, 0.5, 8)
    for scene, image, drawing in zip(scenes, images, drawings, strict=True):
        reading = SceneEvaluator().read(image)
        assert len(reading.scene.things) == len(scene.things) == len(reading.masks)
        for thing, position, mask in zip(reading.scene.things, reading.placements, reading.masks, strict=True):
            number = scene.things.index(thing)
            assert np.hypot(position.x - drawing.placements[number].x, position.y - drawing.placements[number].y) < 0.06
            own = drawing.masks[number].repeat(8, 0).repeat(8, 1)
            assert (mask & own).sum() / (mask | own).sum() > 0.75


def test_wide_images_are_read():
    scenes, images, _ = drawn(3, 32, 0.0, 9, width=48)
    assert SceneEvaluator().accuracy(images, scenes)["all"] >= 0.6


def test_parts_are_compared_with_the_scene_told_from_either_thing():
    cat, boat = Thing("cat", "red"), Thing("boat", "blue")
    scene = Scene((cat, boat), "beach", "left of")
    assert compare(Scene((boat, cat), "beach", "right of"), scene)["all"]
    swapped = Scene((Thing("cat", "blue"), Thing("boat", "red")), "beach", "left of")
    parts = compare(swapped, scene)
    assert parts["object"] and parts["relation"] and not parts["colour"] and not parts["all"]


def test_bad_images_are_refused():
    reader = SceneEvaluator()
    for image in (np.zeros((128, 128), np.uint8), np.zeros((128, 128, 3)), np.zeros((64, 128, 3), np.uint8)):
        with pytest.raises(PixArtNBError, match="expected \\(H, W, 3\\) uint8 of 128 pixels"):
            reader.read(image)
    with pytest.raises(PixArtNBError, match="expected 1, 2 or None"):
        reader.read(np.zeros((128, 128, 3), np.uint8), 3)


def test_unseen_objects_are_read_by_an_evaluator_that_knows_them():
    scenes = [one(name, colour, "beach") for name in UNSEEN_OBJECTS for colour in ("red", "teal", "white")]
    images = [draw(scene, np.random.default_rng(k)) for k, scene in enumerate(scenes)]
    knowing = SceneEvaluator((*OBJECTS, *UNSEEN_OBJECTS))
    assert knowing.accuracy(images, scenes)["all"] == 1.0
    assert SceneEvaluator().read(images[0]).scene.things[0].object in OBJECTS
    known = one("cat", "red", "grass")
    assert knowing.accuracy([draw(known, np.random.default_rng(0))], [known])["all"] == 1.0
    for objects in ([], ["cat", "ankor"]):
        with pytest.raises(PixArtNBError, match="expected some of"):
            SceneEvaluator(objects)


@pytest.mark.parametrize("relation", ["right of", "above"])
def test_masks_come_in_the_order_of_the_scene_that_an_image_should_show(relation):
    cat, boat = Thing("cat", "red"), Thing("boat", "blue")
    drawing = draw_with_masks(Scene((boat, cat), "beach", relation), np.random.default_rng(0))
    for things, masks in (((boat, cat), drawing.masks), ((cat, boat), drawing.masks[::-1])):
        reading = SceneEvaluator().read_for(drawing.pixels, Scene(things, "beach", relation))
        for mask, own in zip(reading.masks, masks, strict=True):
            assert (mask & own).sum() / (mask | own).sum() > 0.75
