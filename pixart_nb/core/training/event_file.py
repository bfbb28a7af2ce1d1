"""Event file for TensorBoard, written by the training itself: a full disk is an error, not a dead thread."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog


class EventFile:
    """Scalars and images by step. TensorBoard hides those of other files of the folder after ``step``."""

    def __init__(self, folder: Path, step: int, suffix: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), suffix)
        self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, step: int, name: str, value: float) -> None:
        """Write a value."""
        self._add(step, summary=summary.scalar(name, value))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write an image (H, W, 3) uint8."""
        self._add(step, summary=summary.image(name, image, dataformats="HWC"))

    def flush(self) -> None:
        """Write everything to disk."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.write_event(Event(step=step, wall_time=time.time(), **content))
