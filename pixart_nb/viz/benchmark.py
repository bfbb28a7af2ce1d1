"""Benchmarks as a table and a figure: bars of seconds side by side, with how many times as fast ours is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from pixart_nb.viz.style import COLOURS, SMALL, TEXT, new_figure, styled
from pixart_nb.viz.tables import Table

#: The seconds that stand for a benchmark, the first that it has.
SECONDS = ("20 steps", "seconds")
NAMES = {"ours": "PixArt-NB, MindSpore", "peer": "diffusers, PyTorch"}


def speed_table(rows: Sequence[Any]) -> Table:
    """The published table on this device: size, steps a second, training images a second."""
    names = {"steps a second": "steps/s", "images a second": "training images/s"}
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if row.system == "ours" and row.measure in names:
            found.setdefault(row.size, {})[names[row.measure]] = row.value
    caption = "PixArt-Sigma on this device: batch 1 with guidance, DPM-Solver++"
    return Table(({"size": size, **found[size]} for size in sorted(found)), caption)


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
        raise ValueError("there are no seconds to draw; run a benchmark first")
    figure = new_figure(7.0, 0.9 + 0.55 * len(bars))
    place = styled(figure.subplots())
    systems = [name for name in NAMES if any(name in values for _, values in bars)]
    for number, system in enumerate(systems):
        own = [(line, values[system]) for line, (_, values) in enumerate(bars) if system in values]
        heights = [line + 0.36 * (number - (len(systems) - 1) / 2) for line, _ in own]
        drawn = place.barh(heights, [v for _, v in own], 0.34, color=COLOURS[number], label=NAMES[system])
        place.bar_label(drawn, [f"{v:.3g} s" for _, v in own], fontsize=SMALL, padding=3)
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
