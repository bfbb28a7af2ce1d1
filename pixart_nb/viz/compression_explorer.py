"""Compression explorer: where attention goes with compressed keys, and the effect on images, error and cost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import traitlets
from matplotlib import colormaps

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.images import to_uint8
from pixart_nb.viz import widget_parts as parts
from pixart_nb.viz.attention import full_against_compressed
from pixart_nb.viz.compression import error_by_timestep
from pixart_nb.viz.event_loop import KernelLoop, giving_way
from pixart_nb.viz.explorers import Choice, compressed_view, outcome_name, view_pixels
from pixart_nb.viz.figures import image_differences
from pixart_nb.viz.html_export import export_compression
from pixart_nb.viz.pixels import enlarged, png_bytes, tiles, with_cells
from pixart_nb.viz.style import HEAT, Figure
from pixart_nb.viz.tables import Table

COSTS = {
    "keys": "keys of a layer",
    "macs": "MACs of a step",
    "attention_macs": "of them attention",
    "bytes": "keys and values, bytes",
}
#: Pixels of a panel's side, of the width of the images of a run, and of the widget's width.
PANEL, SHEET, WIDTH = 266, 460, 830
#: Value of the word control that stands for the clicked patch.
PATCH = -1


class CompressionExplorer(parts.Explorer):
    """Widget that shows what KV compression changes. Put it on the last line of a cell.

    Click a patch, or select a word, to see where it looks among the full keys, among the compressed keys, and the
    difference, in any layer, head and step of the reference run. Run draws the images with the selected layers
    compressed and measures the error of the prediction; it can be cancelled after each call of the model.

    Args:
        study: ``CompressionStudy``.
        ratios, operators: Options to select from.
        start: Initial layers, ratio and operator. Default: the deep half, ratio 2, the first operator.
        row: Index of the image in the study.
    """

    def __init__(
        self,
        study: Any,
        ratios: Sequence[int] = (1, 2, 4),
        operators: Sequence[str] = ("mean", "conv", "uniform"),
        start: tuple[Sequence[int], int, str] | None = None,
        row: int = 0,
    ):
        self.study, self.row, self.seconds, self._cancelled = study, row, 0.0, False
        self._drawn = None  # the outcome whose images are shown
        self._loop, depth, grid = KernelLoop(), len(study.layers), study.trace.grid
        layers, ratio, operator = start or (range(depth // 2, depth), 2 if 2 in ratios else ratios[0], operators[0])
        self.ratio = widgets.ToggleButtons(options=[(str(r), r) for r in ratios], value=ratio, description="Ratio")
        self.operator = widgets.ToggleButtons(options=list(operators), value=operator, description="Operator")
        self._make_attention_controls(max(layers), grid)
        self._make_run_controls((min(layers), max(layers)), depth)
        self.widget = self._laid_out()
        for control in (self.ratio, self.operator, self.layer, self.head, self.step, self.layers):
            control.observe(self._changed, "value")
        self.word.observe(self._word_chosen, "value")
        self.panels[0].observe(self._patch_chosen, "cell")
        steps = study.trace.steps
        self.selection = Choice(patch=(grid[0] // 2, grid[1] // 2), layer=max(layers), step=steps[len(steps) // 2])

    # ---- controls

    def _make_attention_controls(self, layer: int, grid: tuple[int, int]) -> None:
        trace = self.study.trace
        words = [(word, number) for number, word in enumerate(trace.words(self.row))]
        tip = "A word stands for the patches that attend to it most"
        self.word = widgets.Dropdown(options=[("(the clicked patch)", PATCH), *words], description="Word", tooltip=tip)
        self.layer = parts.number_slider("Layer", self.study.layers, "Self-attention layer")
        self.layer.value = layer
        self.head = parts.mean_slider("Head", trace.heads, "Attention head")
        self.step = parts.number_slider("Step", parts.step_names(trace), "Denoising step and its timestep")
        for control in (self.ratio, self.operator, self.word):
            parts.lay_out(control)
        labels = ("full keys", "compressed keys", "difference")
        size = {"rows": grid[0], "columns": grid[1], "width": PANEL}
        self.panels = [
            parts.ClickableImage(label=f"{label}; select a patch with the arrow keys", **size) for label in labels
        ]
        for panel in self.panels[1:]:
            traitlets.link((self.panels[0], "cell"), (panel, "cell"))
        self.titles, self.line = [widgets.HTML() for _ in labels], parts.text_line()
        self.scales = [widgets.HTML() for _ in labels]

    def _make_run_controls(self, layers: tuple[int, int], depth: int) -> None:
        self.layers = widgets.IntRangeSlider(
            min=0, max=depth - 1, value=layers, description="Compress layers", continuous_update=False
        )
        self.layers.layout.width, self.layers.style.description_width = "360px", "110px"
        self.run = parts.button("Run", "Draw the images with these layers compressed", "play", "primary", "90px")
        self.cancel = parts.button(
            "Cancel", "End after the call of the model that is being computed", "stop", width="90px"
        )
        self.bar = widgets.IntProgress(min=0, layout=widgets.Layout(width="180px"))
        self.run.on_click(self._loop.on_loop(self._start))
        self.cancel.on_click(self._loop.on_loop(self._cancel))
        self.images, self.curve = widgets.Image(format="png"), widgets.Image(format="png")
        self.costs, self.message = widgets.HTML(), parts.text_line()
        self._set_running(False)

    def _laid_out(self) -> widgets.Widget:
        for image, width in ((self.images, f"{SHEET}px"), (self.curve, "350px")):
            image.layout = widgets.Layout(width=width, max_width="100%", margin="0")
        self.images.add_class("pixart-results")  # reduced smoothly: sharp pixels would drop lines of the cells
        panels = [parts.column(part, f"{PANEL}px") for part in zip(self.titles, self.panels, self.scales, strict=True)]
        names = "".join(f"<b style='flex:1'>{name}</b>" for name in ("full", "compressed", "difference"))
        columns = widgets.HTML(f"<div style='display:flex;width:{SHEET}px;max-width:100%'>{names}</div>")
        left = parts.column([columns, self.images], "466px")
        self.results = parts.row([left, parts.column([self.curve, self.costs], "350px")])
        what = parts.column([self.ratio, self.operator, self.word], "408px")
        where = parts.column([self.layer, self.head, self.step], "408px")
        running = parts.row([self.layers, self.run, self.cancel, self.bar])
        everything = [parts.row([what, where]), parts.row(panels), self.line, running, self.message, self.results]
        return parts.side_by_side([parts.column(everything, f"{WIDTH}px")])

    # ---- what is chosen

    @property
    def choice(self) -> tuple[tuple[int, ...], int, str]:
        """Layers to compress, ratio and operator. Assign to change them and draw the images at once."""
        first, last = self.layers.value
        return tuple(range(first, last + 1)), self.ratio.value, self.operator.value

    @choice.setter
    def choice(self, value: tuple[Sequence[int], int, str]) -> None:
        layers, ratio, operator = value
        if sorted(layers) != list(range(min(layers), max(layers) + 1)):
            raise PixArtNBError(f"layers {list(layers)} have gaps; the slider selects layers in a row")
        with self._without_drawing():
            self.layers.value, self.ratio.value, self.operator.value = ((min(layers), max(layers)), ratio, operator)
        self.study.outcome(*self.choice)
        self._draw()

    @property
    def outcome(self) -> Any:
        """Outcome of the current choice, None if it was not run yet."""
        return self.study.computed(*self.choice)

    @property
    def selection(self) -> Choice:
        """Patch or word, layer, head and step of the maps; assign to change them."""
        word = None if self.word.value == PATCH else self.word.value
        head = None if self.head.value == parts.MEAN else self.head.value
        patch = tuple(self.panels[0].cell) if word is None else None
        return Choice(word, patch, self.layer.value, head, self.step.value)

    @selection.setter
    def selection(self, value: Choice) -> None:
        compressed_view(self.study, value, self.ratio.value, self.operator.value, self.row)  # refuses what is not there
        with self._without_drawing():
            self.layer.value, self.step.value = value.layer, value.step
            self.head.value = parts.MEAN if value.head is None else value.head
            self.word.value = PATCH if value.word is None else value.word
            self.panels[0].cell = value.patch or ()
        self._draw()

    # ---- events

    def _word_chosen(self, change: Any) -> None:
        if not self._quiet:
            with self._without_drawing():
                grid = self.study.trace.grid
                self.panels[0].cell = () if change["new"] != PATCH else (grid[0] // 2, grid[1] // 2)
            self._draw()

    def _patch_chosen(self, change: Any) -> None:
        if not self._quiet and change["new"]:
            with self._without_drawing():
                self.word.value = PATCH
            self._draw()

    def _start(self) -> None:
        if self.cancel.disabled:
            self._loop.start(self.sample())

    def _cancel(self) -> None:
        self._cancelled = True

    async def sample(self) -> Any:
        """Draw the images of the current choice, as Run does; return the outcome, or None if it was cancelled."""
        choice, self._cancelled = self.choice, False
        self._set_running(True)
        parts.say(self.message, "Running the model with these layers compressed …")
        try:
            async with aclosing(giving_way(self.study.run(*choice))) as calls:
                async for done, total in calls:
                    self.bar.value, self.bar.max = done, total
                    if self._cancelled:
                        break
        except Exception as error:
            parts.say(self.message, str(error), wrong=True)
            raise
        finally:
            self._set_running(False)
        self._draw_outcome()
        if self._cancelled:
            parts.say(self.message, f"Cancelled after {self.bar.value} of {self.bar.max} calls of the model.")
        return self.study.computed(*choice)

    def _set_running(self, running: bool) -> None:
        self.run.disabled, self.cancel.disabled = running, not running
        self.bar.layout.visibility = "visible" if running else "hidden"

    # ---- drawing

    def _draw(self) -> None:
        started = time.perf_counter()
        try:
            view = compressed_view(self.study, self.selection, self.ratio.value, self.operator.value, self.row)
        except PixArtNBError as error:
            return parts.say(self.line, str(error), wrong=True)
        image = self.study.images[self.row]
        for panel, pixels in zip(self.panels, view_pixels(image, view), strict=True):
            panel.png = png_bytes(pixels)
        keys, most = view.compressed.shape, float(np.abs(view.tokens - view.full).max())
        titles = (
            f"full: {view.full.size} keys",
            f"compressed: {keys[0]} x {keys[1]} = {view.compressed.size} keys",
            f"compressed - full: {view.overlap:.0%} is the same",
        )
        for title, text in zip(self.titles, titles, strict=True):
            title.value = f"<b>{text}</b>"
        for scale, (highest, signed) in zip(self.scales, ((view.highest, False),) * 2 + ((most, True),), strict=True):
            scale.value = parts.heat_scale(highest, image, "a token", PANEL - 8, signed)
        self.seconds = time.perf_counter() - started
        parts.say(self.line, f"{self._sentence()} {self.seconds:.2f} s.")
        self._draw_outcome()

    def _sentence(self) -> str:
        """Describe the maps in words."""
        chosen = self.selection
        who = f"Patch {chosen.patch}"
        if chosen.word is not None:
            who = f"The patches that attend most to “{self.study.trace.words(self.row)[chosen.word]}”"
        head = "mean over heads" if chosen.head is None else f"head {chosen.head}"
        how = f"{self.operator.value} {self.ratio.value}" if self.ratio.value > 1 else "no compression"
        return f"{who}, layer {chosen.layer}, {head}, step {chosen.step}: {how}, in this layer alone."

    def _draw_outcome(self) -> None:
        """Show the images, errors and costs of the current choice, or nothing if it was not run yet."""
        outcome = self.outcome
        self.results.layout.display = "none" if outcome is None else ""
        if outcome is not None and outcome is not self._drawn:
            self.images.value = png_bytes(self._images(outcome))
            self.curve.value = parts.figure_png(self._curves(outcome))
            self.costs.value = self.table()._repr_html_()
        self._drawn = outcome
        if not self.cancel.disabled:  # the message is that of the run
            return
        if outcome is None:
            return parts.say(self.message, "Not run yet: Run draws the images with these layers compressed.")
        effect = f"predictions are off by {outcome.error:.1%} on average, images by {outcome.image_error:.3f}"
        parts.say(self.message, f"{outcome_name(outcome)}: {effect} (rms of colours 0..1). {outcome.seconds:.1f} s.")

    def _images(self, outcome: Any) -> np.ndarray:
        """Return rows of full image with key cells, compressed image and difference; at most three rows."""
        cells = []
        for full, small in list(zip(self.study.images, outcome.images, strict=True))[:3]:
            differences = colormaps[HEAT](np.abs(small - full).mean(2))[..., :3]
            plain = [enlarged(to_uint8(pixels), 256) for pixels in (small, differences)]
            cells += [with_cells(full, self.study.trace.grid, outcome.ratio, shown=SHEET // 3), *plain]
        return tiles(cells, 3, 6)

    def _curves(self, outcome: Any) -> Figure:
        """Return the errors of the current outcome and of the last three before it."""
        others = [other for other in self.study.outcomes if other is not outcome and other.ratio > 1][-3:]
        shown = {outcome_name(one): np.maximum(one.errors, 1e-6) for one in (outcome, *others) if one.ratio > 1}
        figure = error_by_timestep(shown, self.study.timesteps, "error of the prediction")
        figure.set_size_inches(3.8, 2.5)
        if shown:
            figure.axes[0].legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return figure

    # ---- without a widget

    def table(self) -> Table:
        """Return the cost of a step without and with this compression."""
        full, small = vars(self.study.cost), vars(self.study.outcome(*self.choice).cost)
        shares = {name: f"{small[name] / full[name]:.1%}" for name in COSTS}
        numbers = {name: {"full": full[name], "compressed": small[name], "share": shares[name]} for name in COSTS}
        return Table({"": label} | numbers[name] for name, label in COSTS.items())

    def figure(self) -> Figure:
        """Return the images of the current choice as a figure."""
        outcome = self.study.outcome(*self.choice)
        pairs = list(zip(self.study.images, outcome.images, strict=True))[:3]
        named = {f"image {number}": pair for number, pair in enumerate(pairs)}
        return image_differences(named, ("full", outcome_name(outcome)))

    def attention_figure(self) -> Figure:
        """Return the current maps as a figure."""
        view = compressed_view(self.study, self.selection, self.ratio.value, self.operator.value, self.row)
        image = self.study.images[self.row]
        return full_against_compressed(image, view.full, view.compressed, self.selection.patch, view.ratio)

    def export(self, path: str | Path) -> Path:
        """Write all outcomes as one HTML file that needs neither Python nor a network, and return the path."""
        current = self.study.outcome(*self.choice)
        return export_compression(path, self.study, self.study.outcomes, self.study.outcomes.index(current))
