"""Curves of trainings: losses, scores, and a figure that is updated while a training runs; sizes of a data set."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from IPython.display import display
from matplotlib.axes import Axes

from pixart_nb.core.errors import PixArtNBError, pluralized
from pixart_nb.viz import style
from pixart_nb.viz.figures import require_as_many
from pixart_nb.viz.style import COLOURS, SMALL, WIDTH, Figure, for_curves, legend, line_style

#: Steps and values of a curve, of equal length.
Curve = tuple[Sequence[float], Sequence[float]]
TrainingRow = Mapping[str, Any]
#: Points of a curve that are drawn at most.
POINTS = 2000
#: Measured values of a variable, up to which each has a tick of its own.
_TICKS = 10


def training_curves(curves: Mapping[str, Curve], ylabel: str = "loss", logarithmic: bool = False) -> Figure:
    """Draw one line per name from ``curves[name] = (steps, values)``, two sequences of equal length."""
    figure, ax = style.curve_axes(7, 3.5, "step", ylabel)
    _draw_curves(ax, curves, list(curves), lines_only=True)
    if logarithmic:
        style.logarithmic_values(ax)
    if curves:
        legend(ax)
    return figure


def score_figure(sizes: Sequence[int], curves: Mapping[str, Sequence[float]], images: Sequence[int]) -> Figure:
    """Draw a curve of shares, 0 to 1, for each method over the image side in pixels; ``images`` were evaluated at each.

    A method may end at a smaller size than others. The bars are 95% intervals.
    """
    require_as_many("numbers of images", images, len(sizes), "sizes")
    figure, ax = style.curve_axes(7, 3.4, "side in pixels, and images judged", "share with everything right")
    for number, (name, shares) in enumerate(curves.items()):
        beside = np.arange(len(shares)) + 0.04 * (number - (len(curves) - 1) / 2)  # bars do not hide each other
        ax.plot(beside, shares, label=name, **line_style(number) | {"markersize": 5})
        middle, half = wilson_interval(np.asarray(shares, dtype=float), np.asarray(images[: len(shares)]))
        ax.errorbar(beside, middle, yerr=half, **_bars(number))
    labels = [f"{size}\n{count}" for size, count in zip(sizes, images, strict=True)]
    labels[:1] = [f"{size}\n{pluralized(count, 'image')}" for size, count in zip(sizes[:1], images[:1], strict=True)]
    ax.set_xticks(range(len(sizes)), labels)
    ax.set_ylim(-0.04, 1.04)
    if curves:
        legend(ax, "above", ncols=len(curves))
    return figure


def loss_and_score(
    losses: Mapping[str, Curve],
    scores: Mapping[str, Curve],
    marks: Mapping[str, float] | None = None,
    levels: Mapping[str, float] | None = None,
    score: str = "share of images that are right",
) -> Figure:
    """Draw losses (left) and scores between 0 and 1 (right) by step; a run has the same line style in both.

    Without scores and levels there is one panel, of the losses.

    Args:
        marks: Named steps, drawn as vertical lines up to the last step.
        levels: Named scores, drawn as horizontal lines.
    """
    scored = bool(scores or levels)  # there are no scores of a model whose images cannot be read
    figure = style.new_figure(WIDTH if scored else 7, 3.4)
    loss, *right = style.axes_grid(figure, 1, 1 + scored)[0]
    names = list(dict.fromkeys([*losses, *scores]))
    _draw_curves(for_curves(loss, "step", "loss"), losses, names, lines_only=True)
    for share in right:
        _draw_curves(for_curves(share, "step", score), scores, names)
        _draw_levels(share, levels or {})
        share.set_ylim(-0.03, 1.03)
    last = max((max(steps) for steps, _ in (*losses.values(), *scores.values()) if len(steps)), default=0)
    for ax in (loss, *right):
        ax.set_xlim(0, last * 1.03 or 1)
        for name, step in (marks or {}).items():
            if step <= last:
                _mark_step(ax, step, name if ax is loss else "")
    if losses or scores:
        style.legend_below(figure, [*right, loss][0])
    return figure


def curve_panels(
    xlabel: str,
    panels: Mapping[str, Mapping[str, Curve]],
    levels: Mapping[str, Mapping[str, float]] | None = None,
    counts: Mapping[str, int] | None = None,
) -> Figure:
    """Draw panels side by side over one variable, from 0 on: ``panels[ylabel][name] = (x, y)``.

    Args:
        levels: ``levels[ylabel][name]`` are baselines of a panel, drawn as horizontal lines.
        counts: The values of the panel ``ylabel`` are shares of so many images; it reaches to 1 and has 95% intervals.
            Its curves stand a little beside each other, so that equal ones are seen.
    """
    if not panels:
        raise PixArtNBError("curve_panels needs at least one panel, got none")
    figure = style.new_figure(WIDTH, 3.4)
    for ax, (ylabel, curves) in zip(style.axes_grid(figure, 1, len(panels))[0], panels.items(), strict=True):
        count = (counts or {}).get(ylabel, 0)
        values = sorted({float(x) for steps, _ in curves.values() for x in steps})
        if count:
            curves = _beside_each_other(curves, values)
        _draw_curves(for_curves(ax, xlabel, ylabel), curves, list(curves), markersize=5)
        _draw_levels(ax, (levels or {}).get(ylabel, {}))
        if count:
            _draw_intervals(ax, curves, count)
        if len(values) <= _TICKS:
            ax.set_xticks(values, [f"{value:g}" for value in values])
        highest = max((float(np.max(line.get_ydata())) for line in ax.lines), default=1.0) if not count else 1.0
        ax.set_ylim(-0.03 * highest, 1.06 * highest or 1.0)
        legend(ax, "above", ncols=2)
    return figure


def _beside_each_other(curves: Mapping[str, Curve], values: Sequence[float]) -> dict[str, Curve]:
    """Shift curves sideways around the sorted ``values`` of their variable, by half of a gap in all at most."""
    gaps = np.diff(values)
    shift = min(0.015 * (values[-1] - values[0]), 0.5 * gaps.min() / len(curves)) if len(gaps) else 0.0
    return {
        name: (np.asarray(steps, dtype=float) + shift * (number - (len(curves) - 1) / 2), shares)
        for number, (name, (steps, shares)) in enumerate(curves.items())
    }


def _draw_intervals(ax: Axes, curves: Mapping[str, Curve], count: int) -> None:
    """Draw the interval of each share of ``count`` images in the colour of its curve."""
    for number, (steps, shares) in enumerate(curves.values()):
        middle, half = wilson_interval(np.asarray(shares, dtype=float), count)
        ax.errorbar(np.asarray(steps, dtype=float), middle, yerr=half, **_bars(number))


def _bars(number: int) -> dict[str, Any]:
    """Look of the error bars of a curve."""
    return {"fmt": "none", "ecolor": line_style(number)["color"], "elinewidth": 1.0, "capsize": 2, "alpha": 0.6}


def wilson_interval(shares: np.ndarray, count: int | np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """Return the middle and half the length of the 95% intervals of shares of ``count`` (Wilson 1927)."""
    scale = 1 + z**2 / count
    half = z * np.sqrt(shares * (1 - shares) / count + z**2 / (4 * count**2)) / scale
    return (shares + z**2 / (2 * count)) / scale, half


def _draw_levels(ax: Axes, levels: Mapping[str, float]) -> None:
    for number, (name, value) in enumerate(levels.items()):
        ax.axhline(value, color="0.35", linewidth=1.0, linestyle=(":", "--", "-.")[number % 3], label=name)


def _draw_curves(
    ax: Axes, curves: Mapping[str, Curve], names: Sequence[str], lines_only: bool = False, **look: Any
) -> None:
    """Draw curves in the line style of their position in ``names``.

    ``lines_only`` leaves out the markers, except that of a curve with one finite value, which is no line.
    """
    for name, (steps, values) in curves.items():
        require_as_many(f"values of {name!r}", values, len(steps), "steps")
        values = np.asarray(values, dtype=float)
        marker = {"marker": None} if lines_only and np.isfinite(values).sum() > 1 else {}
        ax.plot(np.asarray(steps), values, label=name, **line_style(names.index(name)) | marker | look)


def _mark_step(ax: Axes, step: float, name: str) -> None:
    ax.axvline(step, color="0.6", linewidth=0.9, linestyle=":")
    if name:
        style = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": "right", "va": "top"}
        ax.annotate(name, (step, 1.0), (-3, -3), rotation=90, fontsize=SMALL, color="0.35", **style)


def dataset_figure(sizes: Sequence[tuple[int, int]], captions: Sequence[str]) -> Figure:
    """Draw the sizes (height, width) of a data set's images in pixels, and the number of words of their captions.

    The area of a dot is proportional to the number of images of that size.
    """
    if not len(sizes) or len(sizes) != len(captions):
        raise PixArtNBError(f"{len(sizes)} sizes and {len(captions)} captions; expected one of each an image")
    figure = style.new_figure(WIDTH, 2.8)
    left, right = style.axes_grid(figure, 1, 2)[0]
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


def training_figure(rows: Sequence[TrainingRow], total: int = 0) -> Figure:
    """Draw loss and gradient norm by step with their running means over a twentieth of the steps.

    Args:
        rows: Rows that a training yields or logs. Those with ``held_out_loss`` give a curve of their own.
        total: Steps of the whole training.
    """
    figure = style.new_figure(WIDTH, 3.0)
    axes = style.axes_grid(figure, 1, 2)[0]
    for ax, key, label in zip(axes, ("loss", "grad_norm"), ("loss", "gradient norm"), strict=True):
        for_curves(ax, "step", label)
        ax.xaxis.get_major_locator().set_params(integer=True)
        _draw_with_mean(ax, [row for row in rows if key in row], key)
        if total:
            ax.set_xlim(0, total)
    if held_out := [(row["step"], row["held_out_loss"]) for row in rows if "held_out_loss" in row]:
        steps, values = zip(*held_out, strict=True)
        look = {"color": COLOURS[1], "markersize": 4, "linewidth": 1.4, "clip_on": False}
        axes[0].plot(steps, values, "s--", label="held-out images", **look)
        axes[0].set_ylim(0, max(axes[0].get_ylim()[1], 1.1 * max(values)))
    if axes[0].lines:
        legend(axes[0])
    summary = _progress([row for row in rows if "loss" in row], total)
    figure.suptitle(summary, fontsize=style.TEXT, x=0.01, ha="left")
    return figure


def live_curves(
    rows: Iterable[TrainingRow], earlier: Sequence[TrainingRow] = (), total: int = 0, every: float = 2.0
) -> Iterator[TrainingRow]:
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


def _draw_with_mean(ax: Axes, rows: Sequence[TrainingRow], key: str) -> None:
    """Draw each step's value and the running mean of the last steps."""
    steps, values = (np.array([row[name] for row in rows], float) for name in ("step", key))
    steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    if not len(values):
        return
    window = max(1, min(len(values), max(10, len(values) // 20)))
    sums, ends = np.concatenate([[0.0], np.cumsum(values)]), np.arange(1, len(values) + 1)
    means = (sums[ends] - sums[np.maximum(0, ends - window)]) / np.minimum(ends, window)
    few, marker = slice(None, None, -(-len(values) // POINTS)), "o" if len(values) == 1 else None  # no line
    look = {"marker": marker, "markersize": 4, "clip_on": marker is None}
    ax.plot(steps[few], values[few], color=COLOURS[4], linewidth=0.7, alpha=0.6, label="each step", **look)
    label = f"mean of {pluralized(window, 'step')}"
    ax.plot(steps[few], means[few], color=COLOURS[0], linewidth=1.6, label=label, **look)
    ax.set_ylim(0, 1.15 * float(np.quantile(values, 0.98)) or 1.0)  # a single leap hides everything else


def _progress(rows: Sequence[TrainingRow], total: int) -> str:
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
