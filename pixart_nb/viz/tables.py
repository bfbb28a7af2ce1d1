"""Tables that a notebook shows as HTML and that print as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from pixart_nb.core.errors import PixArtNBError


class Table:
    """Rows of values under named columns, with a caption. A column name should give the unit.

    >>> print(Table([{"ratio": 2, "keys": 16384}, {"ratio": 4, "keys": 4096}], "At 4K"))
    At 4K
    ratio   keys
        2 16,384
        4  4,096
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], caption: str = "", columns: Sequence[str] | None = None):
        self.rows = [dict(row) for row in rows]
        self.caption = caption
        self.columns = list(columns or dict.fromkeys(name for row in self.rows for name in row))
        unknown = [name for row in self.rows for name in row if name not in self.columns]
        if columns is not None and unknown and not any(set(self.columns) & set(row) for row in self.rows):
            raise PixArtNBError(f"no row has any of the columns {self.columns}; there are {unknown}")

    def cells(self) -> list[list[str]]:
        """Return the rows as text."""
        return [[in_words(row.get(name)) for name in self.columns] for row in self.rows]

    def __repr__(self) -> str:
        lines = [self.columns, *self.cells()]
        widths = [max(len(line[index]) for line in lines) for index in range(len(self.columns))]
        texts = [" ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([self.caption, *texts] if self.caption else texts)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        body = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in line) + "</tr>" for line in self.cells())
        caption = f"<caption style='text-align:left'>{escape(self.caption)}</caption>" if self.caption else ""
        ignored = "mathjax_ignore tex2jax_ignore"  # a $ in a caption does not start mathematics
        return f"<table class='{ignored}'>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def in_words(value: Any) -> str:
    """Format a value with at most four significant digits and separated thousands; None gives an empty text.

    >>> [in_words(value) for value in (None, 65536, 0.018234, 1234567.8, 2.5e13, "conv", True)]
    ['', '65,536', '0.01823', '1,234,568', '2.50e+13', 'conv', 'yes']
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) or (isinstance(value, int) and abs(value) >= 1e9):
        if value and not 1e-3 <= abs(value) < 1e9:
            return f"{value:.2e}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
