"""Checkpoint files of every format, opened without reading the tensors.

Endings: ``.pth``, ``.pt``, ``.bin`` (torch), ``.safetensors``, ``.ckpt`` (MindSpore). A folder is a component as
diffusers publishes it: one file, or shards with their index, possibly as a variant (``model.fp16.safetensors``).
"""

from __future__ import annotations

import json
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pixart_nb.core.checkpoints.lazy_tensor import DTYPES, FP8, LazyTensor, check_count, checksum, map_file
from pixart_nb.core.errors import first_few
from pixart_nb.core.io import CRC, CheckpointError, check_file, check_sums, crc_seed, open_tensors, read_json

Keep = Callable[[str], bool]

WEIGHTS = "diffusion_pytorch_model.safetensors"
TORCH_ENDINGS = (".pth", ".pt", ".bin")
ENDINGS = (*TORCH_ENDINGS, ".ckpt", ".safetensors")
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_SHARD = r"(?:-\d+-of-\d+)?"
_WEIGHTS_FILE = re.compile(
    rf"(?:{'|'.join(STEMS)}){_SHARD}(?:\.(?P<variant>[\w-]+?){_SHARD})?\.(?P<ending>safetensors|bin)"
    rf"(?:\.index(?:\.(?P<indexed>[\w-]+))?\.json)?"
)
#: Endings of weights of other frameworks.
_FOREIGN_ENDINGS = (".msgpack", ".h5", ".onnx", ".onnx_data", ".pb", ".tflite")
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


def open_checkpoint(
    path: str | Path, keep: Keep = lambda name: True, variant: str | None = None, use_safetensors: bool | None = None
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
    if path.suffix == ".safetensors":
        return _open_safetensors(path, keep)
    if path.suffix not in ENDINGS:
        raise CheckpointError(f"{path}: unknown ending {path.suffix!r}; expected .pth, .bin, .ckpt or .safetensors")
    # The readers of other formats are imported when a file of theirs is opened.
    if path.suffix == ".ckpt":
        from pixart_nb.core.checkpoints.mindspore_file import open_mindspore

        tensors, others = open_mindspore(path)
        notes = [f"Not tensors, left out: {first_few(others)}."]
    else:
        from pixart_nb.core.checkpoints.torch_file import find_weights, read_torch

        tensors, key, others = find_weights(read_torch(path), path)
        notes = [f"Read from {key!r}; not read: {', '.join(map(repr, others))}."]
    return Checkpoint(path, {n: tensor for n, tensor in tensors.items() if keep(n)}, notes if others else [])


def read_tensors(path: str | Path, keep: Keep = lambda name: True, **options) -> dict[str, np.ndarray]:
    """Return the tensors of a checkpoint file or folder; ``keep`` and ``options`` as in ``open_checkpoint``.

    Read-only views of the files where possible; bfloat16 becomes float32.
    """
    return {name: np.asarray(tensor) for name, tensor in open_checkpoint(path, keep, **options).tensors.items()}


# ---- safetensors


def _open_safetensors(path: Path, keep: Keep) -> Checkpoint:
    with open_tensors(path) as content:
        names = content.offset_keys()  # the library checks that they lie in this order, without gaps
        check_count(path, len(names))
        slices = [(name, content.get_slice(name)) for name in names]
        header = [(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices]
        metadata = content.metadata() or {}
    data, tensors = map_file(path), {}
    start = _LENGTH.size + _LENGTH.unpack_from(data)[0]
    for name, dtype, shape in header:
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: {name} has dtype {dtype}; expected one of {', '.join(DTYPES)}")
        stop = start + math.prod(shape) * DTYPES[dtype].itemsize
        if keep(name):
            values = data[start:stop].view(DTYPES[dtype]).reshape(shape)
            tensors[name] = LazyTensor("F32" if dtype in FP8 else dtype, (values,), dtype, name)
        start = stop
    if CRC in metadata:
        bits = {name: tensor.parts[0].reshape(-1).view(np.uint8) for name, tensor in tensors.items()}
        sums = {name: checksum(bits[name], crc_seed(t.storage_dtype, t.shape)) for name, t in tensors.items()}
        check_sums(path, metadata[CRC], sums)
    return _weights_of_state(path, tensors, metadata)


def _weights_of_state(path: Path, tensors: dict[str, LazyTensor], metadata: Mapping[str, str]) -> Checkpoint:
    """Return the weights of a training state (``ema/NAME``, ``model/NAME``); other checkpoints as they are."""
    groups = [group for group in _STATE_GROUPS if any(name.startswith(group) for name in tensors)]
    if not groups:
        stored = sorted({t.storage_dtype for t in tensors.values() if t.storage_dtype in FP8})
        return Checkpoint(path, tensors, [f"Stored as {', '.join(stored)}, read as F32."] if stored else [])
    names = {name: name.removeprefix(groups[0]) for name in tensors if name.startswith(groups[0])}
    if any(".lora_" in name for name in names):
        raise CheckpointError(
            f"{path} is the state of a LoRA training, not of a transformer; load the folder of its result "
            "with load_lora_weights"
        )
    try:
        config = dict(json.loads(metadata.get("identity", "{}")).get("architecture", {}))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: the identity in its metadata cannot be read") from error
    note = f"A training state: its {'EMA ' * (groups[0] == 'ema/')}weights are read."
    return Checkpoint(path, {n: replace(tensors[key], name=n) for key, n in names.items()}, [note], config)


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor]) -> None:
    """Write a safetensors file tensor by tensor, wide dtypes first, so that all are aligned; with checksums."""
    order = sorted(tensors, key=lambda name: -DTYPES[tensors[name].dtype].itemsize)
    sums = dict.fromkeys(order, "0" * 8)
    with path.open("wb") as file:
        file.write(_safetensors_header(tensors, sums))
        for name in order:
            total = crc_seed(tensors[name].dtype, tensors[name].shape)
            for chunk in tensors[name].chunks():
                total = zlib.crc32(chunk.view(np.uint8), total)
                file.write(chunk.view(np.uint8))
            sums[name] = f"{total:08x}"
        file.seek(0)
        file.write(_safetensors_header(tensors, sums))  # as long as the first one


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


# ---- folders


def _open_folder(folder: Path, keep: Keep, variant: str | None, use_safetensors: bool | None) -> Checkpoint:
    names = sorted(path.name for path in folder.iterdir())
    choices = _preferred(names, variant, use_safetensors)
    for ending, suffix in choices:
        checkpoint = _open_files(folder, keep, ending, f".{suffix}" if suffix else "")
        if checkpoint is not None:
            note = [f"The weights are those of the variant {suffix!r}."] if suffix and suffix != variant else []
            if variant and not suffix:
                warnings.warn(f"{folder} has no variant {variant!r}; the others are read", stacklevel=2)
            return replace(checkpoint, path=folder, notes=checkpoint.notes + note)
    ending = choices[0][0]
    if (folder / "model_index.json").is_file():
        raise CheckpointError(f"{folder} is a whole pipeline: give it as the model, or the folder of a component")
    raise CheckpointError(
        f"{folder} holds no weights: expected {' or '.join(f'{stem}.{ending}' for stem in STEMS[:2])}, "
        f"{'their .bin forms, ' * (use_safetensors is None)}or an index of shards; it holds {names[:10]}"
    )


def _preferred(names: Sequence[str], variant: str | None, use_safetensors: bool | None) -> list[tuple[str, str]]:
    """Return ending and variant of the weights to read of a folder of such files, the preferred first."""
    endings = {None: ("safetensors", "bin"), True: ("safetensors",), False: ("bin",)}[use_safetensors]
    others = {pair[1] for pair in map(_ending_and_variant, names) if pair} - {""}
    # The given variant, then none; without one given, none, then the only one that there is.
    suffixes = [variant, ""] if variant else ["", *(others if len(others) == 1 else ())]
    return [(ending, suffix) for suffix in suffixes for ending in endings]


def _ending_and_variant(name: str) -> tuple[str, str] | None:
    match = _WEIGHTS_FILE.fullmatch(name)
    return match and (match["ending"], match["variant"] or match["indexed"] or "")


def unread_files(paths: Iterable[str], variant: str | None = None, use_safetensors: bool | None = None) -> list[str]:
    """Return which files of a pipeline or component hold weights that ``open_checkpoint`` does not read.

    They are those of other formats or variants than the preferred one of their folder, which may be large.
    """
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(str(PurePosixPath(path).parent), []).append(path)
    unread = []
    for files in folders.values():
        pairs = {path: _ending_and_variant(PurePosixPath(path).name) for path in files}
        names = [PurePosixPath(path).name for path in files]
        chosen = next((c for c in _preferred(names, variant, use_safetensors) if c in pairs.values()), None)
        if chosen:
            unread += [path for path in files if pairs[path] not in (None, chosen) or path.endswith(_FOREIGN_ENDINGS)]
    return unread


def _open_files(folder: Path, keep: Keep, ending: str, suffix: str) -> Checkpoint | None:
    for index in sorted(folder.glob(f"*.{ending}.index{suffix}.json")):
        return _open_shards(folder, index, keep)
    paths = [folder / f"{stem}{suffix}.{ending}" for stem in STEMS]
    return next((open_checkpoint(path, keep) for path in paths if path.is_file()), None)


def _open_shards(folder: Path, index: Path, keep: Keep) -> Checkpoint:
    """Open the shards that hold the tensors of ``keep``; all shards of the index are files of the folder."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{index} has no weight_map; expected names of tensors with names of files")
    files = sorted(set(shards.values()))
    outside = [name for name in files if Path(name).name != name or Path(name).suffix not in ENDINGS]
    if outside:
        raise CheckpointError(f"{index} names {outside[:4]}; expected names of checkpoint files inside {folder}")
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {missing}, which {index.name} names. Download the missing shards.")
    shards = {name: shard for name, shard in shards.items() if keep(name)}
    tensors: dict[str, LazyTensor] = {}
    for shard in sorted(set(shards.values())):
        tensors |= open_checkpoint(folder / shard, keep).tensors
    lost = [name for name in shards if name not in tensors]
    if lost:
        raise CheckpointError(f"{index} places {lost[0]} in {shards[lost[0]]}, which does not hold it")
    return Checkpoint(folder, tensors)
