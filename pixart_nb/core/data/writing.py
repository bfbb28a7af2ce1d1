"""Data sets and caches on the disk: whole or not there, and what became of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError

from pixart_nb.core.data.errors import DataError, listed
from pixart_nb.core.io import temporary_beside


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """A disk that is full, or a place that may not be written, becomes a ``DataError`` that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"{path} could not be written ({reason}). Nothing half-written was left, and what was whole before stays: "
            "free space or choose another place, and give the same command again."
        ) from error


def write_once(path: Path, content: bytes) -> None:
    """Write a file whole, unless it is there with this content.

    It is not synced: for thousands of small files that takes minutes. Sync before anything relies on them.
    """
    if path.is_file() and path.read_bytes() == content:
        return
    temporary = temporary_beside(path)
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


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
