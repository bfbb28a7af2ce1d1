"""Trace files: one safetensors file with the arrays, and everything else as JSON with a checksum in its metadata.

Nothing in a file is trusted: every size in the JSON must agree with the arrays that the file really holds.
"""

from __future__ import annotations

import json
import zlib
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pixart_nb.core.backend import ms
from pixart_nb.core.hooks.attention_maps import LayerRecord, Packed
from pixart_nb.core.hooks.hook_points import transformer_of
from pixart_nb.core.hooks.selection import is_cross
from pixart_nb.core.io import CheckpointError, load_metadata, load_tensors, save_tensors
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
    scale: float
    ratio: Positive
    operator: str | None
    queries: str
    keys: str


class TraceHeader(BaseModel):
    """Everything in a trace but its arrays, as it is written."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    names: list[str]
    heads: list[Number]
    grid: tuple[Positive, Positive]
    labels: list[str]
    model: dict[str, Any]
    timesteps: list[tuple[Number, float]]
    texts: list[list[tuple[str, list[str]]]]
    text_of: list[tuple[Number, Number]]
    changes: list[str]
    entries: list[RecordEntry]


def write_trace(
    path: str | Path,
    header: dict[str, Any],
    records: dict[tuple[str, int], LayerRecord],
    images: np.ndarray | None,
) -> None:
    """Write a trace; keys that several steps share are written once."""
    tensors: dict[str, np.ndarray] = {}
    names: dict[int, str] = {}

    def put(packed: Packed, name: str) -> str:
        if id(packed) not in names:
            names[id(packed)] = name
            tensors.update({f"{name}/{part}": getattr(packed, part) for part in PACKED})
        return names[id(packed)]

    entries = []
    for (name, step), record in records.items():
        prefix = f"{name}/{step}"
        entry = dict(name=name, step=step, scale=record.scale, ratio=record.ratio, operator=record.operator)
        entry |= {
            "queries": put(record.queries, f"{prefix}/queries"),
            "keys": put(record.keys, f"{prefix}/keys"),
        }
        tensors |= {f"{prefix}/{n}": a for n in ("mask", "bias") if (a := getattr(record, n)) is not None}
        entries.append(entry)
    if images is not None:
        tensors["images"] = images
    content = json.dumps(header | {"entries": entries})
    metadata = {"format": FORMAT, "trace": content, "crc32": str(_checksum(content, tensors))}
    save_tensors(path, tensors, metadata)


def read_trace(path: str | Path) -> tuple[TraceHeader, dict[tuple[str, int], LayerRecord], np.ndarray | None]:
    """Read what ``write_trace`` wrote; a damaged or foreign file raises CheckpointError."""
    metadata = load_metadata(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not a trace: its format is {metadata.get('format')!r}, not {FORMAT!r}"
        )
    tensors, content = load_tensors(path), metadata.get("trace", "")
    if metadata.get("crc32") != str(_checksum(content, tensors)):
        raise CheckpointError(
            f"{path} is damaged: its checksum does not match its content. Trace the run again."
        )
    try:
        header = TraceHeader.model_validate(json.loads(content))
        records = _records(header, tensors)
        return header, records, _images(header, tensors)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"{path} is not a valid trace: {where}: {first['msg']}") from None
    except (ValueError, RecursionError, KeyError) as error:
        raise CheckpointError(f"{path} is not a valid trace: {error}") from None


def _records(header: TraceHeader, tensors: dict[str, np.ndarray]) -> dict[tuple[str, int], LayerRecord]:
    rows, heads, packed = len(header.labels), len(header.heads), {}
    height, width = header.grid

    def unpack(name: str, count: int | None) -> Packed:
        if name not in packed:
            values, scale, offset = (_array(tensors, f"{name}/{part}") for part in PACKED)
            packed[name] = Packed(values, scale, offset)
        values, scale, offset = (getattr(packed[name], part) for part in PACKED)
        _check(name, values, np.int16, (rows, heads, count, None))
        _check(name, scale, np.float32, (*values.shape[:3], 1))
        _check(name, offset, np.float32, (rows, heads, 1, values.shape[3]))
        return packed[name]

    records = {}
    for entry in header.entries:
        if entry.operator not in (None, *OPERATORS):
            raise ValueError(f"operator {entry.operator!r}, expected one of {', '.join(OPERATORS)}")
        cells = None if is_cross(entry.name) else (height // entry.ratio) * (width // entry.ratio)
        queries, keys = unpack(entry.queries, height * width), unpack(entry.keys, cells)
        if keys.values.shape[3] != queries.values.shape[3] or keys.count == 0:
            raise ValueError(
                f"{entry.keys} has vectors of shape {keys.values.shape}, {entry.queries} of another size"
            )
        prefix = f"{entry.name}/{entry.step}"
        mask, bias = (tensors.get(f"{prefix}/{part}") for part in ("mask", "bias"))
        if mask is not None:
            _check(f"{prefix}/mask", mask, np.bool_, (rows, keys.count))
        if bias is not None:
            _check(f"{prefix}/bias", bias, np.float32, (rows, heads, keys.count))
        records[entry.name, entry.step] = LayerRecord(
            queries, keys, mask, bias, entry.scale, entry.ratio, entry.operator
        )
    _check_complete(header, records)
    return records


def _check_complete(header: TraceHeader, records: dict[tuple[str, int], LayerRecord]) -> None:
    """Refuse a header whose layers, steps and prompts are not those of its records."""
    steps, rows = [step for step, _ in header.timesteps], len(header.labels)
    if set(records) != {(name, step) for name in header.names for step in steps}:
        raise ValueError("its layers and steps are not those of its arrays")
    if (
        len(header.entries) != len(records)
        or len(set(steps)) != len(steps)
        or len(set(header.heads)) != len(header.heads)
    ):
        raise ValueError("a layer, step or head occurs twice")
    if any(number >= len(header.texts) or step not in steps for step, number in header.text_of):
        raise ValueError("text_of names a prompt or step that it does not have")
    if any(len(texts) != rows for texts in header.texts):
        raise ValueError(f"expected a prompt for each of {rows} rows")
    for (name, step), record in records.items():
        number = dict(header.text_of).get(step)
        if number is not None and is_cross(name):
            longest = max((len(pieces) for _, pieces in header.texts[number]), default=0)
            if longest > record.keys.count:
                raise ValueError(f"a prompt of {longest} tokens for {record.keys.count} keys of {name}")


def _images(header: TraceHeader, tensors: dict[str, np.ndarray]) -> np.ndarray | None:
    images = tensors.get("images", tensors.get("pictures"))  # the name in files of version 0.1
    if images is not None:
        _check("images", images, np.uint8, (len(header.labels), None, None, 3))
    return images


def _array(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"array {name!r} is missing")
    return tensors[name]


def _check(name: str, array: np.ndarray, dtype: Any, shape: tuple[int | None, ...]) -> None:
    fits = len(array.shape) == len(shape)
    fits = fits and all(n in (None, size) for n, size in zip(shape, array.shape, strict=True))
    if array.dtype != dtype or not fits:
        expected = tuple("any" if n is None else n for n in shape)
        raise ValueError(f"{name} is {array.dtype} {array.shape}; expected {np.dtype(dtype)} {expected}")
    if array.dtype == np.float32 and not np.isfinite(array).all():
        raise ValueError(f"{name} has numbers that are not finite")


def _checksum(content: str, tensors: dict[str, np.ndarray]) -> int:
    value = zlib.crc32(content.encode())
    for name in sorted(tensors):
        value = zlib.crc32(
            np.ascontiguousarray(tensors[name]).view(np.uint8).data, zlib.crc32(name.encode(), value)
        )
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
        raise CheckpointError(
            "the trace is of a model of the same shape with other weights; trace this one again"
        )
