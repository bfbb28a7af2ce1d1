"""Checkpoint files of every format, opened without reading the tensors.

Endings: ``.pth``, ``.pt``, ``.bin`` (torch), ``.safetensors``, ``.ckpt`` (MindSpore). A folder is a component as
diffusers publishes it: one file, or shards with their index, possibly as a variant (``model.fp16.safetensors``).
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.checkpoints.lazy_tensor import DTYPES, LazyTensor, check_count, checksum, map_file
from pixart_nb.core.checkpoints.mindspore_file import open_mindspore, write_mindspore
from pixart_nb.core.checkpoints.torch_file import find_weights, read_torch, write_torch
from pixart_nb.core.io import (
    CRC,
    CheckpointError,
    check_file,
    check_sums,
    crc_seed,
    load_metadata,
    open_tensors,
    read_json,
)

Keep = Callable[[str], bool]

WEIGHTS = "diffusion_pytorch_model.safetensors"
TORCH_ENDINGS = (".pth", ".pt", ".bin")
ENDINGS = (*TORCH_ENDINGS, ".ckpt", ".safetensors")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANT = re.compile(rf"(?:{'|'.join(_STEMS)})\.([\w-]+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)")
_LENGTH = struct.Struct("<Q")  # of the header of a safetensors file
_ALIGNMENT = 8
#: Groups of tensors in the training states of this kit, the preferred first.
_STATE_GROUPS = ("ema/", "model/")


@dataclass(frozen=True)
class Checkpoint:
    """Tensors of a checkpoint under the names of the file, mapped, and sentences on how it was read.

    ``config``: ``PixArtConfig``'s fields, if the file holds them.
    """

    path: Path
    tensors: dict[str, LazyTensor]
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)


def everything(name: str) -> bool:
    """Accept every name."""
    return True


def open_checkpoint(
    path: str | Path, keep: Keep = everything, variant: str | None = None, use_safetensors: bool | None = None
) -> Checkpoint:
    """Open a checkpoint file or a component's folder; only the names and shapes of tensors are read.

    ``keep``: accepts the names of the tensors to open; only their shards are opened. ``variant`` and
    ``use_safetensors``: the files of a folder to prefer, as in diffusers. The weights of a training state of this kit
    are its EMA weights, if it has any. Checksums that a file carries are compared.

    Raises ``CheckpointError`` for what is missing, damaged, of an unknown ending, or refused.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _open_folder(path, keep, variant, use_safetensors)
    check_file(path, "a checkpoint file or a folder in the diffusers layout")
    if path.suffix not in ENDINGS:
        raise CheckpointError(f"{path}: unknown ending {path.suffix!r}; expected .pth, .bin, .ckpt or .safetensors")
    checkpoint = _OPENERS[path.suffix](path)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if keep(name)}
    if path.suffix == ".safetensors":
        _check_safetensors(path, tensors)
        return _weights_of_state(replace(checkpoint, tensors=tensors))
    return replace(checkpoint, tensors=tensors)


def read_tensors(path: str | Path, keep: Keep = everything, **options) -> dict[str, np.ndarray]:
    """Return the tensors of a checkpoint file or folder; ``keep`` and ``options`` as in ``open_checkpoint``.

    Read-only views of the files where possible; bfloat16 becomes float32.
    """
    return {name: np.asarray(tensor) for name, tensor in open_checkpoint(path, keep, **options).tensors.items()}


def _open_torch(path: Path) -> Checkpoint:
    tensors, key, others = find_weights(read_torch(path), path)
    notes = [f"Read from {key!r}; not read: {', '.join(map(repr, others))}."] if others else []
    return Checkpoint(path, tensors, notes)


def _open_ckpt(path: Path) -> Checkpoint:
    tensors, others = open_mindspore(path)
    notes = [f"Not tensors, left out: {', '.join(others[:4])}{', ...' if len(others) > 4 else ''}."]
    return Checkpoint(path, tensors, notes if others else [])


def _weights_of_state(checkpoint: Checkpoint) -> Checkpoint:
    """Return the weights of a training state (``ema/NAME``, ``model/NAME``); other checkpoints as they are."""
    groups = [group for group in _STATE_GROUPS if any(name.startswith(group) for name in checkpoint.tensors)]
    if not groups:
        return checkpoint
    names = {name: name.removeprefix(groups[0]) for name in checkpoint.tensors if name.startswith(groups[0])}
    if any(".lora_" in name for name in names):
        raise CheckpointError(
            f"{checkpoint.path} is the state of a LoRA training, not of a transformer; load the folder of its result "
            "with load_lora_weights"
        )
    tensors = {name: replace(checkpoint.tensors[key], name=name) for key, name in names.items()}
    note = f"A training state: its {'EMA ' * (groups[0] == 'ema/')}weights are read."
    return Checkpoint(checkpoint.path, tensors, [*checkpoint.notes, note], _config_of_state(checkpoint.path))


def _config_of_state(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(load_metadata(path).get("identity", "{}")).get("architecture", {})
        return dict(config)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: the identity in its metadata cannot be read") from error


# ---- safetensors


def _open_safetensors(path: Path) -> Checkpoint:
    with open_tensors(path) as content:
        names = content.offset_keys()  # the library checks that they lie in this order, without gaps
        check_count(path, len(names))
        slices = [(name, content.get_slice(name)) for name in names]
        header = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices]
    data = map_file(path)
    start = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    tensors = {}
    for name, dtype, shape in header:
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name} has dtype {dtype}; expected one of {', '.join(DTYPES)}")
        stop = start + int(np.prod(shape, dtype=object)) * DTYPES[dtype].itemsize
        values = data[start:stop].view(DTYPES[dtype]).reshape(shape)
        tensors[name] = LazyTensor(dtype, (values,), name=name)
        start = stop
    return Checkpoint(path, tensors)


def _check_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Compare tensors with the checksums that this kit writes into the header."""
    with open_tensors(path) as content:
        sums = (content.metadata() or {}).get(CRC)
    if sums is not None:
        check_sums(path, sums, {n: checksum(_raw(t.parts[0]), crc_seed(t.dtype, t.shape)) for n, t in tensors.items()})


def _raw(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1).view(np.uint8)


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write a safetensors file tensor by tensor, wide dtypes first, so that all are aligned; with checksums."""
    order = sorted(tensors, key=lambda name: -DTYPES[tensors[name].dtype].itemsize)
    sums = dict.fromkeys(order, "0" * 8)
    with path.open("wb") as file:
        start = file.write(_safetensors_header(tensors, sums))
        for name in order:
            total = crc_seed(tensors[name].dtype, tensors[name].shape)
            for chunk in tensors[name].chunks():
                total = zlib.crc32(chunk.view(np.uint8), total)
                file.write(chunk.view(np.uint8))
            sums[name] = f"{total:08x}"
        file.seek(0)
        header = _safetensors_header(tensors, sums)
        assert len(header) == start
        file.write(header)


def _safetensors_header(tensors: Mapping[str, LazyTensor], sums: Mapping[str, str]) -> bytes:
    header: dict[str, dict] = {"__metadata__": {"format": "pt", CRC: json.dumps(sums)}}
    start = 0
    for name in sums:
        stop = start + tensors[name].nbytes
        header[name] = {"dtype": tensors[name].dtype, "shape": list(tensors[name].shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return _LENGTH.pack(len(text)) + text


_OPENERS: Mapping[str, Callable[[Path], Checkpoint]] = {
    ".safetensors": _open_safetensors,
    ".ckpt": _open_ckpt,
    **dict.fromkeys(TORCH_ENDINGS, _open_torch),
}
#: Writers of checkpoints by ending.
WRITERS: Mapping[str, Callable[[Path, Mapping[str, LazyTensor]], None]] = {
    ".safetensors": write_safetensors,
    ".ckpt": write_mindspore,
    ".pth": write_torch,
    ".pt": write_torch,
}


# ---- folders


def _open_folder(folder: Path, keep: Keep, variant: str | None, use_safetensors: bool | None) -> Checkpoint:
    endings = {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}[use_safetensors]
    for suffix in _variants(folder, variant):
        note = [f"The weights are those of the variant {suffix!r}."] if suffix and suffix != variant else []
        for ending in endings:
            checkpoint = _open_files(folder, keep, ending, suffix)
            if checkpoint is not None:
                return replace(checkpoint, path=folder, notes=checkpoint.notes + note)
    names = sorted(path.name for path in folder.iterdir())[:10]
    raise CheckpointError(
        f"{folder} holds no weights: expected {' or '.join(f'{stem}.{endings[0]}' for stem in _STEMS[:2])}, "
        f"{'their .bin forms, ' * (use_safetensors is None)}or an index of shards; it holds {names}"
    )


def _variants(folder: Path, variant: str | None) -> list[str]:
    """Return the variants to try: the given one, none, and the only one that there is."""
    if variant:
        return [variant, ""]
    names = {match[1] for path in folder.iterdir() if (match := _VARIANT.fullmatch(path.name))}
    return ["", *(names if len(names) == 1 else ())]


def _open_files(folder: Path, keep: Keep, ending: str, variant: str) -> Checkpoint | None:
    for index in sorted(folder.glob(f"*.{ending}.index{'.' * bool(variant)}{variant}.json")):
        return _open_shards(folder, index, keep)
    for stem in _STEMS:
        path = folder / f"{stem}.{variant}{'.' * bool(variant)}{ending}"
        if path.is_file():
            return open_checkpoint(path, keep)
    return None


def _open_shards(folder: Path, index: Path, keep: Keep) -> Checkpoint:
    tensors: dict[str, LazyTensor] = {}
    shards = {name: shard for name, shard in _shards_of(folder, index).items() if keep(name)}
    for shard in sorted(set(shards.values())):
        tensors |= open_checkpoint(folder / shard, keep).tensors
    lost = [name for name in shards if name not in tensors]
    if lost:
        raise CheckpointError(f"{index} places {lost[0]} in {shards[lost[0]]}, which does not hold it")
    return Checkpoint(folder, tensors)


def _shards_of(folder: Path, index: Path) -> dict[str, str]:
    """Return the file of each tensor of an index; all are files of the folder."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{index} has no weight_map; expected names of tensors with names of files")
    names = sorted(set(shards.values()))
    outside = [name for name in names if Path(name).name != name or Path(name).suffix not in ENDINGS]
    if outside:
        raise CheckpointError(f"{index} names {outside[:4]}; expected names of checkpoint files inside {folder}")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {missing}, which {index.name} names. Download the missing shards.")
    return shards
