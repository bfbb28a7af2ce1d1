"""Figures of a data set before a training, and live curves of the training."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from IPython.display import display
from matplotlib.axes import Axes

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz.style import COLOURS, SMALL, TEXT, WIDTH, Figure, axes_grid, for_curves, legend, new_figure

#: Points of a curve that are drawn at most.
POINTS = 2000
Row = Mapping[str, Any]


def dataset_figure(sizes: Sequence[tuple[int, int]], captions: Sequence[str]) -> Figure:
    """Draw the sizes (height, width) of a data set's images in pixels, and the number of words of their captions.

    The area of a dot is proportional to the number of images of that size.

    >>> figure = dataset_figure([(64, 64), (64, 64), (64, 96)], ["a red cup", "a cup", "cup"])
    >>> [place.get_xlabel() for place in figure.axes]
    ['width, pixels', 'words of a caption']
    """
    if not len(sizes) or len(sizes) != len(captions):
        raise PixArtNBError(f"{len(sizes)} sizes and {len(captions)} captions; expected one of each an image")
    figure = new_figure(WIDTH, 2.8)
    left, right = axes_grid(figure, 1, 2)[0]
    different, counts = np.unique(np.asarray(sizes), axis=0, return_counts=True)
    for_curves(left, "width, pixels", "height, pixels")
    left.scatter(different[:, 1], different[:, 0], 20 + 300 * counts / counts.sum(), COLOURS[0], alpha=0.7)
    for (height, width), count in zip(different[:8], counts, strict=False):
        left.annotate(f"{count}", (width, height), (11, 8), textcoords="offset points", fontsize=SMALL)
    left.set(xlim=(0, 1.2 * different[:, 1].max()), ylim=(0, 1.2 * different[:, 0].max()))
    words = np.array([len(caption.split()) for caption in captions])
    step = -(-(int(np.ptp(words)) + 1) // 40)
    bins = np.arange(words.min(), words.max() + step + 1, step) - 0.5
    for_curves(right, "words of a caption", "images")
    right.hist(words, bins, color=COLOURS[0], edgecolor="white")
    for axis in (right.xaxis, right.yaxis):
        axis.get_major_locator().set_params(integer=True)
    right.set_axisbelow(True)
    return figure


def training_figure(rows: Sequence[Row], total: int = 0) -> Figure:
    """Draw loss and gradient norm by step with their running means over a twentieth of the steps.

    Args:
        rows: Rows that a training yields or logs. Those with ``held_out_loss`` give a curve of their own.
        total: Steps of the whole training.

    >>> figure = training_figure([{"step": k, "loss": 1 / k, "grad_norm": 1.0} for k in range(1, 30)])
    >>> [place.get_ylabel() for place in figure.axes]
    ['loss', 'gradient norm']
    """
    figure = new_figure(WIDTH, 3.0)
    axes = axes_grid(figure, 1, 2)[0]
    for ax, key, label in zip(axes, ("loss", "grad_norm"), ("loss", "gradient norm"), strict=True):
        for_curves(ax, "step", label)
        ax.xaxis.get_major_locator().set_params(integer=True)
        _with_mean(ax, [row for row in rows if key in row], key)
        if total:
            ax.set_xlim(0, total)
    if held_out := [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]:
        _held_out(axes[0], *map(np.array, zip(*held_out, strict=True)))
    if axes[0].lines:
        legend(axes[0])
    summary = _progress([row for row in rows if "loss" in row], total)
    figure.suptitle(summary, fontsize=TEXT, x=0.01, ha="left")
    return figure


def live_curves(rows: Iterable[Row], earlier: Sequence[Row] = (), total: int = 0, every: float = 2.0) -> Iterator[Row]:
    """Yield the rows of a training unchanged while one figure of its curves is updated.

    Args:
        rows: Rows that ``Training.steps`` yields.
        earlier: Rows up to the step at which a training was resumed.
        total: Steps of the whole training.
        every: Seconds between two updates; the last one shows everything.
    """
    seen = list(earlier)
    shown = display(training_figure(seen, total), display_id=True)  # None outside of IPython
    drawn = time.monotonic()
    try:
        for row in rows:
            seen.append(row)
            if shown and time.monotonic() - drawn > every:
                shown.update(training_figure(seen, total))
                drawn = time.monotonic()
            yield row
    finally:
        if hasattr(rows, "close"):  # an interrupted training saves its state now, not when it is collected
            rows.close()
        if shown:
            shown.update(training_figure(seen, total))


def _held_out(ax: Axes, steps: np.ndarray, values: np.ndarray) -> None:
    style = {"color": COLOURS[1], "markersize": 4, "linewidth": 1.4, "clip_on": False}
    ax.plot(steps, values, "s--", label="held-out images", **style)
    ax.set_ylim(0, max(ax.get_ylim()[1], 1.1 * float(values.max())))


def _with_mean(ax: Axes, rows: Sequence[Row], key: str) -> None:
    steps, values = (np.array([row[name] for row in rows], float) for name in ("step", key))
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if not len(values):
        return
    window = max(1, min(len(values), max(10, len(values) // 20)))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    means = (sums[ends] - sums[np.maximum(0, ends - window)]) / np.minimum(ends, window)
    few = slice(None, None, -(-len(values) // POINTS))
    ax.plot(steps[few], values[few], color=COLOURS[4], linewidth=0.7, alpha=0.6, label="each step")
    ax.plot(steps[few], means[few], color=COLOURS[0], linewidth=1.6, label=f"mean of {window} steps")
    ax.set_ylim(0, 1.15 * float(np.quantile(values, 0.98)) or 1.0)  # a single leap hides everything else


def _progress(rows: Sequence[Row], total: int) -> str:
    if not rows:
        return "no step yet"
    last = rows[-1]
    words = [f"step {last['step']:.0f}" + f" of {total}" * bool(total), f"loss {last['loss']:.4g}"]
    if "images_per_second" in last:
        words.append(f"{last['images_per_second']:.3g} images/s")
    if last.get("seconds_left"):
        minutes, seconds = divmod(round(last["seconds_left"]), 60)
        words.append(f"{minutes}:{seconds:02d} left")
    return ", ".join(words)
