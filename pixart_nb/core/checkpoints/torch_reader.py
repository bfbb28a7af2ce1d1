"""Reader of ``.pth`` and ``.bin`` files without PyTorch, and without running anything that is in them.

Since version 1.6 a torch file is a zip archive: a pickle (``data.pkl``) and one uncompressed member for each storage.
Before, it was a row of pickles (a magic number, the version of the format, facts about the machine, the object, the
names of the storages) and then, for each name, the count of its numbers (8 bytes) and the numbers. Storages are mapped,
not read.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.checkpoints.lazy_tensor import DTYPES, LazyTensor, checksum, map_file
from pixart_nb.core.checkpoints.pickle_program import PickleProgram, Storage
from pixart_nb.core.io import CheckpointError

#: Keys under which training scripts save the weights, in order of preference; they may be nested.
_WRAPPERS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema", "state_dict", "model_state_dict", "model")
_MAX_WRAPPERS = 4
_PREFIX = "module."
_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_LEGACY_START = pickle.dumps(_MAGIC, 2)
_LOCAL_HEADER = 30
#: Exceptions of the zip and pickle modules for damaged bytes.
_DAMAGE = (
    *(zipfile.BadZipFile, pickle.UnpicklingError, EOFError, OSError, RuntimeError, zlib.error, struct.error),
    *(TypeError, ValueError, AttributeError, LookupError, OverflowError, MemoryError),
)


def read_torch(path: str | Path) -> Any:
    """Return what ``torch.save`` wrote, in the zip format or the one before it, tensors as ``LazyTensor``.

    The file must not change while they are used. Raises ``CheckpointError`` for a file that is missing, truncated, of
    another type, or that holds anything but tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected a checkpoint there")
    try:
        data = map_file(path)
        if data[: len(_LEGACY_START)].tobytes() == _LEGACY_START:
            return _read_legacy(path, data)
        if zipfile.is_zipfile(path):
            return _ZipFile(path, data).load()
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    raise CheckpointError(
        f"{path} ({data.size} bytes) is truncated or no checkpoint that torch.save wrote. Download or copy it again."
    )


class _ZipFile:
    """Zip archive of a torch file; each storage is mapped once and shared by the tensors that view it."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data = path, data
        with zipfile.ZipFile(path) as archive:
            self.members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in self.members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{path} is a zip archive without data.pkl; expected a file that torch.save wrote")
        self.prefix = pickles[0].removesuffix("data.pkl")
        self.storages: dict[str, Storage] = {}

    def load(self) -> Any:
        order = f"{self.prefix}byteorder"
        if order in self.members and self.member(order).tobytes() != b"little":
            raise CheckpointError(f"{self.path} was not written on a little-endian machine; that is not supported")
        return PickleProgram(self.path, self.member(f"{self.prefix}data.pkl"), self.storage).run()

    def storage(self, name: str, dtype: str, count: int) -> Storage:
        if name not in self.storages:
            member = f"{self.prefix}data/{name}"
            if member not in self.members:
                raise CheckpointError(f"{self.path} lacks the storage {member}")
            expected, size = count * DTYPES[dtype].itemsize, self.members[member].file_size
            if size != expected:
                raise CheckpointError(f"{self.path}: {member} has {size} bytes; expected {expected}")
            self.storages[name] = Storage(self.member(member).view(DTYPES[dtype]), dtype)
        if self.storages[name].dtype != dtype:
            raise CheckpointError(f"{self.path} reads storage {name} as {self.storages[name].dtype} and as {dtype}")
        return self.storages[name]

    def member(self, name: str) -> np.ndarray:
        """Return the bytes of an uncompressed member, compared with its checksum and not copied."""
        info = self.members[name]
        if info.compress_type != zipfile.ZIP_STORED or info.header_offset < 0:
            raise CheckpointError(f"{self.path}: {name} is compressed; expected it stored, as torch.save does")
        names, extra = struct.unpack_from("<HH", self.data, info.header_offset + _LOCAL_HEADER - 4)
        start = info.header_offset + _LOCAL_HEADER + names + extra
        values = self.data[start : start + info.file_size]
        if len(values) != info.file_size or checksum(values) != info.CRC:
            raise CheckpointError(f"{self.path} is damaged: {name} does not match its checksum. Copy it again.")
        return values


def _read_legacy(path: Path, data: np.ndarray) -> Any:
    """Read a file of before version 1.6. Its object is read twice: the storages lie behind it, unnamed."""
    needed: dict[str, tuple[str, int]] = {}
    storages: dict[str, Storage] = {}

    def survey(name: str, dtype: str, count: int) -> Storage:
        """Note which storages are asked for; the beginning of the file stands in for them."""
        if count * DTYPES[dtype].itemsize > data.size:
            raise CheckpointError(f"{path} ({data.size} bytes) is truncated: a storage has {count} numbers")
        needed[name] = (dtype, count)
        return Storage(data[: count * DTYPES[dtype].itemsize].view(DTYPES[dtype]), dtype)

    def storage(name: str, dtype: str, count: int) -> Storage:
        if name not in storages or storages[name].dtype != dtype:
            raise CheckpointError(f"{path} lacks the storage {name} of {dtype}")
        return storages[name]

    parts, ends = [], [0]
    for _ in range(5):
        program = PickleProgram(path, data, survey, ends[-1])
        parts.append(program.run())
        ends.append(program.end)
    magic, version, machine, _, names = parts
    if magic != _MAGIC or version != _LEGACY_VERSION:
        raise CheckpointError(f"{path} is of an unknown version of torch's format of before 1.6")
    if not isinstance(machine, Mapping) or machine.get("little_endian") is not True:
        raise CheckpointError(f"{path} was not written on a little-endian machine; that is not supported")
    if not isinstance(names, list) or {str(name) for name in names if isinstance(name, str | int)} != set(needed):
        raise CheckpointError(f"{path} is damaged: its list of storages is not that of its tensors")
    position = ends[-1]
    for name in map(str, names):
        dtype, count = needed[name]
        (stored,) = struct.unpack_from("<q", data, position)
        stop = position + 8 + count * DTYPES[dtype].itemsize
        if stored != count or stop > data.size:
            raise CheckpointError(
                f"{path} ({data.size} bytes) is truncated or damaged: storage {name} has not {count} numbers"
            )
        storages[name] = Storage(data[position + 8 : stop].view(DTYPES[dtype]), dtype)
        position = stop
    return PickleProgram(path, data, storage, ends[3]).run()


def find_weights(content: Any, source: str | Path = "checkpoint") -> tuple[dict[str, LazyTensor], str, list[str]]:
    """Return the tensors by name, the key under which they were (``state_dict_ema``, or nothing), and other such keys.

    EMA weights are preferred; ``module.`` prefixes are removed.
    """
    path, others = [], []
    for _ in range(_MAX_WRAPPERS):
        keys = [key for key in _WRAPPERS if isinstance(content, Mapping) and _is_filled(content.get(key))]
        if not keys:
            break
        content = content[keys[0]]
        path.append(keys[0])
        others += keys[1:]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source} holds a {type(content).__name__}; expected tensors by name")
    named = {str(key).removeprefix(_PREFIX): tensor for key, tensor in content.items()}
    tensors = {n: replace(tensor, name=n) for n, tensor in named.items() if isinstance(tensor, LazyTensor)}
    if not tensors:
        raise CheckpointError(f"{source} holds no tensors; its keys are {list(content)[:5]}")
    return tensors, ".".join(path), others


def _is_filled(content: Any) -> bool:
    return isinstance(content, Mapping) and len(content) > 0
