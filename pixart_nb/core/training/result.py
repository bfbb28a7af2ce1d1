"""Result folder of a training: a complete pipeline in the diffusers layout, or a LoRA."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pixart_nb.config import ConfigError
from pixart_nb.core.checkpoints.files import ENDINGS
from pixart_nb.core.io import (
    CheckpointError,
    copy_file,
    ensure_writable,
    load_metadata,
    read_json,
    remove_temporaries,
    write_json,
)

#: File that says which training wrote a result folder.
MARK = "training.json"
#: Bytes from which on weights are linked, where the file system has hard links: T5 XXL has 19 GB.
LINKED = 10**9


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

    A model's folder is refused too. Raises ``WriteError`` or ``ConfigError``.
    """
    path = ensure_writable(folder) / "config.json"
    if (folder / "model_index.json").is_file():
        raise ConfigError(f"{folder} is the folder of a model; choose another output_path")
    if path.is_file() and "output_path" not in read_json(path):
        raise ConfigError(
            f"{path} was not written by `pixart-nb train`, which would write its own there; choose another output_path"
        )


def write_result(folder: Path, mark: Mapping[str, Any], write: Callable[[Path, bool], None]) -> Path:
    """Write a result, unless the folder holds the complete result of the same training.

    ``mark`` says what was trained. ``write(folder, replace)``: with ``replace``, the components in the folder may be
    those of another training. Files that a user added stay.
    """
    path = folder / MARK
    stored = read_json(path) if path.is_file() else {}
    files = stored.pop("files", [])
    whole = bool(files) and all(_is_whole(folder / name) for name in files)
    if stored == {"complete": True, **mark} and whole:
        return folder
    before, now = (marked.get("identity", {}) for marked in (stored, mark))
    same = all(before.get(name) == now.get(name) for name in ("vae", "text_encoder"))
    replace = not (whole and stored.get("complete") and same)
    check_result(folder, ())
    write_json(path, {"complete": False, **mark})
    for part in (folder, *filter(Path.is_dir, folder.iterdir())):
        remove_temporaries(part)
    write(folder, replace)
    written = sorted(part.relative_to(folder).as_posix() for part in folder.rglob("*") if part.is_file())
    write_json(path, {"complete": True, **mark, "files": written})
    return folder


def _is_whole(path: Path) -> bool:
    """Return whether a file exists and, if it holds weights, has the length that its header says."""
    if path.suffix != ".safetensors":
        return path.is_file()
    try:
        load_metadata(path)
    except CheckpointError:
        return False
    return True


def _link_or_copy(path: Path, copy: Path) -> None:
    """Link large weights, and copy other files: whoever writes into a copy does not change the source."""
    if path.suffix in ENDINGS and path.stat().st_size >= LINKED:
        with suppress(OSError):  # another file system, or one without hard links
            return os.link(path.resolve(), copy)
    copy_file(path, copy)


def add_files(source: Path, target: Path, replace: bool = False) -> None:
    """Add the files of a component to a folder: copies, but hard links of weights from ``LINKED`` bytes on.

    Files that exist in ``target`` are left alone. With ``replace`` they are of another component: they are replaced,
    and other weights are removed.
    """
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    for path in files:
        relative = Path(path.name) if path == source else path.relative_to(source)
        copy = target / relative
        if any(part.startswith(".") for part in relative.parts):
            continue
        if copy.exists():
            if not replace or copy.samefile(path) or filecmp.cmp(path, copy, shallow=False):
                continue
            copy.unlink()
        copy.parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(path, copy)
    names = {path.name for path in files}
    for other in target.glob("*") if replace else ():
        if other.name not in names and (other.suffix in ENDINGS or other.name.endswith(".index.json")):
            other.unlink()
