"""The figure of trainings shows the numbers it is given, and nothing that was not reached."""

import doctest

import numpy as np
import pytest
from viz_figures import check_layout

from pixart_nb.viz import training
from pixart_nb.viz.training import loss_and_score

STEPS = np.arange(5, 120, 10)
LOSSES = {"interpolated": (STEPS, 0.1 + 0.3 * np.exp(-STEPS / 20)), "afresh": (STEPS, np.full(12, 0.5))}
SCORES = {"interpolated": ([0, 60, 120], [0.1, 0.7, 0.8]), "afresh": ([60, 120], [0, 0])}


def test_losses_and_scores_of_a_run_look_alike():
    figure = loss_and_score(LOSSES, SCORES, {"usable": 100, "converged": 1000}, {"before": 0.84})
    check_layout(figure)
    loss, share = figure.axes
    for place, curves in ((loss, LOSSES), (share, SCORES)):
        for line, (steps, values) in zip(place.lines, curves.values(), strict=False):
            np.testing.assert_allclose(line.get_xdata(), steps)
            np.testing.assert_allclose(line.get_ydata(), values)
    looks = [[(line.get_color(), line.get_linestyle()) for line in place.lines[:2]] for place in (loss, share)]
    assert looks[0] == looks[1]
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == ["interpolated", "afresh", "before"]


def test_a_mark_that_no_run_reached_is_left_out():
    figure = loss_and_score(LOSSES, SCORES, {"usable": 100, "converged": 1000})
    assert [text.get_text() for text in figure.axes[0].texts] == ["usable"]
    assert all(place.get_xlim()[1] < 200 for place in figure.axes)


def test_a_single_point_and_no_points_are_drawn():
    check_layout(loss_and_score({"a": ([1], [0.5])}, {"a": ([0], [0.0])}))
    assert loss_and_score({}, {}).axes[1].lines[:] == []


def test_a_curve_needs_as_many_values_as_steps():
    with pytest.raises(ValueError, match="as many values of 'a' as steps, got 1 for 2"):
        loss_and_score({"a": ([1, 2], [0.5])}, {})


def test_examples_in_the_documentation_hold():
    assert doctest.testmod(training).failed == 0
