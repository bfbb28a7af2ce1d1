"""Result folder of a training: a complete pipeline in the diffusers layout, or a LoRA."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pixart_nb.config import ConfigError
from pixart_nb.core.io import copy_file, ensure_writable, read_json, remove_temporaries, write_json

#: File that says which training wrote a result folder.
MARK = "training.json"


def check_result(folder: Path, sources: Iterable[Path]) -> None:
    """Refuse to write a result over files that no training wrote, or over the model that is trained.

    Raises ``ConfigError``.
    """
    for source in sources:
        if source.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{source} lies in {folder}, where the result of this training is written; choose another output_path"
            )
    files = [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    if folder.is_symlink() or (files and not (folder / MARK).is_file()):
        raise ConfigError(
            f"{folder} exists and was not written by this version of `pixart-nb train`, which would write its result "
            "there; move it, or choose another output_path"
        )


def check_folder(folder: Path) -> None:
    """Refuse to train in a folder that cannot be written, or whose ``config.json`` is not that of a training.

    Raises ``WriteError`` or ``ConfigError``.
    """
    path = ensure_writable(folder) / "config.json"
    if path.is_file() and "output_path" not in read_json(path):
        raise ConfigError(
            f"{path} was not written by `pixart-nb train`, which would write its own there; choose another output_path"
        )


def write_result(folder: Path, mark: Mapping[str, Any], write: Callable[[Path], None]) -> Path:
    """Write a result with ``write(folder)``, unless the folder holds the complete result of the same training.

    Nothing is removed; ``mark`` says what was trained.
    """
    path = folder / MARK
    if path.is_file() and read_json(path) == {"complete": True, **mark}:
        return folder
    check_result(folder, ())
    write_json(path, {"complete": False, **mark})
    for part in (folder, *filter(Path.is_dir, folder.iterdir())):
        remove_temporaries(part)
    write(folder)
    write_json(path, {"complete": True, **mark})
    return folder


def add_files(source: Path, target: Path) -> None:
    """Add the files of a component to a folder, as hard links where the file system has them, else as copies.

    Files that exist in ``target`` are left alone.
    """
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    for path in files:
        relative = Path(path.name) if path == source else path.relative_to(source)
        copy = target / relative
        if copy.exists() or any(part.startswith(".") for part in relative.parts):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), copy)
        except OSError:  # another file system, or one without hard links
            copy_file(path, copy)
