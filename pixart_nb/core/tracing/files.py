"""A trace as one safetensors file: arrays as tensors, all else as JSON in its metadata, with a checksum."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.checkpoints.store import CheckpointError, load_metadata, load_tensors, save_tensors
from pixart_nb.core.tracing.maps import Kept
from pixart_nb.core.tracing.record import Trace
from pixart_nb.core.tracing.words import Text

FORMAT = "pixart-nb trace 1"
PARTS = ("queries", "keys", "mask")


def save_trace(trace: Trace, path: str | Path) -> None:
    """Write a trace; keys that steps share are written once."""
    tensors: dict[str, np.ndarray] = {}
    places: dict[int, str] = {}
    entries = []
    for (name, step), kept in trace.kept.items():
        entry = {
            "name": name,
            "step": step,
            "scale": kept.scale,
            "ratio": kept.ratio,
            "operator": kept.operator,
        }
        for part in PARTS:
            array = getattr(kept, part)
            if array is None:
                continue
            if part == "mask" or id(array) not in places:
                places[id(array)] = f"{name}/{step}/{part}"
                tensors[f"{name}/{step}/{part}"] = array
            entry[part] = places[id(array)]
        entries.append(entry)
    content = {
        "names": trace.names,
        "heads": trace.heads,
        "grid": trace.grid,
        "labels": trace.labels,
        "model": trace.model,
        "timesteps": list(trace.timestep_of.items()),
        "texts": [[[text.prompt, text.pieces] for text in row] for row in trace.texts],
        "text_of": list(trace.text_of.items()),
        "changes": trace.changes,
        "entries": entries,
    }
    if trace.pictures is not None:
        tensors["pictures"] = trace.pictures
    metadata = {"format": FORMAT, "trace": json.dumps(content), "crc32": str(_checksum(tensors))}
    save_tensors(path, tensors, metadata)


def load_trace(path: str | Path, model: Any = None) -> Trace:
    """Read what ``save_trace`` wrote."""
    metadata = load_metadata(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no trace: its format is {metadata.get('format')!r}, not {FORMAT!r}")
    tensors = load_tensors(path)
    if metadata.get("crc32") != str(_checksum(tensors)):
        raise CheckpointError(
            f"{path} is damaged: its checksum is not that of what it holds. Trace the run again."
        )
    try:
        trace = _rebuild(json.loads(metadata["trace"]), tensors)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged: {type(error).__name__}: {error}. Trace the run again."
        ) from error
    if model is not None:
        check_model(trace, model)
    return trace


def _rebuild(content: dict[str, Any], tensors: dict[str, np.ndarray]) -> Trace:
    trace = Trace(
        content["names"], content["heads"], tuple(content["grid"]), content["labels"], content["model"]
    )
    trace.timestep_of = {int(step): float(timestep) for step, timestep in content["timesteps"]}
    trace.texts = [[Text(prompt, tuple(pieces)) for prompt, pieces in row] for row in content["texts"]]
    for entry in content["entries"]:
        arrays = [tensors[entry[part]] if part in entry else None for part in PARTS]
        trace.kept[entry["name"], int(entry["step"])] = Kept(
            *arrays, float(entry["scale"]), int(entry["ratio"]), entry["operator"]
        )
    trace.text_of = {int(step): int(number) for step, number in content["text_of"]}
    trace.changes = list(content["changes"])
    if "pictures" in tensors:
        trace.pictures = tensors["pictures"]
    return trace


def _checksum(tensors: dict[str, np.ndarray]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(
            np.ascontiguousarray(tensors[name]).view(np.uint8).data, zlib.crc32(name.encode(), value)
        )
    return value


def check_model(trace: Trace, model: Any) -> None:
    """Refuse a trace of another model than ``model`` (a pipeline or a transformer)."""
    from pixart_nb.core.tracing.recorder import model_mark
    from pixart_nb.core.tracing.seam import parts_of

    own = model_mark(parts_of(model)[0])
    said, is_ = trace.model.get("config", {}), own["config"]
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
