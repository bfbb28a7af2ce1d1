"""Textures of generated images against drawn ones, by level of a Laplacian pyramid."""

import numpy as np
import pytest

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.pixelart.scenes import draw
from pixart_nb.pixelart.split import training_scene
from pixart_nb.pixelart.textures import enlarged, laplacian_pyramid, level_energies, sliced_wasserstein, texture_ratios

SCENES = [training_scene(np.random.default_rng(k)) for k in range(36)]


def drawn(seed):
    rng = np.random.default_rng(seed)
    return [draw(scene, rng, 128, 192)[::2, ::2] for scene in SCENES]


def coarse(image):
    height, width = image.shape[:2]
    return image[::4, ::4].repeat(4, 0).repeat(4, 1)[:height, :width]


def test_the_levels_of_a_pyramid_add_up_to_the_image():
    image = drawn(0)[0]
    *levels, rest = laplacian_pyramid(image)
    assert [level.shape[:2] for level in levels] == [(64, 96), (32, 48)]
    assert rest.shape[:2] == (16, 24)
    for level in reversed(levels):
        rest = level + enlarged(rest, level.shape)
    np.testing.assert_allclose(rest, image / 255, atol=1e-5)


def test_other_drawings_are_as_near_as_drawings_are():
    ratios = texture_ratios(drawn(3), drawn(1), drawn(2))
    assert list(ratios) == [64, 32, 16]
    assert all(0.7 < ratio < 1.4 for ratio in ratios.values())


def test_noise_is_far_on_the_finest_level_and_other_colours_on_the_coarsest():
    rng = np.random.default_rng(0)
    noisy = [np.clip(i + rng.normal(0, 12, i.shape), 0, 255).astype(np.uint8) for i in drawn(3)]
    ratios = texture_ratios(noisy, drawn(1), drawn(2))
    assert ratios[64] > 3
    assert ratios[64] > 2 * ratios[16]


def test_a_set_is_at_no_distance_from_itself():
    assert max(sliced_wasserstein(drawn(0), drawn(0)).values()) == 0


def test_an_enlarged_image_has_less_energy_on_its_finest_level():
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    smooth = np.full((64, 96, 3), 128, np.uint8)
    assert level_energies(coarse(image))[64] < 0.8 * level_energies(image)[64]
    assert level_energies(smooth)[64] == pytest.approx(0, abs=1e-9)


def test_images_of_two_sizes_are_refused():
    with pytest.raises(PixArtNBError, match="expected at least one each, of one size"):
        sliced_wasserstein(drawn(0), [np.zeros((8, 8, 3), np.uint8)])
