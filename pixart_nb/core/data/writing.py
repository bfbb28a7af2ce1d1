"""Data sets and caches on the disk: whole or not there, what became of them, and what a killed process left."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from safetensors import SafetensorError

from pixart_nb.core.data.errors import DataError, listed

_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")
#: What safetensors writes first, in the folder of its target. It does not name its writer.
_SAFETENSORS = re.compile(r"\.tmp\w{6}")


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove the unfinished files of processes that were killed while they wrote into ``folder``."""
    for path in folder.glob(".*"):
        writer = _TEMPORARY.fullmatch(path.name)
        if not writer and not _SAFETENSORS.fullmatch(path.name):
            continue
        alive = psutil.pid_exists(int(writer[1])) if writer else _is_open(path)
        if not alive:
            with suppress(OSError):
                path.unlink()


def _is_open(path: Path) -> bool:
    """Whether a process has the file open."""
    place = str(path.resolve())
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(file.path == place for file in process.open_files()):
                return True
    return False


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
