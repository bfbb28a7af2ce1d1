"""Reads ``.pth`` and ``.bin`` files without PyTorch, and without running anything that is in them.

A torch file is a zip archive with a pickle (``data.pkl``) and one raw member per storage. The unpickler here knows
tensors, storages and plain containers; every other name is refused before it is looked up. Storages are mapped, not
read: memory is taken by what is used.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from pixart_nb.core.checkpoints.store import CheckpointError

_BFLOAT16 = "bfloat16"
_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": _BFLOAT16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_WRAPPERS = ("state_dict_ema", "state_dict", "model")
_PREFIX = "module."
#: How files begin that torch wrote before 1.6: a pickled magic number.
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LOCAL_HEADER = 30
#: What the zip and pickle modules raise on bytes that are not what they should be.
_DAMAGE = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    EOFError,
    OSError,
    RuntimeError,
    zlib.error,
    struct.error,
)
_DAMAGE += (TypeError, ValueError, AttributeError, LookupError, OverflowError, MemoryError)


class _Storage(NamedTuple):
    """A storage of the archive: raw values of one dtype (bfloat16 as uint16)."""

    values: np.ndarray
    bfloat16: bool


class _StorageType(NamedTuple):
    name: str


class _Unpickler(pickle._Unpickler):
    """Rebuilds tensors and plain containers; refuses every other global by name.

    This is Python's own unpickler in Python. The one in C allocates as many memo entries as the file says: a hundred
    bytes could ask it for all memory.
    """

    dispatch: ClassVar[dict] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file, archive: _Archive):
        super().__init__(file, encoding="utf-8")
        self.archive = archive

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in _STORAGES:
            return _StorageType(name)
        raise CheckpointError(
            f"{self.archive.path} asks for {module}.{name}, which is no tensor; it was refused and nothing was run. "
            "Load it where you trust it and save its state_dict as safetensors."
        )

    def load_build(self) -> None:
        """Attributes of an object: torch leaves ``_metadata`` on its OrderedDict, which is dropped; no other may."""
        self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict):
            kind = type(self.stack[-1]).__name__
            raise CheckpointError(f"{self.archive.path} sets attributes of a {kind}; it was refused")

    dispatch[pickle.BUILD[0]] = load_build

    def persistent_load(self, key: Any) -> _Storage:
        try:
            kind, storage_type, name, _, count = key
            dtype = _STORAGES[storage_type.name]
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"{self.archive.path} has a storage that cannot be understood: {key!r}"
            ) from error
        if kind != "storage" or not isinstance(count, int):
            raise CheckpointError(f"{self.archive.path} has a storage that cannot be understood: {key!r}")
        return self.archive.storage(str(name), dtype, count)


class _Archive:
    """The zip archive of a torch file; each storage is mapped once and shared by the tensors that view it."""

    def __init__(self, path: Path):
        self.path = path
        self.zip = zipfile.ZipFile(path)
        self.bytes = np.memmap(path, np.uint8, "r")
        pickles = [name for name in self.zip.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(pickles) != 1:
            raise CheckpointError(
                f"{path} is a zip archive without data.pkl; expected a file that torch.save wrote"
            )
        self.pickle_name = pickles[0]
        self.prefix = self.pickle_name[: -len("data.pkl")]
        self.storages: dict[str, _Storage] = {}

    def storage(self, name: str, dtype: Any, count: int) -> _Storage:
        if name not in self.storages:
            bfloat16 = dtype == _BFLOAT16
            raw = np.dtype(np.uint16 if bfloat16 else dtype)
            member = f"{self.prefix}data/{name}"
            if member not in self.zip.NameToInfo:
                raise CheckpointError(f"{self.path} lacks the storage {member}")
            size = self.zip.getinfo(member).file_size
            if size != count * raw.itemsize or self.zip.getinfo(member).compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{self.path}: {member} has {size} bytes; expected {count * raw.itemsize}, stored"
                )
            self.storages[name] = _Storage(self.mapped(member).view(raw), bfloat16)
        return self.storages[name]

    def mapped(self, member: str) -> np.ndarray:
        """The bytes of a stored member, compared with its checksum and not copied."""
        info = self.zip.getinfo(member)
        names, extra = struct.unpack_from("<HH", self.bytes, info.header_offset + _LOCAL_HEADER - 4)
        start = info.header_offset + _LOCAL_HEADER + names + extra
        values = self.bytes[start : start + info.file_size]
        if len(values) != info.file_size or zlib.crc32(values) != info.CRC:
            raise CheckpointError(
                f"{self.path} is damaged: {member} does not match its checksum. Copy it again."
            )
        return values


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """The tensor that views a storage from ``offset`` with ``size`` and ``stride``; bfloat16 as float32, copied."""
    numbers = [offset, *size, *stride]
    if not isinstance(storage, _Storage) or len(size) != len(stride) or len(size) > 16:
        raise CheckpointError(f"a tensor of size {size!r} and stride {stride!r} has no storage that fits it")
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise CheckpointError(
            f"a tensor has offset {offset!r}, size {size!r}, stride {stride!r}; expected whole numbers"
        )
    last = (
        offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if all(size)
        else offset - 1
    )
    if last >= len(storage.values) or np.prod(size, dtype=object) > len(storage.values):
        raise CheckpointError(
            f"a tensor of size {tuple(size)} at offset {offset} leaves its storage of {len(storage.values)}"
        )
    step = storage.values.itemsize
    view = np.lib.stride_tricks.as_strided(
        storage.values[offset:], tuple(size), tuple(s * step for s in stride)
    )
    if not storage.bfloat16:
        return view if view.flags.c_contiguous and view.flags.aligned else view.copy()
    return (view.astype(np.uint32) << 16).view(np.float32)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def read_torch(path: str | Path) -> Any:
    """What ``torch.save`` wrote, tensors as NumPy arrays (bfloat16 becomes float32).

    Arrays are read-only views of the mapped file where they can be; copy one to change it. The file must stay as it is
    while they are used.

    Raises ``CheckpointError`` for a file that is missing, truncated, of another kind, or that holds anything but
    tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected a checkpoint there")
    with path.open("rb") as file:
        legacy = file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC
    if legacy:
        raise CheckpointError(
            f"{path} is in torch's format of before version 1.6, which is not read; expected its zip format. "
            "Load it with torch and save it again, or look for a safetensors file of the same weights."
        )
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is truncated, or no checkpoint in torch's zip format. "
            "Download or copy it again."
        )
    try:
        archive = _Archive(path)
        with archive.zip, archive.zip.open(archive.pickle_name) as file:
            return _Unpickler(file, archive).load()
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def state_dict(content: Any, source: str | Path = "checkpoint") -> dict[str, np.ndarray]:
    """The tensors by name, wherever training scripts put them: EMA weights first, without ``module.`` prefixes."""
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source} holds a {type(content).__name__}; expected tensors by name")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, np.ndarray)}
    if not tensors:
        raise CheckpointError(f"{source} holds no tensors; its keys are {list(content)[:5]}")
    return {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
