"""Views of token compression show the numbers they are given."""

import numpy as np
import pytest
from viz_figures import check_layout, shown

from pixart_nb.viz.compression import (
    beside_the_paper,
    cells_of_keys,
    cost_curves,
    error_by_timestep,
    learned_kernels,
    lost_maps,
    mean_colours,
    similarity_by_layer,
)
from pixart_nb.viz.style import COLOURS
from pixart_nb.viz.tables import Table

RNG = np.random.default_rng(0)


def test_kernels_are_shown_as_multiples_of_the_average():
    weights = {name: 0.25 + 0.05 * RNG.standard_normal((40, 2, 2)) for name in ("layer 14", "layer 20", "layer 27")}
    figure = learned_kernels(weights)
    images = [place for place in figure.axes if place.images and place.get_title() in weights]
    for place in images:
        np.testing.assert_allclose(shown(place), 4 * weights[place.get_title()].mean(0))
        assert [text.get_text() for text in place.texts] == [
            f"{value:.2f}" for value in 4 * weights[place.get_title()].mean(0).ravel()
        ]
    (place,) = [place for place in figure.axes if place.get_xlabel() == "layer"]
    medians = [line.get_ydata()[0] for line in place.lines if line.get_color() == COLOURS[1]]
    np.testing.assert_allclose(medians, [np.median(4 * values) for values in weights.values()])
    ends = [max(line.get_ydata()) for line in place.lines if line.get_color() == COLOURS[0]]
    assert max(ends) <= 4 * max(values.max() for values in weights.values())
    assert [text.get_text() for text in place.get_xticklabels()] == ["14", "20", "27"]
    check_layout(figure)


def test_kernels_of_fourteen_layers_stand_in_two_rows():
    figure = learned_kernels({f"layer {k}": RNG.random((8, 2, 2)) for k in range(14, 28)})
    places = [place for place in figure.axes if place.get_title().startswith("layer ")]
    assert len({round(place.get_position().y0, 3) for place in places}) == 2
    check_layout(figure)


def test_kernels_that_did_not_move_are_all_one():
    figure = learned_kernels({"layer 0": np.full((8, 4, 4), 1 / 16)})
    np.testing.assert_allclose(shown(figure.axes[0]), 1)
    check_layout(figure)


def test_small_deviations_of_kernels_are_pale_and_the_largest_is_named():
    weights = np.full((8, 2, 2), 0.25)
    weights[:, 0, 1] *= 0.999
    figure = learned_kernels({"layer 0": weights})
    assert figure.axes[0].images[0].get_clim() == (0.95, 1.05)
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.000", "0.999", "1.000", "1.000"]
    assert figure.subfigs[0].get_suptitle().endswith("largest deviation 0.001")
    check_layout(figure)


def test_without_a_learned_kernel_it_is_said_which_layers_have_one():
    with pytest.raises(ValueError, match="only layers compressed by 'conv' have one"):
        learned_kernels({})


def test_each_key_stands_for_its_cell():
    image = RNG.random((20, 28, 3))
    tokens = image.reshape(5, 4, 7, 4, 3).mean((1, 3))
    means = tokens[:4, :6].reshape(2, 2, 3, 2, 3).mean((1, 3))
    np.testing.assert_allclose(mean_colours(image, (5, 7), 2), means)
    np.testing.assert_allclose(mean_colours(image, (5, 7), 2, "uniform"), tokens[:4:2, :6:2])
    figure = cells_of_keys(image, (5, 7), 2, "uniform")
    left, right = figure.axes
    np.testing.assert_allclose(shown(right), tokens[:4:2, :6:2])
    assert right.images[0].get_extent() == [0, 6, 4, 0]
    picked = [patch.get_xy() for patch in left.patches if not patch.get_fill()]
    assert picked == [(x, y) for y in (0, 2) for x in (0, 2, 4)]
    rest = {(patch.get_xy(), patch.get_width(), patch.get_height()) for patch in left.patches if patch.get_fill()}
    assert rest == {((0, 4), 7, 1), ((6, 0), 1, 4)}
    assert left.get_title() == "35 tokens, 6 keys of 8 x 8 pixels"
    check_layout(figure)


@pytest.mark.parametrize("ratio", [0, 6])
def test_a_ratio_that_makes_no_cell_is_refused(ratio):
    with pytest.raises(ValueError, match=f"ratio {ratio} makes no cell of 5x7 tokens; give 1 to 5"):
        cells_of_keys(np.zeros((20, 28, 3)), (5, 7), ratio)


def test_similarities_are_means_over_steps_with_their_range():
    values = {"mean": RNG.random((4, 6)), "uniform": RNG.random((4, 6))}
    figure = similarity_by_layer(values, [14, 15, 16, 17])
    place = figure.axes[0]
    for line, band, numbers in zip(place.lines, place.collections, values.values(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), numbers.mean(1))
        heights = band.get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == (numbers.min(), numbers.max())
    assert [label.get_text() for label in place.get_xticklabels()] == ["14", "15", "16", "17"]
    check_layout(figure)


def test_what_is_lost_is_one_minus_the_similarity_and_all_of_it_outside_of_cells():
    image, similar = RNG.random((8, 8, 3)), RNG.random((4, 4)) / 2 + 0.5
    similar[3] = np.nan
    figure = lost_maps(image, {"layer 0": similar, "layer 5": np.ones((4, 4))})
    lost = 1 - np.nan_to_num(similar)
    np.testing.assert_allclose(shown(figure.axes[0]), image)
    np.testing.assert_allclose(shown(figure.axes[1]), lost)
    np.testing.assert_allclose(shown(figure.axes[2]), np.zeros((4, 4)))
    assert {place.images[0].get_clim() for place in figure.axes[1:3]} == {(0, 1)}
    check_layout(figure)


def test_errors_run_with_sampling():
    errors = {"conv 2": [0.5, 0.1], "mean 4": [0.6, 0.3]}
    figure = error_by_timestep(errors, [999, 300], "relative error")
    place = figure.axes[0]
    assert [line.get_ydata().tolist() for line in place.lines] == list(errors.values())
    assert place.xaxis_inverted()
    assert (place.get_yscale(), place.get_ylabel()) == ("log", "relative error")
    check_layout(figure)
    with pytest.raises(ValueError, match="values of 'conv 2' as timesteps, got 1 for 2"):
        error_by_timestep({"conv 2": [1.0]}, [999, 300], "relative error")


def test_what_the_paper_did_not_measure_has_no_bar():
    ours = {"shallow": 0.3, "deep": 0.1, "all": 0.5}
    figure = beside_the_paper({"error": ours, "trained": {"deep": 0.05}}, {"shallow": 9.278, "deep": 8.532})
    left, middle, right = figure.axes
    assert [place.get_xlabel() for place in figure.axes] == ["error", "trained", "paper: FID"]
    assert middle.lines[0].get_xydata().tolist() == [[0.05, 1]]
    assert left.lines[0].get_xdata().tolist() == [0.3, 0.1, 0.5]
    assert right.lines[0].get_xydata().tolist() == [[9.278, 0], [8.532, 1]]
    assert [text.get_text() for text in left.get_yticklabels()] == list(ours)
    check_layout(figure)


def test_costs_are_shares_of_the_first_choice_and_time_is_drawn_where_it_was_measured():
    record = {"size": 256, "macs": 10**9, "bytes": 10**6, "seconds": None}
    larger = record | {"size": 4096, "macs": 4 * 10**9, "seconds": 2.0}
    figure = cost_curves({"full": [record, larger], "ratio 2": [record, larger | {"macs": 10**9}]})
    labels = ["MACs of a step,\nshare of full", "bytes of keys and values,\nshare of full"]
    assert [ax.get_ylabel() for ax in figure.axes] == [*labels, "attention of a layer, measured, s"]
    shares, _, seconds = figure.axes
    assert [line.get_ydata().tolist() for line in shares.lines] == [[1, 1], [1, 0.25]]
    assert seconds.lines[0].get_xydata().tolist() == [[4096, 2.0]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["full", "ratio 2"]
    check_layout(figure)


def test_a_table_shows_its_values_as_html_and_cannot_be_broken_by_them():
    table = Table([{"layer": "<b>", "keys": 65536}, {"layer": "deep", "error": 0.018234}], "Cost & error")
    html = table._repr_html_()
    assert "&lt;b&gt;" in html
    assert "Cost &amp; error" in html
    assert html.count("<tr>") == 3
    assert table.cells() == [["<b>", "65,536", ""], ["deep", "", "0.01823"]]
