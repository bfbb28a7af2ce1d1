"""Condition images: the edges of an image are thin lines where its colours change, and files are checked."""

import json

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from pixart_nb.core.checkpoints.controlnet import edge_options
from pixart_nb.core.data.control import ControlImages, EdgeOptions, edge_f1, edges
from pixart_nb.core.data.files import DataError
from pixart_nb.core.data.images import ImageError
from pixart_nb.core.data.labels import Label
from pixart_nb.core.io import CheckpointError


def picture(height=48, width=64):
    """A red rectangle on grey: rows 10 to 29, columns 20 to 39."""
    image = np.full((height, width, 3), 120, np.uint8)
    image[10:30, 20:40] = (250, 20, 20)
    return image


def test_edges_are_thin_closed_lines_around_a_shape():
    found = edges(picture())
    assert found.shape == (48, 64, 3) and found.dtype == np.uint8
    assert set(np.unique(found)) == {0, 255} and (found == found[..., :1]).all()
    lines = found[..., 0] > 0
    assert (lines[14:26].sum(1) == 2).all() and (lines[:, 24:36].sum(0) == 2).all()
    rows, columns = np.nonzero(lines)
    near = (np.abs(rows - 9.5) <= 2) | (np.abs(rows - 29.5) <= 2) | (np.abs(columns - 19.5) <= 2)
    assert (near | (np.abs(columns - 39.5) <= 2)).all()


def test_edges_of_colours_of_one_brightness_are_seen_and_faint_ones_are_not():
    image = np.full((32, 32, 3), 100, np.uint8)
    assert not edges(image).any()
    image[:, 16:] = 108
    assert not edges(image).any()
    image[:, :16], image[:, 16:] = (200, 0, 0), (0, 102, 0)
    assert (edges(image)[..., 0] > 0).sum(1).tolist() == [1] * 32


def test_a_wide_filter_leaves_out_details_and_lines_can_be_wide():
    image = picture()
    image[3, 3] = 255
    whole, coarse = edges(image)[..., 0] > 0, edges(image, EdgeOptions(sigma=4))[..., 0] > 0
    assert whole[:7, :7].any() and not coarse[:7, :7].any() and coarse[10:30, 18:23].any()
    wide = EdgeOptions(sigma=4, width=3)
    assert np.array_equal(edges(image, wide)[..., 0] > 0, ndimage.maximum_filter(coarse, 3))
    assert np.array_equal(edges(image, wide.thin)[..., 0] > 0, coarse)


def test_a_threshold_is_the_height_of_a_step():
    image = np.full((64, 64, 3), 51, np.uint8)
    image[:, 32:] += 51  # a step of 0.2 in white
    for sigma in (1, 2, 4):
        assert edges(image, EdgeOptions(sigma, 0.18)).any() and not edges(image, EdgeOptions(sigma, 0.22)).any()


@pytest.mark.parametrize("options", [{"sigma": 0}, {"threshold": 2}, {"width": 2}, {"sigma": float("nan")}])
def test_edges_that_cannot_be_drawn_are_refused(options):
    with pytest.raises(ImageError, match="expected sigma above 0"):
        EdgeOptions(**options)


def test_other_options_are_another_entry_of_the_feature_cache(tmp_path):
    settings = [ControlImages(edges=options).settings for options in (EdgeOptions(), EdgeOptions(sigma=2))]
    assert settings == [["edges", 1.0, 0.1, 1], ["edges", 2, 0.1, 1]] and ControlImages(tmp_path).settings == []


@pytest.mark.parametrize("recorded", [{"sigma": "wide"}, {"thickness": 3}, {"width": 2}, [1], "edges"])
def test_damaged_options_of_a_controlnet_are_named(tmp_path, recorded):
    (tmp_path / "config.json").write_text(json.dumps({"control_edges": recorded}))
    with pytest.raises(CheckpointError, match=r"config\.json: control_edges is .*expected sigma, threshold and width"):
        edge_options(tmp_path)


def line(column):
    image = np.zeros((8, 12, 3), np.uint8)
    image[:, column] = 255
    return image


def test_edges_agree_within_the_tolerance():
    scores = [edge_f1(line(4), line(other)) for other in (4, 5, 6)]
    assert scores == [1, 1, 0] and edge_f1(line(4), line(6), tolerance=2) == 1
    assert edge_f1(line(4), line(4) | line(9)) == pytest.approx(2 / 3)  # precision 1, recall 1/2
    empty = np.zeros_like(line(0))
    assert (edge_f1(empty, empty), edge_f1(line(4), empty)) == (1, 0)
    with pytest.raises(ImageError, match="expected one size"):
        edge_f1(line(4), line(4)[:4])


def test_conditions_are_edges_or_the_files_of_a_folder(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    label = Label("a.png", tmp_path / "a.png", "a", "", 48, 64)
    np.testing.assert_array_equal(ControlImages().pixels(label, (48, 64)), edges(picture()))
    (tmp_path / "maps").mkdir()
    Image.fromarray(255 - picture()).save(tmp_path / "maps" / "a.webp", lossless=True)
    control = ControlImages(tmp_path / "maps")
    control.check([label])
    np.testing.assert_array_equal(control.pixels(label, (48, 64)), 255 - picture())


def test_missing_files_and_files_of_another_ratio_are_named(tmp_path):
    (tmp_path / "maps").mkdir()
    Image.fromarray(picture(48, 48)).save(tmp_path / "maps" / "a.png")
    labels = [Label(name, tmp_path / name, "a", "", 48, 64) for name in ("a.png", "b.png")]
    with pytest.raises(DataError, match=r"a.png is 48x48, its image 48x64; .*b.png: does not exist"):
        ControlImages(tmp_path / "maps").check(labels)
    ControlImages().check(labels)
