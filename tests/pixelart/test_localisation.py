"""The map of the object's noun finds the object, on prompts that training never showed."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.pixelart.evaluation import held_out_scenes
from pixart_nb.pixelart.localisation import (
    LocatedWords,
    locate_words,
    mean_overlaps,
    overlap,
    overlaps_by_word,
    position_prior,
    thresholded,
)
from pixart_nb.pixelart.scenes import Scene


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
    for one in found:
        assert one.words[-1] == "</s>" and {one.scene.object, one.scene.setting} <= set(one.words)
        assert one.maps.shape == (len(one.words), 8, 8)
        assert np.abs(one.maps.sum(0) - 1).max() < 1e-5
        assert one.image.shape == (128, 128, 3) and one.mask.shape == (128, 128)
        best = thresholded(one.maps[one.words.index(one.scene.object)], one.mask.shape)
        assert one.overlap_of(one.scene.object) == overlap(best, one.mask)


def test_words_that_name_neither_object_nor_colour_are_wrong_ones():
    words, nothing = ("a", "red", "mushroom", "on", "grass", "</s>"), np.zeros((8, 8))
    found = [
        LocatedWords(Scene("mushroom", "red", "grass"), nothing, nothing, words, nothing, np.array(overlaps))
        for overlaps in ([0.1, 0.6, 0.5, 0.2, 0.0, 0.3], [0.1, 0.4, 0.7, 0.0, 0.1, 0.2])
    ]
    means = mean_overlaps(found)
    assert means == pytest.approx(
        {"count": 2, "object": 0.6, "colour": 0.5, "setting": 0.05, "mean_wrong": 0.125, "best_wrong": 0.25}
    )


def test_the_position_prior_is_the_mean_mask_of_training_scenes_and_a_baseline(found):
    prior = position_prior(64, 64, count=20, seed=3)
    assert prior.shape == (64, 64) and 0 <= prior.min() < 0.05 and prior.max() > 0.9
    assert prior[16:48, 16:48].mean() > 3 * np.delete(prior, np.s_[16:48], axis=0).mean()  # objects are in the middle
    np.testing.assert_array_equal(position_prior(64, 64, count=20, seed=3), prior)
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
