"""Image widget whose cells can be selected."""

from __future__ import annotations

from pathlib import Path

import anywidget
import traitlets

STATIC = Path(__file__).parent / "static"


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
