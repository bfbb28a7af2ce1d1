"""Sizes are brought to the published ones, and pictures back to the size that was asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixart_nb.core.sampling.images import ASPECT_RATIO_BINS, bins_for, closest_bin, resize_and_crop

#: Single entries of the published tables: base size, ratio, height, width.
PUBLISHED = [
    (256, 0.25, 128, 512),
    (256, 0.94, 240, 256),
    (256, 3.62, 464, 128),
    (512, 0.35, 288, 832),
    (512, 1.38, 576, 416),
    (1024, 0.48, 704, 1472),
    (1024, 1.0, 1024, 1024),
    (1024, 3.88, 1984, 512),
    (2048, 0.57, 1536, 2688),
    (2048, 2.89, 3328, 1152),
    (2880, 0.25, 1408, 5760),
    (2880, 0.47, 1920, 4096),
    (2880, 0.93, 2688, 2880),
    (2880, 1.12, 3008, 2688),
    (2880, 3.95, 5568, 1408),
    (2880, 4.0, 5760, 1408),
    (4096, 1.0, 4096, 4096),
    (4096, 0.6, 3072, 5120),
]


@pytest.mark.parametrize(("size", "ratio", "height", "width"), PUBLISHED)
def test_tables_are_the_published_ones(size, ratio, height, width):
    assert ASPECT_RATIO_BINS[size][ratio] == (height, width)


def test_every_table_has_forty_one_sizes_that_the_model_can_take():
    for bins in ASPECT_RATIO_BINS.values():
        assert len(bins) == 41
        assert list(bins) == sorted(bins)
        assert all(side % 16 == 0 for size in bins.values() for side in size)
    assert bins_for(128) is None


@given(st.integers(16, 8000), st.integers(16, 8000), st.sampled_from(sorted(ASPECT_RATIO_BINS)))
def test_no_other_bin_is_nearer(height, width, size):
    bins = ASPECT_RATIO_BINS[size]
    chosen = closest_bin(height, width, bins)
    ratio = next(ratio for ratio, bin_ in bins.items() if bin_ == chosen)
    assert all(abs(ratio - height / width) <= abs(other - height / width) for other in bins)


@given(st.integers(8, 60), st.integers(8, 60), st.integers(8, 60), st.integers(8, 60))
def test_any_size_is_reached_and_values_stay_within_the_picture(rows, columns, height, width):
    pictures = np.random.default_rng(0).random((1, rows, columns, 2), dtype=np.float32)
    out = resize_and_crop(pictures, height, width)
    assert out.shape == (1, height, width, 2)
    assert out.dtype == np.float32
    assert pictures.min() - 1e-6 <= out.min() <= out.max() <= pictures.max() + 1e-6


def test_a_ramp_stays_a_ramp_and_the_middle_is_kept():
    ramp = np.broadcast_to(np.arange(40, dtype=np.float32)[None, None, :, None], (1, 20, 40, 1))
    out = resize_and_crop(ramp, 20, 20)  # cut only
    assert np.array_equal(out[0, 0, :, 0], np.arange(10, 30))
    doubled = resize_and_crop(ramp, 40, 80)
    assert np.allclose(np.diff(doubled[0, 0, 2:-2, 0]), 0.5)
    assert doubled[0, 0, 40, 0] == pytest.approx(19.75)


def test_the_asked_size_itself_is_left_alone():
    picture = np.random.default_rng(0).random((2, 16, 32, 3))
    assert resize_and_crop(picture, 16, 32) is picture
