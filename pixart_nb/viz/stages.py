"""Figure of the time and memory of the stages of runs."""

from __future__ import annotations

from collections.abc import Mapping

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz.style import COLOURS, SMALL, WIDTH, Figure, axes_grid, legend, new_figure

#: By stage: ``seconds`` and ``peak_bytes``, as ``StageFiles.measured`` gives them.
Measured = Mapping[str, Mapping[str, float]]
_HATCHES = ("", "///", "...", "xxx")


def stage_figure(runs: Mapping[str, Measured]) -> Figure:
    """Draw for each named run the seconds of each stage (left) and its peak memory (right).

    Stages without a number are left out. Runs need not have the same stages.

    >>> figure = stage_figure({"staged": {"encode": {"seconds": 2.0}, "denoise": {"seconds": 8.0, "peak_bytes": 1e9}}})
    >>> [bar.get_width() for bar in figure.axes[0].patches], [bar.get_width() for bar in figure.axes[1].patches]
    ([2.0, 8.0], [1.0])
    """
    if not runs:
        raise PixArtNBError("a figure of stages needs at least one run, got none")
    stages = list(dict.fromkeys(stage for measured in runs.values() for stage in measured))
    figure = new_figure(WIDTH, 1.2 + 0.5 * len(runs))
    (time, memory), names = axes_grid(figure, 1, 2)[0], list(runs)
    for row, measured in enumerate(runs.values()):
        done, height = 0.0, 0.8 / len(stages)
        for number, stage in enumerate(stages):
            look = {"color": COLOURS[number % len(COLOURS)], "hatch": _HATCHES[number % 4], "edgecolor": "white"}
            values = measured.get(stage, {})
            label = {"label": stage} if row == 0 else {}
            if "seconds" in values:
                time.barh(row, values["seconds"], 0.6, left=done, **look, **label)
                done += values["seconds"]
            if "peak_bytes" in values:
                position = row - 0.4 + (number + 0.5) * height
                memory.barh(position, values["peak_bytes"] / 1e9, height, **look)
                memory.text(
                    values["peak_bytes"] / 1e9,
                    position,
                    f" {values['peak_bytes'] / 1e9:.2f}",
                    va="center",
                    fontsize=SMALL,
                )
        time.text(done, row, f" {done:,.0f} s", va="center", fontsize=SMALL)
    for ax, label in ((time, "seconds"), (memory, "peak memory, GB")):
        ax.set(xlabel=label, yticks=[], ylim=(len(names) - 0.5, -0.5))
        ax.margins(x=0.2)
    time.set_yticks(range(len(names)), names, fontsize=SMALL)
    legend(time, loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.35 / (0.5 * len(runs) + 0.3)), ncols=len(stages))
    return figure
