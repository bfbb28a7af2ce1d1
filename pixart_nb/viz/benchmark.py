"""Tables and figures of benchmark rows (``benchmarks.runs.Row``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz.style import COLOURS, SMALL, TEXT, WIDTH, Figure, new_figure, styled
from pixart_nb.viz.tables import Table, in_words

#: Measures that a bar shows: the first that a benchmark has.
SECONDS = ("20 steps", "seconds")
NAMES = {"mindspore": "PixArt-NB, MindSpore", "diffusers": "diffusers, PyTorch"}
#: Published steps/s on one and training images/s on four Ascend 910* (mindone, MindSpore 2.3), by size in pixels.
PUBLISHED = {256: (18.04, 88.1), 512: (15.95, 33.5), 1024: (4.96, 6.8), 2048: (0.57, 0.5)}
PUBLISHED_NAMES = ("published steps/s, one Ascend 910*", "published training images/s, four Ascend 910*")
#: Parts of the time of a run, in the order of ``_time_shares``.
SHARES = ("matrix products, at the machine's rate", "matrix products, beyond it", "everything else")


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
    """Draw the time of each size in three parts: products at the machine's rate, beyond it, and everything else.

    >>> from types import SimpleNamespace
    >>> names = ("share of matrix products", "rate of matrix products / rate of the machine")
    >>> same = {"benchmark": "denoise", "size": 256, "unit": ""}
    >>> rows = [SimpleNamespace(**same, measure=name, value=value) for name, value in zip(names, (0.5, 0.5))]
    >>> [bar.get_width() for bar in share_figure(rows).axes[0].patches]
    [0.25, 0.25, 0.5]
    """
    lines = _time_shares(rows)
    if not lines:
        raise PixArtNBError("there are no shares to draw; run the benchmark 'denoise' first")
    figure = new_figure(WIDTH, 1.1 + 0.45 * len(lines))
    axes = styled(figure.subplots())
    left = [0.0] * len(lines)
    for number, name in enumerate(SHARES):
        widths = [parts[number] for parts in lines.values()]
        bars = axes.barh(range(len(lines)), widths, 0.6, left=left, color=COLOURS[number], label=name)
        texts = [f"{width:.0%}" if width > 0.03 else "" for width in widths]
        axes.bar_label(bars, texts, label_type="center", fontsize=TEXT, color="white")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(lines)), lines)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of the time")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.legend(loc="outside upper left", ncols=3, fontsize=SMALL, frameon=False)
    return figure


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
    """Draw the time of this kit against that of diffusers for every benchmark and size, with the seconds beside it.

    Bars start at 0 and are shares of the longest time of their line, so that steps of a second and of a minute are
    readable in one figure.

    >>> from types import SimpleNamespace
    >>> same = {"benchmark": "encode", "size": 256, "measure": "seconds"}
    >>> pairs = (("mindspore", 2.0), ("diffusers", 5.0))
    >>> figure = benchmark_figure([SimpleNamespace(**same, system=name, value=value) for name, value in pairs])
    >>> [bar.get_width() for bar in figure.axes[0].patches], figure.axes[0].texts[-1].get_text()
    ([0.4, 1.0], '2.50 x as fast')
    """
    lines = _seconds(rows)
    if not lines:
        raise PixArtNBError("there are no seconds to draw; run a benchmark first")
    figure = new_figure(WIDTH, 0.9 + 0.55 * len(lines))
    axes = styled(figure.subplots())
    names = [name for name in NAMES if any(name in values for values in lines.values())]
    for number, system in enumerate(names):
        own = [(line, values) for line, values in enumerate(lines.values()) if system in values]
        heights = [line + 0.36 * (number - (len(names) - 1) / 2) for line, _ in own]
        widths = [values[system] / max(values.values()) for _, values in own]
        bars = axes.barh(heights, widths, 0.34, color=COLOURS[number], label=NAMES[system])
        texts = [f"{in_words(float(values[system]))} s" for _, values in own]
        axes.bar_label(bars, texts, fontsize=SMALL, padding=3)
    for line, values in enumerate(lines.values()):
        if set(NAMES) <= set(values):
            text = f"{values['diffusers'] / values['mindspore']:.2f} x as fast"
            axes.text(1.01, line, text, transform=axes.get_yaxis_transform(), va="center", fontsize=TEXT)
    axes.set_yticks(range(len(lines)), lines)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.15), xlabel="time, as a share of the slower system (lower is better)")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if value <= 1 else "")
    figure.legend(loc="outside upper left", ncols=2, fontsize=SMALL, frameon=False)
    return figure


def _seconds(rows: Sequence[Any]) -> dict[str, dict[str, float]]:
    """Return label -> system -> seconds, in the order of the rows."""
    lines: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.measure in SECONDS and row.system in NAMES:
            work = "20 steps" if row.benchmark == "denoise" else row.benchmark
            lines.setdefault(f"{work}, {row.size} px", {})[row.system] = row.value
    return lines
