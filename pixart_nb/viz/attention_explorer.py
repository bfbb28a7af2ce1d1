"""Attention explorer: a widget that shows the map of a clicked patch or a selected word."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.images import to_uint8
from pixart_nb.viz import explorers
from pixart_nb.viz import widget_parts as parts
from pixart_nb.viz.explorers import Choice, layers_of
from pixart_nb.viz.html_export import export_attention
from pixart_nb.viz.overlay import as_float, shrunk
from pixart_nb.viz.pixels import enlarged, png_bytes
from pixart_nb.viz.style import Figure

#: Width of a column: two of them fit beside the file browser of JupyterLab in a window of 1280 pixels.
COLUMN = "406px"


class AttentionExplorer(parts.Explorer):
    """Widget that shows the attention of one run. Put it on the last line of a cell.

    Click a patch of the image to see what it attends to, or select a word to see which patches attend to it. Sliders
    select layer, head and step. The overview shows the same map for all layers and heads; a click selects both.

    Args:
        trace: Trace of a run (``pixart_nb.core.hooks``) with self-attention, cross-attention, or both.
        image: (H, W, 3), result of the run.
        by_step: Images (S, H, W, 3) to show under the maps of ``trace.steps``, such as the predicted images.
        row: Index of the image in the trace.
        choice: Initial selection. Default: the longest word, or else the middle patch.
    """

    def __init__(
        self,
        trace: Any,
        image: np.ndarray,
        by_step: Sequence[np.ndarray] | None = None,
        row: int = 0,
        choice: Choice | None = None,
    ):
        if by_step is not None and len(by_step) != len(trace.steps):
            raise PixArtNBError(f"by_step has {len(by_step)} images, the trace keeps {len(trace.steps)} steps")
        self.trace, self.row, self.image = trace, row, as_float(shrunk(image))
        self._by_step = None if by_step is None else dict(zip(trace.steps, by_step, strict=True))
        self.seconds = 0.0
        self._make_controls()
        self.widget = self._laid_out()
        for control in (self.layer, self.head, self.step, self.threshold):
            control.observe(self._changed, "value")
        self.words.observe(self._word_chosen, "value")
        self.view.observe(self._patch_chosen, "cell")
        self.overview.observe(self._overview_chosen, "cell")
        self.choice = choice or self._first()

    # ---- what is chosen

    @property
    def choice(self) -> Choice:
        """Current selection; assign to change it."""
        numbers = [None if s.value == parts.MEAN else s.value for s in (self.layer, self.head, self.step)]
        patch = tuple(self.view.cell) if self.words.value is None and self.view.cell else None
        return Choice(self.words.value, patch, *numbers, self.threshold.value)

    @choice.setter
    def choice(self, value: Choice) -> None:
        explorers.check_choice(self.trace, value)
        if value.word is not None and not 0 <= value.word < len(words := self.trace.words(self.row)):
            raise PixArtNBError(f"there is no word {value.word}; the prompt has {len(words)}, numbered from 0: {words}")
        with self._without_drawing():
            self._offer_layers(value.attention)
            numbers = (value.layer, value.head, value.step)
            for slider, number in zip((self.layer, self.head, self.step), numbers, strict=True):
                slider.value = parts.MEAN if number is None else number
            self.threshold.value = value.threshold
            self.words.value, self.view.cell = value.word, value.patch or ()
        self._draw()

    def _first(self) -> Choice:
        if layers_of(self.trace, "cross"):
            words = self.trace.word_tokens(self.row)
            lengths = [0 if word.is_special else len(word.text) for word in words]
            return Choice(word=lengths.index(max(lengths)))
        return Choice(patch=(self.trace.grid[0] // 2, self.trace.grid[1] // 2))

    # ---- controls

    def _make_controls(self) -> None:
        grid, words = self.trace.grid, self.trace.words(self.row)
        self.view = parts.ClickableImage(
            rows=grid[0], columns=grid[1], width=400, label="image; select a patch with the arrow keys"
        )
        self.overview = parts.ClickableImage(
            label="map of every layer and head; select one with the arrow keys", width=400
        )
        cross = bool(layers_of(self.trace, "cross"))
        options = [(word, number) for number, word in enumerate(words)] if cross else []
        hints = [f"Which patches attend to “{word}”" for word, _ in options]
        self.words = widgets.ToggleButtons(options=options, value=None, tooltips=hints)
        self.layer = parts.mean_slider("Layer", [], "Layer; the mean is over all layers of the trace")
        self.head = parts.mean_slider("Head", self.trace.heads, "Attention head")
        self.step = parts.mean_slider("Step", parts.step_names(self.trace), "Denoising step and its timestep")
        self.threshold = widgets.FloatSlider(
            min=0, max=1, step=0.05, description="Threshold", tooltip="Share of the maximum below which cells stay grey"
        )
        parts.lay_out(self.threshold)
        self.scale, self.message, self.note = widgets.HTML(), parts.text_line(), parts.text_line()

    def _laid_out(self) -> widgets.Widget:
        hint = widgets.HTML("<b>Click a patch</b> to see what it attends to, or <b>select a word</b>:")
        sliders = [self.layer, self.head, self.step, self.threshold]
        left = parts.column([hint, self.words, self.view, self.scale, self.message], COLUMN)
        return parts.side_by_side([left, parts.column([*sliders, self.note, self.overview], COLUMN)])

    def _offer_layers(self, attention: str) -> None:
        """Offer the layers of which the trace has the current type of attention."""
        layers, chosen = layers_of(self.trace, attention), self.layer.value
        options = [("mean", parts.MEAN), *((str(layer), layer) for layer in layers)]
        if tuple(self.layer.options) != tuple(options):
            with self._without_drawing():
                self.layer.options = options
                self.layer.value = chosen if chosen in layers else parts.MEAN

    # ---- events

    def _word_chosen(self, change: Mapping[str, Any]) -> None:
        if self._quiet or change["new"] is None:
            return
        with self._without_drawing():
            self.view.cell = ()
        self._draw()

    def _patch_chosen(self, change: Mapping[str, Any]) -> None:
        if self._quiet or not change["new"]:
            return
        can_show = bool(layers_of(self.trace, "self"))
        with self._without_drawing():
            if can_show:
                self.words.value = None
            else:
                self.view.cell = ()
        if can_show:
            self._draw()
        else:
            parts.say(self.message, "this trace has no self-attention; select a word", wrong=True)

    def _overview_chosen(self, change: Mapping[str, Any]) -> None:
        if self._quiet or not change["new"]:
            return
        row, column = change["new"]
        with self._without_drawing():
            self.layer.value = layers_of(self.trace, self.choice.attention)[row]
            self.head.value = self.trace.heads[column]
        self._draw()

    # ---- drawing

    def _draw(self) -> None:
        started = time.perf_counter()
        self._offer_layers(self.choice.attention)
        choice = self.choice
        try:
            shown = explorers.map_of(self.trace, choice, self.row)
        except PixArtNBError as error:  # after a swap of prompts, a step without the word
            self.view.png, self.scale.value = png_bytes(enlarged(to_uint8(self._image(choice.step)))), ""
            self.overview.layout.display = "none"
            parts.say(self.note, "")
            return parts.say(self.message, str(error), wrong=True)
        self.view.png = png_bytes(enlarged(explorers.map_pixels(self._image(choice.step), shown, choice.threshold)))
        self.scale.value = parts.heat_scale(float(shown.heat.max()), self._image(choice.step), "share of attention")
        parts.say(self.message, explorers.in_words(self.trace, choice, shown, self.row))
        self.seconds = time.perf_counter() - started
        self._draw_overview(choice)

    def _image(self, step: int | None) -> np.ndarray:
        if self._by_step is None or step is None:
            return self.image
        return as_float(shrunk(self._by_step[step]))

    def _draw_overview(self, choice: Choice) -> None:
        maps = explorers.overview_of(self.trace, choice, self.row)
        self.overview.layout.display = "none" if maps is None else ""
        if maps is None:
            return parts.say(self.note, "The overview of all layers and heads is too large; use the sliders.")
        layers, heads = layers_of(self.trace, choice.attention), self.trace.heads
        with self._without_drawing():
            self.overview.cell = ()
            self.overview.rows, self.overview.columns = maps.shape[:2]
            self.overview.row_names = [f"layer {layer}" for layer in layers]
            self.overview.column_names = [f"head {head}" for head in heads]
            self.overview.png = png_bytes(explorers.overview_pixels(maps, self._image(choice.step)))
            if choice.layer is not None and choice.head is not None:
                self.overview.cell = (layers.index(choice.layer), heads.index(choice.head))
        grid = f"Layers {layers[0]} (top) to {layers[-1]} and heads {heads[0]} to {heads[-1]}"
        parts.say(self.note, f"{grid}, each on its own scale. Click one to select it:")

    # ---- without a widget

    def figure(self) -> Figure:
        """Return the current view as a figure."""
        return explorers.figure_of(self.trace, self._image(self.choice.step), self.choice, self.row)

    def export(self, path: str | Path) -> Path:
        """Write the explorer as one HTML file that needs neither Python nor a network, and return the path."""
        return export_attention(path, self.trace, self._image(self.choice.step), self.choice, self.row)
