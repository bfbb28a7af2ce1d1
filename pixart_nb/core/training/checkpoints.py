"""Training states on disk: written whole, verified by checksums, the newest few kept."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from pixart_nb.core.errors import differences
from pixart_nb.core.io import CheckpointError, load_metadata, load_tensors, save_tensors

#: What the identity in states of earlier versions lacks.
_LATER = ("images", "conditions")
_NAME = re.compile(r"step-(\d{8,})\.safetensors")


@dataclass(frozen=True)
class TrainingState:
    """Tensors of a training state by name, and its metadata."""

    path: Path
    step: int
    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


class CheckpointFolder:
    """States of one training, ``step-00000250.safetensors``, in one folder."""

    def __init__(self, folder: str | Path, keep: int):
        self.folder, self.keep = Path(folder), keep
        self._whole: dict[Path, tuple[int, int]] = {}  # size and time of change when a state was verified

    def paths(self) -> list[Path]:
        """Return the states in the folder, oldest first. Files of other names, such as copies, are no states."""
        states = (path for path in self.folder.glob("step-*.safetensors") if _NAME.fullmatch(path.name))
        return sorted(states, key=_step)

    def path(self, step: int) -> Path:
        """Return the path of the state of a step."""
        return self.folder / f"step-{step:08d}.safetensors"

    def save(self, step: int, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> Path:
        """Write a state with checksums; then remove the states older than the newest ``keep`` whole ones.

        Raises ``WriteError`` if it cannot be written; the older states are kept then.
        """
        path, metadata = self.path(step), {"step": str(step), **metadata}
        save_tensors(path, tensors, {**metadata, "checksum": _crc(metadata)})
        self._whole[path] = _version(path)
        self.remove_old(path)
        return path

    def remove_old(self, newest: Path) -> None:
        """Remove the states older than the newest ``keep`` whole ones, of which ``newest`` is the first."""
        older = [other for other in reversed(self.paths()) if _step(other) < _step(newest)]
        if len(older) < self.keep:
            return  # nothing to read
        kept = 1
        for path in older:
            if kept >= self.keep:
                path.unlink(missing_ok=True)
            elif self._whole.get(path) == _version(path) or self._read(path):
                kept += 1  # damaged ones do not count

    def check_identity(self, identity: Mapping[str, Any]) -> None:
        """Refuse to resume a training with other settings, data or networks. Reads the newest metadata alone."""
        for path in reversed(self.paths()):
            try:
                metadata = load_metadata(path)
            except CheckpointError:  # damaged; ``newest`` skips it too
                continue
            return check_identity(path, metadata, identity)

    def newest(self) -> TrainingState | None:
        """Return the newest state that is whole, or None; print a line for each damaged one that is skipped."""
        return next(filter(None, (self._read(path) for path in reversed(self.paths()))), None)

    def _read(self, path: Path) -> TrainingState | None:
        try:
            state = read_state(path)
        except CheckpointError as error:
            tqdm.write(f"skipped: {error}")
            return None
        self._whole[path] = _version(path)
        return state


def _step(path: Path) -> int:
    return int(_NAME.fullmatch(path.name)[1])


def _crc(metadata: Mapping[str, str]) -> str:
    return f"{zlib.crc32(json.dumps(dict(metadata), sort_keys=True).encode()):08x}"


def _version(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def read_state(path: str | Path) -> TrainingState:
    """Read and verify a training state. Raises ``CheckpointError`` if it is damaged or no training state."""
    path = Path(path)
    metadata = load_metadata(path)
    try:
        step = int(metadata["step"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no training state: its metadata names no step") from error
    checksum = metadata.pop("checksum", None)
    if checksum is not None and checksum != _crc(metadata):
        raise CheckpointError(f"{path} is damaged: its metadata is not what was written")
    return TrainingState(path, step, load_tensors(path), metadata)


def check_fits(
    state: TrainingState, shapes: Mapping[str, tuple[int, ...]], groups: Sequence[str], identity: Mapping[str, Any]
) -> None:
    """Refuse the state of another model (shapes of the parameters in each group), or of another ``identity``."""
    missing = [key for group in groups for name in shapes if (key := f"{group}/{name}") not in state.tensors]
    if missing:
        raise CheckpointError(f"{state.path} is of another model: it lacks {missing[:3]} ({len(missing)} in all)")
    for name, shape in shapes.items():
        actual = state.tensors[f"model/{name}"].shape
        if actual != shape:
            raise CheckpointError(f"{state.path} is of another model: {name} is {actual}, expected {shape}")
    check_identity(state.path, state.metadata, identity)


def check_identity(path: Path, metadata: Mapping[str, str], identity: Mapping[str, Any]) -> None:
    """Refuse the state of a training with other settings, data or networks."""
    before, now = json.loads(metadata.get("identity", "{}")), json.loads(json.dumps(identity))
    now = {key: value for key, value in now.items() if key in before or key not in _LATER}
    if before and now and (other := differences(before, now)):
        raise CheckpointError(
            f"{path} is of a run with another configuration: {other}. Use the same configuration, or another "
            "output folder"
        )
