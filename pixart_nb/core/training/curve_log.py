"""The log of a training: ``curve.csv``, and the same numbers for TensorBoard."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pixart_nb.core.io import write_text


def read_curve(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a log such as ``curve.csv``, in order; none if it is not there yet."""
    path = Path(path)
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as handle:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(handle)]
    return [row | {"step": int(row["step"])} for row in rows]


class CurveLog:
    """Rows of numbers by step. Steps that are done again after an interruption stand in it once."""

    def __init__(self, folder: str | Path, step: int = 0, tensorboard: bool = False, name: str = "curve.csv"):
        """Open the log of ``folder``; rows after ``step``, where the training goes on, are dropped."""
        self.path = Path(folder) / name
        self._trim(step)
        self._board = _Board(Path(folder) / "tensorboard", step) if tensorboard else None

    def _trim(self, step: int) -> None:
        if not self.path.exists():
            return
        header, *rows = self.path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
        whole = [row for row in rows if row.endswith("\n")]  # a killed process may have left half a row
        kept = [row for row in whole if int(row.split(",", 1)[0]) <= step]
        if header.endswith("\n"):
            write_text(self.path, "".join([header, *kept]))
        else:
            self.path.unlink()

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row; the columns are those that the file began with."""
        fresh = not self.path.exists()
        columns = list(row) if fresh else self._columns()
        with self.path.open("a", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, columns, extrasaction="ignore")
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        if self._board is not None:
            for name, value in row.items():
                if name != "step":
                    self._board.number(row["step"], name, value)

    def _columns(self) -> list[str]:
        with self.path.open(newline="", encoding="utf-8") as handle:
            return next(csv.reader(handle))

    def number(self, step: int, name: str, value: float) -> None:
        """Show a number that is not in every row in TensorBoard."""
        if self._board is not None:
            self._board.number(step, name, value)

    def pictures(self, step: int, prompts: Sequence[str], pictures: np.ndarray) -> None:
        """Show validation pictures (N, H, W, 3) uint8 in TensorBoard."""
        if self._board is not None:
            for prompt, picture in zip(prompts, pictures, strict=True):
                self._board.picture(step, prompt, picture)

    def sync(self) -> None:
        """Bring everything onto the disk: what a checkpoint counts as done must not be lost from the log."""
        if self._board is not None:
            self._board.flush()
        if self.path.exists():
            with self.path.open("rb") as handle:
                os.fsync(handle.fileno())


class _Board:
    """TensorBoard's events. Written at once: a queue would lose, with its process, what a checkpoint counts as done."""

    def __init__(self, folder: Path, step: int):
        from tensorboardX.event_file_writer import (
            EventsWriter,
        )  # here: only trainings that ask for it need it
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._event = Event
        # without the suffix, a run that goes on within the same second would write over the file of the first
        self._file = EventsWriter(str(folder / "events"), f".{step}.{os.getpid()}")
        # a start at a step hides what older files say of it and of later ones
        self._write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def _write(self, step: int, **what) -> None:
        self._file.write_event(self._event(step=step, wall_time=time.time(), **what))

    def number(self, step: int, name: str, value: float) -> None:
        """Tell a number."""
        from tensorboardX.summary import scalar

        self._write(step, summary=scalar(name, value))

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """Show a picture (H, W, 3) uint8."""
        from tensorboardX.summary import image

        self._write(step, summary=image(name, pixels, dataformats="HWC"))

    def flush(self) -> None:
        """Hand everything to the operating system."""
        self._file.flush()
