"""An unpickler that knows tensors and plain containers. Nothing that a file names is looked up, nothing is run.

It is Python's own unpickler in Python. The one in C allocates as many memo entries as the file says: a hundred bytes
could ask it for all memory.
"""

from __future__ import annotations

import pickle
import reprlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

from pixart_nb.core.checkpoints.lazy_tensor import DTYPES, Stored, check_count
from pixart_nb.core.io import CheckpointError

#: torch's storage classes and the kind of their numbers.
STORAGES = {
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
#: Tensors may share storages; together they may view this many times the bytes of the file, or of the least size.
MOST_VIEWS = 16
LEAST_SIZE = 2**20
_MOST_AXES = 16
#: Bytes of a pickle, of a line in it, and arguments of a call: several times what any checkpoint has. Each byte can
#: make an object, and each call can look at all its arguments, so these bound memory and time.
MOST_PROGRAM = 4 * 2**20
_MOST_LINE = 4096
_MOST_ARGUMENTS = 16
#: Instructions that make objects, sets or buffers by other ways than the one below; no tensor needs them.
_FORBIDDEN = (
    *(pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4),
    *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
)


class Storage(NamedTuple):
    """A storage: its raw values, flat, and the kind of number they are."""

    values: np.ndarray
    dtype: str


class StorageType(NamedTuple):
    """What a file's ``torch.FloatStorage`` becomes here: its name."""

    name: str


class Program:
    """The instructions of a pickle, read from the bytes of a file as the unpickler asks for them."""

    def __init__(self, path: Path, content: np.ndarray, start: int = 0):
        self.path, self.bytes = path, memoryview(content)
        self.place, self.most = start, start + MOST_PROGRAM

    def read(self, size: int) -> bytes:
        stop = self.place + size
        if stop > self.most:
            raise CheckpointError(
                f"{self.path}: its pickle is longer than {MOST_PROGRAM} bytes; it was refused"
            )
        if stop > len(self.bytes):
            raise EOFError("the pickle ends too early")
        found = bytes(self.bytes[self.place : stop])
        self.place = stop
        return found

    def readline(self) -> bytes:
        end = bytes(self.bytes[self.place : self.place + _MOST_LINE]).find(b"\n")
        if end < 0:
            raise CheckpointError(f"{self.path}: a line of its pickle does not end; it was refused")
        return self.read(end + 1)


class Archive(Protocol):
    """Where an unpickler finds the storages."""

    path: Path
    size: int

    def storage(self, name: str, dtype: str, count: int) -> Storage:
        """The storage of this name, of ``count`` numbers."""


class TensorUnpickler(pickle._Unpickler):
    """Rebuilds tensors and plain containers; refuses everything else by name.

    ``as_tensor`` makes of every ``Stored`` what stands in the result.
    """

    dispatch: ClassVar[dict] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in _FORBIDDEN
    }

    def __init__(self, program: Program, archive: Archive, as_tensor: Callable[[Stored], Any]):
        super().__init__(program, encoding="utf-8")
        self.archive, self.as_tensor = archive, as_tensor
        self.bytes_left = MOST_VIEWS * max(archive.size, LEAST_SIZE)
        self.pairs_left = MOST_PROGRAM
        self.tensors = 0

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return self.ordered_dict
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor")):
            return self.rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if module == "torch" and name in STORAGES:
            return StorageType(name)
        raise CheckpointError(
            f"{self.archive.path} asks for {module}.{name}, which is no tensor; it was refused and nothing was run. "
            "Load it where you trust it and save its state_dict as safetensors."
        )

    def persistent_load(self, key: Any) -> Storage:
        """The storage of torch's id: ("storage", type, name, device, count), in old files with a part of it."""
        try:
            kind, storage_type, name, _, count, *view = key if len(key) <= _MOST_ARGUMENTS else ()
            dtype = STORAGES[storage_type.name]
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise self._unknown_storage(key) from error
        if kind != "storage" or not isinstance(name, str | int) or not _is_count(count):
            raise self._unknown_storage(key)
        storage = self.archive.storage(str(name), dtype, count)
        return self._part(storage, view[0], key) if view and view[0] is not None else storage

    def _part(self, storage: Storage, view: Any, key: Any) -> Storage:
        """Part of a storage, as files of torch 0.4 and before have it: (name, offset, count)."""
        if not isinstance(view, tuple) or len(view) != 3 or not all(_is_count(n) for n in view[1:]):
            raise self._unknown_storage(key)
        start, stop = view[1], view[1] + view[2]
        if stop > len(storage.values):
            raise self._unknown_storage(key)
        return storage._replace(values=storage.values[start:stop])

    def _unknown_storage(self, key: Any) -> CheckpointError:
        shown = reprlib.repr(key)  # bounded: a small pickle can make an object whose whole repr never ends
        return CheckpointError(f"{self.archive.path} has a storage that cannot be understood: {shown}")

    def rebuild_tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
        """The tensor that views a storage from ``offset`` with ``size`` and ``stride``."""
        self.tensors += 1
        check_count(self.archive.path, self.tensors)
        self._check_view(storage, offset, size, stride)
        dtype = DTYPES[storage.dtype]
        self.bytes_left -= int(np.prod(size, dtype=object)) * dtype.itemsize
        if self.bytes_left < 0:
            raise CheckpointError(
                f"{self.archive.path}: its tensors would take over {MOST_VIEWS} times the file's size; it was refused"
            )
        values = storage.values[offset:] if all(size) else storage.values[:0]
        strides = tuple(s * dtype.itemsize for s in stride) if all(size) else (0,) * len(size)
        array = np.ndarray(size, dtype, values, strides=strides)
        return self.as_tensor(Stored(storage.dtype, (array,)))

    def _check_view(self, storage: Any, offset: Any, size: Any, stride: Any) -> None:
        fits = (
            isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= _MOST_AXES
        )
        if not isinstance(storage, Storage) or not fits:
            shown = reprlib.repr((size, stride))
            raise CheckpointError(f"{self.archive.path}: no storage fits a tensor of size and stride {shown}")
        if not all(_is_count(n) for n in (offset, *size, *stride)):
            shown = reprlib.repr((offset, size, stride))
            raise CheckpointError(
                f"{self.archive.path}: a tensor has offset, size and stride {shown}; expected whole numbers"
            )
        last = (
            offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else offset - 1
        )
        if last >= len(storage.values):
            raise CheckpointError(
                f"{self.archive.path}: a tensor of size {size} at offset {offset} leaves its storage of "
                f"{len(storage.values)}"
            )

    # ---- instructions that Python's unpickler carries out more freely

    def load_reduce(self) -> None:
        """A call: of one of the functions above, the only ones that there are, with few arguments."""
        if not isinstance(self.stack[-1], tuple) or len(self.stack[-1]) > _MOST_ARGUMENTS:
            raise CheckpointError(f"{self.archive.path} makes a call with unknown arguments; it was refused")
        super().load_reduce()

    def load_build(self) -> None:
        """Attributes of an object: torch leaves ``_metadata`` on its OrderedDict, which is dropped; no other may."""
        self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict):
            kind = type(self.stack[-1]).__name__
            raise CheckpointError(f"{self.archive.path} sets attributes of a {kind}; it was refused")

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({self._key(items[i]): items[i + 1] for i in range(0, len(items), 2)})

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._mapping()[self._key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        target = self._mapping()
        for i in range(0, len(items), 2):
            target[self._key(items[i])] = items[i + 1]

    def ordered_dict(self, pairs: Any = ()) -> OrderedDict:
        """``OrderedDict`` of pairs, as Python 2 pickled it; later ones write it empty and set its items."""
        self.pairs_left -= len(pairs)
        if self.pairs_left < 0:
            raise CheckpointError(f"{self.archive.path} repeats its dictionaries without end; it was refused")
        return OrderedDict((self._key(key), value) for key, value in pairs)

    def _key(self, key: Any) -> Any:
        """A key as it is, if it is a text or a number: the hash of nested tuples can take for ever."""
        if not isinstance(key, str | bytes | int | float | None) or (
            isinstance(key, int) and key.bit_length() > 64
        ):
            kind = type(key).__name__
            raise CheckpointError(
                f"{self.archive.path}: a dictionary has a key of type {kind}; expected texts"
            )
        return key

    def _mapping(self) -> dict:
        if not isinstance(self.stack[-1], dict):
            raise CheckpointError(f"{self.archive.path} sets items of a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.DICT[0]] = load_dict
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**63
