"""The state of a run in stages on the disk: whole files that say which run they are of, in a folder of one run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.io import (
    CheckpointError,
    load_metadata,
    load_tensors,
    read_json,
    remove_temporaries,
    save_tensors,
    write_errors,
    write_json,
)

try:
    import fcntl
except ImportError:  # not on Windows, where nothing then guards a folder
    fcntl = None

RUN, MEASURED = "run.json", "stages.json"


class StageFiles:
    """The files of one run: ``run.json`` says what it is, ``NAME.safetensors`` hold what its stages have done.

    ``identity`` is all that the run's numbers depend on, as JSON holds it. Every file carries its fingerprint.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any]):
        self.folder = Path(folder)
        self.identity = json.loads(json.dumps(dict(identity)))
        self.fingerprint = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def of(cls, folder: str | os.PathLike[str]) -> StageFiles:
        """The files of a run that was begun; ``CheckpointError`` where there is none."""
        path = Path(folder) / RUN
        if not path.is_file():
            raise CheckpointError(
                f"{folder} holds no run in stages; expected its {RUN}, so draw it there first"
            )
        return cls(folder, read_json(path))

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Have the folder for this process alone.

        Raises ``CheckpointError`` if it is of another run, naming what differs, or in use; ``WriteError`` if it cannot
        be written.
        """
        with write_errors(self.folder / RUN):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("a+")
        with lock:
            if fcntl is not None:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise CheckpointError(
                        f"another process is drawing in {self.folder}; wait for it, or choose another folder"
                    ) from error
            self._claim()
            remove_temporaries(self.folder)
            yield

    def _claim(self) -> None:
        path = self.folder / RUN
        if not path.is_file():
            write_json(path, self.identity)
            return
        known = read_json(path)
        differences = [
            f"{key}: {known.get(key, 'nothing')!r} there, {self.identity.get(key, 'nothing')!r} now"
            for key in sorted({*known, *self.identity})
            if known.get(key) != self.identity.get(key)
        ]
        if differences:
            raise CheckpointError(
                f"{self.folder} is of another run ({'; '.join(differences)}). Give what it was begun with to go on, or "
                "another folder to begin anew."
            )

    def path(self, name: str) -> Path:
        """Where a part lies."""
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether a part is there."""
        return self.path(name).is_file()

    def save(self, name: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Write a part whole; ``WriteError`` if that fails, and what was there before stays."""
        path = self.path(name)
        save_tensors(path, tensors, {"run": self.fingerprint})

    def load(self, name: str) -> dict[str, np.ndarray]:
        """Read a part; one that is damaged or of another run is a ``CheckpointError`` that says what to do."""
        path = self.path(name)
        found = load_metadata(path).get("run")
        if found != self.fingerprint:
            raise CheckpointError(
                f"{path} is of another run ({found or 'it does not say which'}, this one is {self.fingerprint}); "
                "remove the file and its work is done again"
            )
        return load_tensors(path)

    def remove(self, pattern: str) -> None:
        """Remove the parts whose names fit a pattern (``rows-*``)."""
        for path in self.folder.glob(f"{pattern}.safetensors"):
            path.unlink()

    def measured(self) -> dict[str, dict[str, float]]:
        """By stage: ``seconds`` of work and ``load_seconds``, of all sessions, and ``peak_bytes``, the most of any."""
        path = self.folder / MEASURED
        return read_json(path) if path.is_file() else {}

    def add_measured(self, stage: str, peak_bytes: int, **seconds: float) -> None:
        """Add what a stage, or a part of it, took: ``seconds`` or ``load_seconds``, and memory."""
        known = self.measured()
        found = known.setdefault(stage, {"seconds": 0.0, "load_seconds": 0.0, "peak_bytes": 0})
        for name, value in seconds.items():
            found[name] += value
        found["peak_bytes"] = max(found["peak_bytes"], peak_bytes)
        write_json(self.folder / MEASURED, known)
