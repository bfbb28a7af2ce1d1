"""The image of two layouts: trees of modules, and a line for everything that is mapped."""

import io

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from reference_data import OFFICIAL, official

from pixart_nb.core.checkpoints.convert import plan_conversion
from pixart_nb.viz.checkpoints import parity, tree_rows, two_trees

LINKS = [
    (("a.x",), ("left.deep.one",), "renamed"),
    (("a.y",), ("left.q", "left.k"), "split in 2"),
    (("b",), (), "recomputed"),
    ((), ("c",), "absent"),
]


def texts(figure):
    return {text.get_text(): text for text in figure.axes[0].texts}


def drawn(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=60)
    return np.asarray(Image.open(buffer).convert("RGB"))


def test_names_become_the_rows_of_a_tree():
    rows = tree_rows(["a.x", "a.y.z", "b", "a.w"])
    assert [(row.label, row.depth, row.parent, row.name) for row in rows] == [
        ("a", 0, -1, ""),
        ("x", 1, 0, "a.x"),
        ("y.z", 1, 0, "a.y.z"),
        ("w", 1, 0, "a.w"),
        ("b", 0, -1, "b"),
    ]
    assert tree_rows([]) == []


def test_every_link_is_a_line_in_the_colour_of_its_way():
    figure = two_trees(LINKS)
    lines = figure.axes[0].patches
    assert len(lines) == 3
    colours = [to_hex(line.get_edgecolor()) for line in lines]
    assert colours[0] != colours[1] == colours[2]
    legend = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert legend == ["renamed", "split in 2"]


def test_what_has_no_counterpart_says_why_beside_its_name():
    shown = texts(two_trees(LINKS, ("ours", "theirs")))
    assert {"b   recomputed", "absent   c", "ours", "theirs"} <= set(shown)
    assert shown["b   recomputed"].get_color() != shown["x"].get_color()


@pytest.mark.parametrize("case", OFFICIAL)
def test_lines_begin_and_end_beside_the_names_that_they_connect(case, tmp_path):
    audit = plan_conversion(official(case)[0], tmp_path / "folder").audit
    figure = two_trees(audit.links())
    place = figure.axes[0]
    figure.canvas.draw()
    boxes = [text.get_window_extent().transformed(place.transData.inverted()) for text in place.texts]
    for line in place.patches:
        start, *_, stop = line.get_path().vertices
        assert min(abs(box.x1 - start[0]) + abs((box.y0 + box.y1) / 2 - start[1]) for box in boxes) < 0.15
        assert min(abs(box.x0 - stop[0]) + abs((box.y0 + box.y1) / 2 - stop[1]) for box in boxes) < 0.15
    mapped = [link for link in audit.links() if link[2] not in ("recomputed", "absent")]
    assert len(place.patches) == sum(len(left) * len(right) for left, right, _ in mapped)


def test_no_two_names_overlap_and_none_leaves_the_image():
    figure = two_trees(LINKS)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    whole = figure.bbox
    assert all(box.x0 >= 0 and box.x1 <= whole.x1 and box.y0 >= 0 and box.y1 <= whole.y1 for box in boxes)
    assert not any(one.overlaps(other) for k, one in enumerate(boxes) for other in boxes[:k])


def test_the_image_is_drawn_and_grows_with_the_trees():
    few, many = (two_trees([((f"m{k}",), (f"n{k}",), "renamed") for k in range(n)]) for n in (3, 30))
    assert many.get_size_inches()[1] > 2 * few.get_size_inches()[1]
    assert (drawn(few) != 255).any()


def test_equal_predictions_say_so_and_others_show_where_they_differ():
    values = np.random.default_rng(0).standard_normal((1, 4, 6, 8))
    other = values.copy()
    other[0, 2, 1, 5] += 0.5
    same, apart = parity(values, values), parity(values, other)
    assert same.axes[2].get_title() == "difference: none, bit for bit" and not same.axes[2].images
    assert same.axes[2].texts[0].get_text().startswith(f"{values.size:,} predicted values")
    shown = np.asarray(apart.axes[2].images[0].get_array())
    assert np.flatnonzero(shown).tolist() == [1 * 8 + 5]
    assert shown.max() == pytest.approx(0.5 / np.abs(values).max())
    with pytest.raises(ValueError, match="expected two of one shape"):
        parity(values, values[:, :2])
