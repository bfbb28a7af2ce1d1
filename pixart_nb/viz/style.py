"""Style of all figures: font sizes, colour-blind safe colours, colour maps. No global state changes."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib import figure as matplotlib_figure
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

#: Font sizes in points. A figure of ``WIDTH`` inches fills the width of a notebook.
SMALL, TEXT, LARGE = 8, 9, 10
WIDTH = 9.0
#: Smallest height in inches of a figure with a colour bar, whose label needs the room.
BAR_HEIGHT = 2.1
#: Colours of Okabe and Ito without yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", "-.", ":")
#: Colour maps of attention over an image, of amounts, and of differences around zero.
HEAT, AMOUNT, DIFFERENCE = "inferno", "cividis", "PuOr_r"
#: Colour of the frame around a selected patch.
MARK = "#00E5FF"


class Figure(matplotlib_figure.Figure):
    """Matplotlib figure that shows itself in any notebook, without ``%matplotlib inline``, at retina resolution.

    Texts are drawn as they are written: a ``$`` in a caption does not start mathematics.
    """

    def draw(self, renderer: Any) -> None:
        """Draw all texts literally, except the tick labels of logarithmic axes, which are powers of ten."""
        powers = {
            id(label)
            for ax in self.axes
            for axis, scale in ((ax.xaxis, ax.get_xscale()), (ax.yaxis, ax.get_yscale()))
            if scale == "log"
            for label in [*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)]
        }
        for text in self.findobj(Text):
            if id(text) not in powers:
                text.set_parse_math(False)
        super().draw(renderer)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=2 * self.dpi)
        width, height = self.get_size_inches() * self.dpi
        return content.getvalue(), {"width": round(width), "height": round(height)}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of width x height inches with constrained layout."""
    return Figure(figsize=(width, height), layout="constrained")


def axes_grid(figure: Any, rows: int, columns: int, **options: Any) -> np.ndarray:
    """Return styled axes (rows, columns) of a figure or subfigure."""
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.ravel():
        styled(ax)
    return axes


def styled(ax: Axes) -> Axes:
    """Apply font sizes and lines to axes."""
    ax.tick_params(labelsize=SMALL, length=2.5, pad=2)
    ax.tick_params(which="minor", labelsize=SMALL)  # a logarithmic axis may write numbers there
    ax.xaxis.label.set_size(SMALL)
    ax.yaxis.label.set_size(SMALL)
    ax.title.set_size(TEXT)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return ax


def for_image(ax: Axes) -> Axes:
    """Remove ticks and frame of axes that show an image."""
    ax.set(xticks=[], yticks=[])
    ax.set_frame_on(False)
    return ax


def for_curves(ax: Axes, xlabel: str, ylabel: str) -> Axes:
    """Label axes that show curves and add a faint grid."""
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(alpha=0.3, linewidth=0.6)
    return ax


def logarithmic_values(ax: Axes) -> None:
    """Make the value axis of drawn curves logarithmic; its ticks are plain numbers in a range below two decades."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high < 100 * low:
        narrow = high < 10 * low
        ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]) if narrow else LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")


def curve_axes(width: float, height: float, xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """Return a figure of width x height inches with one pair of axes for curves."""
    figure = new_figure(width, height)
    return figure, for_curves(axes_grid(figure, 1, 1)[0, 0], xlabel, ylabel)


def label_every(set_ticks: Callable, labels: Sequence[Any], most: int = 14) -> None:
    """Label an axis by index with evenly spaced ones of many labels; ``set_ticks`` is a method of the axes."""
    every = -(-len(labels) // most)
    set_ticks(range(0, len(labels), every), list(labels)[::every])


def colour_bar(figure: Any, image: AxesImage, axes: Axes | Sequence[Axes], label: str) -> None:
    """Add a colour bar with its label beside axes."""
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=25, pad=0.02)
    bar.set_label(label, size=SMALL)
    bar.ax.tick_params(labelsize=SMALL, length=2.5)
    bar.ax.ticklabel_format(useOffset=False)
    bar.outline.set_visible(False)


def legend(ax: Axes, side: str = "", **options: Any) -> None:
    """Add a legend inside the axes, or at their ``right`` or ``above`` them."""
    anchor = {"right": ("center left", (1.01, 0.5)), "above": ("lower center", (0.5, 1.0))}.get(side)
    if anchor:
        options = {"loc": anchor[0], "bbox_to_anchor": anchor[1]} | options
    ax.legend(fontsize=SMALL, frameon=False, handlelength=2.2, **options)


def legend_below(figure: Any, ax: Axes) -> None:
    """Add the legend of some axes below the figure, in up to three columns."""
    handles, labels = ax.get_legend_handles_labels()
    look = {"fontsize": SMALL, "frameon": False, "handlelength": 3}
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), **look)


def line_style(number: int) -> dict[str, Any]:
    """Return colour, dash and marker of a line; lines differ without colour, too."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": LINES[number % len(LINES)],
        "marker": "os^Dv"[number % 5],
        "markersize": 3,
        "linewidth": 1.4,
    }


def heat_colours(values: np.ndarray, lowest: float, highest: float, name: str = HEAT) -> np.ndarray:
    """Map values (...) between lowest and highest to colours (..., 3), float in [0, 1]."""
    share = (np.asarray(values, float) - lowest) / (highest - lowest) if highest > lowest else 0 * values
    return np.asarray(colormaps[name](np.clip(share, 0, 1)))[..., :3]
