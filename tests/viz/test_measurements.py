"""Figures of shares, of stages and of tile artifacts show the numbers that they are given."""

import numpy as np
import pytest
from viz_figures import check_layout

from pixart_nb.viz.measurements import accuracy_figure, stage_figure, tile_artifact_figure


def test_stages_stand_one_after_another_and_their_peaks_below_each_other():
    runs = {
        "staged": {"encode": {"seconds": 2.0}, "denoise": {"seconds": 8.0, "peak_bytes": 1e9}},
        "whole": {"denoise": {"seconds": 9.0}},
    }
    figure = stage_figure(runs)
    time, memory = figure.axes
    assert [(bar.get_x(), bar.get_width()) for bar in time.patches] == [(0, 2), (2, 8), (0, 9)]
    assert [bar.get_width() for bar in memory.patches] == [1.0]
    check_layout(figure)
    with pytest.raises(ValueError, match="at least one run"):
        stage_figure({})


def test_edges_of_tiles_are_marked_among_the_other_lines():
    figure = tile_artifact_figure({"2048": ([1.0, 2.0], [0.5, 1.5, 2.5]), "4096": ([30.0], [0.1])})
    dots = [dots.get_offsets()[:, 0].tolist() for dots in figure.axes[0].collections]
    assert dots == [[0.5, 1.5, 2.5], [1.0, 2.0], [0.1], [30.0]]
    check_layout(figure)
    with pytest.raises(ValueError, match="tile artifacts needs at least one image"):
        tile_artifact_figure({})


def test_shares_have_their_counts_and_their_intervals():
    figure = accuracy_figure({"20 steps": 0.75, "1 step": 0.0}, {"20 steps": 1.5, "1 step": 0.1}, 12)
    left, right = figure.axes
    assert [bar.get_width() for bar in left.patches] == [0.75, 0.0]
    assert [bar.get_width() for bar in right.patches] == [1.5, 0.1]
    assert [text.get_text() for text in left.texts] == ["9 of 12", "0 of 12"]
    ends = np.array([line[:, 0] for line in left.collections[0].get_segments()])
    np.testing.assert_allclose(ends, [[0.468, 0.911], [0, 0.242]], atol=1e-3)  # Wilson's intervals of 9 and 0 of 12
    check_layout(figure)
    with pytest.raises(ValueError, match="expected the same"):
        accuracy_figure({"a": 0.5}, {"b": 1.0}, 12)
