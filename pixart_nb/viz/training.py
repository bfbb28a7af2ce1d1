"""Figures of the losses and scores of trainings."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes

from pixart_nb.viz.figures import Curve, require_as_many
from pixart_nb.viz.style import SMALL, WIDTH, Figure, axes_grid, for_curves, line_style, new_figure


def loss_and_score(
    losses: Mapping[str, Curve],
    scores: Mapping[str, Curve],
    marks: Mapping[str, float] | None = None,
    levels: Mapping[str, float] | None = None,
    score: str = "share of images that are right",
) -> Figure:
    """Draw losses (left) and scores between 0 and 1 (right) by step; a run has the same line style in both.

    Args:
        marks: Named steps, drawn as vertical lines up to the last step.
        levels: Named scores, drawn as horizontal lines.

    >>> figure = loss_and_score({"a": ([1, 2], [0.3, 0.2])}, {"a": ([0, 2], [0.1, 0.8])}, levels={"before": 0.9})
    >>> [[list(map(float, line.get_ydata())) for line in place.lines] for place in figure.axes]
    [[[0.3, 0.2]], [[0.1, 0.8], [0.9, 0.9]]]
    """
    figure = new_figure(WIDTH, 3.4)
    loss, share = axes_grid(figure, 1, 2)[0]
    names = list(dict.fromkeys([*losses, *scores]))
    for ax, curves, label in ((loss, losses, "loss"), (share, scores, score)):
        for_curves(ax, "step", label)
        for name, (steps, values) in curves.items():
            require_as_many(f"values of {name!r}", values, len(steps), "steps")
            style = line_style(names.index(name))
            marker = {"marker": None} if ax is loss else {}
            ax.plot(np.asarray(steps), np.asarray(values, dtype=float), label=name, **style | marker)
    last = max((max(steps) for steps, _ in (*losses.values(), *scores.values()) if len(steps)), default=0)
    for ax in (loss, share):
        ax.set_xlim(0, last * 1.03 or 1)
        reached = {name: step for name, step in (marks or {}).items() if step <= last}
        _upright(ax, reached, named=ax is loss)
    for number, (name, value) in enumerate((levels or {}).items()):
        share.axhline(value, color="0.35", linewidth=1.0, linestyle=(":", "--", "-.")[number % 3], label=name)
    share.set_ylim(-0.03, 1.03)
    if share.lines:
        handles, labels = share.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False, handlelength=3
        )
    return figure


def _upright(ax: Axes, marks: Mapping[str, float], named: bool) -> None:
    """Draw named vertical lines."""
    for name, step in marks.items():
        ax.axvline(step, color="0.6", linewidth=0.9, linestyle=":")
        if named:
            ax.annotate(
                name, (step, 1.0), (-3, -3), xycoords=("data", "axes fraction"), textcoords="offset points",
                rotation=90, ha="right", va="top", fontsize=SMALL, color="0.35",
            )  # fmt: skip
