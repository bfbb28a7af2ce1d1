"""Reads ``.pth`` and ``.bin`` files without PyTorch, and without running anything that is in them.

Since version 1.6 a torch file is a zip archive: a pickle (``data.pkl``) and one raw member for each storage. Before, it
was a row of pickles (a magic number, the version of the format, facts about the machine, the object, the names of
the storages) and then, for each name, the count of its numbers (8 bytes) and the numbers. Storages are mapped, not
read: memory is taken by what is used.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.checkpoints.lazy_tensor import DTYPES, Stored, map_file, release
from pixart_nb.core.checkpoints.torch_unpickler import Archive, Program, Storage, TensorUnpickler
from pixart_nb.core.io import CheckpointError

#: Where training scripts put the weights, the wanted first; they may stand inside one another.
_WRAPPERS = (
    "state_dict_ema",
    "ema_state_dict",
    "model_ema",
    "ema",
    "state_dict",
    "model_state_dict",
    "model",
)
_MOST_WRAPPERS = 4
_PREFIX = "module."
_MAGIC = 0x1950A86A20F9469CFC6C
#: How files begin that torch wrote before 1.6: the magic number, pickled.
_LEGACY_START = pickle.dumps(_MAGIC, 2)
_LEGACY_VERSION = 1001
_LOCAL_HEADER = 30
#: Bytes of a member that are compared with its checksum before their memory is given back.
_CHECKED_TOGETHER = 64 * 2**20
#: What the zip and pickle modules raise on bytes that are not what they should be.
_DAMAGE = (
    *(zipfile.BadZipFile, pickle.UnpicklingError, EOFError, OSError, RuntimeError, zlib.error, struct.error),
    *(TypeError, ValueError, AttributeError, LookupError, OverflowError, MemoryError),
)


class _Zip:
    """The zip archive of a torch file; each storage is mapped once and shared by the tensors that view it."""

    def __init__(self, path: Path, content: np.ndarray):
        self.path, self.bytes, self.size = path, content, content.size
        with zipfile.ZipFile(path) as archive:
            self.members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in self.members if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(
                f"{path} is a zip archive without data.pkl; expected a file that torch.save wrote"
            )
        self.pickle_name = pickles[0]
        self.prefix = self.pickle_name[: -len("data.pkl")]
        self.storages: dict[str, Storage] = {}

    def load(self, as_tensor: Callable[[Stored], Any]) -> Any:
        order = self.members.get(f"{self.prefix}byteorder")
        if order and self.member(order.filename).tobytes() != b"little":
            raise CheckpointError(f"{self.path} was not written on a little-endian machine; that is not read")
        program = Program(self.path, self.member(self.pickle_name))
        return TensorUnpickler(program, self, as_tensor).load()

    def storage(self, name: str, dtype: str, count: int) -> Storage:
        if name not in self.storages:
            member = f"{self.prefix}data/{name}"
            if member not in self.members:
                raise CheckpointError(f"{self.path} lacks the storage {member}")
            expected = count * DTYPES[dtype].itemsize
            if self.members[member].file_size != expected:
                found = self.members[member].file_size
                raise CheckpointError(f"{self.path}: {member} has {found} bytes; expected {expected}")
            self.storages[name] = Storage(self.member(member).view(DTYPES[dtype]), dtype)
        if self.storages[name].dtype != dtype:
            raise CheckpointError(
                f"{self.path} reads storage {name} as {self.storages[name].dtype} and as {dtype}"
            )
        return self.storages[name]

    def member(self, name: str) -> np.ndarray:
        """The bytes of a stored member, compared with its checksum and not copied."""
        info = self.members[name]
        if info.compress_type != zipfile.ZIP_STORED or info.header_offset < 0:
            raise CheckpointError(
                f"{self.path}: {name} is compressed; expected it stored, as torch.save does"
            )
        names, extra = struct.unpack_from("<HH", self.bytes, info.header_offset + _LOCAL_HEADER - 4)
        start = info.header_offset + _LOCAL_HEADER + names + extra
        values = self.bytes[start : start + info.file_size]
        if len(values) != info.file_size or _checksum(values) != info.CRC:
            raise CheckpointError(
                f"{self.path} is damaged: {name} does not match its checksum. Copy it again."
            )
        return values


def _checksum(values: np.ndarray) -> int:
    total = 0
    for start in range(0, values.size, _CHECKED_TOGETHER):
        total = zlib.crc32(values[start : start + _CHECKED_TOGETHER], total)
        release(values)
    return total


class _Legacy:
    """A torch file of before version 1.6. Its object is unpickled twice: the storages are found after the first."""

    def __init__(self, path: Path, content: np.ndarray):
        self.path, self.bytes, self.size = path, content, content.size
        self.place = 0
        self.storages: dict[str, Storage] = {}

    def load(self, as_tensor: Callable[[Stored], Any]) -> Any:
        if self._unpickled(self) != _MAGIC or self._unpickled(self) != _LEGACY_VERSION:
            raise CheckpointError(f"{self.path} is of an unknown version of torch's format of before 1.6")
        machine = self._unpickled(self)
        if not isinstance(machine, Mapping) or machine.get("little_endian") is not True:
            raise CheckpointError(f"{self.path} was not written on a little-endian machine; that is not read")
        start = self.place
        survey = _Survey(self)
        self._unpickled(survey, lambda tensor: None)
        self._find_storages(survey.wanted, self._unpickled(survey))
        self.place = start
        return self._unpickled(self, as_tensor)

    def _unpickled(self, archive: Archive, as_tensor: Callable[[Stored], Any] = np.asarray) -> Any:
        """What the pickle at ``place`` holds; ``place`` moves to its end."""
        program = Program(self.path, self.bytes, self.place)
        found = TensorUnpickler(program, archive, as_tensor).load()
        self.place = program.place
        return found

    def _find_storages(self, wanted: Mapping[str, tuple[str, int]], names: Any) -> None:
        """Map the storages, which lie one after the other in the order of their names."""
        if not isinstance(names, list) or {str(name) for name in names if isinstance(name, str | int)} != set(
            wanted
        ):
            raise CheckpointError(f"{self.path} is damaged: its list of storages is not that of its tensors")
        place = self.place
        for name in map(str, names):
            dtype, count = wanted[name]
            (found,) = struct.unpack_from("<q", self.bytes, place)
            stop = place + 8 + count * DTYPES[dtype].itemsize
            if found != count or stop > self.size:
                raise CheckpointError(
                    f"{self.path} ({self.size} bytes) is truncated or damaged: storage {name} has not {count} numbers"
                )
            self.storages[name] = Storage(self.bytes[place + 8 : stop].view(DTYPES[dtype]), dtype)
            place = stop

    def storage(self, name: str, dtype: str, count: int) -> Storage:
        if name not in self.storages or self.storages[name].dtype != dtype:
            raise CheckpointError(f"{self.path} lacks the storage {name} of {dtype}")
        return self.storages[name]


class _Survey:
    """Takes down which storages a pickle asks for; the beginning of the file stands in for them."""

    def __init__(self, archive: _Legacy):
        self.path, self.size, self.bytes = archive.path, archive.size, archive.bytes
        self.wanted: dict[str, tuple[str, int]] = {}

    def storage(self, name: str, dtype: str, count: int) -> Storage:
        if count * DTYPES[dtype].itemsize > self.size:
            raise CheckpointError(
                f"{self.path} ({self.size} bytes) is truncated: a storage has {count} numbers"
            )
        self.wanted[name] = (dtype, count)
        return Storage(self.bytes[: count * DTYPES[dtype].itemsize].view(DTYPES[dtype]), dtype)


def read_torch(path: str | Path, as_tensor: Callable[[Stored], Any] = np.asarray) -> Any:
    """What ``torch.save`` wrote, in the zip format or the one before it, tensors as NumPy arrays (bfloat16 as float32).

    Arrays are read-only views of the mapped file where they can be; copy one to change it. The file must stay as it is
    while they are used. ``as_tensor`` makes something else of the ``Stored`` tensors.

    Raises ``CheckpointError`` for a file that is missing, truncated, of another kind, or that holds anything but
    tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected a checkpoint there")
    try:
        return _opened(path).load(as_tensor)
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _opened(path: Path) -> _Zip | _Legacy:
    content = map_file(path)
    if content[: len(_LEGACY_START)].tobytes() == _LEGACY_START:
        return _Legacy(path, content)
    if zipfile.is_zipfile(path):
        return _Zip(path, content)
    raise CheckpointError(
        f"{path} ({content.size} bytes) is truncated or no checkpoint that torch.save wrote. Download or copy it again."
    )


def state_dict(content: Any, source: str | Path = "checkpoint") -> dict[str, Any]:
    """The tensors by name, wherever training scripts put them: EMA weights first, without ``module.`` prefixes."""
    return find_weights(content, source)[0]


def find_weights(content: Any, source: str | Path = "checkpoint") -> tuple[dict[str, Any], str, list[str]]:
    """The tensors by name, where they stood (``state_dict_ema``, or nothing), and where there were others."""
    places, others = [], []
    for _ in range(_MOST_WRAPPERS):
        found = [name for name in _WRAPPERS if isinstance(content, Mapping) and _is_full(content.get(name))]
        if not found:
            break
        content = content[found[0]]
        places.append(found[0])
        others += found[1:]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source} holds a {type(content).__name__}; expected tensors by name")
    tensors = {
        str(name).removeprefix(_PREFIX): value
        for name, value in content.items()
        if isinstance(value, np.ndarray | Stored)
    }
    if not tensors:
        raise CheckpointError(f"{source} holds no tensors; its keys are {list(content)[:5]}")
    return tensors, ".".join(places), others


def _is_full(content: Any) -> bool:
    return isinstance(content, Mapping) and len(content) > 0
