"""Figures of checkpoints: the module trees of two layouts with what becomes what, and two predictions compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz import style
from pixart_nb.viz.style import COLOURS, SMALL, TEXT, WIDTH, Figure

#: (modules of the left, modules of the right, way); either side may be empty.
Link = tuple[Sequence[str], Sequence[str], str]

#: Inches. The letters all have one width, so that lines can begin where words end.
_ROW, _INDENT, _LETTER, _GAP, _TOP = 0.185, 0.16, 0.602 * SMALL / 72, 0.06, 0.75
_FONT = "DejaVu Sans Mono"
_FAINT, _GREY = "0.65", "0.5"


@dataclass(frozen=True)
class TreeRow:
    """Line of a tree: label, depth, row of its parent (-1: none), and the whole name of a leaf."""

    label: str
    depth: int
    parent: int
    name: str = ""


def tree_rows(names: Iterable[str]) -> list[TreeRow]:
    """Return dotted names as the rows of a tree, in the order of first appearance; lone branches are one row.

    >>> [(row.depth, row.label) for row in tree_rows(["a.b.c", "a.b.d", "e.f"])]
    [(0, 'a.b'), (1, 'c'), (1, 'd'), (0, 'e.f')]
    """
    tree: dict[str, dict] = {}
    for name in names:
        branch = tree
        for part in name.split("."):
            branch = branch.setdefault(part, {})
    rows: list[TreeRow] = []
    _add_rows(rows, tree, "", 0, -1)
    return rows


def _add_rows(rows: list[TreeRow], tree: dict[str, dict], above: str, depth: int, parent: int) -> None:
    for part, below in tree.items():
        label = part
        while len(below) == 1:
            (only, below), *_ = below.items()
            label += f".{only}"
        rows.append(TreeRow(label, depth, parent, "" if below else above + label))
        _add_rows(rows, below, f"{above}{label}.", depth + 1, len(rows) - 1)


def two_trees(links: Sequence[Link], titles: tuple[str, str] = ("official", "diffusers")) -> Figure:
    """Draw the trees of two layouts side by side, the right one mirrored, with a line for each module that is mapped.

    ``links`` as ``Audit.links()`` gives them. A line has the colour of its way (same name, renamed, split, ...); what
    has no counterpart is written in grey, its way beside it.
    """
    links = _in_order(links)
    sides = [tree_rows(name for link in links for name in link[side]) for side in (0, 1)]
    height = _TOP + _ROW * (max(map(len, sides)) + 1)
    figure = Figure(figsize=(WIDTH, height))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(height, 0))  # inches from the upper left corner
    ax.axis("off")
    colours = _colours(links)
    lonely = {name: way for left, right, way in links if not (left and right) for name in (*left, *right)}
    ends = [_draw_tree(ax, rows, side, lonely) for side, rows in enumerate(sides)]
    for left, right, way in links:
        for one in left:
            for other in right:
                ax.add_patch(_curve(ends[0][one], ends[1][other], colours[way]))
    _legend(ax, titles, colours)
    return figure


def _in_order(links: Sequence[Link]) -> list[Link]:
    """Sort links by the first levels of the right side, so that few lines cross; those without counterpart last."""
    first = [right[0].split(".")[0] if left and right else "" for left, right, _ in links]
    order = {part: number for number, part in enumerate(dict.fromkeys(part for part in first if part))}
    return [link for _, link in sorted(zip(first, links, strict=True), key=lambda pair: order.get(pair[0], len(order)))]


def _colours(links: Sequence[Link]) -> dict[str, str]:
    ways = dict.fromkeys(way for left, right, way in links if left and right)
    return {way: COLOURS[number % len(COLOURS)] for number, way in enumerate(ways)}


def _draw_tree(ax: Axes, rows: Sequence[TreeRow], side: int, lonely: dict[str, str]) -> dict[str, tuple[float, float]]:
    """Draw a tree from the left or the right edge; return the inner end of each leaf's label by its name."""
    ends = {}
    sign, edge = (1, 0.15) if side == 0 else (-1, WIDTH - 0.15)
    for number, row in enumerate(rows):
        x, y = edge + sign * _INDENT * row.depth, _TOP + _ROW * number
        way = lonely.get(row.name)
        label = row.label if not way else f"{way}   {row.label}" if side else f"{row.label}   {way}"
        weight = "normal" if row.name else "bold"
        look = {"family": _FONT, "size": SMALL, "weight": weight, "color": _GREY if way else "black"}
        ax.text(x, y, label, ha="right" if side else "left", va="center", **look)
        if row.parent >= 0:
            stem, above = x - sign * 0.6 * _INDENT, _TOP + _ROW * (row.parent + 0.4)
            ax.plot([stem, stem, x - sign * 0.03], [above, y, y], color=_FAINT, linewidth=0.7)
        ends[row.name] = (x + sign * (_LETTER * len(label) + _GAP), y)
    return ends


def _curve(start: tuple[float, float], stop: tuple[float, float], colour: str) -> PathPatch:
    middle = (start[0] + stop[0]) / 2
    points = [start, (middle, start[1]), (middle, stop[1]), stop]
    path = Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4])
    return PathPatch(path, facecolor="none", edgecolor=colour, linewidth=1.1, alpha=0.85)


def _legend(ax: Axes, titles: tuple[str, str], colours: dict[str, str]) -> None:
    for x, title, side in ((0.15, titles[0], "left"), (WIDTH - 0.15, titles[1], "right")):
        ax.text(x, 0.25, title, ha=side, va="center", size=TEXT + 2, weight="bold")
    lines = [Line2D([], [], color=colour, linewidth=2, label=way) for way, colour in colours.items()]
    if lines:
        where = {"loc": "upper center", "bbox_to_anchor": (0.5, 1 - 0.1 / ax.get_ylim()[0])}
        ax.legend(handles=lines, ncols=len(lines), frameon=False, fontsize=TEXT, **where)


def parity(expected: np.ndarray, actual: np.ndarray, labels: tuple[str, str] = ("source", "target")) -> Figure:
    """Draw the first channel of two predictions (1, C, H, W), and the difference of all channels.

    The first two images share their colours. The third is the largest difference of any channel, in units of the
    largest value; if every value is equal, a text says so in its place.
    """
    if expected.shape != actual.shape:
        raise PixArtNBError(
            f"the predictions have shapes {expected.shape} and {actual.shape}; expected two of one shape"
        )
    figure = style.new_figure(WIDTH, 0.5 + WIDTH / 3 * expected.shape[2] / expected.shape[3])
    axes = [style.for_image(ax) for ax in style.axes_grid(figure, 1, 3)[0]]
    largest = np.abs(expected).max() or 1.0
    reach = np.abs(expected[0, 0]).max() or 1.0
    for ax, values, label in zip(axes, (expected, actual), labels, strict=False):
        image = ax.imshow(values[0, 0], cmap=style.DIFFERENCE, vmin=-reach, vmax=reach, interpolation="nearest")
        ax.set_title(label, size=TEXT)
    style.colour_bar(figure, image, axes[:2], "prediction, first channel")
    difference = np.abs(actual - expected)[0].max(0) / largest
    if not difference.any():
        axes[2].set_title("difference: none, bit for bit", size=TEXT)
        facts = f"{expected.size:,} predicted values,\neach the same in both"
        axes[2].text(0.5, 0.5, facts, ha="center", va="center", size=TEXT + 2, transform=axes[2].transAxes)
        return figure
    image = axes[2].imshow(difference, cmap=style.AMOUNT, vmin=0, vmax=difference.max(), interpolation="nearest")
    axes[2].set_title("difference", size=TEXT)
    style.colour_bar(figure, image, axes[2], "largest of all channels, relative")
    return figure
