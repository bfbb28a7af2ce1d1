"""The evaluator of drawn scenes, on images it has never seen and on images that show no scene."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pixart_nb.pixelart.backgrounds import BACKGROUNDS
from pixart_nb.pixelart.evaluator import SpriteEvaluator, cell_means
from pixart_nb.pixelart.scenes import (
    COLOURS,
    OBJECTS,
    SETTINGS,
    Scene,
    all_scenes,
    draw,
    draw_grid,
    draw_with_mask,
    resize_nearest,
)

EVALUATOR = SpriteEvaluator()
PARTS = ("object", "colour", "setting")


def fresh(count: int, seed: int, height: int = 128, width: int = 128) -> tuple[list[np.ndarray], list[Scene]]:
    rng, scenes = np.random.default_rng(seed), all_scenes()
    chosen = [scenes[k] for k in rng.integers(len(scenes), size=count)]
    return [draw(scene, rng, height, width) for scene in chosen], chosen


def spoilt(image: np.ndarray, rng: np.random.Generator, blur: float, noise: float) -> np.ndarray:
    """Blurred by ``blur`` pixels, then with Gaussian noise of ``noise`` in 0..255."""
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(blur)), dtype=float)
    return np.clip(blurred + rng.normal(0, noise, blurred.shape), 0, 255).astype(np.uint8)


def backgrounds(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(11)
    grids = [BACKGROUNDS[SETTINGS[k % len(SETTINGS)]](rng, 16, 16) for k in range(count)]
    return [resize_nearest(np.clip(grid, 0, 255).astype(np.uint8), 128, 128) for grid in grids]


def test_fresh_images_are_read_right_and_with_confidence():
    images, scenes = fresh(500, seed=4242)
    shares = EVALUATOR.accuracy(images, scenes)
    assert set(shares) == {*PARTS, "all"}
    assert all(shares[part] >= 0.99 for part in PARTS), shares
    assert all(verdict.confident for verdict in EVALUATOR.evaluate_many(images))


@pytest.mark.parametrize(("blur", "noise"), [(1, 12), (2, 25), (3, 40)])
def test_blurred_and_noisy_images_are_read_right(blur, noise):
    rng = np.random.default_rng(1)
    images, scenes = fresh(200, seed=99)
    shares = EVALUATOR.accuracy([spoilt(image, rng, blur, noise) for image in images], scenes)
    assert all(shares[part] >= 0.95 for part in PARTS), shares


def test_images_with_a_colour_cast_are_read_right():
    rng = np.random.default_rng(2)
    images, scenes = fresh(200, seed=98)
    cast = [np.clip(p + rng.uniform(-15, 15, 3), 0, 255).astype(np.uint8) for p in images]
    shares = EVALUATOR.accuracy(cast, scenes)
    assert all(shares[part] >= 0.95 for part in PARTS), shares


@pytest.mark.parametrize(
    ("height", "width"), [(128, 128), (128, 192), (256, 256), (192, 128), (64, 64), (97, 130), (16, 16), (200, 512)]
)
def test_images_of_any_size_are_read_right(height, width):
    images, scenes = fresh(60, height + width, height, width)
    assert EVALUATOR.accuracy(images, scenes)["all"] >= 0.98


def test_shuffled_scenes_agree_only_by_chance():
    images, scenes = fresh(500, seed=5)
    shuffled = [scenes[k] for k in np.random.default_rng(6).permutation(len(scenes))]
    shares = EVALUATOR.accuracy(images, shuffled)
    for part, names in zip(PARTS, (OBJECTS, COLOURS, SETTINGS), strict=True):
        chance = 1 / len(names)
        assert abs(shares[part] - chance) < 4 * np.sqrt(chance * (1 - chance) / len(scenes)), (part, shares)
    assert shares["all"] < 0.02


def test_placement_and_mask_are_those_of_the_drawing():
    for k, scene in enumerate(all_scenes()[::37]):
        image = draw_with_mask(scene, np.random.default_rng(k), 128, 192)
        verdict = EVALUATOR.evaluate(image.pixels)
        assert verdict.placement == image.placement, scene
        assert np.array_equal(verdict.mask, image.mask), scene


def test_an_object_two_cells_off_its_usual_place_is_still_found():
    for k, scene in enumerate(all_scenes()[::97]):
        grid = draw_grid(scene, np.random.default_rng(k), 18, 18)
        corner = resize_nearest(grid[:16, :16], 128, 128)
        assert EVALUATOR.evaluate(corner).object == scene.object, scene


@pytest.mark.parametrize("kind", ["background", "noisy background", "pixel noise", "cell noise", "blobs", "flat"])
def test_an_image_without_an_object_is_flagged(kind):
    rng = np.random.default_rng(3)
    make = {
        "background": lambda: backgrounds(64),
        "noisy background": lambda: [spoilt(image, rng, 1, 20) for image in backgrounds(64)],
        "pixel noise": lambda: list(rng.integers(0, 256, (32, 128, 128, 3), dtype=np.uint8)),
        "cell noise": lambda: [
            resize_nearest(g, 128, 128) for g in rng.integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
        ],
        "blobs": lambda: [resize_nearest(g, 128, 128) for g in rng.integers(0, 256, (64, 4, 4, 3), dtype=np.uint8)],
        "flat": lambda: [np.full((64, 64, 3), c, np.uint8) for c in rng.integers(0, 256, (64, 3), dtype=np.uint8)],
    }
    verdicts = EVALUATOR.evaluate_many(make[kind]())
    assert not any(verdict.confident for verdict in verdicts)
    assert all(0 <= verdict.object_score <= 1 for verdict in verdicts)


def test_a_plain_rectangle_is_not_taken_for_an_object():
    rng = np.random.default_rng(8)
    images = [image.copy() for image in backgrounds(64)]
    for image in images:
        image[24:104, 24:104] = rng.integers(0, 256, 3)
    assert not any(verdict.confident for verdict in EVALUATOR.evaluate_many(images))


def test_recolouring_the_object_changes_the_colour_alone():
    for k, colour in enumerate(COLOURS):
        verdict = EVALUATOR.evaluate(draw(Scene("dragon", colour, "forest"), np.random.default_rng(k)))
        assert verdict.scene == Scene("dragon", colour, "forest")


def test_images_of_several_sizes_keep_their_order():
    sizes = [(128, 128), (64, 96), (256, 256), (128, 128), (64, 96)]
    scenes = all_scenes()[::480]
    rng = np.random.default_rng(0)
    images = [draw(scene, rng, *size) for scene, size in zip(scenes, sizes, strict=True)]
    assert [verdict.scene for verdict in EVALUATOR.evaluate_many(images)] == scenes
    assert [verdict.mask.shape for verdict in EVALUATOR.evaluate_many(images)] == sizes


def test_cell_means_of_a_clean_image_are_its_grid():
    scene = all_scenes()[100]
    image = draw(scene, np.random.default_rng(9), 128, 192)
    grid = draw_grid(scene, np.random.default_rng(9), 16, 24)
    np.testing.assert_allclose(cell_means(image[None])[0], grid, atol=1e-3)


@pytest.mark.parametrize(
    "image", [np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3)), np.zeros((64, 64, 4), np.uint8)]
)
def test_arrays_that_are_not_rgb_bytes_are_refused(image):
    with pytest.raises(ValueError, match="uint8"):
        EVALUATOR.evaluate(image)


def test_accuracy_refuses_lists_that_do_not_match():
    images, scenes = fresh(3, seed=0)
    with pytest.raises(ValueError, match="one scene per image"):
        EVALUATOR.accuracy(images, scenes[:2])
    with pytest.raises(ValueError, match="at least one"):
        EVALUATOR.accuracy([], [])
