"""Figures of token compression: kernels, cells, error and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz import style
from pixart_nb.viz.attention import draw_cells, image_axes, show_pixels
from pixart_nb.viz.figures import require_as_many
from pixart_nb.viz.overlay import as_float, shrunk
from pixart_nb.viz.style import COLOURS, SMALL, TEXT, WIDTH, Figure, axes_grid, for_curves, line_style, new_figure

#: Operators that take the upper left token of a cell instead of all of them.
PICKS = ("ave", "uniform")
#: Colour map of what is lost, white for nothing: a loss is small nearly everywhere.
LOST = "OrRd"
#: Least deviation from the average that the colours of learned kernels reach to: smaller ones are pale.
LEAST_SCALE = 0.05
#: Panels of ``cost_curves``: key of a record, name of the axis.
COSTS = {"macs": "MACs of a step", "bytes": "bytes of keys and values", "seconds": "attention of a layer, measured, s"}


def learned_kernels(kernels: Mapping[str, np.ndarray]) -> Figure:
    """Draw learned kernels (C, R, R) of each layer against the average 1/R^2 that they were initialised with.

    Weights are multiplied by R^2, so 1 is the average. Top: mean over the channels, at most seven layers in a row.
    Bottom: spread over the channels of each layer: middle half (box) and 5% to 95% (whiskers).
    """
    if not kernels:
        raise PixArtNBError("there is no kernel to show; only layers compressed by 'conv' have one")
    scaled = {name: np.asarray(weights) * weights.shape[-1] ** 2 for name, weights in kernels.items()}
    columns = min(7, len(scaled))
    rows, cell = -(-len(scaled) // columns), min(1.8, (WIDTH - 1) / columns)
    above, below = rows * (cell + 0.45) + 0.3, 2.2
    figure = new_figure(max(4.0, columns * cell + 1.1), above + below)
    top, bottom = figure.subfigures(2, 1, height_ratios=[above, below])
    _show_means(top, {name: weights.mean(0) for name, weights in scaled.items()}, rows, columns)
    ax = for_curves(axes_grid(bottom, 1, 1)[0, 0], "layer", "weight x R²")
    lines = {part: {"color": COLOURS[0]} for part in ("boxprops", "whiskerprops", "capprops")}
    everything = [weights.ravel() for weights in scaled.values()]
    ax.boxplot(everything, whis=(5, 95), showfliers=False, medianprops={"color": COLOURS[1]}, **lines)
    ax.axhline(1, color="0.3", linestyle="--", linewidth=1.0, zorder=0)
    ax.set_xticks(range(1, len(scaled) + 1), [name.removeprefix("layer ") for name in scaled])
    ax.set_title("weights of all channels; dashed: the average", fontsize=TEXT)
    return figure


def _show_means(figure: Any, means: Mapping[str, np.ndarray], rows: int, columns: int) -> None:
    """Show mean kernels on one scale around the average, which reaches to ``LEAST_SCALE`` at least."""
    deviation = max(float(np.abs(mean - 1).max()) for mean in means.values())
    most = max(deviation, LEAST_SCALE)
    digits = 2 if deviation >= 0.02 else 3
    axes = [style.for_image(ax) for ax in axes_grid(figure, rows, columns).ravel()]
    for ax, (name, mean) in zip(axes, means.items(), strict=False):
        image = ax.imshow(mean, cmap=style.DIFFERENCE, vmin=1 - most, vmax=1 + most)
        ax.set_title(name, fontsize=TEXT)
        _write_values(ax, mean, most, digits)
    style.colour_bar(figure, image, axes, "mean weight x R²")
    figure.suptitle(f"mean over channels; largest deviation {deviation:.2g}", fontsize=TEXT)


def _write_values(ax: Axes, values: np.ndarray, most: float, digits: int) -> None:
    """Write each value of a small kernel into its square."""
    if values.size > 16:
        return
    for (row, column), value in np.ndenumerate(values):
        dark = abs(value - 1) > 0.6 * most
        look = {"ha": "center", "va": "center", "fontsize": SMALL, "color": "white" if dark else "black"}
        ax.text(column, row, f"{value:.{digits}f}", **look)


def cells_of_keys(image: np.ndarray, grid: tuple[int, int], ratio: int, operator: str = "conv") -> Figure:
    """Draw the pixels that each compressed key represents, and the image at the resolution of the keys.

    Left: cells of R x R tokens. Operators that pick one token of a cell have it marked; tokens in no cell are hatched.
    Right: mean colour of the tokens of each key.
    """
    _check_ratio(grid, ratio)
    pixels = as_float(image)
    aspect, cell = pixels.shape[0] / pixels.shape[1], 3.4
    figure = new_figure(2 * cell + 0.2, cell * aspect + 0.5)
    left, right = (style.for_image(ax) for ax in axes_grid(figure, 1, 2)[0])
    rows, columns = grid[0] // ratio, grid[1] // ratio
    token = (pixels.shape[0] / grid[0], pixels.shape[1] / grid[1])
    scale = token[0] / token[1]
    left.imshow(shrunk(pixels), extent=(0, grid[1], grid[0], 0), aspect=scale, interpolation="nearest")
    _draw_cells(left, rows, columns, ratio, operator)
    _hatch_rest(left, grid, rows * ratio, columns * ratio)
    size = f"{ratio * token[1]:.3g} x {ratio * token[0]:.3g}"
    left.set_title(f"{grid[0] * grid[1]:,} tokens, {rows * columns:,} keys of {size} pixels", fontsize=TEXT)
    kept = mean_colours(pixels, grid, ratio, operator)
    right.imshow(kept, extent=(0, columns * ratio, rows * ratio, 0), aspect=scale, interpolation="nearest")
    right.set(xlim=(0, grid[1]), ylim=(grid[0], 0))
    right.set_title("upper left tokens" if operator in PICKS else "means of cells", fontsize=TEXT)
    return figure


def mean_colours(image: np.ndarray, grid: tuple[int, int], ratio: int, operator: str = "conv") -> np.ndarray:
    """Return the mean colour of the tokens of each key: (H, W, 3) -> (h // R, w // R, 3) float."""
    pixels = as_float(image)
    edges = [np.linspace(0, pixels.shape[axis], grid[axis] + 1).astype(int) for axis in range(2)]
    rows, columns = edges
    tokens = np.add.reduceat(np.add.reduceat(pixels, rows[:-1], 0), columns[:-1], 1)
    tokens /= (np.diff(rows)[:, None] * np.diff(columns))[..., None]
    height, width = grid[0] // ratio, grid[1] // ratio
    cells = tokens[: height * ratio, : width * ratio].reshape(height, ratio, width, ratio, 3)
    return cells[:, 0, :, 0] if operator in PICKS else cells.mean((1, 3))


def _check_ratio(grid: tuple[int, int], ratio: int) -> None:
    if not 1 <= ratio <= min(grid):
        raise PixArtNBError(f"ratio {ratio} makes no cell of {grid[0]}x{grid[1]} tokens; give 1 to {min(grid)}")


def _draw_cells(ax: Axes, rows: int, columns: int, ratio: int, operator: str) -> None:
    width = 1.2 if max(rows, columns) <= 32 else 0.4
    draw_cells(ax, (rows, columns), ratio, linewidth=width)
    if operator in PICKS and rows * columns <= 1024:
        for row, column in np.ndindex(rows, columns):
            corner = (column * ratio, row * ratio)
            ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=style.MARK, linewidth=1.5))


def _hatch_rest(ax: Axes, grid: tuple[int, int], rows: int, columns: int) -> None:
    rests = (((0, rows), grid[1], grid[0] - rows), ((columns, 0), grid[1] - columns, rows))
    for corner, width, height in rests:
        if width and height:
            ax.add_patch(Rectangle(corner, width, height, facecolor="0.5", alpha=0.7, hatch="//"))


def similarity_by_layer(
    values: Mapping[str, np.ndarray], layers: Sequence[str | int], ylabel: str = "cosine similarity"
) -> Figure:
    """Draw values (layers, steps) of several choices: means over the steps, shaded from minimum to maximum."""
    figure, ax = style.curve_axes(WIDTH * 0.8, 3.0, "layer", f"{ylabel}, mean and range over steps")
    for number, (label, numbers) in enumerate(values.items()):
        require_as_many(f"layers of {label!r}", numbers, len(layers), "names")
        look, positions = line_style(number), np.arange(len(layers))
        ax.plot(positions, numbers.mean(1), label=label, **look)
        ax.fill_between(positions, numbers.min(1), numbers.max(1), color=look["color"], alpha=0.15, linewidth=0)
    style.label_every(ax.set_xticks, layers)
    style.legend(ax, "right")
    return figure


def lost_maps(image: np.ndarray, similarities: Mapping[str, np.ndarray], columns: int = 7) -> Figure:
    """Draw the image and, for each layer, 1 - similarity (h, w), from white for nothing, on one scale."""
    lost = {name: 1 - np.nan_to_num(values, nan=0.0) for name, values in similarities.items()}
    columns, image = min(columns, len(lost) + 1), shrunk(image)
    cell = min(2.0, (WIDTH - 0.9) / columns)
    figure, axes = image_axes(-(-(len(lost) + 1) // columns), columns, image, cell)
    show_pixels(axes[0], as_float(image), "image")
    extent = (0, image.shape[1], image.shape[0], 0)
    look = {"cmap": LOST, "interpolation": "nearest", "extent": extent, "vmin": 0}
    look["vmax"] = max(float(values.max()) for values in lost.values())
    for ax, (name, values) in zip(axes[1:], lost.items(), strict=False):
        heat = ax.imshow(values, **look)
        ax.set_title(name, fontsize=TEXT)
    style.colour_bar(figure, heat, axes, "1 - cosine similarity")
    return figure


def error_by_timestep(
    errors: Mapping[str, Sequence[float]], timesteps: Sequence[float], ylabel: str, logarithmic: bool = True
) -> Figure:
    """Draw one line per choice over the timesteps of a run, in the order of sampling."""
    figure, ax = style.curve_axes(WIDTH * 0.85, 3.2, "timestep (sampling runs to the right)", ylabel)
    for number, (label, values) in enumerate(errors.items()):
        require_as_many(f"values of {label!r}", values, len(timesteps), "timesteps")
        ax.plot(list(timesteps), np.asarray(values, float), label=label, **line_style(number))
    if logarithmic:
        style.logarithmic_values(ax)
    ax.invert_xaxis()
    if errors:
        style.legend(ax, "right")
    return figure


def beside_the_paper(
    measured: Mapping[str, Mapping[str, float]], paper: Mapping[str, float], paper_label: str = "paper: FID"
) -> Figure:
    """Draw measured values by choice, and those of the paper, as points; the axes do not begin at zero.

    There is one panel for each measure, with the paper's last. Missing measurements have no point.
    """
    names = list(dict.fromkeys(name for values in measured.values() for name in values))
    figure = new_figure(WIDTH, 0.36 * len(names) + 0.9)
    columns = {**measured, paper_label: paper}
    panels = axes_grid(figure, 1, len(columns), sharey=True)[0]
    for number, (ax, (label, values)) in enumerate(zip(panels, columns.items(), strict=True)):
        chosen = [name for name in names if name in values]
        colour = "0.3" if label == paper_label else COLOURS[number]
        points = [values[name] for name in chosen], [names.index(name) for name in chosen]
        ax.plot(*points, "o", color=colour, markersize=7)
        for value, row in zip(*points, strict=True):
            ax.annotate(f"{value:.4g}", (value, row), (7, 0), textcoords="offset points", va="center", size=SMALL)
        for_curves(ax, label, "").margins(x=0.25, y=0.2)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    return figure


def cost_curves(costs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Draw MACs and memory of each choice against the image size, as shares of the first choice, and measured seconds.

    Records have ``size`` (side of a square image in pixels), ``macs``, ``bytes`` and ``seconds`` (or None).
    """
    first = next(iter(costs))
    full = {record["size"]: record for record in costs[first]}
    sizes = sorted({record["size"] for records in costs.values() for record in records})
    timed = any(record.get("seconds") is not None for records in costs.values() for record in records)
    shown = {key: label for key, label in COSTS.items() if key != "seconds" or timed}
    figure = new_figure(WIDTH, 2.7 + 0.12 * len(costs))
    axes = axes_grid(figure, 1, len(shown)).ravel()
    for ax, (key, label) in zip(axes, shown.items(), strict=True):
        share = key != "seconds"
        for number, (choice, records) in enumerate(costs.items()):
            records = [record for record in records if record.get(key) is not None and record["size"] in full]
            values = [record[key] / full[record["size"]][key] if share else record[key] for record in records]
            ax.plot([record["size"] for record in records], values, label=choice, **line_style(number))
        ylabel = f"{label},\nshare of {first}" if share else label
        for_curves(ax, "side of the image, pixels", ylabel).set_xscale("log", base=2)
        if share:
            ax.set_ylim(0, 1.08)
        else:
            style.logarithmic_values(ax)
        ax.set_xticks(sizes, sizes)
        ax.minorticks_off()
    style.legend_below(figure, axes[0])
    return figure
