"""Batches carry the images and captions that were drawn for them, whoever reads them and in whatever order."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from pixart_nb.core.data.buckets import BucketSampler, training_sizes
from pixart_nb.core.data.images import ImageError, fit, load_image, to_signed
from pixart_nb.core.data.labels import load_labels
from pixart_nb.core.data.reader import ImageReader


@pytest.fixture(scope="module")
def labels(project):
    folder = project / "data" / "pixelart"
    return load_labels(folder / "labels.json", folder)


def reader(labels, batch_size=4, rank=0, world=1, ratio=0.5, seed=0):
    sizes = training_sizes(labels, 256, True)
    return ImageReader(labels, BucketSampler(sizes, batch_size, seed, rank, world), ratio)


def test_a_batch_has_the_pixels_and_captions_of_its_labels(labels):
    batches = [reader(labels).batch(step) for step in range(9)]
    assert {batch.pixels.shape for batch in batches} == {(4, 3, 256, 256), (4, 3, 208, 304), (4, 3, 304, 208)}
    for batch in batches:
        size = batch.pixels.shape[2:]
        expected = to_signed(np.stack([fit(load_image(labels[i].file), *size) for i in batch.indices]))
        np.testing.assert_array_equal(batch.pixels, expected)
        assert batch.pixels.dtype == np.float32
        for i, caption in zip(batch.indices, batch.captions, strict=True):
            assert caption in (labels[i].prompt, labels[i].sharegpt4v)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_original_prompts_come_up_as_often_as_asked(labels, ratio):
    choices = [reader(labels, ratio=ratio).choose(step) for step in range(250)]
    share = np.mean([choice.captions == 0 for choice in choices])
    assert abs(share - ratio) <= 4 * (ratio * (1 - ratio) / 1000) ** 0.5


def test_an_image_without_a_description_shows_its_prompt(labels):
    bare = [replace(label, sharegpt4v="") for label in labels]
    batch = reader(bare, ratio=0).batch(0)
    assert batch.captions == [labels[i].prompt for i in batch.indices]


def test_several_prompts_come_up_equally_often_and_change_nothing_else(labels):
    several = [replace(label, more_prompts=("b", "c")) if i % 2 else label for i, label in enumerate(labels)]
    counts = Counter()
    for step in range(200):
        choice = reader(several).choose(step)
        usual = reader(labels).choose(step)
        np.testing.assert_array_equal(choice.indices, usual.indices)
        single, original = choice.indices % 2 == 0, usual.captions == 0
        np.testing.assert_array_equal(choice.captions[single], usual.captions[single])
        np.testing.assert_array_equal(choice.captions[~single] < 3, original[~single])
        counts.update(choice.captions[~single & original].tolist())
    assert set(counts) == {0, 1, 2} and min(counts.values()) > 0.25 * counts.total()


def test_two_workers_read_what_one_would(labels):
    alone, parts = reader(labels), [reader(labels, 2, rank, 2) for rank in (0, 1)]
    for step in (0, 7, 40):
        whole, halves = alone.batch(step), [part.batch(step) for part in parts]
        np.testing.assert_array_equal(np.concatenate([half.pixels for half in halves]), whole.pixels)
        assert [text for half in halves for text in half.captions] == whole.captions


def test_an_image_that_went_away_is_named(labels, tmp_path):
    gone = [replace(label, file=tmp_path / label.path) for label in labels]
    with pytest.raises(ImageError, match=str(tmp_path)):
        reader(gone).batch(0)


def test_an_impossible_ratio_is_refused(labels):
    with pytest.raises(ValueError, match="0 to 1"):
        reader(labels, ratio=1.5)
