"""Benchmarks as a table and a figure: bars of seconds side by side, with how many times as fast ours is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz.style import COLOURS, SMALL, TEXT, WIDTH, new_figure, styled
from pixart_nb.viz.tables import Table, in_words

#: The seconds that stand for a benchmark, the first that it has.
SECONDS = ("20 steps", "seconds")
NAMES = {"ours": "PixArt-NB, MindSpore", "peer": "diffusers, PyTorch"}


#: Steps a second and training images a second as published, for one and for four Ascend 910* (mindone, MindSpore 2.3).
PUBLISHED = {256: (18.04, 88.1), 512: (15.95, 33.5), 1024: (4.96, 6.8), 2048: (0.57, 0.5)}
PUBLISHED_NAMES = ("steps/s, one Ascend 910*", "training images/s, four Ascend 910*")
#: What a run's time consists of, in the order of ``_share_parts``.
SHARES = ("matrix products, at the machine's rate", "what they take beyond it", "everything else")


def speed_table(rows: Sequence[Any]) -> Table:
    """The published table on this device: size, steps a second, training images a second, beside what was published."""
    names = {"steps a second": "steps/s", "images a second": "training images/s"}
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row.system == "ours" and row.measure in names:
            found.setdefault(row.size, {})[names[row.measure]] = row.value
    for size, line in found.items():
        line.update(zip(PUBLISHED_NAMES, PUBLISHED.get(size, ()), strict=False))
    caption = "PixArt-Sigma on this device, and as published: batch 1 with guidance, DPM-Solver++"
    columns = ["size", *names.values(), *PUBLISHED_NAMES]
    return Table(({"size": size, **found[size]} for size in sorted(found)), caption, columns)


def share_table(rows: Sequence[Any]) -> Table:
    """How much of the time of each benchmark is spent in matrix products, their rate, and the machine's."""
    found: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if row.unit in ("", "GFLOP/s"):
            name = f"{row.measure}, {row.unit}" if row.unit else row.measure
            found.setdefault((row.benchmark, row.size), {})[name] = row.value
    return Table({"benchmark": name, "size": size, **line} for (name, size), line in found.items())


def share_figure(rows: Sequence[Any]) -> Figure:
    """The time of each size in three parts: products at the machine's rate, what they take beyond it, and the rest.

    >>> from types import SimpleNamespace
    >>> names = ("share of matrix products", "matrix products, of the machine's rate")
    >>> same = {"benchmark": "denoise", "size": 256, "unit": ""}
    >>> rows = [SimpleNamespace(**same, measure=name, value=value) for name, value in zip(names, (0.5, 0.5))]
    >>> [bar.get_width() for bar in share_figure(rows).axes[0].patches]
    [0.25, 0.25, 0.5]
    """
    lines = _share_parts(rows)
    if not lines:
        raise PixArtNBError("there are no shares to draw; run the benchmark of denoising first")
    figure = new_figure(WIDTH, 1.1 + 0.45 * len(lines))
    place = styled(figure.subplots())
    left = [0.0] * len(lines)
    for number, name in enumerate(SHARES):
        widths = [parts[number] for parts in lines.values()]
        drawn = place.barh(range(len(lines)), widths, 0.6, left=left, color=COLOURS[number], label=name)
        texts = [f"{width:.0%}" if width > 0.03 else "" for width in widths]
        place.bar_label(drawn, texts, label_type="center", fontsize=TEXT, color="white")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    place.set_yticks(range(len(lines)), lines)
    place.invert_yaxis()
    place.set(xlim=(0, 1), xlabel="share of the time")
    place.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.legend(loc="outside upper left", ncols=3, fontsize=SMALL, frameon=False)
    return figure


def _share_parts(rows: Sequence[Any]) -> dict[str, tuple[float, float, float]]:
    """Of every size: the shares that ``SHARES`` names. Together they are the whole."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if not row.unit:
            found.setdefault(f"{row.benchmark}, {row.size}", {})[row.measure] = row.value
    lines = {}
    for label, values in found.items():
        share = values.get("share of matrix products")
        if share is not None:
            at_rate = share * min(1.0, values["matrix products, of the machine's rate"])
            lines[label] = (at_rate, share - at_rate, 1 - share)
    return lines


def benchmark_figure(rows: Sequence[Any]) -> Figure:
    """Seconds of every benchmark and size, a bar for each system, from rows as ``runs.Row``.

    The scale is logarithmic, since a step at 1024 takes a hundred times as long as one at 256.

    >>> from types import SimpleNamespace
    >>> same = {"benchmark": "encode", "size": 256, "measure": "seconds"}
    >>> rows = [SimpleNamespace(**same, system=name, value=value) for name, value in (("ours", 2.0), ("peer", 5.0))]
    >>> figure = benchmark_figure(rows)
    >>> [bar.get_width() for bar in figure.axes[0].patches], figure.axes[0].texts[-1].get_text()
    ([2.0, 5.0], '2.50x as fast')
    """
    bars = _bars(rows)
    if not bars:
        raise PixArtNBError("there are no seconds to draw; run a benchmark first")
    figure = new_figure(WIDTH, 0.9 + 0.55 * len(bars))
    place = styled(figure.subplots())
    systems = [name for name in NAMES if any(name in values for _, values in bars)]
    for number, system in enumerate(systems):
        own = [(line, values[system]) for line, (_, values) in enumerate(bars) if system in values]
        heights = [line + 0.36 * (number - (len(systems) - 1) / 2) for line, _ in own]
        drawn = place.barh(heights, [v for _, v in own], 0.34, color=COLOURS[number], label=NAMES[system])
        place.bar_label(drawn, [f"{in_words(float(v))} s" for _, v in own], fontsize=SMALL, padding=3)
    for line, (_, values) in enumerate(bars):
        if {"ours", "peer"} <= set(values):
            said = f"{values['peer'] / values['ours']:.2f}x as fast"
            place.text(1.01, line, said, transform=place.get_yaxis_transform(), va="center", fontsize=TEXT)
    place.set_yticks(range(len(bars)), [label for label, _ in bars])
    place.invert_yaxis()
    place.set(xscale="log", xlabel="seconds, lower is better")
    place.margins(x=0.12)
    figure.legend(loc="outside upper left", ncols=2, fontsize=SMALL, frameon=False)
    return figure


def _bars(rows: Sequence[Any]) -> list[tuple[str, dict[str, float]]]:
    """Label and seconds by system of every benchmark and size, in the order of the rows."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.measure in SECONDS and row.system in NAMES:
            work = "20 steps" if row.benchmark == "denoise" else row.benchmark
            found.setdefault(f"{work}, {row.size}", {})[row.system] = row.value
    return list(found.items())
