"""Curves of trainings show the numbers that they are given, and nothing that was not reached."""

import numpy as np
import pytest
from viz_figures import check_layout

from pixart_nb.viz import curves as module
from pixart_nb.viz.curves import (
    POINTS,
    curve_panels,
    dataset_figure,
    live_curves,
    loss_and_score,
    score_figure,
    training_curves,
    training_figure,
)

STEPS = np.arange(5, 120, 10)
LOSSES = {"interpolated": (STEPS, 0.1 + 0.3 * np.exp(-STEPS / 20)), "afresh": (STEPS, np.full(12, 0.5))}
SCORES = {"interpolated": ([0, 60, 120], [0.1, 0.7, 0.8]), "afresh": ([60, 120], [0, 0])}


def rows(count):
    return [
        {"step": k, "loss": 1 / k, "grad_norm": 2 / k, "images_per_second": 8.0, "seconds_left": 62.0}
        for k in range(1, count + 1)
    ]


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
    assert loss_and_score({}, {}).axes[0].lines[:] == []


def test_losses_without_scores_have_one_panel_and_their_legend_below_it():
    figure = loss_and_score(LOSSES, {})
    check_layout(figure)
    (ax,) = figure.axes
    box = figure.legends[0].get_window_extent()
    assert abs((box.x0 + box.x1) / 2 - figure.bbox.width / 2) < 0.1 * figure.bbox.width
    assert ax.get_window_extent().width > 0.8 * figure.bbox.width


@pytest.mark.parametrize("draw", [training_curves, lambda losses: loss_and_score(losses, {})])
def test_a_curve_of_one_point_has_a_marker_and_a_longer_one_has_none(draw):
    few, many = draw({"one": ([1], [0.5]), "two": ([1, 2], [0.5, 0.4])}).axes[0].lines
    assert few.get_marker() not in (None, "None", "") and many.get_marker() == "None"


def test_a_training_of_one_step_is_a_visible_point():
    loss, _ = training_figure(rows(1), 1).axes
    assert all(line.get_marker() == "o" for line in loss.lines)
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["each step", "mean of 1 step"]


@pytest.mark.parametrize(
    ("values", "plain"), [([1.45, 1.52], True), ([0.4, 0.4], True), ([0.02, 0.9], True), ([0.001, 10.0], False)]
)
def test_ticks_of_a_logarithmic_axis_are_plain_numbers_below_two_decades(values, plain):
    figure = training_curves({"a": ([0, 9], values)}, logarithmic=True)
    check_layout(figure)
    (ax,) = figure.axes
    low, high = ax.get_ylim()
    ticks = zip(ax.get_yticks(), ax.yaxis.get_ticklabels(), strict=True)
    texts = [label.get_text() for place, label in ticks if low <= place <= high]
    assert len(texts) >= 2 and len(set(texts)) == len(texts)
    assert all(("10^" in text) != plain for text in texts)
    if plain:
        assert [float(text) for text in texts] == sorted(float(text) for text in texts)
        assert not any(tick.label1.get_text() for tick in ax.yaxis.get_minor_ticks())


def test_a_curve_needs_as_many_values_as_steps():
    with pytest.raises(ValueError, match="as many values of 'a' as steps, got 1 for 2"):
        loss_and_score({"a": ([1, 2], [0.5])}, {})


def test_scores_stand_over_their_sizes_and_a_method_may_end_early():
    figure = score_figure([128, 256], {"grown": [0.9, 0.8], "at once": [0.9]}, [12, 6])
    (ax,) = figure.axes
    lines = [line for line in ax.lines if not line.get_label().startswith("_")]
    assert [list(line.get_ydata()) for line in lines] == [[0.9, 0.8], [0.9]]
    assert len(ax.containers) == 2  # intervals
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["128\n12 images", "256\n6"]
    check_layout(figure)
    with pytest.raises(ValueError, match="numbers of images as sizes, got 1 for 2"):
        score_figure([128, 256], {}, [12])


def test_curves_hold_the_values_under_their_names():
    figure = training_curves({"train": ([0, 5, 9], [3.0, 2.0, 1.0]), "held out": ([0, 9], [4.0, 2.5])}, "error", True)
    place = figure.axes[0]
    assert [line.get_label() for line in place.lines] == ["train", "held out"]
    np.testing.assert_array_equal(place.lines[0].get_xydata(), [[0, 3], [5, 2], [9, 1]])
    np.testing.assert_array_equal(place.lines[1].get_xydata(), [[0, 4], [9, 2.5]])
    assert (place.get_ylabel(), place.get_yscale(), place.get_xlabel()) == ("error", "log", "step")


def test_panels_share_their_variable_and_have_baselines():
    curves = {"distance": {"mean": ([0.2, 0.6, 1], [0.1, 0.2, 0.4])}, "share right": {"colour": ([0.2, 1], [0, 1])}}
    figure = curve_panels("strength", curves, {"distance": {"other noise": 0.5}})
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["mean", "other noise"] and len(right.lines) == 1
    np.testing.assert_array_equal(left.lines[0].get_xydata(), [[0.2, 0.1], [0.6, 0.2], [1, 0.4]])
    assert list(left.lines[1].get_ydata()) == [0.5, 0.5] and left.get_ylim()[1] > 0.5
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["0.2", "0.6", "1"]
    assert (left.get_xlabel(), right.get_ylabel()) == ("strength", "share right")
    check_layout(figure)
    with pytest.raises(ValueError, match="at least one panel"):
        curve_panels("strength", {})


def test_curves_need_a_value_for_each_step():
    with pytest.raises(ValueError, match="values of 'train'"):
        training_curves({"train": ([0, 1], [1.0])})


def test_panels_of_shares_reach_to_one_and_have_intervals():
    curves = {"share right": {"colour": ([1, 4], [0.2, 0.5])}, "seconds": {"all": ([1, 4], [2, 3])}}
    left, right = curve_panels("steps", curves, counts={"share right": 48}).axes
    assert left.get_ylim()[1] > 1 and len(left.containers) == 1 and not right.containers
    low, high = left.containers[0].lines[2][0].get_segments()[1][:, 1]
    assert (low, high) == (pytest.approx(0.364, abs=0.002), pytest.approx(0.636, abs=0.002))  # Wilson, 24 of 48


def test_equal_curves_of_shares_stand_beside_each_other():
    curves = {"share right": {"ddim": ([1, 2, 8], [0.2, 0.5, 1]), "dpm++": ([1, 2, 8], [0.2, 0.5, 1])}}
    figure = curve_panels("steps", curves, counts={"share right": 48})
    (panel,) = figure.axes
    first, second = (line.get_xdata() for line in panel.lines[:2])
    assert (first < second).all() and np.allclose((first + second) / 2, [1, 2, 8]) and (second - first < 0.5).all()
    bars = [container.lines[2][0].get_segments()[0][0, 0] for container in panel.containers]
    assert bars == [first[0], second[0]]
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["1", "2", "8"]
    check_layout(figure)


def test_one_image_is_in_the_singular():
    labels = score_figure([256, 512], {"full": [1, 1]}, [1, 2]).axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == ["256\n1 image", "512\n2"]
