"""Selection of a word or patch, layer, head and step, and its attention map, without widgets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.images import to_uint8
from pixart_nb.viz.attention import check_patch, patch_attention, word_heat_maps
from pixart_nb.viz.overlay import as_float, overlay, overlay_differences, shrunk, spread_cells
from pixart_nb.viz.pixels import tiled, with_cells
from pixart_nb.viz.style import Figure

#: Scores that the overview of all layers and heads may compute at once; above it is left out.
OVERVIEW_SCORES = 5_000_000
#: Patches that stand for a word where its keys are compressed.
WORD_QUERIES = 64


@dataclass(frozen=True)
class Choice:
    """Selection: a word, by its index in ``trace.words()``, or a patch (row, column).

    ``layer``, ``head`` and ``step`` are numbers, or None for the mean over all that the trace has. ``threshold`` is
    the share of the map's maximum below which the image stays grey; 0 disables it.
    """

    word: int | None = None
    patch: tuple[int, int] | None = None
    layer: int | None = None
    head: int | None = None
    step: int | None = None
    threshold: float = 0.0

    @property
    def attention(self) -> str:
        """``cross`` for a word, ``self`` for a patch."""
        return "cross" if self.word is not None else "self"


@dataclass(frozen=True)
class Shown:
    """Attention map (kh, kw) of a selection, in cells of ``ratio`` x ``ratio`` tokens."""

    heat: np.ndarray
    ratio: int
    grid: tuple[int, int]

    @property
    def tokens(self) -> np.ndarray:
        """Map with the share of each cell divided among its tokens, (h, w)."""
        return spread_cells(self.heat, self.ratio, self.grid)


def layers_of(trace: Any, attention: str) -> list[int]:
    """Return the layers whose cross- or self-attention the trace has."""
    return [
        int(name.split(".")[1])
        for name in trace.names
        if (name.split(".")[2] == "cross_attn") == (attention == "cross")
    ]


def map_of(trace: Any, choice: Choice, row: int = 0) -> Shown:
    """Return the map of a selection: attention of every patch to the word, or of the patch to every key.

    Several layers, heads or steps are averaged; layers with different key grids are averaged token by token.
    """
    check_choice(trace, choice)
    if choice.word is not None:
        heat = trace.word_map(_word(trace, choice, row), choice.layer, choice.head, choice.step, row)
        return Shown(heat, 1, trace.grid)
    maps = [
        Shown(heats.mean(0), trace.compression(name, step)[1], trace.grid)
        for name, step, heats in _patch_rows(trace, choice, row)
    ]
    if len({shown.heat.shape for shown in maps}) == 1:
        return Shown(np.mean([shown.heat for shown in maps], axis=0), maps[0].ratio, trace.grid)
    return Shown(np.mean([shown.tokens for shown in maps], axis=0), 1, trace.grid)


def _word(trace: Any, choice: Choice, row: int) -> int | str:
    """Return the word by its index, or by its text where the prompt was swapped and indices differ between steps."""
    return choice.word if len(trace.texts) < 2 else trace.words(row)[choice.word]


def _patch_rows(trace: Any, choice: Choice, row: int):
    """Return (name, step, (heads, kh, kw)) of the selected patch for each selected layer and step."""
    query = choice.patch[0] * trace.grid[1] + choice.patch[1]
    layers = layers_of(trace, "self") if choice.layer is None else [choice.layer]
    for layer in layers:
        name = f"blocks.{layer}.attn"
        for step in trace.steps if choice.step is None else [choice.step]:
            rows = trace.rows(name, step, [query], choice.head, row)[:, 0]
            yield name, step, rows.reshape(len(rows), *trace.key_grid(name, step))


def check_choice(trace: Any, choice: Choice) -> None:
    """Refuse a selection that the trace does not have, and name what it has."""
    if (choice.word is None) == (choice.patch is None):
        raise PixArtNBError("choose a word or a patch, one of the two")
    if not (layers := layers_of(trace, choice.attention)):
        raise PixArtNBError(f"the trace has no {choice.attention}-attention; it has {', '.join(trace.names)}")
    if choice.layer is not None and choice.layer not in layers:
        raise PixArtNBError(
            f"the trace has no {choice.attention}-attention of layer {choice.layer}; it has layers {layers}"
        )
    for what, number, valid in (("head", choice.head, trace.heads), ("step", choice.step, trace.steps)):
        if number is not None and number not in valid:
            raise PixArtNBError(f"the trace has no {what} {number}; it has {valid}")
    if choice.patch is not None:
        check_patch(choice.patch, trace.grid)


def overview_of(trace: Any, choice: Choice, row: int = 0) -> np.ndarray | None:
    """Return the map of the selection for every layer and head, (layers, heads, h, w), or None if it is too large."""
    layers = layers_of(trace, choice.attention)
    steps = len(trace.steps) if choice.step is None else 1
    queries = trace.grid[0] * trace.grid[1] if choice.word is not None else 1
    keys = len(trace.words(row)) if choice.word is not None else trace.grid[0] * trace.grid[1]
    if len(layers) * len(trace.heads) * steps * queries * keys > OVERVIEW_SCORES:
        return None
    return np.stack([_every_head(trace, choice, layer, row) for layer in layers])


def _every_head(trace: Any, choice: Choice, layer: int, row: int) -> np.ndarray:
    if choice.word is not None:
        word = _word(trace, choice, row)
        return np.stack([trace.word_map(word, layer, head, choice.step, row) for head in trace.heads])
    whole = Choice(patch=choice.patch, layer=layer, step=choice.step)
    return np.mean(
        [
            spread_cells(heats, trace.compression(name, step)[1], trace.grid)
            for name, step, heats in _patch_rows(trace, whole, row)
        ],
        axis=0,
    )


def in_words(trace: Any, choice: Choice, shown: Shown, row: int = 0) -> str:
    """Describe the map in a sentence with its numbers."""
    parts = {"layer": choice.layer, "head": choice.head, "step": choice.step}
    where = ", ".join(f"{name} {value}" for name, value in parts.items() if value is not None)
    means = [f"{name}s" for name, value in parts.items() if value is None]
    where = "; ".join(part for part in (where, f"mean over {', '.join(means)}" if means else "") if part)
    where = where[0].upper() + where[1:]
    top = np.unravel_index(int(shown.heat.argmax()), shown.heat.shape)
    most = f"most at ({top[0]}, {top[1]}): {shown.heat.max():.3f}"
    if choice.word is not None:
        word = trace.words(row)[choice.word]
        return f"“{word}” gets {shown.heat.mean():.3f} of a patch's attention on average, {most}. {where}."
    rows, columns = shown.heat.shape
    return f"Patch {choice.patch} over {rows} x {columns} keys, {most}. {where}."


def figure_of(trace: Any, image: np.ndarray, choice: Choice, row: int = 0) -> Figure:
    """Return the selection as a figure, as the attention explorer shows it.

    A word gives its map over the image; a patch gives its view, for each head if all heads and one layer and step are
    selected.
    """
    shown = map_of(trace, choice, row)
    if choice.word is not None:
        word = trace.words(row)[choice.word]
        return word_heat_maps(image, {word: shown.heat}, choice.threshold or None)
    title = f"layer {'mean' if choice.layer is None else choice.layer}"
    if None in (choice.layer, choice.step) or choice.head is not None:
        return patch_attention(image, shown.heat[None], choice.patch, [title], shown.ratio, shown.grid)
    ((_, _, heads),) = _patch_rows(trace, choice, row)
    titles = [f"{title}, head {head}" for head in trace.heads]
    return patch_attention(image, heads, choice.patch, titles, shown.ratio, shown.grid)


@dataclass(frozen=True)
class CompressedView:
    """Attention with full keys (h, w) and with compressed keys (kh, kw) in cells of ``ratio`` x ``ratio`` tokens."""

    full: np.ndarray
    compressed: np.ndarray
    ratio: int

    @property
    def tokens(self) -> np.ndarray:
        """Compressed map with the share of each cell divided evenly among its tokens, (h, w)."""
        return spread_cells(self.compressed, self.ratio, self.full.shape)

    @property
    def highest(self) -> float:
        """Largest share of attention of a token in both maps."""
        return float(max(self.full.max(), self.compressed.max() / self.ratio**2))

    @property
    def overlap(self) -> float:
        """Share of the attention that is the same, 1 - sum |difference| / 2."""
        return float(1 - np.abs(self.tokens - self.full).sum() / 2)


def compressed_view(study: Any, choice: Choice, ratio: int, operator: str, row: int = 0) -> CompressedView:
    """Return where a patch looks in one layer and step of a reference run, with full and with compressed keys.

    A word stands for the ``WORD_QUERIES`` patches that attend to it most, weighted by how much they do. The head is a
    number, or None for the mean.

    Args:
        study: ``CompressionStudy``; its trace and its ``compressed_attention`` are used.
    """
    trace = study.trace
    check_choice(trace, choice)
    if choice.layer is None or choice.step is None:
        raise PixArtNBError("compressed keys are shown for one layer and one step; choose both")
    if choice.word is None:
        queries, weights = np.array([choice.patch[0] * trace.grid[1] + choice.patch[1]]), np.ones(1)
    else:
        heat = trace.word_map(_word(trace, choice, row), choice.layer, choice.head, choice.step, row).ravel()
        queries = np.argsort(heat, kind="stable")[-WORD_QUERIES:]
        weights = heat[queries] / heat[queries].sum()
    full = trace.rows(f"blocks.{choice.layer}.attn", choice.step, queries, choice.head, row)
    small = study.compressed_attention(choice.layer, choice.step, queries, ratio, operator, choice.head, row)
    full, small = (np.tensordot(weights, maps.mean(0), 1) for maps in (full, small))
    return CompressedView(full.reshape(trace.grid), small, ratio)


def view_pixels(image: np.ndarray, view: CompressedView) -> list[np.ndarray]:
    """Return images (H, W, 3) uint8: the full map, the compressed map with its cells, and their difference.

    The first two share one scale, the share of attention of a token.
    """
    grid, highest = view.full.shape, view.highest
    heats = (view.full, 1), (view.compressed / view.ratio**2, view.ratio)
    maps = [overlay(image, heat, (0, highest), None, ratio, grid) for heat, ratio in heats]
    difference = view.tokens - view.full
    maps.append(overlay_differences(image, difference, float(np.abs(difference).max())))
    lines = (1, view.ratio, view.ratio)
    return [with_cells(pixels, grid, ratio) for pixels, ratio in zip(maps, lines, strict=True)]


def map_pixels(image: np.ndarray, shown: Shown, threshold: float = 0.0) -> np.ndarray:
    """Return a map over the image, (H, W, 3) uint8."""
    return to_uint8(overlay(image, shown.heat, None, threshold or None, shown.ratio, shown.grid))


def overview_pixels(maps: np.ndarray, image: np.ndarray, most: int = 96) -> np.ndarray:
    """Return maps (layers, heads, h, w) over small copies of the image in a grid, uint8, each on its own scale."""
    small = as_float(shrunk(image, most))
    rows = [[to_uint8(overlay(small, heat)) for heat in layer] for layer in maps]
    return tiled(rows, max(1, min(small.shape[:2]) // 16))


def outcome_name(outcome: Any) -> str:
    """Return the name of a compression: operator, ratio and layers."""
    layers = outcome.layers
    if outcome.ratio == 1 or not layers:
        return "no compression"
    if len(layers) == 1:
        return f"{outcome.operator} {outcome.ratio}, layer {layers[0]}"
    in_a_row = layers[-1] - layers[0] < len(layers)
    numbers = f"{layers[0]}-{layers[-1]}" if in_a_row else ", ".join(map(str, layers))
    return f"{outcome.operator} {outcome.ratio}, layers {numbers}"
