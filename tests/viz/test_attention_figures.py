"""Views of attention show the numbers they are given, where they belong."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from viz_figures import check_layout, shown

from pixart_nb.viz.attention import (
    attention_statistics,
    full_against_compressed,
    located_words,
    overlap_bars,
    overview_grid,
    patch_attention,
    word_heat_maps,
    word_strip,
)
from pixart_nb.viz.overlay import COVER, DIMMED, cell_of_pixels, spread_cells
from pixart_nb.viz.overlay import overlay as overlaid
from pixart_nb.viz.style import heat_colours

RNG = np.random.default_rng(0)
WIDE = RNG.random((12, 24, 3))


def test_heat_is_blended_with_the_grey_image_cell_by_cell():
    heat = np.array([[0.0, 2.0, 4.0]])
    pixels = overlaid(WIDE, heat)
    grey = DIMMED * WIDE.mean(2, keepdims=True).repeat(3, 2)
    for column, share in enumerate((0, 0.5, 1)):
        cover = COVER[0] + (COVER[1] - COVER[0]) * share
        expected = (1 - cover) * grey + cover * heat_colours(np.array(share), 0, 1)
        part = slice(8 * column, 8 * column + 8)
        np.testing.assert_allclose(pixels[:, part], expected[:, part], atol=1e-12)


def test_below_the_threshold_the_image_stays_grey_and_above_it_keeps_its_colours():
    pixels = overlaid(WIDE, np.array([[0.4, 0.5, 1.0]]), threshold=0.5)
    grey = DIMMED * WIDE.mean(2, keepdims=True).repeat(3, 2)
    np.testing.assert_allclose(pixels[:, :8], grey[:, :8])
    cover = COVER[1]
    hot = (1 - cover) * WIDE[:, 16:] + cover * heat_colours(np.array(1.0), 0, 1)
    np.testing.assert_allclose(pixels[:, 16:], hot)
    assert not np.allclose(pixels[:, 8:16], grey[:, 8:16])


def test_tokens_that_are_in_no_cell_get_no_heat():
    image = np.full((10, 14, 3), 0.5)
    pixels = overlaid(image, np.ones((2, 3)), ratio=2, grid=(5, 7))
    np.testing.assert_allclose(pixels[8:], DIMMED * 0.5)
    np.testing.assert_allclose(pixels[:, 12:], DIMMED * 0.5)
    assert (pixels[:8, :12, 0] > 0.5).all()


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.integers(1, 4), st.tuples(*[st.integers(1, 40)] * 2))
def test_every_pixel_belongs_to_the_cell_that_covers_it(grid, ratio, size):
    cells = tuple(side // ratio for side in grid)
    if min(cells) == 0:
        return
    for found, pixels, tokens, count in zip(cell_of_pixels(size, cells, ratio, grid), size, grid, cells, strict=True):
        for pixel in range(pixels):
            token = int(pixel * tokens / pixels + 1e-9)
            assert found[pixel] == (token // ratio if token // ratio < count else -1)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_spreading_keeps_the_sum_and_the_cells(height, width, ratio, rest):
    rest = min(rest, ratio - 1)
    weights = np.random.default_rng(height * width).random((2, height, width))
    grid = (height * ratio + rest, width * ratio)
    spread = spread_cells(weights, ratio, grid)
    assert spread.shape == (2, *grid)
    np.testing.assert_allclose(spread.sum((1, 2)), weights.sum((1, 2)))
    np.testing.assert_allclose(spread[:, ::ratio, ::ratio][:, :height] * ratio**2, weights)


def test_a_map_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="2x2 cells does not belong to 8x8 tokens at ratio 2, which make 4x4"):
        overlaid(WIDE, np.ones((2, 2)), ratio=2, grid=(8, 8))


def test_words_share_one_scale_unless_each_has_its_own():
    maps = {"red": np.full((2, 4), 0.1), "cup": np.full((2, 4), 0.4)}
    shared = word_heat_maps(WIDE, maps)
    np.testing.assert_allclose(shown(shared.axes[0]), WIDE)
    np.testing.assert_allclose(shown(shared.axes[1]), overlaid(WIDE, maps["red"], (0, 0.4)))
    np.testing.assert_allclose(shown(shared.axes[2]), overlaid(WIDE, maps["cup"], (0, 0.4)))
    assert shared.axes[-1].get_ylabel() == "share of a patch's attention"
    assert shared.axes[-1].get_ylim() == (0, 0.4)
    own = word_heat_maps(WIDE, maps, own_scale=True)
    np.testing.assert_allclose(shown(own.axes[1]), overlaid(WIDE, maps["red"], (0, 0.1)))
    assert own.axes[1].get_title() == "red\nup to 0.100"
    check_layout(shared)
    check_layout(own)


def test_a_strip_has_images_above_and_maps_below_on_one_scale():
    images, maps = RNG.random((3, 8, 8, 3)), RNG.random((3, 4, 4))
    strip = word_strip(images, maps, ["t 999", "t 500", "t 1"], "cup")
    for step in range(3):
        np.testing.assert_allclose(shown(strip.axes[step]), images[step])
        np.testing.assert_allclose(shown(strip.axes[3 + step]), overlaid(images[step], maps[step], (0, maps.max())))
    assert [strip.axes[place].get_ylabel() for place in (0, 3)] == ["image", "cup"]
    check_layout(strip)
    check_layout(word_strip(RNG.random((10, 8, 24, 3)), RNG.random((10, 4, 12)), ["t"] * 10, "wheelbarrow-maker"))


def test_a_patch_is_framed_on_axes_that_count_tokens():
    weights = RNG.random((5, 3, 6))
    figure = patch_attention(WIDE, weights, (2, 11), [f"head {k}" for k in range(5)], ratio=2, grid=(7, 13))
    for head in range(5):
        place = figure.axes[head]
        assert place.images[0].get_extent() == [0, 13, 7, 0]
        frame = place.patches[0]
        assert (frame.get_xy(), frame.get_width(), frame.get_height()) == ((11, 2), 1, 1)
        np.testing.assert_allclose(shown(place), overlaid(WIDE, weights[head], (0, weights.max()), None, 2, (7, 13)))
        across = [tuple(path.vertices[:, 1]) for path in place.collections[0].get_paths()]
        assert across == [(0, 0), (2, 2), (4, 4), (6, 6)]
    check_layout(figure)


def test_a_patch_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"no patch \(4, 0\); rows are 0 to 3, columns 0 to 3"):
        patch_attention(WIDE, np.ones((1, 4, 4)), (4, 0), ["head 0"])


def test_full_and_compressed_are_compared_token_by_token():
    full = RNG.random((4, 6))
    full /= full.sum()
    cells = full.reshape(2, 2, 3, 2).sum((1, 3))
    figure = full_against_compressed(WIDE, full, cells, (1, 1), 2)
    np.testing.assert_allclose(shown(figure.axes[2]), spread_cells(cells, 2) - full)
    same = 1 - np.abs(spread_cells(cells, 2) - full).sum() / 2
    assert figure.axes[2].get_title() == f"compressed - full\n{same:.0%} of the attention is the same"
    low, high = figure.axes[2].images[0].get_clim()
    assert low == -high
    most = max(full.max(), cells.max() / 4)
    np.testing.assert_allclose(shown(figure.axes[0]), overlaid(WIDE, full, (0, most)))
    np.testing.assert_allclose(shown(figure.axes[1]), overlaid(WIDE, cells / 4, (0, most), None, 2))
    check_layout(figure)


def test_the_overview_has_a_place_for_each_layer_and_head():
    maps = RNG.random((3, 4, 5, 7))
    grid = overview_grid(maps, [0, 5, 27], [0, 1, 2, 3])
    for place, heat in zip(grid.axes, maps.reshape(12, 5, 7), strict=True):
        np.testing.assert_array_equal(shown(place), heat)
        assert place.images[0].get_clim() == (heat.min(), heat.max())
    assert [place.get_ylabel() for place in grid.axes[::4]] == ["layer 0", "layer 5", "layer 27"]
    check_layout(grid)


def test_statistics_are_means_over_steps_and_over_heads():
    values = RNG.random((6, 5, 3))
    figure = attention_statistics(values, range(6), [999, 800, 600, 400, 200], "entropy, nats", most=2.0)
    left, right = figure.axes[:2]
    np.testing.assert_allclose(shown(left), values.mean(1))
    drawn = [line for line in right.lines if len(line.get_xdata()) == 5]
    np.testing.assert_allclose([line.get_ydata() for line in drawn], values.mean(2))
    assert right.xaxis_inverted()
    assert right.texts[0].get_text() == "most: 2.00"
    assert (left.get_xlabel(), left.get_ylabel(), right.get_ylabel()) == ("head", "layer", "entropy, nats")
    check_layout(figure)


def test_of_many_layers_eight_lines_are_drawn_and_fourteen_are_named():
    figure = attention_statistics(RNG.random((28, 4, 16)), range(28), [999, 600, 300, 1], "entropy, nats")
    assert len(figure.axes[1].lines) == 8
    assert len(figure.axes[0].get_yticks()) == 14
    check_layout(figure)


def test_colours_tell_apart_without_red_and_green():
    """Simulated deuteranopia (Viénot et al. 1999): the heat's colours keep growing brighter."""
    colours = heat_colours(np.linspace(0, 1, 32), 0, 1) ** 2.2
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.02996, 0.18431, 1.46709]])
    lms = colours @ to_lms.T
    lms[:, 1] = 0.494207 * lms[:, 0] + 1.24827 * lms[:, 2]
    seen = lms @ np.linalg.inv(to_lms).T
    luminance = seen @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) > 0).mean() > 0.95


def test_words_are_ordered_by_their_overlap_beside_the_position_prior():
    overlaps = {"object": np.full(6, 0.6), "on": np.full(6, 0.4), "rare": [1.0], "position prior": np.full(6, 0.7)}
    figure = overlap_bars(overlaps)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["on (n = 6)", "object (n = 6)"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([0.4, 0.6])
    assert figure.axes[0].lines[-1].get_xdata() == pytest.approx([0.7, 0.7])
    check_layout(figure)


def test_an_object_is_outlined_over_the_map_of_its_word():
    mask = np.pad(np.ones((4, 4), bool), 2)
    figure = located_words([np.zeros((8, 8, 3))], [np.eye(2)], [mask], ["cup: 0.5"])
    np.testing.assert_allclose(shown(figure.axes[0]), overlaid(np.zeros((8, 8, 3)), np.eye(2), (0, 1), 0.5))
    assert len(figure.axes[0].collections) == 1
