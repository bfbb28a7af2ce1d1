"""A trace as one safetensors file: arrays as tensors, all else as JSON in its metadata, with a checksum."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.hooks.maps import Kept
from pixart_nb.core.hooks.packed import Packed
from pixart_nb.core.hooks.record import Trace
from pixart_nb.core.hooks.words import Text
from pixart_nb.core.io import CheckpointError, load_metadata, load_tensors, save_tensors

FORMAT = "pixart-nb trace 1"
#: Of a Packed.
PARTS = ("values", "scale", "offset")


def save_trace(trace: Trace, path: str | Path) -> None:
    """Write a trace; keys that steps share are written once."""
    tensors: dict[str, np.ndarray] = {}
    places: dict[int, str] = {}

    def put(packed: Packed, place: str) -> str:
        if id(packed) not in places:
            places[id(packed)] = place
            tensors.update({f"{place}/{part}": getattr(packed, part) for part in PARTS})
        return places[id(packed)]

    entries = []
    for (name, step), kept in trace.kept.items():
        place = f"{name}/{step}"
        entry = {
            "name": name,
            "step": step,
            "scale": kept.scale,
            "ratio": kept.ratio,
            "operator": kept.operator,
        }
        entry |= {"queries": put(kept.queries, f"{place}/queries"), "keys": put(kept.keys, f"{place}/keys")}
        tensors |= {f"{place}/{n}": a for n in ("mask", "bias") if (a := getattr(kept, n)) is not None}
        entries.append(entry)
    if trace.pictures is not None:
        tensors["pictures"] = trace.pictures
    content = json.dumps(_content(trace) | {"entries": entries})
    metadata = {"format": FORMAT, "trace": content, "crc32": str(_checksum(content, tensors))}
    save_tensors(path, tensors, metadata)


def _content(trace: Trace) -> dict[str, Any]:
    return {
        "names": trace.names,
        "heads": trace.heads,
        "grid": trace.grid,
        "labels": trace.labels,
        "model": trace.model,
        "timesteps": list(trace.timestep_of.items()),
        "texts": [[[text.prompt, text.pieces] for text in rows] for rows in trace.texts],
        "text_of": list(trace.text_of.items()),
        "changes": trace.changes,
    }


def load_trace(path: str | Path, model: Any = None) -> Trace:
    """Read what ``save_trace`` wrote."""
    metadata = load_metadata(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no trace: its format is {metadata.get('format')!r}, not {FORMAT!r}")
    tensors, content = load_tensors(path), metadata.get("trace", "")
    if metadata.get("crc32") != str(_checksum(content, tensors)):
        raise CheckpointError(
            f"{path} is damaged: its checksum is not that of what it holds. Trace the run again."
        )
    trace = _rebuilt(json.loads(content), tensors)
    if model is not None:
        check_model(trace, model)
    return trace


def _rebuilt(content: dict[str, Any], tensors: dict[str, np.ndarray]) -> Trace:
    trace = Trace(
        content["names"], content["heads"], tuple(content["grid"]), content["labels"], content["model"]
    )
    trace.timestep_of, trace.text_of = dict(content["timesteps"]), dict(content["text_of"])
    trace.texts = [[Text(prompt, tuple(pieces)) for prompt, pieces in rows] for rows in content["texts"]]
    trace.changes = content["changes"]
    packed: dict[str, Packed] = {}
    for entry in content["entries"]:
        for place in (entry["queries"], entry["keys"]):
            packed.setdefault(place, Packed(*(tensors[f"{place}/{part}"] for part in PARTS)))
        key = entry["name"], entry["step"]
        mask, bias = (tensors.get(f"{key[0]}/{key[1]}/{part}") for part in ("mask", "bias"))
        made = entry["scale"], entry["ratio"], entry["operator"]
        trace.kept[key] = Kept(packed[entry["queries"]], packed[entry["keys"]], mask, bias, *made)
    if "pictures" in tensors:
        trace.pictures = tensors["pictures"]
    return trace


def _checksum(content: str, tensors: dict[str, np.ndarray]) -> int:
    value = zlib.crc32(content.encode())
    for name in sorted(tensors):
        value = zlib.crc32(
            np.ascontiguousarray(tensors[name]).view(np.uint8).data, zlib.crc32(name.encode(), value)
        )
    return value


def check_model(trace: Trace, model: Any) -> None:
    """Refuse a trace of another model than ``model`` (a pipeline or a transformer)."""
    from pixart_nb.core.hooks.recorder import model_mark
    from pixart_nb.core.hooks.seam import parts_of

    own = model_mark(parts_of(model)[0])
    said, is_ = (json.loads(json.dumps(part["config"])) for part in (trace.model, own))
    different = {key: (said.get(key), is_[key]) for key in is_ if said.get(key) != is_[key]}
    if different:
        listed = ", ".join(
            f"{key} {a!r} in the trace, {b!r} in the model" for key, (a, b) in different.items()
        )
        raise CheckpointError(f"the trace is of another model: {listed}")
    if trace.model.get("weights") != own["weights"]:
        raise CheckpointError(
            "the trace is of a model of the same shape with other weights; trace this one again"
        )
