"""Exports an explorer as one interactive HTML file that needs neither Python nor a network."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import write_text
from pixart_nb.viz.explorers import Choice, check_choice, layers_of
from pixart_nb.viz.overlay import COVER, DIMMED, as_float, shrunk
from pixart_nb.viz.pixels import as_bytes, image_url, with_cells
from pixart_nb.viz.style import HEAT
from pixart_nb.viz.widget_parts import STATIC

#: Most bytes of maps in a file, before base64.
MOST_BYTES = 24_000_000


def export_attention(
    path: str | Path, trace: Any, image: np.ndarray, choice: Choice, row: int = 0, most_bytes: int = MOST_BYTES
) -> Path:
    """Write the attention explorer as a page that starts with ``choice``, and return the path.

    The page holds the maps of all words and patches for every layer, head and step in 8 bits. If they exceed
    ``most_bytes``, it holds only the selected step (the middle one for the mean) and, if necessary, only the
    selected patch.

    Raises:
        PixArtNBError: the maps are still too large; nothing is written.
    """
    check_choice(trace, choice)
    steps, patches = _fitting(trace, choice, row, most_bytes)
    colours = (colormaps[HEAT](np.arange(256))[:, :3] * 255).round().astype(np.uint8)
    data = {
        "title": trace.text(row).prompt or "attention",
        "image": image_url(as_bytes(as_float(shrunk(image)))),
        "grid": list(trace.grid),
        "words": trace.words(row) if layers_of(trace, "cross") else [],
        "heads": list(trace.heads),
        "steps": [[step, trace.timestep_of[step]] for step in steps],
        "cross": _word_maps(trace, steps, row),
        "self": _patch_maps(trace, steps, patches, row),
        "patches": patches,
        "colours": _text(colours),
        "blend": {"cover": list(COVER), "dimmed": DIMMED},
        "start": _start(choice, steps),
    }
    return _write(path, "attention.html", data)


def _start(choice: Choice, steps: Sequence[int]) -> dict[str, Any]:
    step = choice.step if choice.step in steps or len(steps) > 1 else steps[0]
    patch = None if choice.patch is None else list(choice.patch)
    return {
        "word": choice.word,
        "patch": patch,
        "layer": choice.layer,
        "head": choice.head,
        "step": step,
        "threshold": choice.threshold,
    }


def _fitting(trace: Any, choice: Choice, row: int, most: int) -> tuple[list[int], list[int]]:
    """Return the steps and patches whose maps fit."""
    tokens = trace.grid[0] * trace.grid[1]
    chosen = [choice.patch[0] * trace.grid[1] + choice.patch[1]] if choice.patch is not None else []
    step = choice.step if choice.step is not None else trace.steps[len(trace.steps) // 2]
    for steps, patches in ((trace.steps, range(tokens)), ([step], range(tokens)), ([step], chosen)):
        words = len(trace.words(row)) * tokens * len(layers_of(trace, "cross"))
        keys = sum(int(np.prod(trace.key_grid(f"blocks.{n}.attn", step))) for n in layers_of(trace, "self"))
        size = len(steps) * len(trace.heads) * (words + len(patches) * keys)
        if size <= most:
            return list(steps), list(patches)
    raise PixArtNBError(
        f"the maps of one step would take {size / 1e6:.0f} MB, more than {most / 1e6:.0f}; trace fewer layers or "
        "heads, or raise most_bytes"
    )


def _word_maps(trace: Any, steps: Sequence[int], row: int) -> list[dict[str, Any]]:
    """Return the maps (steps, heads, words, h, w) of each layer in 8 bits."""
    maps_by_layer = []
    for layer in layers_of(trace, "cross"):
        maps = np.stack([[trace.word_maps(layer, head, step, row) for head in trace.heads] for step in steps])
        maps_by_layer.append({"layer": layer, "ratio": 1, "cells": list(trace.grid)} | quantised(maps))
    return maps_by_layer


def _patch_maps(trace: Any, steps: Sequence[int], patches: Sequence[int], row: int) -> list[dict[str, Any]]:
    """Return the attention (steps, heads, patches, kh, kw) of each layer in 8 bits."""
    maps_by_layer = []
    for layer in layers_of(trace, "self") if patches else []:
        name = f"blocks.{layer}.attn"
        cells = {step: trace.key_grid(name, step) for step in steps}
        if len(set(cells.values())) > 1:
            raise PixArtNBError(f"{name} has keys on different grids, {cells}; export steps with one grid")
        rows = np.stack([trace.rows(name, step, patches, None, row) for step in steps])
        maps = rows.reshape(*rows.shape[:3], *cells[steps[0]])
        ratio = trace.compression(name, steps[0])[1]
        maps_by_layer.append({"layer": layer, "ratio": ratio, "cells": list(cells[steps[0]])} | quantised(maps))
    return maps_by_layer


def quantised(maps: np.ndarray) -> dict[str, Any]:
    """Encode maps (steps, heads, n, kh, kw) in 8 bits as base64, each scaled by its largest value.

    >>> sorted(quantised(np.ones((1, 1, 1, 2, 2))))
    ['count', 'most', 'values']
    """
    flat = maps.reshape(*maps.shape[:3], -1).astype(np.float32)
    most = flat.max(-1)
    values = np.round(255 * flat / np.where(most == 0, 1, most)[..., None]).astype(np.uint8)
    return {"count": maps.shape[2], "most": _text(most), "values": _text(values)}


def export_compression(path: str | Path, study: Any, outcomes: Sequence[Any], start: int = 0) -> Path:
    """Write the outcomes of a compression explorer as a page of images, errors and costs."""
    if not outcomes:
        raise PixArtNBError("there is no outcome to write; run a compression first")
    run, config = study.reference, study.pipe.transformer.config
    unit = 8 * config.patch_size
    grid = (run.height // unit, run.width // unit)
    data = {
        "title": study.prompt if isinstance(study.prompt, str) else " · ".join(study.prompt),
        "timesteps": [float(t) for t in study.timesteps],
        "full": {"images": [image_url(as_bytes(p)) for p in study.images], "cost": vars(study.cost)},
        "outcomes": [_outcome(outcome, study, grid) for outcome in outcomes],
        "start": start,
    }
    return _write(path, "compression.html", data)


def _outcome(outcome: Any, study: Any, grid: tuple[int, int]) -> dict[str, Any]:
    return {
        "name": f"{outcome.operator} {outcome.ratio}, layers {', '.join(map(str, outcome.layers)) or 'none'}",
        "cells": [image_url(with_cells(p, grid, outcome.ratio)) for p in study.images],
        "images": [image_url(as_bytes(p)) for p in outcome.images],
        "errors": [float(error) for error in outcome.errors],
        "imageError": outcome.image_error,
        "cost": vars(outcome.cost),
    }


def _text(array: np.ndarray) -> str:
    """Return the bytes of an array, little-endian, as base64."""
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return base64.b64encode(little.tobytes()).decode()


def _write(path: str | Path, template: str, data: Mapping[str, Any]) -> Path:
    path = Path(path)
    write_text(path, page_of(template, data))
    return path


def page_of(template: str, data: Mapping[str, Any]) -> str:
    """Return a page with its ``title`` escaped and its data as JSON that cannot close its element.

    Placeholders are replaced in one pass, so that a title which contains one stays text.
    """
    content = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        content = content.replace(character, f"\\u{ord(character):04x}")
    values = {"title": escape(str(data["title"])), "data": content}
    page = (STATIC / template).read_text(encoding="utf-8")
    return re.sub(r"{{(title|data)}}", lambda match: values[match[1]], page)
