"""The one style of all figures: sizes of letters, colours that colour-blind people can tell apart, and heat.

Matplotlib's global settings are left alone; every figure takes its axes from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

#: Points. A figure of ``WIDTH`` inches fills a notebook's width.
SMALL, TEXT, LARGE = 8, 9, 10
WIDTH = 9.0
#: Inches that a figure with a colour bar has at least, so that the bar's label has room.
BAR_HEIGHT = 2.1
#: Okabe and Ito's colours, without yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", "-.", ":")
#: Colour maps: for attention over a picture, for amounts, and for differences around zero.
HEAT, AMOUNT, DIFFERENCE = "inferno", "cividis", "PuOr_r"
#: What marks a patch that was chosen.
MARK = "#00E5FF"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches, that keeps its labels apart.

    >>> new_figure(9, 3).get_size_inches().tolist()
    [9.0, 3.0]
    """
    return Figure(figsize=(width, height), layout="constrained")


def axes_grid(figure: Any, rows: int, columns: int, **options: Any) -> np.ndarray:
    """Axes (rows, columns) with this style's letters; ``figure`` may be a subfigure."""
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for place in axes.ravel():
        styled(place)
    return axes


def styled(place: Axes) -> Axes:
    """Give axes this style's letters and lines."""
    place.tick_params(labelsize=SMALL, length=2.5, pad=2)
    place.tick_params(which="minor", labelsize=SMALL)  # a logarithmic axis may write numbers there
    place.xaxis.label.set_size(SMALL)
    place.yaxis.label.set_size(SMALL)
    place.title.set_size(TEXT)
    for side in ("top", "right"):
        place.spines[side].set_visible(False)
    return place


def for_picture(place: Axes) -> Axes:
    """Axes that show a picture: no ticks, no frame."""
    place.set(xticks=[], yticks=[])
    place.set_frame_on(False)
    return place


def for_curves(place: Axes, xlabel: str, ylabel: str) -> Axes:
    """Axes that show curves, with named axes and a faint grid."""
    place.set(xlabel=xlabel, ylabel=ylabel)
    place.grid(alpha=0.3, linewidth=0.6)
    return place


def colour_bar(figure: Any, image: AxesImage, axes: Axes | Sequence[Axes], label: str) -> None:
    """A colour bar beside axes, with its label."""
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=25, pad=0.02)
    bar.set_label(label, size=SMALL)
    bar.ax.tick_params(labelsize=SMALL, length=2.5)
    bar.ax.ticklabel_format(useOffset=False)
    bar.outline.set_visible(False)


def legend(place: Axes, **options: Any) -> None:
    """A legend in this style's letters."""
    place.legend(fontsize=SMALL, frameon=False, handlelength=2.2, **options)


def line_style(number: int) -> dict[str, Any]:
    """Colour, dash and marker of the line of that number: two lines differ without colour too."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number % len(LINES)],
        "marker": "os^Dv"[number % 5],
        "markersize": 3,
        "linewidth": 1.4,
    }


def heat_colours(values: np.ndarray, lowest: float, highest: float, name: str = HEAT) -> np.ndarray:
    """Colours of values (...) between lowest and highest: (..., 3) float in [0, 1].

    >>> heat_colours(np.array([0.0, 2.0]), 0, 2, "gray").tolist()
    [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    """
    share = (np.asarray(values, float) - lowest) / (highest - lowest) if highest > lowest else 0 * values
    return np.asarray(colormaps[name](np.clip(share, 0, 1)))[..., :3]
