"""Parts of the widgets: an image with cells to select, sliders with a mean, lines of text, a colour bar, layout."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets
from matplotlib import colormaps
from matplotlib.colors import to_hex
from PIL import Image

from pixart_nb.viz.style import HEAT, Figure

STATIC = Path(__file__).parent / "static"
STYLE = """<style>
.pixart-explorer .pixart-say .widget-html-content { line-height: 1.4; overflow-wrap: anywhere; }
.pixart-explorer .pixart-wrong .widget-html-content { color: var(--jp-error-color1, #b71c1c); font-weight: 600; }
.pixart-explorer .widget-toggle-buttons { flex-flow: row wrap; }
.pixart-explorer .widget-toggle-button { width: auto; }
.pixart-explorer .pixart-crisp img { image-rendering: pixelated; }
.pixart-explorer table { border-collapse: collapse; font-size: 12px; line-height: 1.5; }
.pixart-explorer td, .pixart-explorer th { padding: 1px 10px 1px 0; text-align: right; }
</style>"""
#: Value of a slider that stands for the mean.
MEAN = -1


class ClickableImage(anywidget.AnyWidget):
    """PNG divided into ``rows`` x ``columns`` cells. ``cell`` is the selected (row, column), or () for none.

    A click or the arrow keys select a cell. ``label`` is read by screen readers.
    """

    _esm = STATIC / "clickable.js"
    _css = STATIC / "clickable.css"

    png = traitlets.Bytes().tag(sync=True)
    rows = traitlets.Int(1).tag(sync=True)
    columns = traitlets.Int(1).tag(sync=True)
    cell = traitlets.Tuple().tag(sync=True)
    width = traitlets.Int(400).tag(sync=True)
    label = traitlets.Unicode("image").tag(sync=True)

    @traitlets.validate("cell")
    def _within(self, proposal: dict) -> tuple[int, ...]:
        cell = tuple(int(index) for index in proposal["value"])
        if cell and not (len(cell) == 2 and 0 <= cell[0] < self.rows and 0 <= cell[1] < self.columns):
            raise traitlets.TraitError(
                f"there is no cell {cell}; rows are 0 to {self.rows - 1}, columns 0 to {self.columns - 1}"
            )
        return cell


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


def png_bytes(pixels: np.ndarray, most: int | None = None) -> bytes:
    """Return a PNG of pixels (H, W, 3 or 4) uint8, reduced until no side has more than ``most`` pixels."""
    image = Image.fromarray(pixels)
    if most is not None:
        image.thumbnail((most, most))
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def tiles(images: np.ndarray) -> np.ndarray:
    """Tile images (N, H, W, 3) uint8 with transparent gaps, in about as many rows as columns: (h, w, 4) uint8."""
    count, height, width, _ = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    gap = 0 if count == 1 else max(height, width) // 32
    sheet = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        sheet[top : top + height, left : left + width, :3] = image
        sheet[top : top + height, left : left + width, 3] = 255
    return sheet
