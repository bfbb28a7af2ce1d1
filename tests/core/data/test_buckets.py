"""Batches of one size, in an order that only the seed decides, in which no image is left out."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pixart_nb.core.data.buckets import BucketSampler, training_sizes
from pixart_nb.core.data.files import DataError
from pixart_nb.core.data.labels import Label, load_labels

SIZES = ((256, 256), (208, 304), (304, 208))
COUNTS = st.lists(st.integers(1, 20), min_size=1, max_size=3)


def labels_of(*shapes):
    return [Label(f"{n}.png", None, "a cat", "", height, width) for n, (height, width) in enumerate(shapes)]


def sizes_of(counts, seed=0):
    sizes = [size for size, count in zip(SIZES, counts, strict=False) for _ in range(count)]
    return [sizes[i] for i in np.random.default_rng(seed).permutation(len(sizes))]


def test_without_multi_scale_all_are_squares():
    assert training_sizes(labels_of((10, 20), (7, 7)), 512, False) == [(512, 512)] * 2


def test_with_multi_scale_each_gets_the_nearest_published_size():
    found = training_sizes(labels_of((100, 100), (100, 150), (300, 200), (1, 1000), (4000, 1000)), 512, True)
    assert found == [(512, 512), (416, 608), (608, 416), (256, 1024), (1024, 256)]


def test_the_shipped_images_fill_three_sizes(project):
    folder = project / "data" / "pixelart"
    labels = load_labels(folder / "labels.json", folder)
    assert Counter(training_sizes(labels, 256, True)) == {(256, 256): 28, (208, 304): 4, (304, 208): 4}


def test_rare_sizes_go_to_the_nearest_that_is_used():
    shapes = [(1, 1)] * 5 + [(2, 1)] * 4 + [(4, 1)]
    (nearest,) = training_sizes(labels_of((2, 1)), 256, True)
    assert training_sizes(labels_of(*shapes), 256, True, valid_num=2)[-1] == nearest
    with pytest.raises(DataError, match="at most 5"):
        training_sizes(labels_of(*shapes), 256, True, valid_num=6)


@pytest.mark.parametrize(
    ("size", "multi_scale", "expected"),
    [(128, True, "no table"), (100, False, "multiple of 16"), (0, False, "multiple of 16")],
)
def test_sizes_that_cannot_be_are_refused(size, multi_scale, expected):
    with pytest.raises(DataError, match=expected):
        training_sizes(labels_of((1, 1)), size, multi_scale)


@given(COUNTS, st.integers(1, 6), st.integers(1, 3), st.integers(1, 8), st.integers(0, 99))
def test_every_image_is_shown_as_often_as_any_other_of_its_size(counts, batch_size, world, epochs, seed):
    sizes = sizes_of(counts)
    whole = batch_size * world
    assume(whole <= len(sizes))
    sampler = BucketSampler(sizes, batch_size, seed, 0, world)
    shown = Counter()
    for step in range(sampler.batches(epochs)):
        size, indices = sampler.whole_batch(step)
        assert len(indices) == whole and {sizes[i] for i in indices} == {size}
        shown.update(indices.tolist())
    for size, members in sampler.buckets.items():
        times = {shown[i] for i in members.tolist()}
        assert max(times) - min(times) <= 1
        assert sum(shown[i] for i in members.tolist()) == epochs * len(members) // whole * whole, size


@given(COUNTS, st.integers(1, 4), st.integers(2, 4), st.integers(0, 200))
def test_workers_share_the_batch_that_one_would_have(counts, batch_size, world, step):
    sizes = sizes_of(counts)
    assume(batch_size * world <= len(sizes))
    size, together = BucketSampler(sizes, batch_size * world, 3).batch(step)
    parts = [BucketSampler(sizes, batch_size, 3, rank, world).batch(step) for rank in range(world)]
    assert {part[0] for part in parts} == {size}
    np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), together)


@given(COUNTS, st.permutations(range(30)))
def test_a_batch_depends_on_its_number_and_not_on_what_came_before(counts, order):
    sizes = sizes_of(counts)
    assume(len(sizes) >= 2)
    used = BucketSampler(sizes, 2, 5)
    for step in order:
        fresh = BucketSampler(sizes, 2, 5).batch(step)
        assert used.batch(step)[0] == fresh[0]
        np.testing.assert_array_equal(used.batch(step)[1], fresh[1])


@given(COUNTS, st.integers(1, 7), st.integers(0, 10**12))
def test_every_batch_lies_in_the_epoch_that_says_so(counts, batch_size, step):
    sizes = sizes_of(counts)
    assume(batch_size <= len(sizes))
    sampler = BucketSampler(sizes, batch_size, 0)
    epoch = sampler.epoch(step)
    assert sampler.batches(epoch) <= step < sampler.batches(epoch + 1)


def test_an_epoch_whose_images_divide_into_batches_shows_each_once():
    sampler = BucketSampler(sizes_of((8, 4, 12)), 4, 0)
    assert [sampler.batches(n) for n in range(4)] == [0, 6, 12, 18]
    for first in (0, 6, 12):
        shown = np.concatenate([sampler.batch(step)[1] for step in range(first, first + 6)])
        assert sorted(shown) == list(range(24))


def test_seeds_and_epochs_have_orders_of_their_own_and_sizes_are_mixed():
    sizes = sizes_of((60, 60))
    one, other = BucketSampler(sizes, 4, 0), BucketSampler(sizes, 4, 1)
    batches = [tuple(one.batch(step)[1]) for step in range(60)]
    assert len(set(batches)) == 60
    assert batches[:30] != [tuple(other.batch(step)[1]) for step in range(30)]
    changes = sum(one.batch(step)[0] != one.batch(step + 1)[0] for step in range(29))
    assert 5 < changes < 25


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(DataError, match="4 x 3 workers = 12 images, but there are only 11"):
        BucketSampler(sizes_of((11,)), 4, 0, 0, 3)
    with pytest.raises(DataError, match="only 0"):
        BucketSampler([], 1, 0)


def test_a_size_with_fewer_images_than_a_batch_is_told_and_still_shown():
    sampler = BucketSampler(sizes_of((10, 1)), 4, 0)
    assert "208x304: 1 images, fewer than the 4 of a batch" in sampler.describe()
    small = [step for step in range(sampler.batches(8)) if sampler.batch(step)[0] == (208, 304)]
    assert len(small) == 2  # its one image once an epoch, four at a time


@pytest.mark.parametrize(("batch_size", "rank", "world"), [(0, 0, 1), (1, 1, 1), (1, -1, 2), (1, 0, 0)])
def test_impossible_workers_are_refused(batch_size, rank, world):
    with pytest.raises(ValueError, match="expected"):
        BucketSampler([(16, 16)] * 4, batch_size, 0, rank, world)


def test_a_batch_far_away_in_a_large_data_set_is_found_at_once():
    sampler = BucketSampler([SIZES[i % 3] for i in range(100_000)], 64, 0)
    started = time.process_time()
    sampler.batch(10**9)
    assert time.process_time() - started < 2
