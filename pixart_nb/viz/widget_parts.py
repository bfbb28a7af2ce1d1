"""Parts of the explorers: sliders with a mean, lines of text, a colour bar, layout."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape

import ipywidgets as widgets
import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from pixart_nb.viz.style import HEAT, Figure

STYLE = """<style>
.pixart-explorer .pixart-say .widget-html-content { line-height: 1.4; overflow-wrap: anywhere; }
.pixart-explorer .pixart-wrong .widget-html-content { color: var(--jp-error-color1, #b71c1c); font-weight: 600; }
.pixart-explorer .widget-toggle-buttons { flex-flow: row wrap; }
.pixart-explorer .widget-toggle-button { width: auto; }
.pixart-explorer .pixart-crisp img { image-rendering: pixelated; }
.pixart-explorer table { border-collapse: collapse; font-size: 12px; line-height: 1.5; }
.pixart-explorer td, .pixart-explorer th { padding: 1px 10px 1px 0; text-align: right; }
</style>"""
#: The value of a slider that stands for the mean.
MEAN = -1


def mean_slider(name: str, options: Sequence, tooltip: str) -> widgets.SelectionSlider:
    """Return a slider over options, preceded by the mean, whose value is ``MEAN``."""
    named = [option if isinstance(option, tuple) else (str(option), option) for option in options]
    slider = widgets.SelectionSlider(options=[("mean", MEAN), *named], value=MEAN, description=name, tooltip=tooltip)
    lay_out(slider)
    return slider


def lay_out(control: widgets.Widget) -> None:
    """Set the width of a control and of its name."""
    control.layout.width, control.style.description_width = "400px", "80px"


def side_by_side(parts: Sequence[widgets.Widget]) -> widgets.HBox:
    """Place columns side by side, or below each other in a narrow window."""
    style = widgets.HTML(STYLE, layout=widgets.Layout(display="none"))
    whole = widgets.HBox([style, *parts], layout=widgets.Layout(flex_flow="row wrap", grid_gap="16px"))
    whole.add_class("pixart-explorer")
    return whole


def text_line() -> widgets.HTML:
    """Return a line of text that wraps."""
    line = widgets.HTML()
    line.add_class("pixart-say")
    return line


def say(line: widgets.HTML, text: str, wrong: bool = False) -> None:
    """Show a text; ``wrong`` marks an error."""
    line.value = escape(text)
    (line.add_class if wrong else line.remove_class)("pixart-wrong")


def heat_scale(most: float) -> str:
    """Return a colour bar from 0 to ``most``."""
    stops = ", ".join(to_hex(colormaps[HEAT](share)) for share in np.linspace(0, 1, 9))
    bar = f"flex:1;height:10px;background:linear-gradient(to right, {stops})"
    return (
        "<div style='display:flex;gap:8px;align-items:center;width:400px;font-size:12px'>"
        f"<span>0</span><span style='{bar}'></span><span>{most:.3f}</span><span>share of attention</span></div>"
    )


def figure_png(figure: Figure) -> bytes:
    """Return a figure as PNG bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()
