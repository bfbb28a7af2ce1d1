"""Trace files: one safetensors file with the arrays, and everything else as JSON with a checksum in its metadata.

Nothing in a file is trusted: every size in the JSON must agree with the arrays that the file really holds.
"""

from __future__ import annotations

import json
import zlib
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pixart_nb.core.backend import ms
from pixart_nb.core.hooks.attention_maps import LayerRecord, Packed
from pixart_nb.core.hooks.hook_points import transformer_of
from pixart_nb.core.hooks.selection import is_cross
from pixart_nb.core.io import CRC, CheckpointError, check_sums, open_tensors, save_tensors, tensor_crc
from pixart_nb.core.models.kv_compression import OPERATORS

FORMAT = "pixart-nb trace 1"
#: Arrays of a ``Packed``.
PACKED = ("values", "scale", "offset")
#: Largest side of the token grid and number of a step in a file.
MAX_NUMBER = 2**20
Number = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
Positive = Annotated[int, Field(ge=1, le=MAX_NUMBER)]


class RecordEntry(BaseModel):
    """Description of the arrays of one layer at one step; ``queries`` and ``keys`` are names of arrays in the file."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    name: str = Field(pattern=r"^blocks\.(0|[1-9]\d{0,5})\.(attn|cross_attn)$")
    step: Number
    scale: float = Field(gt=0, le=1)  # of the scores, 1 / sqrt(head size)
    ratio: Positive
    operator: Literal[OPERATORS] | None
    queries: str
    keys: str


class TraceHeader(BaseModel):
    """Everything in a trace but its arrays, as it is written."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    names: list[str]
    heads: list[Number]
    grid: tuple[Number, Number]
    labels: list[str]
    model: dict[str, Any]
    timesteps: list[tuple[Number, float]]
    texts: list[list[tuple[str, list[str]]]]
    text_of: list[tuple[Number, Number]]
    changes: list[str]
    entries: list[RecordEntry]

    @model_validator(mode="after")
    def _consistent(self) -> TraceHeader:
        steps, records = [step for step, _ in self.timesteps], [(e.name, e.step) for e in self.entries]
        for values in (self.heads, steps, records):
            if len(set(values)) != len(values):
                raise ValueError("a head, step or layer occurs twice")
        if set(records) != {(name, step) for name in self.names for step in steps}:
            raise ValueError("its layers and steps are not those of its arrays")
        if any(step not in steps or number >= len(self.texts) for step, number in self.text_of):
            raise ValueError("text_of names a step or prompt that it does not have")
        if any(len(texts) != len(self.labels) for texts in self.texts):
            raise ValueError(f"expected a prompt for each of {len(self.labels)} rows")
        return self


def write_trace(
    path: str | Path, header: dict[str, Any], records: dict[tuple[str, int], LayerRecord], images: np.ndarray | None
) -> None:
    """Write a trace; keys that several steps share are written once."""
    tensors, names = {} if images is None else {"images": images}, {}

    def put(packed: Packed, name: str) -> str:
        if id(packed) not in names:
            names[id(packed)] = name
            tensors.update({f"{name}/{part}": getattr(packed, part) for part in PACKED})
        return names[id(packed)]

    entries = []
    for (name, step), record in records.items():
        prefix = f"{name}/{step}"
        entry = dict(name=name, step=step, scale=record.scale, ratio=record.ratio, operator=record.operator)
        entry |= {"queries": put(record.queries, f"{prefix}/queries"), "keys": put(record.keys, f"{prefix}/keys")}
        tensors |= {f"{prefix}/{n}": a for n in ("mask", "bias") if (a := getattr(record, n)) is not None}
        entries.append(entry)
    content = json.dumps(header | {"entries": entries})
    metadata = {"format": FORMAT, "trace": content, "trace_crc32": str(zlib.crc32(content.encode()))}
    save_tensors(path, tensors, metadata)


def read_trace(path: str | Path) -> tuple[TraceHeader, dict[tuple[str, int], LayerRecord], np.ndarray | None]:
    """Read what ``write_trace`` wrote; a damaged or foreign file raises CheckpointError."""
    with open_tensors(path) as file:
        metadata = dict(file.metadata() or {})
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} is not a trace: its format is {metadata.get('format')!r}, not {FORMAT!r}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content, sums = metadata.get("trace", ""), metadata.get(CRC, "")
    if sums.isdecimal():  # files of version 0.1 have one checksum
        intact = sums == str(_checksum(content, tensors))
    else:
        check_sums(path, sums, {name: tensor_crc(value) for name, value in tensors.items()})
        intact = metadata.get("trace_crc32") == str(zlib.crc32(content.encode()))
    if not intact:
        raise CheckpointError(f"{path} is damaged: its checksum does not match its content. Trace the run again.")
    try:
        header = TraceHeader.model_validate(json.loads(content))
        records = _records(header, tensors)
        images = tensors.get("images", tensors.get("pictures"))  # the name in files of version 0.1
        if images is not None:
            _check("images", images, np.uint8, (len(header.labels), *images.shape[1:3], 3))
        return header, records, images
    except (ValueError, RecursionError, KeyError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else error
        raise CheckpointError(f"{path} is not a valid trace: {problem}") from None


def _records(header: TraceHeader, tensors: dict[str, np.ndarray]) -> dict[tuple[str, int], LayerRecord]:
    (height, width), rows, heads = header.grid, len(header.labels), len(header.heads)
    packed: dict[str, Packed] = {}
    records = {}
    for entry in header.entries:
        cells = None if is_cross(entry.name) else (height // entry.ratio) * (width // entry.ratio)
        for name, count in ((entry.queries, height * width), (entry.keys, cells)):
            packed[name] = packed.get(name) or _packed(tensors, name, rows, heads)
            if packed[name].count != count and not (count is None and packed[name].count):
                raise ValueError(f"{name} has {packed[name].count} vectors for a grid of {height} x {width} tokens")
        queries, keys = packed[entry.queries], packed[entry.keys]
        _check(entry.keys, keys.values, np.int16, (*keys.values.shape[:3], queries.values.shape[3]))
        mask, bias = (tensors.get(f"{entry.name}/{entry.step}/{part}") for part in ("mask", "bias"))
        if mask is not None:
            _check("mask", mask, np.bool_, (rows, keys.count))
        if bias is not None:
            _check("bias", bias, np.float32, (rows, heads, keys.count))
        number = dict(header.text_of).get(entry.step)
        texts = header.texts[number] if number is not None else []
        if is_cross(entry.name) and max((len(pieces) for _, pieces in texts), default=0) > keys.count:
            raise ValueError(f"a prompt has more tokens than {entry.keys} has keys")
        compression = entry.scale, entry.ratio, entry.operator
        records[entry.name, entry.step] = LayerRecord(queries, keys, mask, bias, *compression)
    return records


def _packed(tensors: dict[str, np.ndarray], name: str, rows: int, heads: int) -> Packed:
    values, scale, offset = (tensors[f"{name}/{part}"] for part in PACKED)
    vectors, size = values.shape[2:]
    forms = ((values, np.int16, (vectors, size)), (scale, np.float32, (vectors, 1)), (offset, np.float32, (1, size)))
    for array, dtype, shape in forms:
        _check(name, array, dtype, (rows, heads, *shape))
    return Packed(values, scale, offset)


def _check(name: str, array: np.ndarray, dtype: Any, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"{name} is {array.dtype} {array.shape}; expected {np.dtype(dtype)} {shape}")
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise ValueError(f"{name} has numbers that are not finite")


def _checksum(content: str, tensors: dict[str, np.ndarray]) -> int:
    """Return the one checksum of a file of version 0.1."""
    value = zlib.crc32(content.encode())
    for name in sorted(tensors):
        value = zlib.crc32(np.ascontiguousarray(tensors[name]).view(np.uint8).data, zlib.crc32(name.encode(), value))
    return value


def model_fingerprint(net: Any) -> dict[str, Any]:
    """Return the configuration of a transformer and a digest of a sample of every weight."""
    digest = sha256()
    for name, weight in net.parameters_and_names():
        values = weight.reshape(-1)[:: max(1, weight.size // 64)].astype(ms.float32).asnumpy()
        digest.update(name.encode() + values.tobytes())
    return {"config": net.config.to_dict(), "weights": digest.hexdigest()}


def check_model(fingerprint: dict[str, Any], model: Any) -> None:
    """Refuse a trace with the ``fingerprint`` of another model than ``model`` (a pipeline or a transformer)."""
    own = json.loads(json.dumps(model_fingerprint(transformer_of(model))))
    traced, config = fingerprint.get("config"), own["config"]
    traced = traced if isinstance(traced, dict) else {}
    different = [key for key in config if traced.get(key) != config[key]]
    if different:
        pairs = (f"{key} {traced.get(key)!r} in the trace, {config[key]!r} in the model" for key in different)
        raise CheckpointError(f"the trace is of another model: {', '.join(pairs)}")
    if fingerprint.get("weights") != own["weights"]:
        raise CheckpointError("the trace is of a model of the same shape with other weights; trace this one again")
