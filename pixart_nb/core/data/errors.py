"""Errors and reports about data sets."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pixart_nb.core.errors import PixArtNBError

#: Problems that the message of an error lists; the others are counted.
SHOWN = 20


class DataError(PixArtNBError):
    """Data that cannot be used; the message names the file, what is wrong with it and what to do."""


class ProblemsError(DataError):
    """Several problems at once. ``problems`` has a sentence for each; the message lists the first ones."""

    def __init__(self, source: str | os.PathLike[str], problems: Sequence[str], shown: int = SHOWN):
        self.problems = list(problems)
        self.heading = f"{source}: {len(self.problems)} problem{'s' * (len(self.problems) > 1)}"
        super().__init__(f"{self.heading}\n{listed(self.problems, shown)}")

    def whole(self) -> str:
        """Return the message with all problems."""
        return f"{self.heading}\n{listed(self.problems, len(self.problems))}"


@dataclass
class ImportReport:
    """Result of an import: files that were written, numbers of images, and what was left out and why."""

    files: list[Path]
    training: int = 0
    testing: int = 0
    left_out: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.training} training images" + f", {self.testing} test images" * bool(self.testing)]
        lines += [f"left out: {count} {reason}" for reason, count in self.left_out.items()]
        lines += [listed(self.problems, len(self.problems))] * bool(self.problems)
        return "\n".join([*lines, *self.notes, *map(str, self.files)])


def listed(problems: Sequence[str], shown: int = SHOWN) -> str:
    """Return problems as indented lines, the first ``shown`` of them, and the number of the others."""
    lines = [f"  {problem}" for problem in problems[:shown]]
    more = len(problems) - shown
    return "\n".join(lines + [f"  and {more} more"] * (more > 0))


def shortened(value: object, longest: int = 80) -> str:
    """Return a value and its type on one printable line, for an error message."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return f"{text if len(text) <= longest else text[:longest] + '...'} ({type(value).__name__})"
