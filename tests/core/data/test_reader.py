"""Batches carry the images and captions that were drawn for them, whoever reads them and in whatever order."""

import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from pixart_nb.core.data.buckets import BucketSampler, training_sizes
from pixart_nb.core.data.images import ImageError, fit, load_image, to_signed
from pixart_nb.core.data.labels import load_labels
from pixart_nb.core.data.reader import LiveFeatures, ReadAhead


@pytest.fixture(scope="module")
def labels(project):
    folder = project / "data" / "pixelart"
    return load_labels(folder / "labels.json", folder)


def reader(labels, batch_size=4, rank=0, world=1, ratio=0.5, seed=0):
    sizes = training_sizes(labels, 256, True)
    return LiveFeatures(labels, BucketSampler(sizes, batch_size, seed, rank, world), ratio, None, None)


def test_a_batch_has_the_pixels_and_captions_of_its_labels(labels):
    batches = [reader(labels).images(step) for step in range(9)]
    assert {pixels.shape for pixels, *_ in batches} == {(4, 3, 256, 256), (4, 3, 208, 304), (4, 3, 304, 208)}
    for pixels, captions, indices in batches:
        expected = to_signed(np.stack([fit(load_image(labels[i].file), *pixels.shape[2:]) for i in indices]))
        np.testing.assert_array_equal(pixels, expected)
        assert pixels.dtype == np.float32
        for i, caption in zip(indices, captions, strict=True):
            assert caption in (labels[i].prompt, labels[i].sharegpt4v)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_original_prompts_come_up_as_often_as_asked(labels, ratio):
    choices = [reader(labels, ratio=ratio).choose(step) for step in range(250)]
    share = np.mean([captions == 0 for *_, captions in choices])
    assert abs(share - ratio) <= 4 * (ratio * (1 - ratio) / 1000) ** 0.5


def test_an_image_without_a_description_shows_its_prompt(labels):
    bare = [replace(label, sharegpt4v="") for label in labels]
    _, captions, indices = reader(bare, ratio=0).images(0)
    assert captions == [labels[i].prompt for i in indices]


def test_several_prompts_come_up_equally_often_and_change_nothing_else(labels):
    several = [replace(label, more_prompts=("b", "c")) if i % 2 else label for i, label in enumerate(labels)]
    counts = Counter()
    for step in range(200):
        (_, indices, captions), (_, usual_indices, usual) = reader(several).choose(step), reader(labels).choose(step)
        np.testing.assert_array_equal(indices, usual_indices)
        single, original = indices % 2 == 0, usual == 0
        np.testing.assert_array_equal(captions[single], usual[single])
        np.testing.assert_array_equal(captions[~single] < 3, original[~single])
        counts.update(captions[~single & original].tolist())
    assert set(counts) == {0, 1, 2} and min(counts.values()) > 0.25 * counts.total()


def test_two_workers_read_what_one_would(labels):
    alone, parts = reader(labels), [reader(labels, 2, rank, 2) for rank in (0, 1)]
    for step in (0, 7, 40):
        whole, halves = alone.images(step), [part.images(step) for part in parts]
        np.testing.assert_array_equal(np.concatenate([half[0] for half in halves]), whole[0])
        assert [text for half in halves for text in half[1]] == whole[1]


def test_an_image_that_went_away_is_named(labels, tmp_path):
    gone = [replace(label, file=tmp_path / label.path) for label in labels]
    with pytest.raises(ImageError, match=str(tmp_path)):
        reader(gone).images(0)


def test_an_impossible_ratio_is_refused(labels):
    with pytest.raises(ValueError, match="0 to 1"):
        reader(labels, ratio=1.5)


def test_what_is_read_ahead_comes_in_any_order_and_once():
    calls, lock = [], threading.Lock()

    def slow(number):
        with lock:
            calls.append(number)
        return number * 10

    ahead = ReadAhead(slow, 2)
    assert [ahead(n) for n in (0, 1, 2, 7, 8)] == [0, 10, 20, 70, 80]
    assert sorted(calls)[:3] == [0, 1, 2]
    assert len(calls) == len(set(calls)) + calls.count(7) - 1


def test_an_error_while_reading_ahead_is_raised_when_its_batch_is_asked_for():
    def broken(number):
        if number == 2:
            raise ValueError("image 2 is cut")
        return number

    ahead = ReadAhead(broken, 3)
    assert [ahead(0), ahead(1)] == [0, 1]
    with pytest.raises(ValueError, match="image 2 is cut"):
        ahead(2)
    assert ReadAhead(broken, 0)(1) == 1
