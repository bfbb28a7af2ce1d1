"""Interpreter of the pickles in torch files: rebuilds tensors and plain containers and refuses everything else.

No name of a file is imported and no code of it runs: a call is a row of data here, and only those of ``GLOBALS`` are
understood. Python's own unpickler is not used: the one in C allocates as many memo entries as the file announces.
"""

from __future__ import annotations

import io
import pickletools
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

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
_TENSOR = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor")
_PARAMETER, _DICT = "torch._utils._rebuild_parameter", "collections.OrderedDict"
GLOBALS = (*_TENSOR, _PARAMETER, _DICT, *(f"torch.{name}" for name in STORAGES))
#: Bytes of a pickle, its names, axes and arguments of a call: several times what any checkpoint has. Each byte can make
#: an object, and each call can look at all its arguments, so these bound memory and time.
MAX_PROGRAM = 4 * 2**20
_MAX_LINE, _MAX_AXES, _MAX_ARGUMENTS = 4096, 16, 16
#: Tensors may share storages; together they may view this many times the bytes of the file, or of the least size.
MAX_VIEWS, MIN_SIZE = 16, 2**20

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ARGUMENTS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
)
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Global(NamedTuple):
    """A name that a pickle refers to, as ``module.name``."""

    name: str


class Storage(NamedTuple):
    """A storage: its values as they are stored, flat, and their dtype."""

    values: np.ndarray
    dtype: str


class PickleProgram:
    """A pickle that starts at byte ``start`` of ``data``, the bytes of the file ``path``.

    ``storage_of(name, dtype, count)`` returns the storage of a name.
    """

    def __init__(self, path, data: np.ndarray, storage_of: Callable[[str, str, int], Storage], start: int = 0):
        self.path, self.storage_of, self.start = path, storage_of, start
        self.code = data[start : start + MAX_PROGRAM].tobytes()
        self.end = start
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.bytes_left = MAX_VIEWS * max(path.stat().st_size, MIN_SIZE)
        self.pairs_left, self.tensors = MAX_PROGRAM, 0

    def refused(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {reason}; it was refused and nothing was run")

    def run(self) -> Any:
        """Return what the pickle holds, tensors as ``LazyTensor``; ``end`` is then the byte after it."""
        try:
            for operation, argument, position in pickletools.genops(_Bounded(self)):
                if operation.name == "STOP":
                    self.end = self.start + position + 1
                    return self.stack.pop()
                self._step(operation.name, argument)
        except ValueError as error:
            if len(self.code) == MAX_PROGRAM and "exhausted" in str(error):
                raise self.refused(f"has a pickle longer than {MAX_PROGRAM} bytes") from error
            raise
        raise EOFError("the pickle ends too early")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _ARGUMENTS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self._push_tuple(_TUPLES[name])
        elif name.endswith("PUT") or name == "MEMOIZE":
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name.endswith("GET"):
            stack.append(self.memo[argument])
        elif name in _HANDLERS:
            _HANDLERS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            raise self.refused(f"uses the instruction {name}, which no tensor needs")

    # ---- containers

    def _push_tuple(self, count: int) -> None:
        items = [self.stack.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def _from_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _pop(self, _: Any) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()

    def _append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise self.refused(f"appends to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not dict:
            raise self.refused(f"sets items of a {type(self.stack[-1]).__name__}")
        self.stack[-1].update(self._pairs(zip(items[::2], items[1::2], strict=True)))

    def _push_dict(self, _: Any) -> None:
        items = self._from_mark()
        self.stack.append({})
        self._set_items(items)

    def _pairs(self, pairs: Any) -> dict[Any, Any]:
        """Return a dictionary of pairs; keys are texts and numbers, as hashing nested tuples can take forever."""
        out = {}
        for key, value in pairs:
            if not isinstance(key, str | bytes | int | float | None) or (type(key) is int and key.bit_length() > 64):
                raise self.refused(f"has a dictionary with a key of type {type(key).__name__} (expected texts)")
            out[key] = value
        return out

    def _set_last_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    # ---- names, calls and storages

    def _global(self, name: str) -> None:
        if name not in GLOBALS:
            raise CheckpointError(
                f"{self.path} asks for {name}, which is no tensor; it was refused and nothing was run. Load the file "
                "where you trust it and save its state_dict as safetensors."
            )
        self.stack.append(Global(name))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._global(f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "an unnamed object")

    def _call(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or type(arguments) is not tuple or len(arguments) > _MAX_ARGUMENTS:
            raise self.refused("makes a call with unknown arguments")
        if function.name in _TENSOR:
            self.stack.append(self._tensor(*arguments[:4]))
        elif function.name == _PARAMETER and arguments:
            self.stack.append(arguments[0])
        elif function.name == _DICT:  # Python 2 pickled it with its pairs
            pairs = arguments[0] if arguments else []
            self.pairs_left -= len(pairs)
            if self.pairs_left < 0:
                raise self.refused("repeats its dictionaries without end")
            self.stack.append(self._pairs(pairs))
        else:
            raise self.refused(f"calls {function.name}")

    def _build(self, _: Any) -> None:
        """Drop the attributes of a dictionary: torch leaves ``_metadata`` on its OrderedDict."""
        self.stack.pop()
        if type(self.stack[-1]) is not dict:
            raise self.refused(f"sets attributes of a {type(self.stack[-1]).__name__}")

    def _push_storage(self, _: Any) -> None:
        """Push the storage of torch's id: ("storage", class, name, device, count), in old files with a part of it."""
        key = self.stack.pop()
        try:
            label, storage_class, name, _, count, *part = key if len(key) <= _MAX_ARGUMENTS else ()
            dtype = STORAGES[storage_class.name.removeprefix("torch.")]
            if label != "storage" or not isinstance(name, str | int) or not _is_count(count):
                raise ValueError("not a storage")
            storage = self.storage_of(str(name), dtype, count)
            if part and part[0] is not None:  # torch 0.4 and before: (name, offset, count)
                _, offset, size = part[0]
                if not (_is_count(offset) and _is_count(size)) or offset + size > len(storage.values):
                    raise ValueError("leaves its storage")
                storage = Storage(storage.values[offset : offset + size], dtype)
        except CheckpointError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            shown = reprlib.repr(key)  # bounded: a small pickle can make an object whose repr never ends
            raise CheckpointError(f"{self.path} has a storage that cannot be understood: {shown}") from error
        self.stack.append(storage)

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> LazyTensor:
        """Return the tensor that views a storage from ``offset`` with ``size`` and ``stride``."""
        self.tensors += 1
        check_count(self.path, self.tensors)
        shown = reprlib.repr((offset, size, stride))
        shapes = type(size) is tuple and type(stride) is tuple and len(size) == len(stride) <= _MAX_AXES
        if not isinstance(storage, Storage) or not shapes or not all(map(_is_count, (offset, *size, *stride))):
            raise self.refused(f"has a tensor with offset, size and stride {shown} (expected whole numbers)")
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if all(size) else offset - 1
        if last >= len(storage.values):
            raise self.refused(
                f"has a tensor with offset, size and stride {shown} in a storage of {len(storage.values)} numbers"
            )
        dtype = DTYPES[storage.dtype]
        self.bytes_left -= int(np.prod(size, dtype=object)) * dtype.itemsize
        if self.bytes_left < 0:
            raise self.refused(f"has tensors that take over {MAX_VIEWS} times the file's size")
        values = storage.values[offset:] if all(size) else storage.values[:0]
        strides = tuple(s * dtype.itemsize for s in stride) if all(size) else (0,) * len(size)
        return LazyTensor(storage.dtype, (np.ndarray(size, dtype, values, strides=strides),))


class _Bounded(io.BytesIO):
    """The code of a pickle; a line, which holds a name or a number, is of bounded length."""

    def __init__(self, program: PickleProgram):
        super().__init__(program.code)
        self.program = program

    def readline(self, size: int = -1) -> bytes:
        line = super().readline(_MAX_LINE)
        if len(line) == _MAX_LINE:
            raise self.program.refused("has a pickle with a line that does not end")
        return line


def _is_count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**63


_HANDLERS: dict[str, Callable[[PickleProgram, Any], None]] = {
    "EMPTY_DICT": lambda self, _: self.stack.append({}),
    "EMPTY_LIST": lambda self, _: self.stack.append([]),
    "MARK": lambda self, _: self.marks.append(len(self.stack)),
    "POP": PickleProgram._pop,
    "POP_MARK": lambda self, _: self._from_mark() and None,
    "DUP": lambda self, _: self.stack.append(self.stack[-1]),
    "TUPLE": lambda self, _: self.stack.append(tuple(self._from_mark())),
    "LIST": lambda self, _: self.stack.append(self._from_mark()),
    "DICT": PickleProgram._push_dict,
    "APPEND": lambda self, _: self._append([self.stack.pop()]),
    "APPENDS": lambda self, _: self._append(self._from_mark()),
    "SETITEM": PickleProgram._set_last_item,
    "SETITEMS": lambda self, _: self._set_items(self._from_mark()),
    "GLOBAL": lambda self, name: self._global(name.replace(" ", ".", 1)),
    "STACK_GLOBAL": PickleProgram._stack_global,
    "REDUCE": PickleProgram._call,
    "BUILD": PickleProgram._build,
    "BINPERSID": PickleProgram._push_storage,
}
