"""What the transformer is told besides the prompt: where a patch lies, and how much noise there is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz.style import (
    AMOUNT,
    COLOURS,
    DIFFERENCE,
    MARK,
    SMALL,
    TEXT,
    WIDTH,
    axes_grid,
    colour_bar,
    for_curves,
    for_picture,
    legend,
    new_figure,
)

#: The six parts of adaLN-single's modulation, in the order of ``scale_shift_table``.
MODULATION = (
    "shift, self-attention",
    "scale, self-attention",
    "gate, self-attention",
    "shift, MLP",
    "scale, MLP",
    "gate, MLP",
)


def position_interpolation(
    small: np.ndarray, large: np.ndarray, labels: tuple[str, str], channels: Sequence[int] = (0, 8, 24)
) -> Figure:
    """How the positional embedding of a small grid becomes that of a large one.

    Above and below: channels of both over their grids, and how similar each place is to the middle one. At the right:
    the first of the channels along the middle row, over the relative place in the picture.

    Args:
        small, large: (h, w, D) embeddings; grids of any two sizes.
        labels: what to call the two.

    >>> grid = lambda n: np.sin(np.linspace(0, 3, n))[:, None, None] * np.ones((n, n, 32))
    >>> figure = position_interpolation(grid(4), grid(16), ("256", "4K"))
    >>> [image.get_array().shape for place in figure.axes for image in place.images][::4]
    [(4, 4), (16, 16)]
    """
    if small.ndim != 3 or large.ndim != 3 or small.shape[2] != large.shape[2]:
        raise PixArtNBError(f"embeddings must be (h, w, D) of one D, got {small.shape} and {large.shape}")
    beyond = [channel for channel in channels if not 0 <= channel < small.shape[2]]
    if beyond:
        raise PixArtNBError(f"there are no channels {beyond}; the embedding has {small.shape[2]}")
    figure = new_figure(WIDTH, 3.2)
    left, right = figure.subfigures(1, 2, width_ratios=[2.3, 1])
    axes = axes_grid(left, 2, len(channels) + 1)
    for row, (grid, label) in enumerate(zip((small, large), labels, strict=True)):
        for column, channel in enumerate(channels):
            place = for_picture(axes[row, column])
            image = place.imshow(
                grid[..., channel], cmap=DIFFERENCE, vmin=-1, vmax=1, interpolation="nearest"
            )
            place.set_title(f"channel {channel}" if row == 0 else "", fontsize=TEXT)
        axes[row, 0].set_ylabel(f"{label}: {grid.shape[0]} x {grid.shape[1]}", fontsize=TEXT)
        alike = _show_similarity(for_picture(axes[row, -1]), grid)
        axes[row, -1].set_title("like the middle" if row == 0 else "", fontsize=TEXT)
    colour_bar(left, image, axes[:, :-1].ravel().tolist(), "value")
    colour_bar(left, alike, axes[:, -1].tolist(), "cosine")
    _along_the_middle(right, small, large, labels, channels[0])
    return figure


def _show_similarity(place, grid: np.ndarray):
    middle = (grid.shape[0] // 2, grid.shape[1] // 2)
    length = np.linalg.norm(grid, axis=-1, keepdims=True)
    unit = grid / np.where(length == 0, 1, length)
    image = place.imshow(unit @ unit[middle], cmap=AMOUNT, vmin=0, vmax=1, interpolation="nearest")
    place.plot(middle[1], middle[0], "+", color=MARK, markersize=6)
    return image


def _along_the_middle(figure, small, large, labels, channel: int) -> None:
    place = axes_grid(figure, 1, 1)[0, 0]
    for grid, label, style in zip((large, small), labels[::-1], ("-", "o"), strict=True):
        line = grid[grid.shape[0] // 2, :, channel]
        colour = COLOURS[1] if style == "o" else COLOURS[0]
        place.plot(np.arange(len(line)) / len(line), line, style, color=colour, markersize=3.5, label=label)
    for_curves(place, "share of the width", f"channel {channel}, middle row")
    legend(place, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def timestep_modulation(
    values: np.ndarray, timesteps: Sequence[float], layers: Sequence[int] | None = None
) -> Figure:
    """Shift, scale and gate of adaLN-single by layer and timestep: root mean squares over the channels.

    values (T, layers, 6, D), in the order of ``MODULATION``; a panel for each of the six, sampling runs to the right.

    >>> figure = timestep_modulation(np.ones((5, 3, 6, 8)), [999, 750, 500, 250, 0])
    >>> [place.get_title() for place in figure.axes[:2]], figure.axes[0].images[0].get_array().shape
    (['shift, self-attention', 'scale, self-attention'], (3, 5))
    """
    if values.ndim != 4 or values.shape[2] != len(MODULATION) or len(values) != len(timesteps):
        raise PixArtNBError(
            f"values have shape {values.shape}; expected ({len(timesteps)} timesteps, layers, {len(MODULATION)}, D)"
        )
    strength = np.sqrt(np.square(values, dtype=np.float64).mean(-1))
    layers = list(range(values.shape[1])) if layers is None else list(layers)
    figure = new_figure(WIDTH, max(4.2, 0.3 * len(layers) + 1.6))
    axes = axes_grid(figure, 2, 3, sharex=True, sharey=True)
    every, step = -(-len(layers) // 14), -(-len(timesteps) // 5)
    for number, (place, name) in enumerate(zip(axes.ravel(), MODULATION, strict=True)):
        image = place.imshow(strength[:, :, number].T, cmap=AMOUNT, aspect="auto", interpolation="nearest")
        place.set_title(name, fontsize=TEXT)
        colour_bar(figure, image, place, "rms over channels" if number % 3 == 2 else "")
    axes[0, 0].set_yticks(range(0, len(layers), every), layers[::every])
    axes[0, 0].set_xticks(range(0, len(timesteps), step), [f"{t:.0f}" for t in timesteps[::step]])
    for place in axes[:, 0]:
        place.set_ylabel("layer", fontsize=SMALL)
    for place in axes[1]:
        place.set_xlabel("timestep", fontsize=SMALL)
    return figure
