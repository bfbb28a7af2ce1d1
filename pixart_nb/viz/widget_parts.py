"""Parts of the widgets: images to click or to paint over, sliders with a mean, lines of text, a colour bar, layout."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets
from matplotlib.colors import to_hex

from pixart_nb.viz.overlay import bar_colours
from pixart_nb.viz.style import Figure

STATIC = Path(__file__).parent / "static"
STYLE = (STATIC / "widgets.css").read_text(encoding="utf-8")
#: Value of a slider that stands for the mean.
MEAN = -1


class ClickableImage(anywidget.AnyWidget):
    """PNG divided into ``rows`` x ``columns`` cells. ``cell`` is the selected (row, column), or () for none.

    A click or the arrow keys select a cell; with ``zoomable`` they show the image as large as the window instead.
    Pixels stay sharp unless ``smooth``. Screen readers read ``label``, and the names of the selected row and column
    (by default their numbers).
    """

    _esm = STATIC / "clickable.js"
    _css = STATIC / "clickable.css"

    png = traitlets.Bytes().tag(sync=True)
    rows = traitlets.Int(1).tag(sync=True)
    columns = traitlets.Int(1).tag(sync=True)
    cell = traitlets.Tuple().tag(sync=True)
    width = traitlets.Int(400).tag(sync=True)
    label = traitlets.Unicode("image").tag(sync=True)
    row_names = traitlets.List(traitlets.Unicode()).tag(sync=True)
    column_names = traitlets.List(traitlets.Unicode()).tag(sync=True)
    smooth = traitlets.Bool(False).tag(sync=True)
    zoomable = traitlets.Bool(False).tag(sync=True)

    @traitlets.validate("cell")
    def _within(self, proposal: dict) -> tuple[int, ...]:
        cell = tuple(int(index) for index in proposal["value"])
        if cell and not (len(cell) == 2 and 0 <= cell[0] < self.rows and 0 <= cell[1] < self.columns):
            raise traitlets.TraitError(
                f"there is no cell {cell}; rows are 0 to {self.rows - 1}, columns 0 to {self.columns - 1}"
            )
        return cell


class PaintedImage(anywidget.AnyWidget):
    """Image (bytes of a file) that the mouse paints over; ``mask`` is a PNG of its size, white where it was painted.

    Both are empty at first. ``brush``: width of a stroke in percent of the image's. Screen readers read ``label``.
    """

    _esm = STATIC / "painter.js"
    _css = STATIC / "painter.css"

    png = traitlets.Bytes().tag(sync=True)
    mask = traitlets.Bytes().tag(sync=True, from_json=lambda value, widget: bytes(value))  # the page sends a memoryview
    brush = traitlets.Int(15).tag(sync=True)
    width = traitlets.Int(288).tag(sync=True)
    label = traitlets.Unicode("image to paint over").tag(sync=True)


class Explorer:
    """Base class of the explorers: ``_draw`` shows what the controls of ``widget`` select."""

    widget: widgets.Widget
    _quiet = False

    @contextmanager
    def _without_drawing(self) -> Iterator[None]:
        """Set controls inside the block without an effect."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def _changed(self, _: Any) -> None:
        if not self._quiet:
            self._draw()

    def _repr_mimebundle_(self, **options: Any):
        return mime_bundle(self.widget, type(self).__name__, **options)


def mime_bundle(widget: widgets.Widget, name: str, **options: Any) -> dict[str, Any]:
    """Return a widget as a notebook shows it, and the text that stands for it where it cannot be shown."""
    return widget._repr_mimebundle_(**options) | {"text/plain": f"{name}: run this cell to use it"}


def mean_slider(name: str, options: Sequence, tooltip: str) -> widgets.SelectionSlider:
    """Return a slider over options, preceded by the mean, whose value is ``MEAN``."""
    return number_slider(name, [("mean", MEAN), *options], tooltip)


def number_slider(name: str, options: Sequence, tooltip: str) -> widgets.SelectionSlider:
    """Return a slider over numbers, or pairs of a name and a number."""
    named = [option if isinstance(option, tuple) else (str(option), option) for option in options]
    slider = widgets.SelectionSlider(options=named, value=named[0][1], description=name, tooltip=tooltip)
    lay_out(slider)
    return slider


def step_names(trace) -> list[tuple[str, int]]:
    """Return (name, number) of each step of a trace."""
    return [(f"{step}: t {t:.0f}", step) for step, t in zip(trace.steps, trace.timesteps, strict=True)]


def lay_out(control: widgets.Widget) -> None:
    """Set the width of a control and of its name."""
    control.layout.width, control.style.description_width = "400px", "80px"


def button(name: str, tooltip: str, icon: str = "", style: str = "", width: str = "auto") -> widgets.Button:
    """Return a button; without a width it takes its share of the row."""
    layout = widgets.Layout(width=width, flex="1" if width == "auto" else "none")
    return widgets.Button(description=name, tooltip=tooltip, icon=icon, button_style=style, layout=layout)


def column(parts: Sequence[widgets.Widget], width: str) -> widgets.VBox:
    """Stack widgets in a column of fixed width, or less where there is not so much room."""
    return widgets.VBox(list(parts), layout=widgets.Layout(width=width, max_width="100%", flex="none"))


def row(parts: Sequence[widgets.Widget]) -> widgets.HBox:
    """Place widgets side by side, or below each other where there is no room."""
    return widgets.HBox(list(parts), layout=widgets.Layout(grid_gap="6px 14px", flex_flow="row wrap"))


def side_by_side(parts: Sequence[widgets.Widget], name: str = "pixart-explorer") -> widgets.HBox:
    """Place columns side by side, or below each other in a narrow window, with the style of all widgets."""
    style = widgets.HTML(f"<style>{STYLE}</style>", layout=widgets.Layout(display="none"))
    whole = widgets.HBox([style, *parts], layout=widgets.Layout(flex_flow="row wrap", grid_gap="6px 16px"))
    whole.add_class("pixart-widget")
    whole.add_class(name)
    return whole


def text_line() -> widgets.HTML:
    """Return a line of text that wraps."""
    line = widgets.HTML()
    line.add_class("pixart-say")
    return line


def say(line: widgets.HTML, text: str, wrong: bool = False) -> None:
    """Show a text as it is written; ``wrong`` marks an error."""
    line.value = escape(text)
    (line.add_class if wrong else line.remove_class)("pixart-wrong")


def heat_scale(most: float, image: np.ndarray, label: str, width: int = 400, signed: bool = False) -> str:
    """Return the colour bar of maps over an image from 0 (or, signed, ``-most``) to ``most``."""
    stops = ", ".join(map(to_hex, bar_colours(image, signed)[np.linspace(0, 255, 17).astype(int)]))
    bar = f"flex:1;height:10px;background:linear-gradient(to right, {stops})"
    lowest = f"-{most:.2g}" if signed else "0"
    return (
        f"<div style='display:flex;gap:8px;align-items:center;width:{width}px;max-width:100%;font-size:12px'>"
        f"<span>{lowest}</span><span style='{bar}'></span><span>{most:.2g}</span><span>{escape(label)}</span></div>"
    )


def figure_png(figure: Figure) -> bytes:
    """Return a figure as PNG bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
