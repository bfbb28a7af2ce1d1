"""Curves of a training as it goes on show the numbers that it yields."""

import doctest

import numpy as np
import pytest

from pixart_nb.viz import live_curves as module
from pixart_nb.viz.live_curves import POINTS, dataset_figure, live_curves, training_figure


def rows(count):
    return [
        {"step": k, "loss": 1 / k, "grad_norm": 2 / k, "images_per_second": 8.0, "seconds_left": 62.0}
        for k in range(1, count + 1)
    ]


def test_examples_hold():
    assert doctest.testmod(module).failed == 0


def test_curves_are_the_losses_and_their_running_means():
    loss, norm = training_figure(rows(40), 50).axes
    single, mean = (line.get_ydata() for line in loss.lines)
    np.testing.assert_allclose(single, 1 / np.arange(1, 41))
    np.testing.assert_allclose(mean[[0, 4, 39]], [1, single[:5].mean(), single[30:].mean()])
    np.testing.assert_allclose(norm.lines[0].get_ydata(), 2 / np.arange(1, 41))
    assert loss.get_xlim() == (0, 50)


def test_held_out_images_have_a_curve_of_their_own():
    told = [{"step": 0, "held_out_loss": 3.0}, *rows(20), {"step": 20, "held_out_loss": 0.5}]
    line = training_figure(told).axes[0].lines[-1]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 20], [3.0, 0.5])
    assert training_figure(told).axes[0].get_ylim()[1] > 3


def test_where_it_stands_is_written_above():
    assert training_figure(rows(7), 90).get_suptitle() == "step 7 of 90, loss 0.1429, 8 images/s, 1:02 left"
    assert training_figure([]).get_suptitle() == "no step yet"


def test_a_long_training_is_thinned_and_what_is_no_number_left_out():
    told = rows(3 * POINTS)
    told[5] = told[5] | {"loss": float("nan")}
    drawn = training_figure(told).axes[0].lines[1]
    assert len(drawn.get_xdata()) <= POINTS
    assert np.isfinite(drawn.get_ydata()).all()


class Shown:
    def __init__(self):
        self.titles = []

    def __call__(self, figure, display_id):
        self.titles.append(figure.get_suptitle())
        return self

    def update(self, figure):
        self.titles.append(figure.get_suptitle())


def test_rows_are_passed_on_while_one_figure_is_drawn_again(monkeypatch):
    shown = Shown()
    monkeypatch.setattr(module, "display", shown)
    given = rows(4)
    assert list(live_curves(iter(given[2:]), given[:2], 4, every=0.0)) == given[2:]
    assert [title.split(",")[0] for title in shown.titles] == [f"step {k} of 4" for k in (2, 3, 4, 4)]


def test_a_training_that_breaks_off_leaves_its_last_curves(monkeypatch):
    shown = Shown()
    monkeypatch.setattr(module, "display", shown)

    def breaking():
        yield from rows(3)
        raise FloatingPointError("loss is no number")

    with pytest.raises(FloatingPointError):
        list(live_curves(breaking(), every=1e9))
    assert shown.titles[-1].startswith("step 3,")


def test_sizes_and_lengths_are_counted():
    figure = dataset_figure([(64, 64)] * 3 + [(64, 96)], ["a", "a b", "a b", "a b c d"])
    left, right = figure.axes
    np.testing.assert_array_equal(left.collections[0].get_offsets(), [[64, 64], [96, 64]])
    assert [text.get_text() for text in left.texts] == ["3", "1"]
    assert [patch.get_height() for patch in right.patches][:4] == [1, 2, 0, 1]
    with pytest.raises(ValueError, match="1 sizes and 0 captions"):
        dataset_figure([(64, 64)], [])
