"""Checkpoint files of every layout, opened without reading them: tensors by name, and what the file said beside them.

Endings: ``.pth``, ``.pt``, ``.bin`` (torch), ``.safetensors``, ``.ckpt`` (MindSpore). A folder is a component as
diffusers publishes it: one file, or shards with their index.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from pixart_nb.core.checkpoints.lazy_tensor import DTYPES, Stored, check_count, map_file
from pixart_nb.core.checkpoints.mindspore_file import open_mindspore, write_mindspore
from pixart_nb.core.checkpoints.torch_reader import find_weights, read_torch
from pixart_nb.core.checkpoints.torch_writer import write_torch
from pixart_nb.core.io import CheckpointError, opened, read_json

Keep = Callable[[str], bool]

WEIGHTS = "diffusion_pytorch_model.safetensors"
TORCH_ENDINGS = (".pth", ".pt", ".bin")
ENDINGS = (*TORCH_ENDINGS, ".ckpt", ".safetensors")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_LENGTH = struct.Struct("<Q")  # of the header of a safetensors file
_ALIGNMENT = 8


@dataclass(frozen=True)
class Opened:
    """A checkpoint: its tensors under the names of the file, mapped; and sentences on how it was read."""

    path: Path
    tensors: dict[str, Stored]
    notes: list[str] = field(default_factory=list)


def everything(name: str) -> bool:
    """Accepts every name."""
    return True


def open_checkpoint(path: str | Path, keep: Keep = everything) -> Opened:
    """Open a checkpoint file or a component's folder. Nothing is read but the names; a damaged one is an error.

    Only tensors whose names ``keep`` accepts, and only the shards in which those are.

    Raises ``CheckpointError`` for what is missing, damaged, of an unknown ending, or refused.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, keep)
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; expected a checkpoint file or a folder in the diffusers layout"
        )
    if path.suffix not in ENDINGS:
        raise CheckpointError(
            f"{path}: unknown ending {path.suffix!r}; expected .pth, .bin, .ckpt or .safetensors"
        )
    whole = _OPENERS[path.suffix](path)
    return replace(whole, tensors={name: t for name, t in whole.tensors.items() if keep(name)})


def read_tensors(path: str | Path, keep: Keep = everything) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint file or a component's folder whose names ``keep`` accepts: all unless told.

    Read-only views of the files where they can be; bfloat16 becomes float32.
    """
    return {name: np.asarray(tensor) for name, tensor in open_checkpoint(path, keep).tensors.items()}


def _open_torch(path: Path) -> Opened:
    found, place, others = find_weights(read_torch(path, lambda tensor: tensor), path)
    notes = [f"Read from {place!r}; not read: {', '.join(map(repr, others))}."] if others else []
    return Opened(path, {name: replace(tensor, name=name) for name, tensor in found.items()}, notes)


def _open_ckpt(path: Path) -> Opened:
    tensors, others = open_mindspore(path)
    notes = [f"Not tensors, left out: {', '.join(others[:4])}{', ...' if len(others) > 4 else ''}."]
    return Opened(path, tensors, notes if others else [])


def open_safetensors(path: str | Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, mapped. A damaged file is a ``CheckpointError``."""
    path = Path(path)
    with opened(path) as content:
        names = content.offset_keys()  # the library checks that they lie in this order, without gaps
        check_count(path, len(names))
        parts = [(name, content.get_slice(name)) for name in names]
        described = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in parts]
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


_OPENERS: Mapping[str, Callable[[Path], Opened]] = {
    ".safetensors": lambda path: Opened(path, open_safetensors(path)),
    ".ckpt": _open_ckpt,
    **dict.fromkeys(TORCH_ENDINGS, _open_torch),
}
#: What a checkpoint is written with, by its ending.
WRITERS: Mapping[str, Callable[[Path, Mapping[str, Stored]], None]] = {
    ".safetensors": write_safetensors,
    ".ckpt": write_mindspore,
    ".pth": write_torch,
    ".pt": write_torch,
}


def _open_folder(folder: Path, keep: Keep) -> Opened:
    for ending in ("safetensors", "bin"):
        for index in sorted(folder.glob(f"*.{ending}.index.json")):
            return _open_shards(folder, index, keep)
        for stem in _STEMS:
            if (folder / f"{stem}.{ending}").is_file():
                return replace(open_checkpoint(folder / f"{stem}.{ending}", keep), path=folder)
    raise CheckpointError(
        f"{folder} holds no weights: expected diffusion_pytorch_model.safetensors, model.safetensors, their .bin "
        f"forms or an index of shards; it holds {sorted(p.name for p in folder.iterdir())[:10]}"
    )


def _open_shards(folder: Path, index: Path, keep: Keep) -> Opened:
    tensors: dict[str, Stored] = {}
    places = {name: shard for name, shard in _shards_of(folder, index).items() if keep(name)}
    for shard in sorted(set(places.values())):
        tensors |= open_checkpoint(folder / shard, keep).tensors
    lost = [name for name in places if name not in tensors]
    if lost:
        raise CheckpointError(f"{index} places {lost[0]} in {places[lost[0]]}, which does not hold it")
    return Opened(folder, tensors)


def _shards_of(folder: Path, index: Path) -> dict[str, str]:
    """Tensor -> file of an index, all of them files of the folder."""
    places = read_json(index).get("weight_map")
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(shard, str) for shard in places.values())
    ):
        raise CheckpointError(f"{index} has no weight_map; expected names of tensors with names of files")
    shards = sorted(set(places.values()))
    outside = [shard for shard in shards if Path(shard).name != shard or Path(shard).suffix not in ENDINGS]
    if outside:
        raise CheckpointError(
            f"{index} names {outside[:4]}; expected names of checkpoint files inside {folder}"
        )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {missing}, which {index.name} names. Download the missing shards."
        )
    return places
