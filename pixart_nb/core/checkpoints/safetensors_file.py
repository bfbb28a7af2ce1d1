"""safetensors files, mapped when read and streamed when written: a tensor at a time, whatever the size of the file."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pixart_nb.core.checkpoints.store import CheckpointError, opened
from pixart_nb.core.checkpoints.stored import DTYPES, Stored, map_file

_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8


def open_safetensors(path: str | Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, mapped. A damaged file is a ``CheckpointError``."""
    path = Path(path)
    with opened(
        path
    ) as content:  # the library checks that the tensors lie without gaps, in the order of offset_keys
        found = [(name, content.get_slice(name)) for name in content.offset_keys()]
        described = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in found]
    data = map_file(path)
    place = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    tensors = {}
    for name, kind, shape in described:
        if kind not in DTYPES:
            raise CheckpointError(f"{path}: {name} is of kind {kind}; expected one of {', '.join(DTYPES)}")
        stop = place + int(np.prod(shape, dtype=object)) * DTYPES[kind].itemsize
        tensors[name] = Stored(kind, (data[place:stop].view(DTYPES[kind]).reshape(shape),), name=name)
        place = stop
    return tensors


def write_safetensors(path: Path, tensors: Mapping[str, Stored]) -> None:
    """Write a safetensors file tensor by tensor, those of wide numbers first, so that every one is aligned."""
    order = sorted(tensors, key=lambda name: -DTYPES[tensors[name].dtype].itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in order:
        tensor = tensors[name]
        places = [place, place + tensor.nbytes]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": places}
        place += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(_LENGTH.pack(len(text)) + text)
        for name in order:
            for chunk in tensors[name].chunks():
                file.write(chunk.view(np.uint8))
