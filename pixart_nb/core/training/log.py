"""Training log: ``curve.csv``, and the same values for TensorBoard."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pixart_nb.config import ConfigError
from pixart_nb.core.io import write_text


def read_curve(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Return the rows of a log such as ``curve.csv``, in order; none if the file does not exist."""
    path = Path(path)
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as handle:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(handle)]
    return [row | {"step": int(row["step"])} for row in rows]


class CurveLog:
    """Rows of values by step in a CSV file; steps that are repeated after an interruption appear once."""

    def __init__(self, folder: str | Path, step: int = 0, tensorboard: bool = False, name: str = "curve.csv"):
        """Open the log of ``folder`` and drop the rows after ``step``, from where the training resumes.

        A row that a killed process left incomplete is dropped too. Raises ``ConfigError`` for a file that no training
        wrote, or that another program wrote anew.
        """
        self.path, self._board = Path(folder) / name, None
        if self.path.exists():
            header, *rows = self.path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
            whole = [row for row in rows if row.endswith("\n")]
            if header.endswith("\n"):
                own = header.split(",")[0].strip() == "step" and all(row.split(",")[0].isdecimal() for row in whole)
            else:  # cut off, as by a killed process
                own = header.startswith("step,"[: len(header)])
            if not own:
                raise ConfigError(
                    f"{self.path} is no log of a training, or was saved by another program: it begins with "
                    f"{header.strip()[:40]!r}. Move it, or choose another output_path"
                )
            kept = [row for row in whole if int(row.split(",", 1)[0]) <= step]
            if header.endswith("\n"):
                write_text(self.path, "".join([header, *kept]))
            else:
                self.path.unlink()
        if tensorboard:
            from pixart_nb.core.training.event_file import EventFile  # only trainings that ask for it need it

            suffix = f".{step}.{os.getpid()}"  # sessions within one second differ
            self._board = EventFile(Path(folder) / "tensorboard", step, suffix)

    def write(self, row: Mapping[str, float]) -> None:
        """Append a row; the columns are those of the first row of the file."""
        columns, fresh = list(row), not self.path.exists()
        if not fresh:
            with self.path.open(newline="", encoding="utf-8") as handle:
                columns = next(csv.reader(handle))
        with self.path.open("a", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, columns, extrasaction="ignore", lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow(row)
        for name, value in row.items():
            if name != "step":
                self.scalar(row["step"], name, value)

    def scalar(self, step: int, name: str, value: float) -> None:
        """Write a value for TensorBoard only."""
        if self._board is not None:
            self._board.scalar(step, name, value)

    def images(self, step: int, prompts: Sequence[str], images: np.ndarray) -> None:
        """Write validation images (N, H, W, 3) uint8 for TensorBoard."""
        if self._board is not None:
            for prompt, image in zip(prompts, images, strict=True):
                self._board.image(step, prompt, image)

    def sync(self) -> None:
        """Write everything to disk, so that a checkpoint never counts steps that the log has lost."""
        if self._board is not None:
            self._board.flush()
        if self.path.exists():
            with self.path.open("rb") as handle:
                os.fsync(handle.fileno())

    def close(self) -> None:
        """Close the files."""
        if self._board is not None:
            self._board.close()
