"""Figure of tile artifacts: jumps of brightness at the edges of tiles beside those at other lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz.style import COLOURS, SMALL, WIDTH, Figure, axes_grid, legend, new_figure

#: Edges and other lines of an image: mean jumps, 0..255, as ``measure_tile_artifacts`` gives them.
Jumps = tuple[Sequence[float], Sequence[float]]
_TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)


def seam_figure(jumps: Mapping[str, Jumps]) -> Figure:
    """Draw for each named image the jump of brightness at every line between cells, with the edges of tiles marked.

    Without artifacts, edges lie anywhere among the other lines.

    >>> figure = seam_figure({"2048": ([1.0, 2.0], [0.5, 1.5, 2.5])})
    >>> [dots.get_offsets().shape[0] for dots in figure.axes[0].collections]
    [3, 2]
    """
    if not jumps:
        raise PixArtNBError("a figure of seams needs at least one image, got none")
    figure = new_figure(WIDTH, 1.1 + 0.55 * len(jumps))
    ax, rng = axes_grid(figure, 1, 1)[0, 0], np.random.default_rng(0)
    for row, (edges, others) in enumerate(jumps.values()):
        spread = row + rng.uniform(-0.25, 0.25, len(others))
        first = {"label": "other lines between cells"} if row == 0 else {}
        ax.scatter(others, spread, s=5, color=COLOURS[4], alpha=0.5, linewidth=0, **first)
        first = {"label": "edges of tiles"} if row == 0 else {}
        ax.scatter(edges, np.full(len(edges), row), s=55, marker="|", color=COLOURS[1], zorder=3, **first)
    ax.set_yticks(range(len(jumps)), list(jumps), fontsize=SMALL)
    ax.set(xlabel="mean jump of brightness across the line, 0 to 255", ylim=(len(jumps) - 0.5, -0.5))
    ax.set_xscale("symlog", linthresh=1.0)
    every = [jump for pair in jumps.values() for part in pair for jump in part] or [0.0]
    least = max(tick for tick in _TICKS if tick <= min(every))
    ticks = [tick for tick in _TICKS if least <= tick <= max(1.0, *every)]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set_xlim(left=0.9 * least or -0.05)
    ax.minorticks_off()
    legend(ax, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure
