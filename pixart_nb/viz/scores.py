"""Curves of scores against image size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz.style import Figure, axes_grid, for_curves, legend, line_style, new_figure


def score_figure(sizes: Sequence[int], curves: Mapping[str, Sequence[float]], images: Sequence[int]) -> Figure:
    """Draw a curve of shares, 0 to 1, for each method over the image side in pixels; ``images`` were evaluated at each.

    A method may end at a smaller size than others.

    >>> figure = score_figure([128, 256], {"grown": [0.9, 0.8], "at once": [0.9]}, [12, 6])
    >>> [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    ['128\\n12 images', '256\\n6']
    """
    if len(images) != len(sizes):
        raise PixArtNBError(f"need as many numbers of images as sizes, got {len(images)} for {len(sizes)}")
    figure = new_figure(7, 3.4)
    ax = for_curves(axes_grid(figure, 1, 1)[0, 0], "side in pixels, and images judged", "share right in all")
    for number, (name, shares) in enumerate(curves.items()):
        ax.plot(range(len(shares)), shares, label=name, **line_style(number) | {"markersize": 5})
    labels = [f"{size}\n{count}" for size, count in zip(sizes, images, strict=True)]
    ax.set_xticks(range(len(sizes)), [f"{label} images" if k == 0 else label for k, label in enumerate(labels)])
    ax.set_ylim(-0.04, 1.04)
    if curves:
        legend(ax)
    return figure
