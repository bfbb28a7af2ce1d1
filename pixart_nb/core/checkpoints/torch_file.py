"""Reading and writing of torch's ``.pth`` and ``.bin`` files without PyTorch, and without running what is in them.

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
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.checkpoints.lazy_tensor import DTYPES, LazyTensor, checksum, map_file
from pixart_nb.core.checkpoints.torch_pickle import CLASSES, Storage, TensorUnpickler, pickled
from pixart_nb.core.io import CheckpointError

#: Keys under which training scripts save the weights, in order of preference; they may be nested.
_WRAPPERS = ("state_dict_ema", "ema_state_dict", "model_ema", "ema", "state_dict", "model_state_dict", "model")
_MAX_WRAPPERS = 4
_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_LEGACY_START = pickle.dumps(_MAGIC, 2)
_LOCAL_HEADER, _ALIGNMENT, _PADDING_FIELD = 30, 64, b"FB"
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
            return _read_zip(path, data)
    except CheckpointError:
        raise
    except _DAMAGE as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is damaged, or holds more than tensors ({reason}); nothing was run") from error
    raise CheckpointError(
        f"{path} ({data.size} bytes) is truncated or no checkpoint that torch.save wrote. Download or copy it again."
    )


def _read_zip(path: Path, data: np.ndarray) -> Any:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}

    @cache
    def member(name: str) -> np.ndarray:
        """Return the bytes of an uncompressed member, compared with its checksum and not copied."""
        if name not in members:
            raise CheckpointError(f"{path} lacks the storage {name}")
        info = members[name]
        if info.compress_type != zipfile.ZIP_STORED or info.header_offset < 0:
            raise CheckpointError(f"{path}: {name} is compressed; expected it stored, as torch.save does")
        names, extra = struct.unpack_from("<HH", data, info.header_offset + _LOCAL_HEADER - 4)
        start = info.header_offset + _LOCAL_HEADER + names + extra
        values = data[start : start + info.file_size]
        if len(values) != info.file_size or checksum(values) != info.CRC:
            raise CheckpointError(f"{path} is damaged: {name} does not match its checksum. Copy it again.")
        return values

    def storage(name: str, dtype: str, count: int) -> Storage:
        values, expected = member(f"{prefix}data/{name}"), count * DTYPES[dtype].itemsize
        if values.size != expected:
            raise CheckpointError(f"{path}: {prefix}data/{name} has {values.size} bytes; expected {expected}")
        return Storage(values.view(DTYPES[dtype]), dtype)

    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(f"{path} is a zip archive without data.pkl; expected a file that torch.save wrote")
    prefix = pickles[0].removesuffix("data.pkl")
    order = f"{prefix}byteorder"
    if order in members and member(order).tobytes() != b"little":
        raise CheckpointError(f"{path} was not written on a little-endian machine; that is not supported")
    return TensorUnpickler(path, member(pickles[0]), storage).load()


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
        if storages[name].dtype != dtype:
            raise CheckpointError(f"{path} lacks the storage {name} of {dtype}")
        return storages[name]

    parts, ends = [], [0]
    for _ in range(5):
        unpickler = TensorUnpickler(path, data, survey, ends[-1])
        parts.append(unpickler.load())
        ends.append(unpickler.end)
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
        start, position = position + 8, position + 8 + count * DTYPES[dtype].itemsize
        if stored != count or position > data.size:
            raise CheckpointError(
                f"{path} ({data.size} bytes) is truncated or damaged: storage {name} has not {count} numbers"
            )
        storages[name] = Storage(data[start:position].view(DTYPES[dtype]), dtype)
    return TensorUnpickler(path, data, storage, ends[3]).load()


def find_weights(content: Any, source: str | Path = "checkpoint") -> tuple[dict[str, LazyTensor], str, list[str]]:
    """Return the tensors by name, the key under which they were (``state_dict_ema``, or nothing), and other such keys.

    EMA weights are preferred; ``module.`` prefixes are removed.
    """
    path, others = [], []
    for _ in range(_MAX_WRAPPERS):
        nested = content if isinstance(content, Mapping) else {}
        keys = [key for key in _WRAPPERS if isinstance(nested.get(key), Mapping) and nested[key]]
        if not keys:
            break
        content = content[keys[0]]
        path.append(keys[0])
        others += keys[1:]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source} holds a {type(content).__name__}; expected tensors by name")
    named = {str(key).removeprefix("module."): tensor for key, tensor in content.items()}
    tensors = {n: replace(tensor, name=n) for n, tensor in named.items() if isinstance(tensor, LazyTensor)}
    if not tensors:
        raise CheckpointError(f"{source} holds no tensors; its keys are {list(content)[:5]}")
    return tensors, ".".join(path), others


def write_torch(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write ``{"state_dict": tensors}`` in the zip format, tensor by tensor, aligned as torch aligns them."""
    wrong = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in CLASSES]
    if wrong:
        raise CheckpointError(f"a .pth file cannot hold {', '.join(wrong[:4])}; it can hold {', '.join(CLASSES)}")
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(tensors))
        archive.writestr("archive/byteorder", "little")
        for number, tensor in enumerate(tensors.values()):
            large = tensor.nbytes >= 2**31 - 1  # which needs the longer header of zip's 64-bit form
            info = zipfile.ZipInfo(f"archive/data/{number}")
            info.extra = b"" if large else _padding(file.tell() + _LOCAL_HEADER + len(info.filename))
            with archive.open(info, "w", force_zip64=large) as member:
                for chunk in tensor.chunks():
                    member.write(chunk.view(np.uint8))
        archive.writestr("archive/version", "3\n")


def _padding(position: int) -> bytes:
    """Return a header field that moves what follows it from ``position`` to a multiple of 64 bytes."""
    size = -(position + len(_PADDING_FIELD) + 2) % _ALIGNMENT
    return _PADDING_FIELD + size.to_bytes(2, "little") + b"Z" * size
