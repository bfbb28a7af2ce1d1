"""Figures show the numbers they are given."""

import io

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from pixart_nb.viz.curves import training_curves
from pixart_nb.viz.figures import comparison_grid, film_strip, image_grid
from pixart_nb.viz.style import LARGE, SMALL, WIDTH


def shown(place):
    return np.asarray(place.images[0].get_array())


def test_a_grid_shows_every_image_in_order_with_its_title():
    images = np.random.default_rng(0).random((5, 8, 12, 3))
    figure = image_grid(images, [f"number {k}" for k in range(5)], columns=3)
    filled = [place for place in figure.axes if place.images]
    assert len(figure.axes) == 6
    for k, place in enumerate(filled):
        np.testing.assert_array_equal(shown(place), images[k])
        assert place.get_title() == f"number {k}"
    assert len(filled) == 5


@pytest.mark.parametrize(
    ("count", "columns", "expected"), [(1, None, (1, 1)), (4, None, (2, 2)), (7, None, (3, 3)), (2, 5, (1, 2))]
)
def test_a_grid_has_as_many_rows_and_columns_as_it_needs(count, columns, expected):
    layout = image_grid(np.zeros((count, 4, 4, 3)), columns=columns).axes[0].get_subplotspec().get_gridspec()
    assert (layout.nrows, layout.ncols) == expected


def test_bytes_stay_bytes_and_floats_are_clipped():
    whole = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    np.testing.assert_array_equal(shown(image_grid(whole).axes[0]), whole[0])
    wild = np.array([-1.0, 0.25, 2.0]).reshape(1, 1, 1, 3)
    np.testing.assert_array_equal(shown(image_grid(wild).axes[0]), [[[0.0, 0.25, 1.0]]])


@pytest.mark.parametrize(("dtype", "white"), [(np.uint8, 255), (np.float32, 1)])
def test_a_grey_image_is_scaled_to_the_whole_range_and_not_to_its_own(dtype, white):
    place = image_grid([np.zeros((4, 4), dtype)]).axes[0]
    assert place.images[0].get_clim() == (0, white)


def test_images_of_several_sizes_share_a_grid():
    figure = image_grid([np.zeros((4, 8, 3)), np.zeros((8, 4, 3))])
    assert [shown(place).shape for place in figure.axes] == [(4, 8, 3), (8, 4, 3)]


def test_rows_are_as_high_as_their_images():
    images = [np.zeros((8, 8, 3))] * 2 + [np.zeros((3, 8, 3))] * 2
    figure = image_grid(images, columns=2)
    figure.draw_without_rendering()
    upper, lower = (figure.axes[k].get_position().height for k in (0, 2))
    assert lower / upper == pytest.approx(3 / 8, rel=0.1)
    alone = image_grid(images[:2], columns=2).get_figheight()
    assert alone < figure.get_figheight() < 1.6 * alone


def test_titles_break_at_middle_dots():
    title = "1: a red mushroom · 256 x 256 · dpm++, 20 steps · guidance 4.5 · seed 0"
    lines = image_grid(np.zeros((1, 4, 4, 3)), [title], cell=2.6).axes[0].get_title().splitlines()
    assert len(lines) > 1 and all(line.strip("· ") == line for line in lines)
    assert " · ".join(lines) == title


def test_rows_are_labelled_at_their_first_image():
    figure = image_grid(np.zeros((6, 4, 4, 3)), columns=3, row_labels=["few", "many"])
    assert [place.get_ylabel() for place in figure.axes] == ["few", "", "", "many", "", ""]


def test_long_labels_of_rows_are_folded_to_the_height_of_a_row():
    label = "a teal guitar in the snow on a winter day"
    place = image_grid(np.zeros((1, 4, 8, 3)), row_labels=[label]).axes[0]
    assert place.get_ylabel().replace("\n", " ") == label
    assert max(map(len, place.get_ylabel().splitlines())) <= 1.8 / 2 * 14


def test_long_titles_are_folded_between_words():
    title = "a teal guitar in the snow on a winter day"
    lines = image_grid(np.zeros((1, 4, 4, 3)), [title]).axes[0].get_title().splitlines()
    assert " ".join(lines) == title
    assert max(map(len, lines)) <= 27


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (np.zeros((0, 4, 4, 3)), {}, "at least one image"),
        (np.zeros((2, 4, 4, 4)), {}, r"must be \(H, W, 3\)"),
        (np.full((1, 4, 4, 3), np.nan), {}, "finite"),
        (np.zeros((2, 4, 4, 3)), {"titles": ["one"]}, "as many titles as images, got 1 for 2"),
        (np.zeros((2, 4, 4, 3)), {"columns": 1, "row_labels": ["one"]}, "as many row labels as rows"),
    ],
)
def test_what_cannot_be_shown_is_refused(images, options, message):
    with pytest.raises(ValueError, match=message):
        image_grid(images, **options)


def test_a_film_strip_is_one_row_in_order():
    frames = np.linspace(0, 1, 4)[:, None, None, None] * np.ones((4, 6, 6, 3))
    figure = film_strip(frames, ["t 999", "t 600", "t 300", "t 0"])
    layout = figure.axes[0].get_subplotspec().get_gridspec()
    assert (layout.nrows, layout.ncols) == (1, 4)
    assert [shown(place)[0, 0, 0] for place in figure.axes] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert [place.get_xlabel() for place in figure.axes] == ["t 999", "t 600", "t 300", "t 0"]


def test_a_film_strip_needs_a_label_for_each_image():
    with pytest.raises(ValueError, match="as many labels as images, got 1 for 2"):
        film_strip(np.zeros((2, 4, 4, 3)), ["start"])


def test_a_comparison_has_a_row_for_each_value_of_one_choice_and_a_column_for_each_of_the_other():
    images = np.random.default_rng(0).random((2, 3, 8, 12, 3))
    figure = comparison_grid({"euler": images[0], "ddim": list(images[1])}, ["few", "more", "many"])
    layout = figure.axes[0].get_subplotspec().get_gridspec()
    assert (layout.nrows, layout.ncols) == (2, 3)
    for place, image in zip(figure.axes, images.reshape(6, 8, 12, 3), strict=True):
        np.testing.assert_array_equal(shown(place), image)
    assert [place.get_title() for place in figure.axes] == ["few", "more", "many", "", "", ""]
    assert [place.get_ylabel() for place in figure.axes] == ["euler", "", "", "ddim", "", ""]


def test_a_comparison_shows_images_of_different_sizes_to_one_scale():
    wide, tall = np.zeros((4, 8, 3)), np.zeros((8, 4, 3), np.uint8)
    places = comparison_grid({"a cup": [wide, tall]}, ["wide", "tall"]).axes
    assert [shown(place).shape for place in places] == [(8, 8, 3), (8, 8, 3)]
    assert shown(places[0])[:, 0, 0].tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
    assert shown(places[1])[0, :, 0].tolist() == [255, 255, 0, 0, 0, 0, 255, 255]


PROMPTS = {
    "short": "A small cactus with a happy face in the Sahara desert.",
    "long": "an astronaut who rides a green horse through a narrow street of an old town at night, while it rains and "
    "many lamps shine on the wet stones of the road.",
    "one word": "unbreakable" * 8,
}


def check_titles(figure):
    """Every text lies within the figure, and every title above its image, at the resolutions of files and notebooks."""
    for dpi in (72, 100, 150, 200):
        figure.set_dpi(dpi)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        renderer = canvas.get_renderer()
        texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
        for text in texts:
            box = text.get_window_extent(renderer)
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, f"{text.get_text()!r} at {dpi} dpi: {box}"
            assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, f"{text.get_text()!r} at {dpi} dpi: {box}"
        images = [place.images[0].get_window_extent(renderer) for place in figure.axes if place.images]
        titles = [place.title.get_window_extent(renderer) for place in figure.axes if place.get_title()]
        assert not any(title.overlaps(image) for title in titles for image in images)
        sides = [image.width for image in images]
        assert max(sides) - min(sides) <= 1


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (12, 8)])
@pytest.mark.parametrize(("count", "columns"), [(1, None), (2, 2), (4, 2), (8, 8), (8, 4)])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_titles_lie_within_the_rendered_figure(prompt, count, columns, shape):
    images, titles = np.zeros((count, *shape, 3)), [PROMPTS[prompt]] * count
    check_titles(image_grid(images, titles, columns))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_titles_of_comparisons_and_labels_of_strips_lie_within_the_rendered_figure(prompt):
    images, title = np.zeros((2, 8, 8, 3)), PROMPTS[prompt]
    check_titles(comparison_grid({"dpm++": images[:1], "ddim": images[1:]}, [title]))
    check_titles(comparison_grid({"before": images, "after": images}, [title, title]))
    check_titles(comparison_grid({"before": images[:1]}, [title]))
    check_titles(film_strip(images, ["t 999", "t 0"]))


def test_titles_of_many_lines_have_room_above():
    title = " ".join(["a teal guitar in the snow"] * 4)
    figure = image_grid(np.zeros((2, 4, 4, 3)), [title, ""], columns=2)
    figure.draw_without_rendering()
    top = figure.axes[0].title.get_window_extent().y1
    assert figure.axes[0].get_title().count("\n") >= 3
    assert top <= figure.bbox.y1


@pytest.mark.parametrize("columns", [3, 8, 20])
def test_a_row_of_many_images_is_no_wider_than_a_notebook(columns):
    figure = comparison_grid({"a": np.zeros((columns, 4, 4, 3))}, ["a red mushroom in a forest"] * columns)
    assert figure.get_figwidth() <= WIDTH + 1e-6
    assert all(SMALL <= place.title.get_fontsize() <= LARGE for place in figure.axes)


def test_a_comparison_of_one_column_lies_in_a_row():
    figure = comparison_grid({"a": np.zeros((1, 4, 4, 3)), "b": np.zeros((1, 4, 4, 3))}, ["only"])
    layout = figure.axes[0].get_subplotspec().get_gridspec()
    assert (layout.nrows, layout.ncols) == (1, 2)
    assert [place.get_title() for place in figure.axes] == ["a", "b"] and figure.get_suptitle() == "only"


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ({}, ["few"], "at least one image"),
        ({"euler": []}, [], "at least one image"),
        ({"euler": np.zeros((2, 4, 4, 3))}, ["few"], "images in row 'euler' as columns, got 2 for 1"),
    ],
)
def test_a_comparison_without_a_image_for_each_place_is_refused(rows, columns, message):
    with pytest.raises(ValueError, match=message):
        comparison_grid(rows, columns)


def test_a_figure_is_written_as_a_image(tmp_path):
    image_grid(np.zeros((1, 4, 4, 3))).savefig(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_shows_itself_without_a_matplotlib_backend():
    figure = image_grid(np.zeros((2, 8, 8, 3)), ["first", "second"])
    png, size = figure._repr_png_()
    with Image.open(io.BytesIO(png)) as image:
        assert image.size == pytest.approx((2 * size["width"], 2 * size["height"]), abs=2)


@pytest.mark.parametrize("caption", ["$5 and $10", r"\frac{1}{", "$", r"a $\undefined$ b", "50% & {braces}"])
def test_captions_are_drawn_as_they_are_written(caption):
    figure = image_grid(np.zeros((1, 8, 8, 3)), [caption], row_labels=[caption])
    assert figure._repr_png_()[0].startswith(b"\x89PNG")
    texts = [text for text in figure.findobj(Text) if text.get_text() == caption]
    assert len(texts) == 2
    assert not any(text.get_parse_math() for text in texts)


def test_powers_of_ten_of_a_logarithmic_axis_are_still_set_as_mathematics():
    figure = training_curves({"loss": ([1, 2], [1.0, 1000.0])}, logarithmic=True)
    figure._repr_png_()
    labels = [label for label in figure.axes[0].get_yticklabels() if "10^" in label.get_text()]
    assert labels
    assert all(label.get_parse_math() for label in labels)
