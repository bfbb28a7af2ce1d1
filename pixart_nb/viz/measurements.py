"""Tables and figures of measurements: benchmark rows, shares of right images, stages of runs, artifacts of tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz.curves import wilson_interval
from pixart_nb.viz.style import COLOURS, SMALL, TEXT, WIDTH, Figure, axes_grid, legend, new_figure
from pixart_nb.viz.tables import Table, in_words

#: Measures that a bar shows: the first that a benchmark has.
SECONDS = ("20 steps", "seconds")
NAMES = {
    "mindspore": "PixArt-NB, MindSpore", "recompute": "PixArt-NB, gradient checkpointing",
    "diffusers": "diffusers, PyTorch", "compiled": "diffusers, torch.compile",
    "trimmed": "diffusers, prompts without padding",
}  # fmt: skip
#: Published steps/s on one and training images/s on four Ascend 910* (mindone, MindSpore 2.3), by size in pixels.
PUBLISHED = {256: (18.04, 88.1), 512: (15.95, 33.5), 1024: (4.96, 6.8), 2048: (0.57, 0.5)}
PUBLISHED_NAMES = ("published steps/s, one Ascend 910*", "published training images/s, four Ascend 910*")
#: Parts of the time of a run, in the order of ``_time_shares``.
SHARES = ("matrix products, at the machine's rate", "matrix products, beyond it", "everything else")
#: By stage: ``seconds`` and ``peak_bytes``, as ``StageFiles.measured`` gives them.
StageCosts = Mapping[str, Mapping[str, float]]
_HATCHES = ("", "///", "...", "xxx")
#: Edges and other lines of an image: mean jumps, 0..255, as ``measure_tile_artifacts`` gives them.
Jumps = tuple[Sequence[float], Sequence[float]]
_JUMP_TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)


# ---- benchmark rows (``benchmarks.runs.Row``)


def speed_table(rows: Sequence[Any]) -> Table:
    """Return the published table on this device: size, steps/s and training images/s, beside the published values."""
    names = {"steps per second": "steps/s", "images per second": "training images/s"}
    lines: dict[int, dict[str, float]] = {}
    for row in rows:
        if row.system == "mindspore" and row.measure in names:
            lines.setdefault(row.size, {})[names[row.measure]] = row.value
    for size, line in lines.items():
        line.update(zip(PUBLISHED_NAMES, PUBLISHED.get(size, ()), strict=False))
    caption = "PixArt-Sigma on this device, and as published: batch 1 with guidance, DPM-Solver++"
    columns = ["size", *names.values(), *PUBLISHED_NAMES]
    return Table(({"size": size, **lines[size]} for size in sorted(lines)), caption, columns)


def share_table(rows: Sequence[Any]) -> Table:
    """Return the share of matrix products in the time of each benchmark, their rate, and the rate of the machine."""
    lines: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row.unit in ("", "GFLOP/s"):
            name = f"{row.measure}, {row.unit}" if row.unit else row.measure
            lines.setdefault((row.benchmark, row.size), {})[name] = row.value
    return Table({"benchmark": name, "size": size, **line} for (name, size), line in lines.items())


def share_figure(rows: Sequence[Any]) -> Figure:
    """Draw the time of each size in three parts: products at the machine's rate, beyond it, and everything else."""
    lines = _time_shares(rows)
    if not lines:
        raise PixArtNBError("there are no shares to draw; run the benchmark 'denoise' first")
    figure, axes = _lines_of_bars(1.1 + 0.45 * len(lines), list(lines))
    left = [0.0] * len(lines)
    for number, name in enumerate(SHARES):
        widths = [parts[number] for parts in lines.values()]
        bars = axes.barh(range(len(lines)), widths, 0.6, left=left, color=COLOURS[number], label=name)
        texts = [f"{width:.0%}" if width > 0.03 else "" for width in widths]
        axes.bar_label(bars, texts, label_type="center", fontsize=TEXT, color="white")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set(xlim=(0, 1), xlabel="share of the time")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.legend(loc="outside upper left", ncols=3, fontsize=SMALL, frameon=False)
    return figure


def _lines_of_bars(height: float, names: Sequence[str]) -> tuple[Figure, Any]:
    figure = new_figure(WIDTH, height)
    axes = axes_grid(figure, 1, 1)[0, 0]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    return figure, axes


def _time_shares(rows: Sequence[Any]) -> dict[str, tuple[float, float, float]]:
    """Return label -> the shares that ``SHARES`` names, which sum to 1."""
    measures: dict[str, dict[str, float]] = {}
    for row in rows:
        if not row.unit:
            measures.setdefault(f"{row.benchmark}, {row.size} px", {})[row.measure] = row.value
    lines = {}
    for label, values in measures.items():
        share = values.get("share of matrix products")
        if share is not None:
            at_rate = share * min(1.0, values["rate of matrix products / rate of the machine"])
            lines[label] = (at_rate, share - at_rate, 1 - share)
    return lines


def benchmark_figure(rows: Sequence[Any]) -> Figure:
    """Draw the seconds of each benchmark and size, one bar per system.

    The seconds stand beside the bars. If there are several systems, a bar is the share of the slowest one, and lines
    with diffusers end with its ratio.
    """
    lines = _seconds(rows)
    if not lines:
        raise PixArtNBError("there are no seconds to draw; run a benchmark first")
    names = list(dict.fromkeys(name for values in lines.values() for name in values))
    step = 0.72 / max(2, len(names))
    figure, axes = _lines_of_bars(0.9 + 0.2 / step * len(lines), list(lines))
    for number, system in enumerate(names):
        own = [(line, values) for line, values in enumerate(lines.values()) if system in values]
        heights = [line + step * (number - (len(names) - 1) / 2) for line, _ in own]
        widths = [values[system] / (max(values.values()) if len(names) > 1 else 1) for _, values in own]
        label = " ".join([NAMES[system.split()[0]], *system.split()[1:]])
        bars = axes.barh(heights, widths, 0.94 * step, color=COLOURS[number % len(COLOURS)], label=label)
        texts = [f"{in_words(float(values[system]))} s" for _, values in own]
        axes.bar_label(bars, texts, fontsize=SMALL, padding=3)
    for line, values in enumerate(lines.values()):
        if {"mindspore", "diffusers"} <= set(values):
            text = f"{values['diffusers'] / values['mindspore']:.2f} x as fast"
            axes.text(1.01, line, text, transform=axes.get_yaxis_transform(), va="center", fontsize=TEXT)
    if len(names) > 1:
        axes.set(xlim=(0, 1.15), xlabel="time, as a share of the slowest system (lower is better)")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if value <= 1 else "")
    else:
        axes.set(xlabel="seconds (lower is better)")
        axes.margins(x=0.12)
    figure.legend(loc="outside upper left", ncols=2, fontsize=SMALL, frameon=False)
    return figure


def _seconds(rows: Sequence[Any]) -> dict[str, dict[str, float]]:
    """Return label -> system -> seconds, in the order of the rows."""
    lines: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.measure in SECONDS and row.unit == "s":
            work = "20 steps" if row.benchmark == "denoise" else row.benchmark
            lines.setdefault(f"{work}, {row.size} px", {})[row.system] = row.value
    return lines


# ---- shares of right images


def accuracy_figure(shares: Mapping[str, float], seconds: Mapping[str, float], count: int) -> Figure:
    """Draw for each named sampler the share of ``count`` images that are right (left) and the seconds per image.

    The line through a bar is the 95% interval of the share (Wilson 1927).
    """
    if not shares or shares.keys() != seconds.keys() or count < 1:
        raise PixArtNBError(f"shares of {list(shares)}, seconds of {list(seconds)}, {count} images; expected the same")
    figure = new_figure(WIDTH, 1.0 + 0.42 * len(shares))
    left, right = axes_grid(figure, 1, 2, sharey=True)[0]
    rows, values = range(len(shares)), np.array(list(shares.values()))
    middle, half = wilson_interval(values, count)
    left.barh(rows, values, 0.6, color=COLOURS[4])
    left.errorbar(middle, rows, xerr=half, fmt="none", ecolor="black", elinewidth=1.2, capsize=3)
    for row, (value, end) in enumerate(zip(values, np.maximum(values, middle + half), strict=True)):
        left.text(end + 0.02, row, f"{round(value * count)} of {count}", va="center", fontsize=SMALL)
    bars = right.barh(rows, list(seconds.values()), 0.6, color=COLOURS[1])
    right.bar_label(bars, [f"{value:.2f} s" for value in seconds.values()], fontsize=SMALL, padding=3)
    left.set(xlim=(0, 1.25), xticks=np.linspace(0, 1, 5), xlabel="share of images that are right in all parts")
    left.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    left.set_yticks(rows, list(shares), fontsize=TEXT)
    left.invert_yaxis()
    right.set_xlabel("seconds per image")
    right.margins(x=0.2)
    return figure


# ---- stages and tiles of large images


def stage_figure(runs: Mapping[str, StageCosts]) -> Figure:
    """Draw for each named run the seconds of each stage (left) and its peak memory (right).

    Stages without a number are left out. Runs need not have the same stages.
    """
    if not runs:
        raise PixArtNBError("a figure of stages needs at least one run, got none")
    stages = list(dict.fromkeys(stage for costs in runs.values() for stage in costs))
    figure, height = new_figure(WIDTH, 1.2 + 0.5 * len(runs)), 0.8 / len(stages)
    time, memory = axes_grid(figure, 1, 2)[0]
    for row, costs in enumerate(runs.values()):
        done = 0.0
        for number, stage in enumerate(stages):
            look = {"color": COLOURS[number % len(COLOURS)], "hatch": _HATCHES[number % 4], "edgecolor": "white"}
            values = costs.get(stage, {})
            if "seconds" in values:
                label = {"label": stage} if row == 0 else {}
                time.barh(row, values["seconds"], 0.6, left=done, **look, **label)
                done += values["seconds"]
            if "peak_bytes" in values:
                middle, peak = row - 0.4 + (number + 0.5) * height, values["peak_bytes"] / 1e9
                memory.barh(middle, peak, height, **look)
                memory.text(peak, middle, f" {peak:.2f}", va="center", fontsize=SMALL)
        time.text(done, row, f" {done:,.0f} s", va="center", fontsize=SMALL)
    for ax, label in ((time, "seconds"), (memory, "peak memory, GB")):
        ax.set(xlabel=label, yticks=[], ylim=(len(runs) - 0.5, -0.5))
        ax.margins(x=0.2)
    time.set_yticks(range(len(runs)), list(runs), fontsize=SMALL)
    handles = time.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper left", ncols=len(stages), fontsize=SMALL, frameon=False)
    return figure


def tile_artifact_figure(jumps: Mapping[str, Jumps]) -> Figure:
    """Draw for each named image the jump of brightness at every line between cells, with the edges of tiles marked.

    Without artifacts, edges lie anywhere among the other lines.
    """
    if not jumps:
        raise PixArtNBError("a figure of tile artifacts needs at least one image, got none")
    figure = new_figure(WIDTH, 1.1 + 0.55 * len(jumps))
    ax, rng = axes_grid(figure, 1, 1)[0, 0], np.random.default_rng(0)
    for row, (edges, others) in enumerate(jumps.values()):
        spread = row + rng.uniform(-0.25, 0.25, len(others))
        labels = ("other lines between cells", "edges of tiles") if row == 0 else (None, None)
        ax.scatter(others, spread, s=5, color=COLOURS[4], alpha=0.5, linewidth=0, label=labels[0])
        ax.scatter(edges, np.full(len(edges), row), s=55, marker="|", color=COLOURS[1], zorder=3, label=labels[1])
    ax.set_yticks(range(len(jumps)), list(jumps), fontsize=SMALL)
    ax.set(xlabel="mean jump of brightness across the line, 0 to 255", ylim=(len(jumps) - 0.5, -0.5))
    ax.set_xscale("symlog", linthresh=1.0)
    every = [jump for pair in jumps.values() for part in pair for jump in part] or [0.0]
    least = max(tick for tick in _JUMP_TICKS if tick <= min(every))
    ticks = [tick for tick in _JUMP_TICKS if least <= tick <= max(1.0, *every)]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xlim(left=0.9 * least or -0.05)
    ax.minorticks_off()
    legend(ax, "above", ncols=2)
    return figure
