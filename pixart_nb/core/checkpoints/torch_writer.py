"""Writer of ``.pth`` files without PyTorch: ``{"state_dict": tensors}`` in the zip format of ``torch.save``.

A pickle holds names and shapes, and one uncompressed member each tensor, aligned as torch aligns them.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pixart_nb.core.checkpoints.lazy_tensor import LazyTensor
from pixart_nb.core.checkpoints.pickle_program import STORAGES
from pixart_nb.core.io import CheckpointError

_CLASSES = {dtype: name for name, dtype in STORAGES.items()}
_ALIGNMENT = 64
_LOCAL_HEADER = 30
_PADDING_FIELD = b"FB"
#: A member of this many bytes needs the longer header of zip's 64-bit form.
_LARGE = 2**31 - 1


def write_torch(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write a ``.pth`` file tensor by tensor."""
    wrong = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in _CLASSES]
    if wrong:
        raise CheckpointError(f"a .pth file cannot hold {', '.join(wrong[:4])}; it can hold {', '.join(_CLASSES)}")
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", _pickled(tensors))
        archive.writestr("archive/byteorder", "little")
        for number, tensor in enumerate(tensors.values()):
            large = tensor.nbytes > _LARGE
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


def _pickled(tensors: Mapping[str, LazyTensor]) -> bytes:
    """Return the pickle, whose instructions rebuild each tensor from its storage."""
    parts = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT, _text("state_dict"), _ORDERED_DICT, pickle.MARK]
    for number, (name, tensor) in enumerate(tensors.items()):
        strides = [int(np.prod(tensor.shape[axis + 1 :], dtype=object)) for axis in range(len(tensor.shape))]
        storage = _global("torch", _CLASSES[tensor.dtype])
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
