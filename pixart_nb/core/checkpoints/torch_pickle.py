"""Pickles of torch files: read to tensors and plain containers, everything else refused, and written."""

from __future__ import annotations

import io
import math
import pickle
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from pixart_nb.core.checkpoints.lazy_tensor import DTYPES, LazyTensor, check_count
from pixart_nb.core.io import CheckpointError

#: torch's storage classes and their dtypes.
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
CLASSES = {dtype: name for name, dtype in STORAGES.items()}
#: Bytes of a pickle, axes, and arguments of a call: several times what any checkpoint has. Each byte can make an
#: object, and each call can look at all its arguments, so these bound memory and time.
MAX_PROGRAM = 4 * 2**20
_MAX_AXES, _MAX_ARGUMENTS = 16, 16
#: Tensors may share storages; together they may view this many times the bytes of the file, or of the least size.
_MAX_VIEWS, _MIN_SIZE = 16, 2**20
#: Instructions that tensors and plain containers need; none of them makes an object of a class.
_INSTRUCTIONS = (
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP", "NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT"),
    *("GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    *("GLOBAL", "STACK_GLOBAL", "BINPERSID"),
)
_CODES = [getattr(pickle, name)[0] for name in _INSTRUCTIONS]


class Global(NamedTuple):
    """A function that a pickle refers to, as ``module.name``."""

    name: str


class Storage(NamedTuple):
    """A storage: its values as they are stored, flat, and their dtype."""

    values: np.ndarray
    dtype: str


class TensorUnpickler(pickle._Unpickler):
    """Python's unpickler, reduced to what tensors and plain containers need; it looks up no name of the file.

    The public one, in C, is not used: it allocates as many memo entries as the file announces, and its instructions
    cannot be restricted. The pickle starts at byte ``start`` of ``data``, the bytes of the file ``path``.
    ``storage_of(name, dtype, count)`` returns a storage.
    """

    dispatch: ClassVar = {code: pickle._Unpickler.dispatch[code] for code in _CODES}

    def __init__(self, path: Path, data: np.ndarray, storage_of: Callable[[str, str, int], Storage], start: int = 0):
        self.path, self.storage_of, self.start = path, storage_of, start
        self.code = io.BytesIO(data[start : start + MAX_PROGRAM].tobytes())
        self.bytes_left = _MAX_VIEWS * max(path.stat().st_size, _MIN_SIZE)
        self.pairs_left, self.tensors = MAX_PROGRAM, 0
        super().__init__(self.code, encoding="utf-8")

    @property
    def end(self) -> int:
        """Position after the pickle."""
        return self.start + self.code.tell()

    def load(self) -> Any:
        try:
            return super().load()
        except KeyError as error:
            raise self.refused(f"uses the instruction {error} of pickle, which no tensor needs") from None
        except EOFError:
            if self.code.tell() == MAX_PROGRAM:
                raise self.refused(f"has a pickle longer than {MAX_PROGRAM} bytes") from None
            raise

    def refused(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {reason}; it was refused and nothing was run")

    def find_class(self, module: str, name: str) -> Any:
        """Return the dtype of a storage class, or the name of a function; nothing is imported."""
        full = f"{module}.{name}"
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if full in _FUNCTIONS:
            return Global(full)
        raise CheckpointError(
            f"{self.path} asks for {full:.200}, which is no tensor; it was refused and nothing was run. Load the "
            "file where you trust it and save its state_dict as safetensors."
        )

    def persistent_load(self, pid: Any) -> Storage:
        """Return the storage of torch's id: ("storage", dtype, name, device, count), before 0.4 with a part of it."""
        view = None
        match pid:
            case ("storage", str(dtype), str() | int() as name, _, int(count)):
                pass
            case ("storage", str(dtype), str() | int() as name, _, int(count), view):
                pass
            case _:
                raise self._no_storage(pid)
        if dtype not in CLASSES or not _is_count(count):
            raise self._no_storage(pid)
        storage = self.storage_of(str(name), dtype, count)
        match view:
            case None:
                return storage
            case (_, offset, size) if _is_count(offset) and _is_count(size) and offset + size <= count:
                return Storage(storage.values[offset : offset + size], dtype)
        raise self._no_storage(pid)

    def _no_storage(self, pid: Any) -> CheckpointError:
        shown = reprlib.repr(pid)  # bounded: a small pickle can make an object whose repr never ends
        return CheckpointError(f"{self.path} has a storage that cannot be understood: {shown}")

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> LazyTensor:
        """Return the tensor that views a storage from ``offset`` with ``size`` and ``stride``."""
        self.tensors += 1
        check_count(self.path, self.tensors)
        shown = f"has a tensor with offset, size and stride {reprlib.repr((offset, size, stride))}"
        shapes = type(size) is tuple and type(stride) is tuple and len(size) == len(stride) <= _MAX_AXES
        if not isinstance(storage, Storage) or not shapes or not all(map(_is_count, (offset, *size, *stride))):
            raise self.refused(f"{shown} (expected whole numbers)")
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else offset - 1
        if last >= len(storage.values):
            raise self.refused(f"{shown} in a storage of {len(storage.values)} numbers")
        dtype = DTYPES[storage.dtype]
        self.bytes_left -= math.prod(size) * dtype.itemsize
        if self.bytes_left < 0:
            raise self.refused(f"has tensors that take over {_MAX_VIEWS} times the file's size")
        values = storage.values[offset:] if all(size) else storage.values[:0]
        strides = tuple(s * dtype.itemsize for s in stride) if all(size) else (0,) * len(size)
        return LazyTensor(storage.dtype, (np.ndarray(size, dtype, values, strides=strides),))

    def _dictionary(self, pairs: Any = ()) -> dict:
        """Return a dictionary of the pairs with which Python 2 pickled it."""
        self.pairs_left -= len(pairs)
        if self.pairs_left < 0:
            raise self.refused("repeats its dictionaries without end")
        return self._put({}, pairs)

    def _put(self, target: Any, pairs: Iterable) -> dict:
        """Set items of a dictionary; keys are texts and numbers, as hashing nested tuples can take forever."""
        if type(target) is not dict:
            raise self.refused(f"sets items of a {type(target).__name__}")
        for key, value in pairs:
            if not isinstance(key, str | bytes | int | float | None) or (type(key) is int and key.bit_length() > 64):
                raise self.refused(f"has a dictionary with a key of type {type(key).__name__} (expected texts)")
            target[key] = value
        return target

    def load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS:
            raise self.refused("makes a call with unknown arguments")
        self.append(_FUNCTIONS[function.name](self, *arguments))

    def load_build(self) -> None:
        """Drop the attributes of a dictionary: torch leaves ``_metadata`` on its OrderedDict."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise self.refused(f"sets attributes of a {type(self.stack[-1]).__name__}")

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put(self.stack[-1], [(key, value)])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._put(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(self._put({}, zip(items[::2], items[1::2], strict=True)))

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict


#: Functions that a pickle may call, and what stands for them here.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": TensorUnpickler._tensor,
    "torch._utils._rebuild_tensor": TensorUnpickler._tensor,
    "torch._utils._rebuild_parameter": lambda _, data, *rest: data,
    "collections.OrderedDict": TensorUnpickler._dictionary,
}


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**63


# ---- writing


def pickled(tensors: Mapping[str, LazyTensor]) -> bytes:
    """Return the pickle of ``{"state_dict": tensors}``, whose instructions rebuild each tensor from its storage."""
    parts = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, _text("state_dict"), _ORDERED_DICT, pickle.MARK]
    for number, (name, tensor) in enumerate(tensors.items()):
        strides = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
        storage = _global("torch", CLASSES[tensor.dtype])
        key = _tuple(_text("storage"), storage, _text(str(number)), _text("cpu"), _number(tensor.size))
        view = (_tuple(*map(_number, numbers)) for numbers in (tensor.shape, strides))
        arguments = _tuple(key + pickle.BINPERSID, _number(0), *view, pickle.NEWFALSE, _ORDERED_DICT)
        parts += [_text(name), _global("torch._utils", "_rebuild_tensor_v2"), arguments, pickle.REDUCE]
    return b"".join([*parts, pickle.SETITEMS, pickle.SETITEM, pickle.STOP])


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + len(text.encode()).to_bytes(4, "little") + text.encode()


def _number(number: int) -> bytes:
    return pickle.LONG1 + b"\x08" + number.to_bytes(8, "little", signed=True)


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


_ORDERED_DICT = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
