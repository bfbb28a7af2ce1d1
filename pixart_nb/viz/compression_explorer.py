"""Compression explorer: a widget that shows image, error and cost for a choice of layers, ratio and operator."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from pixart_nb.viz.compression import error_by_timestep
from pixart_nb.viz.explorers import as_bytes, enlarged, stacked, with_cells
from pixart_nb.viz.figures import image_differences
from pixart_nb.viz.html_export import export_compression
from pixart_nb.viz.style import HEAT
from pixart_nb.viz.tables import Table
from pixart_nb.viz.widget_parts import figure_png, lay_out, png_bytes, say, side_by_side, text_line


class CompressionExplorer:
    """Widget that shows the effect of KV compression on images, predictions and cost.

    Args:
        study: ``CompressionStudy``, or any object with ``outcome(layers, ratio, operator)``.
        ratios, operators: Options to select from.
        start: Initial layers, ratio and operator. Default: the deep half, ratio 2, mean.
    """

    def __init__(
        self,
        study: Any,
        ratios: Sequence[int] = (1, 2, 4),
        operators: Sequence[str] = ("mean", "conv", "uniform"),
        start: tuple[Sequence[int], int, str] | None = None,
    ):
        self.study, self.outcome, self.seconds, self._quiet = study, None, 0.0, False
        self.tried: list[Any] = []
        depth = len(study.layers)
        layers, ratio, operator = start or (range(depth // 2, depth), 2, operators[0])
        self.ratio = widgets.ToggleButtons(options=[(str(r), r) for r in ratios], value=ratio, description="Ratio")
        self.operator = widgets.ToggleButtons(options=list(operators), value=operator, description="Operator")
        self.layers = widgets.IntRangeSlider(
            min=0, max=depth - 1, value=(min(layers), max(layers)), description="Layers", continuous_update=False
        )
        lay_out(self.layers)
        self.images, self.curve = widgets.Image(format="png"), widgets.Image(format="png")
        self.costs, self.message = widgets.HTML(), text_line()
        self.widget = self._laid_out()
        for control in (self.ratio, self.operator, self.layers):
            control.observe(self._changed, "value")
        self._draw()

    def _laid_out(self) -> widgets.Widget:
        for image, width in ((self.images, "470px"), (self.curve, "400px")):
            image.layout = widgets.Layout(width=width, max_width="100%", margin="0")
        self.images.add_class("pixart-crisp")
        columns = widgets.HTML(
            "<div style='display:flex;width:470px;max-width:100%'>"
            + "".join(f"<b style='flex:1'>{name}</b>" for name in ("full", "compressed", "difference"))
            + "</div>"
        )
        left = widgets.VBox([columns, self.images, self.message])
        left.layout = widgets.Layout(width="480px", flex="none")
        right = widgets.VBox([self.ratio, self.operator, self.layers, self.curve, self.costs])
        right.layout = widgets.Layout(width="410px", flex="none")
        return side_by_side([left, right])

    @property
    def choice(self) -> tuple[tuple[int, ...], int, str]:
        """Current layers, ratio and operator; assign to change them."""
        first, last = self.layers.value
        return tuple(range(first, last + 1)), self.ratio.value, self.operator.value

    @choice.setter
    def choice(self, value: tuple[Sequence[int], int, str]) -> None:
        layers, ratio, operator = value
        self._quiet = True
        try:
            self.layers.value, self.ratio.value, self.operator.value = ((min(layers), max(layers)), ratio, operator)
        finally:
            self._quiet = False
        self._draw()

    def _changed(self, _: Any) -> None:
        if not self._quiet:
            self._draw()

    def _draw(self) -> None:
        started = time.perf_counter()
        say(self.message, "drawing with this compression …")
        try:
            self.outcome = self.study.outcome(*self.choice)
        except ValueError as error:
            return say(self.message, str(error), wrong=True)
        if self.outcome not in self.tried:
            self.tried.append(self.outcome)
        self.images.value = png_bytes(self._images())
        self.curve.value = figure_png(self._curves())
        self.costs.value = self.table()._repr_html_()
        self.seconds = time.perf_counter() - started
        say(
            self.message,
            f"{_name(self.outcome)}: predictions are off by {self.outcome.error:.1%} on average, images by "
            f"{self.outcome.image_error:.3f} (rms of colours 0..1). {self.seconds:.1f} s.",
        )

    def _images(self) -> np.ndarray:
        """Return rows of full image with key cells, compressed image and difference; at most three rows."""
        run = self.study.reference
        unit = 8 * self.study.pipe.transformer.config.patch_size
        grid = (run.height // unit, run.width // unit)
        rows = []
        for full, small in list(zip(self.study.images, self.outcome.images, strict=True))[:3]:
            differences = colormaps[HEAT](np.abs(small - full).mean(2))[..., :3]
            plain = [enlarged(as_bytes(pixels), 256) for pixels in (small, differences)]
            rows.append([with_cells(full, grid, self.outcome.ratio), *plain])
        return stacked(rows)

    def _curves(self) -> Figure:
        """Return the errors of the current outcome and of the last three before it."""
        others = [outcome for outcome in self.tried if outcome is not self.outcome and outcome.ratio > 1][-3:]
        shown = [outcome for outcome in (self.outcome, *others) if outcome.ratio > 1]
        figure = error_by_timestep(
            {_name(outcome): np.maximum(outcome.errors, 1e-6) for outcome in shown},
            self.study.timesteps,
            "error of the prediction",
        )
        figure.set_size_inches(5.4, 2.8)
        if shown:
            figure.axes[0].legend(fontsize=8, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        return figure

    def table(self) -> Table:
        """Return the cost of a step without and with this compression."""
        full, small = vars(self.study.cost), vars(self.outcome.cost)
        names = {
            "keys": "keys of a layer",
            "macs": "MACs of a step",
            "attention_macs": "of them attention",
            "bytes": "keys and values, bytes",
        }
        rows = [
            {"": label, "full": full[name], "compressed": small[name], "share": f"{small[name] / full[name]:.1%}"}
            for name, label in names.items()
        ]
        return Table(rows)

    def figure(self) -> Figure:
        """Return the current images as a figure."""
        pairs = list(zip(self.study.images, self.outcome.images, strict=True))[:3]
        return image_differences({f"image {k}": pair for k, pair in enumerate(pairs)}, ("full", _name(self.outcome)))

    def export(self, path: str | Path) -> Path:
        """Write all outcomes as one HTML file that needs neither Python nor a network, and return the path."""
        return export_compression(path, self.study, self.tried, self.tried.index(self.outcome))

    def _repr_mimebundle_(self, **options: Any):
        return self.widget._repr_mimebundle_(**options)


def _name(outcome: Any) -> str:
    first, last = outcome.layers[0], outcome.layers[-1]
    return f"{outcome.operator} {outcome.ratio}, layers {first}-{last}"
