"""Files that are whole or not there: everything is written beside its place, synced, and renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pixart_nb.core.errors import PixArtNBError

_TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")


class CheckpointError(PixArtNBError):
    """A checkpoint that cannot be read, or does not fit what it was read for."""


@contextmanager
def written_beside(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path on the same disk; on success it replaces ``path``, on any error it is removed."""
    with written_together(path) as (temporary,):
        yield temporary


@contextmanager
def written_together(*paths: str | Path) -> Iterator[tuple[Path, ...]]:
    """Yield a temporary path for each of ``paths``, to be written whole.

    Each has its name, and is in a folder of its own beside its place: a writer that makes temporary files itself, as
    safetensors does, makes them there. On success all are put in place, once all are on the disk. On any error all are
    removed, and the folders that were made for them.
    """
    targets = [Path(path) for path in paths]
    temporaries = tuple(temporary_beside(path) / path.name for path in targets)
    made: list[Path] = []
    try:
        for path, temporary in zip(targets, temporaries, strict=True):
            made += _make_folders(path.parent)
            temporary.parent.mkdir(exist_ok=True)
        yield temporaries
        for temporary in temporaries:
            _sync(temporary)
        for temporary, path in zip(temporaries, targets, strict=True):
            os.replace(temporary, path)
        for folder in {path.parent for path in targets}:
            _sync(folder)
    finally:
        for temporary in temporaries:
            shutil.rmtree(temporary.parent, ignore_errors=True)
        for folder in reversed(made):
            with suppress(OSError):  # it holds what was written
                folder.rmdir()


def temporary_beside(path: Path) -> Path:
    """Where this process writes what is to replace ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def temporaries_in(folder: Path) -> list[Path]:
    """What is being written into ``folder``, or was when its process died."""
    return [path for path in folder.glob(".*.tmp") if _TEMPORARY.fullmatch(path.name)]


def remove_temporaries(folder: Path, alone: bool = False) -> None:
    """Remove what processes that were killed while they wrote into ``folder`` have left.

    ``alone``: no process is writing there, so that an id in use is of another that has nothing to do with it.
    """
    for path in temporaries_in(folder):
        if not alone and psutil.pid_exists(int(_TEMPORARY.fullmatch(path.name)[1])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; the ones that were not there before, the outer first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole."""
    with written_beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content) -> None:
    """Write a JSON file whole, readable by people."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | Path) -> dict:
    """Read a JSON file; one that is missing or damaged is a ``CheckpointError`` that names it."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected a JSON file there")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # damaged, not UTF-8, or nested without end
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected an object, {{...}}")
    return content


def save_tensors(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whole."""
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    with written_beside(path) as temporary:
        save_file(contiguous, temporary, dict(metadata or {}))


def load_tensors(path: str | Path, keep: Callable[[str], bool] = lambda name: True) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file whose names ``keep`` accepts; a damaged file is a ``CheckpointError``."""
    with opened(path) as content:
        return {name: content.get_tensor(name) for name in content.keys() if keep(name)}  # noqa: SIM118


def load_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of a safetensors file."""
    with opened(path) as content:
        return dict(content.metadata() or {})


@contextmanager
def opened(path: str | Path):
    """A safetensors file, its header checked by the library; a damaged one is a ``CheckpointError``."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected a safetensors file there")
    try:
        with safe_open(path, framework="numpy") as content:
            yield content
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated or no safetensors file: {error}. "
            "Download or copy it again."
        ) from error
