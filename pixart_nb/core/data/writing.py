"""Report of a data set that was imported."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pixart_nb.core.data.errors import listed


@dataclass
class Report:
    """What became of a data set that was brought in: what was written, and what was left out and why."""

    files: list[Path]
    training: int = 0
    testing: int = 0
    left_out: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        counted = f"{self.training} pictures to train on"
        lines = [counted + f", {self.testing} to test on" * bool(self.testing)]
        lines += [f"left out: {count} {reason}" for reason, count in self.left_out.items()]
        lines += [listed(self.problems, len(self.problems))] * bool(self.problems)
        return "\n".join([*lines, *self.notes, *map(str, self.files)])
