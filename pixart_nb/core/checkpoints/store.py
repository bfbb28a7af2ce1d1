"""Files that are whole or not there: everything is written beside its place, synced, and renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit what it was read for."""


@contextmanager
def written_beside(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it replaces ``path``, on any error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def save_tensors(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file whole."""
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    with written_beside(path) as temporary:
        save_file(contiguous, temporary, dict(metadata or {}))


def load_tensors(path: str | Path, keep: Callable[[str], bool] = lambda name: True) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file whose names ``keep`` accepts; a damaged file is a ``CheckpointError``."""
    with _opened(path) as content:
        return {name: content.get_tensor(name) for name in content.keys() if keep(name)}  # noqa: SIM118


def load_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of a safetensors file."""
    with _opened(path) as content:
        return dict(content.metadata() or {})


@contextmanager
def _opened(path: str | Path):
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
