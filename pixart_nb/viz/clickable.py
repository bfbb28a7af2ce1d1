"""A picture in a notebook that can be clicked: which of its cells was chosen is a trait that Python observes."""

from __future__ import annotations

from pathlib import Path

import anywidget
import traitlets

STATIC = Path(__file__).parent / "static"


class ClickablePicture(anywidget.AnyWidget):
    """A PNG divided into ``rows`` x ``columns`` cells. ``cell`` is the chosen (row, column), () for none.

    A click chooses a cell; with the keyboard, the arrow keys do. ``label`` is what a screen reader says.
    """

    _esm = STATIC / "clickable.js"
    _css = STATIC / "clickable.css"

    png = traitlets.Bytes().tag(sync=True)
    rows = traitlets.Int(1).tag(sync=True)
    columns = traitlets.Int(1).tag(sync=True)
    cell = traitlets.Tuple().tag(sync=True)
    width = traitlets.Int(400).tag(sync=True)
    label = traitlets.Unicode("picture").tag(sync=True)

    @traitlets.validate("cell")
    def _within(self, proposal: dict) -> tuple[int, ...]:
        cell = tuple(int(place) for place in proposal["value"])
        if cell and not (len(cell) == 2 and 0 <= cell[0] < self.rows and 0 <= cell[1] < self.columns):
            raise traitlets.TraitError(
                f"there is no cell {cell}; rows are 0 to {self.rows - 1}, columns 0 to {self.columns - 1}"
            )
        return cell
