"""The map of the object's noun finds the object, on prompts that training never showed."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.pixelart.localisation import (
    LocatedWords,
    locate_words,
    mean_overlaps,
    overlap,
    overlaps_by_word,
    position_prior,
    thresholded,
)
from pixart_nb.pixelart.scenes import Scene, Thing, one
from pixart_nb.pixelart.split import held_out_scenes

MUSHROOM = one("mushroom", "red", "grass")


@pytest.fixture(scope="module")
def found(project):
    pipe = PixArtSigmaPipeline.from_pretrained(project / "data/tiny-sigma", mindspore_dtype=ms.float32)
    return locate_words(pipe, held_out_scenes(6), sampling_steps=10, batch_size=6)


def test_the_noun_finds_the_object_and_a_wrong_word_does_not(found):
    means = mean_overlaps(found)
    assert means["count"] == 6
    assert means["object"] > 0.3
    assert means["object"] > 2 * means["setting"]


def test_each_image_comes_with_its_words_and_their_maps(found):
    for one_found in found:
        name = one_found.scene.things[0].object
        assert one_found.words[-1] == "</s>" and {name, one_found.scene.setting} <= set(one_found.words)
        assert one_found.maps.shape == (len(one_found.words), 16, 16)
        assert np.abs(one_found.maps.sum(0) - 1).max() < 1e-5
        assert one_found.image.shape == (256, 256, 3) and one_found.mask.shape == (256, 256)
        best = thresholded(one_found.maps[one_found.words.index(name)], one_found.mask.shape)
        assert one_found.overlap_of(name) == overlap(best, one_found.mask)


def test_words_that_name_neither_object_nor_colour_are_wrong_ones():
    words, nothing = ("a", "red", "mushroom", "on", "grass", "</s>"), np.zeros((8, 8))
    found = [
        LocatedWords(MUSHROOM, nothing, (nothing,), words, nothing, np.array(overlaps)[:, None])
        for overlaps in ([0.1, 0.6, 0.5, 0.2, 0.0, 0.3], [0.1, 0.4, 0.7, 0.0, 0.1, 0.2])
    ]
    means = mean_overlaps(found)
    assert means == pytest.approx(
        {"count": 2, "object": 0.6, "colour": 0.5, "setting": 0.05, "mean_wrong": 0.125, "best_wrong": 0.25}
    )


def test_words_of_two_things_prefer_their_own():
    words, nothing = ("a", "red", "cat", "above", "a", "blue", "boat"), np.zeros((8, 8))
    overlaps = np.array([[0, 0], [0.5, 0.1], [0.6, 0.2], [0, 0], [0, 0], [0.4, 0.3], [0.1, 0.7]])
    scene = Scene((Thing("cat", "red"), Thing("boat", "blue")), "snow", "above")
    located = LocatedWords(scene, nothing, (nothing, nothing), words, nothing, overlaps)
    assert located.prefers_its_own() == [True, True] and located.prefers_its_own("colour") == [True, False]
    assert located.overlap_of("boat", 1) == 0.7
    alike = Scene((Thing("cat", "red"), Thing("boat", "red")), "snow", "above")
    same = LocatedWords(alike, nothing, (nothing, nothing), words, nothing, overlaps)
    assert same.prefers_its_own("colour") == []


def test_the_position_prior_is_the_mean_mask_of_training_scenes_and_a_baseline(found):
    prior = position_prior(128, 128, count=40, seed=3)
    assert prior.shape == (128, 128) and 0 <= prior.min() < 0.05 and 0.3 < prior.max() <= 1
    assert prior[:32].mean() < 0.3 * prior[64:112].mean()  # objects stand on the ground
    np.testing.assert_array_equal(position_prior(128, 128, count=40, seed=3), prior)
    prior = position_prior()
    by_word = overlaps_by_word(found, prior)
    assert {"object", "colour", "setting", "</s>", "position prior"} <= set(by_word)
    assert len(by_word["position prior"]) == len(by_word["object"]) == 6
    assert mean_overlaps(found, prior)["position_prior"] == pytest.approx(by_word["position prior"].mean())


def test_overlap_is_intersection_over_union():
    a, b = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    assert overlap(a, b) == 0
    a[0], b[:, 0] = True, True
    assert overlap(a, b) == 1 / 5
    assert overlap(a, a) == 1


def test_a_map_is_enlarged_smoothly_and_cut_between_its_ends():
    mask = thresholded(np.array([[0.0, 1.0], [0.0, 1.0]]), (8, 16))
    assert mask.shape == (8, 16)
    assert not mask[:, :8].any() and mask[:, 8:].all()
    assert thresholded(np.array([[0.0, 1.0]]), (4, 8), 0.9).sum() < 4 * 4


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="and 0 scenes"):
        locate_words(None, [])
