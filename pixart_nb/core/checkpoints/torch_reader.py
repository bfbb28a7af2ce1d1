"""Reads ``.pth`` and ``.bin`` files without PyTorch, and without running anything that is in them.

A torch file is a zip archive with a pickle (``data.pkl``) and one raw member per storage. The unpickler here knows
tensors, storages and plain containers; every other name is refused before it is looked up.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class _Storage:
    """A storage of the archive: raw values of one dtype (bfloat16 as uint16)."""

    values: np.ndarray
    bfloat16: bool


class _StorageType:
    def __init__(self, name: str):
        self.name = name


class _Unpickler(pickle.Unpickler):
    """Rebuilds tensors and plain containers; refuses every other global by name."""

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
    """The zip archive of a torch file; each storage is read once and shared by the tensors that view it."""

    def __init__(self, path: Path):
        self.path = path
        self.zip = zipfile.ZipFile(path)
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
            self.storages[name] = _Storage(np.frombuffer(self.zip.read(member), raw), bfloat16)
        return self.storages[name]


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> np.ndarray:
    """The tensor that views a storage from ``offset`` with ``size`` and ``stride``, copied; bfloat16 as float32."""
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
        return np.array(view)
    return (view.astype(np.uint32) << 16).view(np.float32)


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def read_torch(path: str | Path) -> Any:
    """What ``torch.save`` wrote, tensors as NumPy arrays (bfloat16 becomes float32).

    Raises ``CheckpointError`` for a file that is missing, truncated, of another kind, or that holds anything but
    tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected a checkpoint there")
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
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, OSError, NotImplementedError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, OverflowError, MemoryError) as error:
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
