"""Training states on the disk: whole, verified, the newest few kept; one training at a time in a folder."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from tqdm.auto import tqdm

from pixart_nb.core.io import (
    CheckpointError,
    load_metadata,
    load_tensors,
    remove_temporaries,
    save_tensors,
)

try:
    import fcntl
except ImportError:  # not on Windows, where nothing then guards a folder
    fcntl = None

_PATTERN = "step-*.safetensors"


@dataclass(frozen=True)
class State:
    """A training state: its tensors by name, and what was said of it."""

    path: Path
    step: int
    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


class CheckpointFolder:
    """The states of one training, ``step-00000250.safetensors``, in one folder."""

    def __init__(self, folder: str | Path, keep: int):
        self.folder, self.keep = Path(folder), keep

    def paths(self) -> list[Path]:
        """The states in the folder, oldest first."""
        return sorted(self.folder.glob(_PATTERN))

    def path(self, step: int) -> Path:
        """Where the state of a step is, or will be."""
        return self.folder / f"step-{step:08d}.safetensors"

    def save(self, step: int, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> Path:
        """Write a state whole, with a checksum of every tensor; then remove all but the newest ``keep``.

        Raises ``CheckpointError`` if it cannot be written; the older states are then still there.
        """
        path = self.path(step)
        told = {"step": str(step), **metadata}
        sums = {name: checksum(value) for name, value in tensors.items()} | {"": _words(told)}
        told["checksums"] = json.dumps(sums)
        try:
            save_tensors(path, tensors, told)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(self._unwritten(path, tensors, error)) from error
        for old in self.paths()[: -self.keep]:
            old.unlink()
        return path

    def _unwritten(self, path: Path, tensors: Mapping[str, np.ndarray], error: Exception) -> str:
        needed = sum(value.nbytes for value in tensors.values()) / 1e9
        free = shutil.disk_usage(self.folder).free / 1e9
        older = self.paths()
        left = f"The newest whole one is {older[-1].name}" if older else "There is none yet"
        return (
            f"{path} could not be written ({error}); it needs {needed:.2f} GB, and {free:.2f} GB are free in "
            f"{self.folder}. {left}. Free space and run the same command to go on."
        )

    def newest(self) -> State | None:
        """The newest state that is whole; one that is damaged is passed over, and said so. None without any."""
        for path in reversed(self.paths()):
            try:
                return read_state(path)
            except CheckpointError as error:
                tqdm.write(f"passed over: {error}")
        return None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Refuse to train where another process is training; the lock goes with its process, however it ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("a+") as handle:
            if fcntl is not None:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    handle.seek(0)
                    raise CheckpointError(
                        f"process {handle.read().strip() or '?'} is training in {self.folder}; stop it, or choose "
                        "another folder"
                    ) from error
            handle.truncate(0)
            handle.write(str(os.getpid()))
            handle.flush()
            remove_temporaries(self.folder)
            yield


def checksum(value: np.ndarray) -> int:
    """CRC-32 of a tensor: its kind, its shape, and its bytes."""
    start = zlib.crc32(f"{value.dtype} {value.shape}".encode())
    return zlib.crc32(np.ascontiguousarray(value).reshape(-1).view(np.uint8), start)


def _words(metadata: Mapping[str, str]) -> int:
    """CRC-32 of what is said of a state."""
    return zlib.crc32(json.dumps(dict(metadata), sort_keys=True).encode())


def read_state(path: str | Path) -> State:
    """Read a training state and verify it; one that is damaged, or no training state, is a ``CheckpointError``.

    Those of the first version of this kit have no checksums; of them only the structure is verified.
    """
    path = Path(path)
    metadata, tensors = load_metadata(path), load_tensors(path)
    try:
        sums = json.loads(metadata.pop("checksums", "{}"))
        step = int(metadata["step"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is no training state: its step or checksums are missing") from error
    found = {name: checksum(value) for name, value in tensors.items()} | {"": _words(metadata)}
    wrong = sorted(name for name in {*found, *sums} if found.get(name) != sums.get(name))
    if sums and wrong:
        raise CheckpointError(
            f"{path} is damaged: {wrong[0] or 'its description'} is not what was written ({len(wrong)} in all)"
        )
    return State(path, step, tensors, metadata)


def check_fits(
    state: State, shapes: Mapping[str, tuple[int, ...]], groups: Sequence[str], identity: Mapping[str, Any]
) -> None:
    """Refuse the state of another model (parameters by name, in each group), or of a run with another identity."""
    missing = [key for group in groups for name in shapes if (key := f"{group}/{name}") not in state.tensors]
    if missing:
        raise CheckpointError(
            f"{state.path} is of another model: it lacks {missing[:3]} ({len(missing)} in all)"
        )
    for name, shape in shapes.items():
        found = state.tensors[f"model/{name}"].shape
        if found != shape:
            raise CheckpointError(f"{state.path} is of another model: {name} is {found}, here {shape}")
    differences = _differences(
        json.loads(state.metadata.get("identity", "{}")), json.loads(json.dumps(identity))
    )
    if differences:
        raise CheckpointError(
            f"{state.path} is of a run with another configuration: {'; '.join(differences)}. Take the same, or another "
            "output folder"
        )


def _differences(known: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, if both are known."""
    if not known or not now:
        return []
    return [
        f"{key}: {known.get(key, 'nothing')!r} there, {now.get(key, 'nothing')!r} here"
        for key in sorted({*known, *now})
        if known.get(key) != now.get(key)
    ]
