"""How well pictures of different sizes follow their prompts, as curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz.style import axes_grid, for_curves, legend, line_style, new_figure


def score_figure(
    sizes: Sequence[int], curves: Mapping[str, Sequence[float]], pictures: Sequence[int]
) -> Figure:
    """A curve of shares, 0 to 1, for each way to draw, over sides in pixels; ``pictures`` were judged at each.

    A way may end at a smaller size than others.

    >>> figure = score_figure([128, 256], {"grown": [0.9, 0.8], "at once": [0.9]}, [12, 6])
    >>> [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    ['128\\n12 pictures', '256\\n6']
    """
    if len(pictures) != len(sizes):
        raise PixArtNBError(
            f"need as many numbers of pictures as sizes, got {len(pictures)} for {len(sizes)}"
        )
    figure = new_figure(7, 3.4)
    place = for_curves(
        axes_grid(figure, 1, 1)[0, 0], "side in pixels, and pictures judged", "share right in all"
    )
    for number, (name, shares) in enumerate(curves.items()):
        place.plot(range(len(shares)), shares, label=name, **line_style(number) | {"markersize": 5})
    labels = [f"{size}\n{count}" for size, count in zip(sizes, pictures, strict=True)]
    place.set_xticks(
        range(len(sizes)), [f"{label} pictures" if k == 0 else label for k, label in enumerate(labels)]
    )
    place.set_ylim(-0.04, 1.04)
    if curves:
        legend(place)
    return figure
