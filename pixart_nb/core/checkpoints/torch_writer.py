"""Writes ``.pth`` files without PyTorch: ``{"state_dict": tensors}`` in the zip format of ``torch.save``.

The layout is torch's: a pickle of the names and shapes, a raw member for each tensor, aligned as torch aligns them.
**Not opened with PyTorch here**; ``torch_reader`` reads back what is written.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pixart_nb.core.checkpoints.lazy_tensor import Stored
from pixart_nb.core.checkpoints.torch_unpickler import STORAGES
from pixart_nb.core.io import CheckpointError

_CLASSES = {kind: name for name, kind in STORAGES.items()}
_ARCHIVE = "archive"
_ALIGNMENT = 64
_LOCAL_HEADER = 30
_PADDING_FIELD = b"FB"
#: A member of this many bytes needs the longer header of zip's 64-bit form.
_LARGE = 2**31 - 1
_PICKLE_VERSION = 2


def write_torch(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write a ``.pth`` file tensor by tensor."""
    wrong = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in _CLASSES]
    if wrong:
        raise CheckpointError(
            f"a .pth file cannot hold {', '.join(wrong[:4])}; it can hold {', '.join(_CLASSES)}"
        )
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{_ARCHIVE}/data.pkl", _pickled(tensors))
        archive.writestr(f"{_ARCHIVE}/byteorder", "little")
        for number, tensor in enumerate(tensors.values()):
            large = tensor.nbytes > _LARGE
            info = zipfile.ZipInfo(f"{_ARCHIVE}/data/{number}")
            info.extra = b"" if large else _padding(file.tell() + _LOCAL_HEADER + len(info.filename))
            with archive.open(info, "w", force_zip64=large) as member:
                for chunk in tensor.chunks():
                    member.write(chunk.view(np.uint8))
        archive.writestr(f"{_ARCHIVE}/version", "3\n")


def _padding(place: int) -> bytes:
    """A field that moves what follows it from ``place`` to a multiple of 64 bytes, as torch's own."""
    size = -(place + len(_PADDING_FIELD) + 2) % _ALIGNMENT
    return _PADDING_FIELD + size.to_bytes(2, "little") + b"Z" * size


def _pickled(tensors: Mapping[str, Stored]) -> bytes:
    """The pickle: instructions that rebuild each tensor from its storage."""
    parts = [pickle.PROTO, bytes([_PICKLE_VERSION]), pickle.EMPTY_DICT, _text("state_dict")]
    parts += [_ORDERED, pickle.MARK]
    for number, (name, tensor) in enumerate(tensors.items()):
        parts += [_text(name), _rebuilt(tensor, str(number))]
    parts += [pickle.SETITEMS, pickle.SETITEM, pickle.STOP]
    return b"".join(parts)


def _rebuilt(tensor: Stored, storage: str) -> bytes:
    strides = [int(np.prod(tensor.shape[axis + 1 :], dtype=object)) for axis in range(len(tensor.shape))]
    kind = _global("torch", _CLASSES[tensor.dtype])
    key = (
        _tuple(_text("storage"), kind, _text(storage), _text("cpu"), _number(tensor.size)) + pickle.BINPERSID
    )
    view = [_number(0), *(_tuple(*map(_number, numbers)) for numbers in (tensor.shape, strides))]
    arguments = _tuple(key, *view, pickle.NEWFALSE, _ORDERED)
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + len(text.encode()).to_bytes(4, "little") + text.encode()


def _number(number: int) -> bytes:
    return pickle.LONG1 + b"\x08" + number.to_bytes(8, "little", signed=True)


def _tuple(*items: bytes) -> bytes:
    return pickle.MARK + b"".join(items) + pickle.TUPLE


_ORDERED = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
