"""MindSpore's ``.ckpt`` files, read and written without MindSpore, mapped and streamed.

The file is a row of protobuf messages: ``Checkpoint {repeated Value value = 1}``, ``Value {string tag = 1; TensorProto
tensor = 2}``, ``TensorProto {repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3}``. A tensor of
more than 512 MB follows in slices, each a ``Value`` with the same tag and the dimensions of the whole. Optionally
``crc_num`` and ten bytes, the checksum of all before, end the file. Scalars have no dimensions, or [0].
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pixart_nb.core.checkpoints.lazy_tensor import DTYPES, Stored, check_count, map_file, release
from pixart_nb.core.io import CheckpointError

#: MindSpore's names of the kinds of numbers.
NAMES = {
    "Float64": "F64",
    "Float32": "F32",
    "Float16": "F16",
    "BFloat16": "BF16",
    "Bool": "BOOL",
    **{f"Int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"UInt{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
}
_KIND_NAMES = {kind: name for name, kind in NAMES.items()}
_SLICE = 512 * 2**20
_CHECKSUM, _CHECKSUM_SIZE = b"crc_num", 17
_VARINT, _BYTES = 0, 2
_MOST_AXES = 16
_MOST_LETTERS = 4096


class _Reader:
    """Fields of a protobuf message between two places of a file; every length is checked against what is there."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.data = path, memoryview(data)

    def damaged(self, place: int, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} ({len(self.data)} bytes) is truncated or no MindSpore checkpoint: {why} at byte {place}"
        )

    def varint(self, place: int, stop: int) -> tuple[int, int]:
        """A number of seven bits a byte, and the place after it."""
        value = 0
        for shift in range(0, 70, 7):
            if place >= stop:
                raise self.damaged(place, "it ends")
            byte = self.data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & (2**64 - 1), place
        raise self.damaged(place, "a number is too long")

    def fields(self, place: int, stop: int, known: Mapping[int, int]) -> Iterator[tuple[int, int, int]]:
        """(number, start, stop) of each field, (number, value, value) of a number; ``known``: number -> wire type."""
        while place < stop:
            key, place = self.varint(place, stop)
            number, wire = key >> 3, key & 7
            if known.get(number) != wire:
                raise self.damaged(place, f"unknown field {number} of wire type {wire}")
            value, place = self.varint(place, stop)
            if wire == _VARINT:
                yield number, value, value
                continue
            if value > stop - place:
                raise self.damaged(place, f"{value} bytes are announced and {stop - place} follow")
            yield number, place, place + value
            place += value

    def text(self, place: int, stop: int) -> str:
        if stop - place > _MOST_LETTERS:
            raise self.damaged(place, "a name is too long")
        try:
            return bytes(self.data[place:stop]).decode()
        except UnicodeDecodeError as error:
            raise self.damaged(place, "a name is no text") from error

    def value(self, place: int, stop: int) -> tuple[str, str, tuple[int, ...], tuple[int, int]]:
        """Tag, type, dimensions and the place of the content of a ``Value``."""
        tag, tensor = "", None
        for number, start, end in self.fields(place, stop, {1: _BYTES, 2: _BYTES}):
            if number == 1:
                tag = self.text(start, end)
            else:
                tensor = (start, end)
        if not tag or tensor is None:
            raise self.damaged(place, "a value without a name or a tensor")
        kind, dims, content = "", [], (0, 0)
        for number, start, end in self.fields(*tensor, {1: _VARINT, 2: _BYTES, 3: _BYTES}):
            if number == 1:
                dims.append(start)
            elif number == 2:
                kind = self.text(start, end)
            else:
                content = (start, end)
            if len(dims) > _MOST_AXES:
                raise self.damaged(start, f"{tag} has more than {_MOST_AXES} dimensions")
        return tag, kind, tuple(dims), content


def open_mindspore(path: str | Path) -> tuple[dict[str, Stored], list[str]]:
    """The tensors of a ``.ckpt`` file, mapped, and the names of what is no tensor (texts, say)."""
    path = Path(path)
    data = _without_checksum(path, map_file(path))
    reader, pieces, others = _Reader(path, data), {}, []
    for count, (_, start, stop) in enumerate(reader.fields(0, len(data), {1: _BYTES}), 1):
        check_count(path, count)
        tag, kind, dims, content = reader.value(start, stop)
        if kind not in NAMES:
            others.append(tag)
            continue
        first = pieces.setdefault(tag, (kind, dims, []))
        if first[:2] != (kind, dims):
            raise CheckpointError(f"{path} holds {tag} twice, as {first[:2]} and as {(kind, dims)}")
        first[2].append(data[slice(*content)])
    if not pieces:
        raise CheckpointError(f"{path} ({data.size} bytes) holds no tensors; expected a MindSpore checkpoint")
    return {tag: _tensor(path, tag, *found) for tag, found in pieces.items()}, others


def _tensor(path: Path, tag: str, kind: str, dims: tuple[int, ...], pieces: list[np.ndarray]) -> Stored:
    dtype = DTYPES[NAMES[kind]]
    found = sum(piece.size for piece in pieces)
    shape = () if dims == (0,) and found == dtype.itemsize else dims
    if found != int(np.prod(shape, dtype=object)) * dtype.itemsize:
        raise CheckpointError(f"{path}: {tag} of shape {shape} and type {kind} has {found} bytes")
    content = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    return Stored(NAMES[kind], (content.view(dtype).reshape(shape),), name=tag)


def _without_checksum(path: Path, data: np.ndarray) -> np.ndarray:
    """The bytes before the checksum at the end, compared with it, if there is one."""
    tail = data[-_CHECKSUM_SIZE:].tobytes()
    if not tail.startswith(_CHECKSUM):
        return data
    data, total = data[:-_CHECKSUM_SIZE], 0
    for start in range(0, data.size, _SLICE):
        total = zlib.crc32(data[start : start + _SLICE], total)
        release(data)
    if total != int.from_bytes(tail[len(_CHECKSUM) :], "big"):
        raise CheckpointError(f"{path} is damaged: it does not match its checksum. Copy it again.")
    return data


def write_mindspore(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write a ``.ckpt`` file tensor by tensor. MindSpore cannot store a tensor without elements."""
    with path.open("wb") as file:
        for name, tensor in tensors.items():
            if not tensor.size:
                raise CheckpointError(
                    f"{name} has shape {tensor.shape}, which a MindSpore checkpoint cannot hold"
                )
            rows = tensor.shape[0] if tensor.shape else 1
            step = max(1, _SLICE * rows // tensor.nbytes)
            for start in range(0, rows, step):
                part = tensor.rows(start, start + step) if step < rows else tensor
                _write_value(file, name, tensor, part)


def _write_value(file: BinaryIO, name: str, tensor: Stored, part: Stored) -> None:
    head = b"".join(b"\x08" + _varint(n) for n in tensor.shape) + _bytes(
        2, _KIND_NAMES[tensor.dtype].encode()
    )
    head += b"\x1a" + _varint(part.nbytes)
    tag = _bytes(1, name.encode())
    inner = len(head) + part.nbytes
    value = tag + b"\x12" + _varint(inner) + head
    file.write(b"\x0a" + _varint(len(value) + part.nbytes) + value)
    for chunk in part.chunks():
        file.write(chunk.view(np.uint8))


def _bytes(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | _BYTES]) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
