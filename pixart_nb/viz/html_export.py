"""Exports an explorer as one interactive HTML file that needs neither Python nor a network."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import write_text
from pixart_nb.core.sampling.images import to_uint8
from pixart_nb.viz.explorers import Choice, check_choice, layers_of, outcome_name
from pixart_nb.viz.overlay import COVER, DIMMED, as_float, bar_colours, shrunk
from pixart_nb.viz.pixels import image_url, with_cells
from pixart_nb.viz.style import HEAT
from pixart_nb.viz.widget_parts import STATIC

#: Most bytes of maps in a file, before base64.
MOST_BYTES = 24_000_000


@dataclass
class Kept:
    """Numbers of the steps, patches, layers and heads whose maps a page holds."""

    steps: list[int]
    patches: list[int]
    layers: list[int]
    heads: list[int]

    def of(self, trace: Any, attention: str) -> list[int]:
        """Return the kept layers whose cross- or self-attention the trace has."""
        return [layer for layer in layers_of(trace, attention) if layer in self.layers]

    def size(self, trace: Any, row: int) -> int:
        """Return the bytes of the maps."""
        words = len(_words(trace, self, row)) * trace.grid[0] * trace.grid[1] * len(self.of(trace, "cross"))
        grids = [trace.key_grid(f"blocks.{layer}.attn", self.steps[0]) for layer in self.of(trace, "self")]
        keys = sum(height * width for height, width in grids)
        return len(self.steps) * len(self.heads) * (words + len(self.patches) * keys)


def export_attention(
    path: str | Path, trace: Any, image: np.ndarray, choice: Choice, row: int = 0, most_bytes: int = MOST_BYTES
) -> Path:
    """Write the attention explorer as a page that starts with ``choice``, and return the path.

    The page holds the maps of all words and patches for every layer, head and step in 8 bits. If they exceed
    ``most_bytes``, it holds the selected patch only, then evenly spaced steps, then layers and heads, always with the
    selected ones, and says so. Where the prompt was swapped during the run, it holds the steps of one prompt: that of
    the selected step, or of the first.

    Raises:
        PixArtNBError: the maps of one layer, head and step are still too large; nothing is written.
    """
    check_choice(trace, choice)
    kept, image = _fitting(trace, choice, row, most_bytes), as_float(shrunk(image))
    data = {
        "title": trace.text(row, kept.steps[0]).prompt or "attention",
        "notes": _notes(trace, kept, row),
        "image": image_url(to_uint8(image)),
        "grid": list(trace.grid),
        "words": _words(trace, kept, row) if layers_of(trace, "cross") else [],
        "heads": kept.heads,
        "steps": [[step, trace.timestep_of[step]] for step in kept.steps],
        "cross": _word_maps(trace, kept, row),
        "self": _patch_maps(trace, kept, row),
        "patches": kept.patches if layers_of(trace, "self") else [],
        "colours": _text(to_uint8(colormaps[HEAT](np.arange(256))[:, :3])),
        "bar": _text(to_uint8(bar_colours(image))),
        "blend": {"cover": list(COVER), "dimmed": DIMMED},
        "start": _start(trace, choice, kept, row),
    }
    return _write(path, "attention.html", data)


def _words(trace: Any, kept: Kept, row: int) -> list[str]:
    """Return the words of the prompt of the kept steps."""
    return [word.text for word in trace.text(row, kept.steps[0]).words]


def _start(trace: Any, choice: Choice, kept: Kept, row: int) -> dict[str, Any]:
    """Return the selection that the page starts with, whose word is found by its text where the prompt was swapped."""
    steps, word = kept.steps, choice.word
    if word is not None and (words := _words(trace, kept, row)) != trace.words(row):
        text = trace.words(row)[word]
        word = words.index(text) if text in words else 0
    return asdict(choice) | {"word": word, "step": choice.step if choice.step in steps or len(steps) > 1 else steps[0]}


def _fitting(trace: Any, choice: Choice, row: int, most: int) -> Kept:
    """Return what of a trace fits into ``most`` bytes."""
    tokens, layers = trace.grid[0] * trace.grid[1], sorted({*layers_of(trace, "cross"), *layers_of(trace, "self")})
    kept = Kept(_of_one_prompt(trace, choice.step, row), list(range(tokens)), layers, list(trace.heads))
    if replace(kept, steps=kept.steps[:1]).size(trace, row) > most:
        kept.patches = [] if choice.patch is None else [choice.patch[0] * trace.grid[1] + choice.patch[1]]
    while (size := kept.size(trace, row)) > most:
        if len(kept.steps) > 1:
            kept.steps = _thinned(kept.steps, choice.step)
        elif len(kept.layers) > max(1, len(kept.heads)):
            kept.layers = _thinned(kept.layers, choice.layer)
        elif len(kept.heads) > 1:
            kept.heads = _thinned(kept.heads, choice.head)
        elif len(kept.layers) > 1:
            kept.layers = _thinned(kept.layers, choice.layer)
        else:
            problem = f"the maps of one layer, head and step take {size / 1e6:.3g} MB, more than {most / 1e6:.3g}"
            raise PixArtNBError(f"{problem}; raise most_bytes")
    return kept


def _of_one_prompt(trace: Any, step: int | None, row: int) -> list[int]:
    """Return the steps with the prompt of a step, by default the first; prompts may be swapped during a run."""
    return [other for other in trace.steps if trace.text(row, other) == trace.text(row, step)]


def _thinned(numbers: list[int], chosen: int | None) -> list[int]:
    """Return every second number, the chosen one (or the middle one) among them."""
    at = numbers.index(chosen) if chosen in numbers else len(numbers) // 2
    return numbers[at % 2 :: 2]


def _notes(trace: Any, kept: Kept, row: int) -> str:
    """Say what is left out of a page."""
    layers = {*layers_of(trace, "cross"), *layers_of(trace, "self")}
    steps = _of_one_prompt(trace, kept.steps[0], row)
    swapped = "The prompt was swapped during the run; the page has the steps of one prompt."
    swapped = swapped if len(steps) < len(trace.steps) else ""
    totals = {"steps": len(steps), "layers": len(layers), "heads": len(trace.heads)}
    numbers = {name: getattr(kept, name) for name in totals}
    parts = [
        f"{len(numbers[name])} of {count} {name} ({', '.join(map(str, numbers[name]))})"
        for name, count in totals.items()
        if len(numbers[name]) < count
    ]
    if len(kept.patches) < trace.grid[0] * trace.grid[1] and layers_of(trace, "self"):
        parts.append(f"{len(kept.patches)} of {trace.grid[0] * trace.grid[1]} patches")
    if not parts:
        return swapped
    rest = f"All maps are too large for one page. It holds {'; '.join(parts)}. A mean is over what it holds."
    return f"{swapped} {rest}".strip()


def _word_maps(trace: Any, kept: Kept, row: int) -> list[dict[str, Any]]:
    """Return the maps (steps, heads, words, h, w) of each layer in 8 bits."""
    maps_by_layer = []
    for layer in kept.of(trace, "cross"):
        maps = np.stack([[trace.word_maps(layer, head, step, row) for head in kept.heads] for step in kept.steps])
        maps_by_layer.append({"layer": layer, "ratio": 1, "cells": list(trace.grid)} | quantised(maps))
    return maps_by_layer


def _patch_maps(trace: Any, kept: Kept, row: int) -> list[dict[str, Any]]:
    """Return the attention (steps, heads, patches, kh, kw) of each layer in 8 bits."""
    maps_by_layer, steps = [], kept.steps
    for layer in kept.of(trace, "self") if kept.patches else []:
        name = f"blocks.{layer}.attn"
        cells = {step: trace.key_grid(name, step) for step in steps}
        if len(set(cells.values())) > 1:
            raise PixArtNBError(f"{name} has keys on different grids, {cells}; export steps with one grid")
        rows = np.stack([trace.rows(name, step, kept.patches, kept.heads, row) for step in steps])
        maps = rows.reshape(*rows.shape[:3], *cells[steps[0]])
        ratio = trace.compression(name, steps[0])[1]
        maps_by_layer.append({"layer": layer, "ratio": ratio, "cells": list(cells[steps[0]])} | quantised(maps))
    return maps_by_layer


def quantised(maps: np.ndarray) -> dict[str, Any]:
    """Encode maps (steps, heads, n, kh, kw) in 8 bits as base64, each scaled by its largest value."""
    flat = maps.reshape(*maps.shape[:3], -1).astype(np.float32)
    most = flat.max(-1)
    values = np.round(255 * flat / np.where(most == 0, 1, most)[..., None]).astype(np.uint8)
    return {"count": maps.shape[2], "most": _text(most), "values": _text(values)}


def export_compression(path: str | Path, study: Any, outcomes: Sequence[Any], start: int = 0) -> Path:
    """Write the outcomes of a compression explorer as a page of images, errors and costs.

    The page starts with the outcome number ``start``. Of several outcomes without compression it has one.
    """
    if not outcomes:
        raise PixArtNBError("there is no outcome to write; run a compression first")
    run, config = study.reference, study.pipe.transformer.config
    unit = 8 * config.patch_size
    grid = (run.height // unit, run.width // unit)
    named = {outcome_name(outcome): outcome for outcome in outcomes}
    data = {
        "title": study.prompt if isinstance(study.prompt, str) else " · ".join(study.prompt),
        "timesteps": [float(t) for t in study.timesteps],
        "full": {"images": [image_url(to_uint8(p)) for p in study.images], "cost": vars(study.cost)},
        "outcomes": [_outcome(outcome, study, grid) for outcome in named.values()],
        "start": list(named).index(outcome_name(outcomes[start])),
    }
    return _write(path, "compression.html", data)


def _outcome(outcome: Any, study: Any, grid: tuple[int, int]) -> dict[str, Any]:
    return {
        "name": outcome_name(outcome),
        "cells": [image_url(with_cells(p, grid, outcome.ratio)) for p in study.images],
        "images": [image_url(to_uint8(p)) for p in outcome.images],
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
