"""What is wrong with data, said once and whole."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pixart_nb.core.errors import PixArtNBError

#: Problems that an error names; the others are counted.
SHOWN = 20


class DataError(PixArtNBError):
    """Data that cannot be used; the message names the file, what is wrong with it and what to do."""


class ProblemsError(DataError):
    """Several things are wrong. ``problems`` has a sentence for each; the message counts them and names the first."""

    def __init__(self, source: str | os.PathLike[str], problems: Sequence[str], shown: int = SHOWN):
        self.problems = list(problems)
        self.heading = f"{source}: {len(self.problems)} problem{'s' * (len(self.problems) > 1)}"
        super().__init__(f"{self.heading}\n{listed(self.problems, shown)}")

    def whole(self) -> str:
        """The message with every problem, however many."""
        return f"{self.heading}\n{listed(self.problems, len(self.problems))}"


def listed(problems: Sequence[str], shown: int = SHOWN) -> str:
    """Problems as lines of text; of a long list the first, and how many more there are."""
    lines = [f"  {problem}" for problem in problems[:shown]]
    more = len(problems) - shown
    return "\n".join(lines + [f"  and {more} more"] * (more > 0))


def shortened(value: object, most: int = 80) -> str:
    """A value as an error may show it, on one line."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return f"{text if len(text) <= most else text[:most] + '...'} ({type(value).__name__})"
