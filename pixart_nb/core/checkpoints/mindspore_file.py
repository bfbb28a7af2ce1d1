"""MindSpore's ``.ckpt`` files, read and written without loading them: mapped and streamed.

The file is a row of protobuf messages: ``Checkpoint {repeated Value value = 1}``, ``Value {string tag = 1; TensorProto
tensor = 2}``, ``TensorProto {repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3}``. A tensor of
more than 512 MB is written in slices, each a ``Value`` with the same tag and the dimensions of the whole. ``crc_num``
and ten bytes, the CRC-32 of everything before, may end the file. Scalars have no dimensions, or [0]. MindSpore's own
messages (``mindspore.train.checkpoint_pb2``) are not used: they read a whole file into memory, and fail where another
version of protobuf is imported first.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from pixart_nb.core.checkpoints.lazy_tensor import DTYPES, LazyTensor, check_count, checksum, map_file
from pixart_nb.core.io import CheckpointError

#: MindSpore's names of dtypes.
NAMES = {
    "Float64": "F64",
    "Float32": "F32",
    "Float16": "F16",
    "BFloat16": "BF16",
    "Bool": "BOOL",
    **{f"Int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"UInt{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}
_NAMES_OF = {dtype: name for name, dtype in NAMES.items()}
_SLICE = 512 * 2**20
_CHECKSUM, _CHECKSUM_BYTES = b"crc_num", 10
_VARINT, _BYTES = 0, 2
_MAX_AXES, _MAX_LETTERS = 16, 4096


def open_mindspore(path: str | Path) -> tuple[dict[str, LazyTensor], list[str]]:
    """Return the tensors of a ``.ckpt`` file, mapped, and the names of values that are no tensors (texts, say)."""
    path = Path(path)
    data, slices, others = _without_checksum(path, map_file(path)), {}, []
    try:
        for count, (_, value) in enumerate(_fields(memoryview(data), {1: _BYTES}), 1):
            check_count(path, count)
            tag, name, dims, content = _value(value)
            if name not in NAMES:
                others.append(tag)
                continue
            first = slices.setdefault(tag, (name, dims, []))
            if first[:2] != (name, dims):
                raise CheckpointError(f"{path} holds {tag} twice, as {first[:2]} and as {(name, dims)}")
            first[2].append(np.frombuffer(content, np.uint8))
    except CheckpointError:
        raise
    except ValueError as error:
        size = f"{path} ({data.size} bytes)"
        raise CheckpointError(f"{size} is truncated or no MindSpore checkpoint: {error}") from error
    if not slices:
        raise CheckpointError(f"{path} ({data.size} bytes) holds no tensors; expected a MindSpore checkpoint")
    return {tag: _tensor(path, tag, *parts) for tag, parts in slices.items()}, others


def _fields(data: memoryview, wire_types: Mapping[int, int]) -> Iterator[tuple[int, int | memoryview]]:
    """Yield number and content of each field of a message; every length is compared with what is there."""
    position = 0
    while position < len(data):
        key, position = _varint_at(data, position)
        number, wire = key >> 3, key & 7
        if wire_types.get(number) != wire:
            raise ValueError(f"unknown field {number} of wire type {wire}")
        content, position = _varint_at(data, position)
        if wire == _BYTES:
            start, position = position, position + content
            if position > len(data):
                raise ValueError(f"{content} bytes are announced and {len(data) - start} follow")
            content = data[start:position]
        yield number, content


def _varint_at(data: memoryview, position: int) -> tuple[int, int]:
    """Return a number of seven bits per byte, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("it ends within a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), position
    raise ValueError("a number is too long")


def _value(message: memoryview) -> tuple[str, str, tuple[int, ...], memoryview]:
    """Return tag, type, dimensions and content of a ``Value``."""
    fields = dict(_fields(message, {1: _BYTES, 2: _BYTES}))
    if set(fields) != {1, 2} or not (tag := _text(fields[1])):
        raise ValueError("a value without a name or a tensor")
    name, dims, content = "", [], memoryview(b"")
    for number, part in _fields(fields[2], {1: _VARINT, 2: _BYTES, 3: _BYTES}):
        if number == 1:
            dims.append(part)
        elif number == 2:
            name = _text(part)
        else:
            content = part
        if len(dims) > _MAX_AXES:
            raise ValueError(f"{tag} has more than {_MAX_AXES} dimensions")
    return tag, name, tuple(dims), content


def _text(data: memoryview) -> str:
    text = bytes(data[: _MAX_LETTERS + 1]).decode(errors="replace")
    if len(data) > _MAX_LETTERS or "\N{REPLACEMENT CHARACTER}" in text:
        raise ValueError("a name is too long or no text")
    return text


def _tensor(path: Path, tag: str, name: str, dims: tuple[int, ...], slices: list[np.ndarray]) -> LazyTensor:
    dtype = DTYPES[NAMES[name]]
    size = sum(part.size for part in slices)
    shape = () if dims == (0,) and size == dtype.itemsize else dims
    if size != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{path}: {tag} of shape {shape} and type {name} has {size} bytes")
    content = slices[0] if len(slices) == 1 else np.concatenate(slices)
    return LazyTensor(NAMES[name], (content.view(dtype).reshape(shape),), name=tag)


def _without_checksum(path: Path, data: np.ndarray) -> np.ndarray:
    """Return the bytes before the checksum at the end, compared with it, if there is one."""
    tail = data[-len(_CHECKSUM) - _CHECKSUM_BYTES :].tobytes()
    if not tail.startswith(_CHECKSUM):
        return data
    data = data[: -len(tail)]
    if checksum(data) != int.from_bytes(tail[len(_CHECKSUM) :], "big"):
        raise CheckpointError(f"{path} is damaged: it does not match its checksum. Copy it again.")
    return data


# ---- writing


def write_mindspore(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write a ``.ckpt`` file tensor by tensor, with MindSpore's checksum at its end.

    Raises ``CheckpointError`` for a tensor without elements, which MindSpore cannot store.
    """
    total = 0
    with path.open("wb") as file:
        for name, tensor in tensors.items():
            for chunk in _messages(name, tensor):
                total = zlib.crc32(chunk, total)
                file.write(chunk)
        file.write(_CHECKSUM + total.to_bytes(_CHECKSUM_BYTES, "big"))


def _messages(name: str, tensor: LazyTensor) -> Iterator[bytes | np.ndarray]:
    """Yield the bytes of a tensor's ``Value`` messages, one for each slice."""
    if not tensor.size:
        raise CheckpointError(f"{name} has shape {tensor.shape}, which a MindSpore checkpoint cannot hold")
    rows = tensor.shape[0] if tensor.shape else 1
    step = max(1, _SLICE * rows // tensor.nbytes)
    for start in range(0, rows, step):
        part = tensor.rows(start, start + step) if step < rows else tensor
        head = b"".join(b"\x08" + _varint(n) for n in tensor.shape)
        head += _field(2, _NAMES_OF[tensor.dtype].encode()) + b"\x1a" + _varint(part.nbytes)
        value = _field(1, name.encode()) + b"\x12" + _varint(len(head) + part.nbytes) + head
        yield b"\x0a" + _varint(len(value) + part.nbytes) + value
        yield from (chunk.view(np.uint8) for chunk in part.chunks())


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | _BYTES]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
