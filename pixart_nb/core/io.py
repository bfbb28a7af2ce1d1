"""Files that are complete or absent: atomic writes, locks of folders, and JSON and safetensors files.

Every file is written to a temporary name beside its target, synced to the disk and renamed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pixart_nb.core.errors import FolderInUseError, PixArtNBError, WriteError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

_HOST = re.sub(r"[^\w-]", "-", platform.node()) or "host"
_HELD_BY = re.compile(r"\d+ on \S+")
_TEMPORARY = re.compile(r"\..+?(?:\.(?P<host>[\w-]+))?\.(?P<pid>\d+)\.tmp")
_DAY = 24 * 3600
_POINTER = b"version https://git-lfs"
_MAX_JSON = 64 * 2**20
#: Key of a safetensors file's metadata that holds the checksums of its tensors.
CRC = "crc32"
#: Folders in which this process has removed what dead writers left.
_swept: set[Path] = set()
#: Handles of the locks that this process holds.
_held: set[int] = set()


class CheckpointError(PixArtNBError):
    """A checkpoint that cannot be read, or does not fit what it was read for."""


# ---- atomic writes


@contextmanager
def atomic_write(path: str | Path, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` on success; ``atomic_write_together`` for a single file."""
    with atomic_write_together(path, sync=sync) as (temporary,):
        yield temporary


@contextmanager
def atomic_write_together(*paths: str | Path, sync: bool = True) -> Iterator[tuple[Path, ...]]:
    """Yield a temporary path for each of ``paths``; all replace their targets on success, none on any error.

    The first appears last: where it is, the others are, whenever the process is killed.

    Each temporary file has the name of its target and is in a folder of its own beside it, so that a writer that
    makes further temporary files, as safetensors does, makes them there. Files get the mode that the umask gives.
    Folders that are missing are made, and removed on an error. ``sync=False`` leaves it to the system when the bytes
    reach the disk: for thousands of small files. Raises ``WriteError`` if a file cannot be written.
    """
    targets = [Path(path) for path in paths]
    temporaries = tuple(temporary_beside(path) / path.name for path in targets)
    made: list[Path] = []
    try:
        with write_errors(targets[0], tuple(path.parent for path in targets)):
            for path, temporary in zip(targets, temporaries, strict=True):
                made += _make_folders(path.parent)
                _sweep_once(path.parent)
                temporary.parent.mkdir(exist_ok=True)
            yield temporaries
            for temporary in temporaries:
                temporary.chmod(temporary.parent.stat().st_mode & 0o666)  # the folder's mode obeys the umask
                if sync:
                    _sync(temporary)
            for temporary, path in reversed(list(zip(temporaries, targets, strict=True))):
                os.replace(temporary, path)
            for folder in {path.parent for path in targets} if sync else ():
                _sync(folder)
    finally:
        for temporary in temporaries:
            shutil.rmtree(temporary.parent, ignore_errors=True)
        _remove_empty(made)


@contextmanager
def write_errors(path: str | Path, folders: tuple[Path, ...] = ()) -> Iterator[None]:
    """Turn the system's errors while ``path`` is written into a ``WriteError`` that names it.

    ``folders``: errors that name a file outside of them are left alone, as errors of reading something else.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, WriteError):
            raise
        source = Path(getattr(error, "filename", None) or path)
        if folders and not any(a.is_relative_to(b) for f in folders for a, b in ((source, f), (f, source))):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise WriteError(
            f"{path} could not be written ({reason}). Files that were complete before are unchanged, and no incomplete "
            "file is left. Free space or choose another folder, and run the command again."
        ) from error


def ensure_writable(folder: str | Path, needed: int = 0) -> Path:
    """Check before work begins that files can be written into ``folder``; returns it as a path.

    A folder that does not exist is tried and not left behind. ``needed``: bytes that must be free.
    Raises ``WriteError``.
    """
    folder = Path(folder).expanduser()
    made: list[Path] = []
    try:
        with write_errors(folder):
            made = _make_folders(folder)
            trial = temporary_beside(folder / "trial")
            trial.write_bytes(b"")
            trial.unlink()
        free = shutil.disk_usage(folder).free
    finally:
        _remove_empty(made)
    if free < needed:
        raise WriteError(
            f"{folder} needs {needed / 1e6:,.1f} MB and has {free / 1e6:,.1f} MB free; free space or choose another"
        )
    return folder


def temporary_beside(path: Path) -> Path:
    """Return the temporary name under which this process writes what is to replace ``path``."""
    return path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.tmp")


def temporaries_in(folder: Path) -> list[Path]:
    """Return the temporary files and folders in ``folder``, of living writers and of dead ones."""
    return [path for path in folder.glob(".*.tmp") if _TEMPORARY.fullmatch(path.name)]


def remove_temporaries(folder: Path) -> None:
    """Remove the temporaries and locks of processes of this machine that have died, others if older than a day."""
    _remove_stale_locks(folder)
    for path in filter(_is_abandoned, temporaries_in(folder)):
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _is_abandoned(path: Path) -> bool:
    """Return whether the process that made a temporary is gone; a process id may have been given again since."""
    parts = _TEMPORARY.fullmatch(path.name)
    try:
        written = path.stat().st_mtime
        if parts["host"] not in (None, _HOST):
            return time.time() - written > _DAY
        return psutil.Process(int(parts["pid"])).create_time() > written + 1
    except psutil.NoSuchProcess:
        return True
    except (OSError, psutil.Error, OverflowError):
        return False


def _sweep_once(folder: Path) -> None:
    if folder.resolve() not in _swept:
        _swept.add(folder.resolve())
        remove_temporaries(folder)


def _make_folders(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns those that did not exist, the outer first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        with suppress(OSError):  # it holds something
            folder.rmdir()


def _sync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    except PermissionError:
        if path.is_dir():
            return  # Windows has no handle of a folder to sync
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- locks


@contextmanager
def folder_lock(folder: str | Path, name: str = ".lock", wait: bool = False) -> Iterator[Path]:
    """Hold a folder for this process alone, from before the first byte is written until the ``with`` block ends.

    Makes the folder, checks that it can be written, and removes what dead writers left in it. The lock is the
    operating system's: it ends with the process, however that ends, and its file is removed. It is not reentrant. A
    command that writes a single file takes the name ``.FILE.lock``, so that others of the folder can be written.
    Processes that are forked meanwhile do not hold it, so that none that outlives this one keeps the folder locked.

    ``wait``: wait until the other process has finished, instead of raising ``FolderInUseError``.
    Raises ``WriteError`` for a folder that cannot be written.
    """
    folder = Path(folder).expanduser()
    path, made = folder / name, []
    with write_errors(folder):
        made = _make_folders(folder)
        while (handle := _try_lock(path)) is None:
            if not wait:
                raise FolderInUseError(
                    f"process {_holder(path)} is writing into {folder}; wait for it, stop it, or choose another folder"
                )
            time.sleep(0.2)
    _held.add(handle)
    try:
        remove_temporaries(folder)
        yield folder
    finally:
        if handle in _held:  # not in a process that was forked inside of the block
            _held.remove(handle)
            _unlock(handle, path)
            _remove_empty(made)


def _unlock(handle: int, path: Path) -> None:
    """Remove the file of a lock and release it."""
    if fcntl is None:  # Windows, where an open file cannot be removed
        os.close(handle)
    with suppress(OSError):
        path.unlink()  # elsewhere while the lock is held: see _try_lock
    if fcntl is not None:
        os.close(handle)


def _forget_locks() -> None:
    """Close the handles of locks that a forked process got from its parent, which keeps the locks."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_forget_locks)


def _try_lock(path: Path) -> int | None:
    """Return a handle that holds the lock of ``path``, or None if another has it."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(handle)
        except (BlockingIOError, PermissionError):
            os.close(handle)
            return None
        except OSError as error:  # a file system without locks
            warnings.warn(f"{path} cannot be locked ({error.strerror}): start one process only", stacklevel=3)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):  # not one that its holder has just removed
                with suppress(OSError):  # a full disk; the text is for messages
                    os.ftruncate(handle, 0)
                    os.write(handle, f"{os.getpid()} on {_HOST}".encode())  # _HELD_BY
                return handle
        os.close(handle)


def _remove_stale_locks(folder: Path) -> None:
    """Remove the files of locks that nobody holds: their holder was killed."""
    if fcntl is None:
        return  # Windows removes no file that is open, and the next holder overwrites it
    for path in filter(_is_lock, folder.glob(".*lock*")):
        with suppress(OSError), path.open("rb") as file:
            _lock(file.fileno())
            path.unlink()


def _is_lock(path: Path) -> bool:
    """Return whether a file is the lock of a process of this kit."""
    plain = path.is_file() and not path.is_symlink() and path.stat().st_size < 200
    return plain and bool(_HELD_BY.fullmatch(_holder(path)))


def _lock(handle: int) -> None:
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    os.lseek(handle, 1024, os.SEEK_SET)  # beyond the text, which others may read
    msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    os.lseek(handle, 0, os.SEEK_SET)


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") or "?"
    except OSError:
        return "?"


# ---- JSON and safetensors files


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file atomically; the copy has the mode that the umask gives."""
    with atomic_write(target) as temporary:
        shutil.copyfile(source, temporary)


def write_json(path: str | Path, content) -> None:
    """Write a JSON file atomically, indented."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_once(path: Path, content: bytes) -> None:
    """Write a file atomically unless it exists with this content. It is not synced."""
    if path.is_file() and path.read_bytes() == content:
        return
    with atomic_write(path, sync=False) as temporary:
        temporary.write_bytes(content)


def is_pointer(path: str | os.PathLike[str]) -> bool:
    """Return True for a file that is only a pointer of Git LFS to the real one."""
    with Path(path).open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def check_file(path: Path, expected: str) -> None:
    """Refuse a file that is missing, or only a pointer of Git LFS to the real one. ``expected``: what it should be."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected {expected}")
    try:
        pointer = is_pointer(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    if pointer:
        raise CheckpointError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder, or download the file"
        )


def read_json(path: str | Path) -> dict:
    """Read a JSON object; raises ``CheckpointError`` for a file that is missing or damaged."""
    path = Path(path).expanduser()
    check_file(path, "a JSON file")
    if path.stat().st_size > _MAX_JSON:
        raise CheckpointError(f"{path} has {path.stat().st_size} bytes; expected a JSON file of at most {_MAX_JSON}")
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
    """Write a safetensors file atomically, with a checksum of every tensor in its metadata."""
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    sums = {name: f"{tensor_crc(value):08x}" for name, value in contiguous.items()}
    with atomic_write(path) as temporary:
        save_file(contiguous, temporary, {**(metadata or {}), CRC: json.dumps(sums)})


def load_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file, compared with the checksums that ``save_tensors`` wrote.

    Raises ``CheckpointError`` for a damaged file.
    """
    with open_tensors(path) as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        sums = (content.metadata() or {}).get(CRC)
    if sums is not None:
        check_sums(path, sums, {name: tensor_crc(value) for name, value in tensors.items()})
    return tensors


def load_metadata(path: str | Path) -> dict[str, str]:
    """Return the text metadata of a safetensors file, without the checksums."""
    with open_tensors(path) as content:
        return {key: value for key, value in (content.metadata() or {}).items() if key != CRC}


def crc_seed(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the CRC-32 with which the checksum of a tensor begins; ``dtype`` under safetensors' name (F32)."""
    return zlib.crc32(f"{dtype} {list(shape)}".encode())


def tensor_crc(value: np.ndarray) -> int:
    """Return the CRC-32 of a tensor's dtype, shape and bytes, as ``save_tensors`` stores it."""
    letter = {"f": "F", "i": "I", "u": "U"}.get(value.dtype.kind, "BF")
    dtype = "BOOL" if value.dtype.kind == "b" else f"{letter}{8 * value.dtype.itemsize}"
    return zlib.crc32(value.reshape(-1).view(np.uint8), crc_seed(dtype, value.shape))


def check_sums(path: str | Path, sums: str, computed: Mapping[str, int]) -> None:
    """Compare checksums of tensors with those of the file's metadata. Raises ``CheckpointError``."""
    try:
        expected = json.loads(sums)
        wrong = sorted(name for name, value in computed.items() if expected.get(name) != f"{value:08x}")
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its checksums cannot be read. Copy it again.") from error
    if wrong:
        raise CheckpointError(
            f"{path} is damaged: {wrong[0]} does not match its checksum ({len(wrong)} in all). Copy it again."
        )


@contextmanager
def open_tensors(path: str | Path):
    """Open a safetensors file, whose header the library checks. Raises ``CheckpointError`` for a damaged one."""
    path = Path(path).expanduser()
    check_file(path, "a safetensors file")
    try:
        with safe_open(path, framework="numpy") as content:
            yield content
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated or no safetensors file: {error}. "
            "Download or copy it again."
        ) from error
