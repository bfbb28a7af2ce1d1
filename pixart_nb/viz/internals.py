"""Figures of the positional embedding and of the timestep modulation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz.style import (
    AMOUNT,
    COLOURS,
    DIFFERENCE,
    MARK,
    SMALL,
    TEXT,
    WIDTH,
    Figure,
    axes_grid,
    colour_bar,
    for_curves,
    for_image,
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
    """Draw how the positional embedding of a small grid is interpolated to a large one.

    Top and bottom: channels of both over their grids, and the similarity of each position to the middle one. Right: the
    first of the channels along the middle row, over the relative position in the image.

    Args:
        small, large: (h, w, D) embeddings; grids of any two sizes.
        labels: Names of the two.

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
            ax = for_image(axes[row, column])
            image = ax.imshow(grid[..., channel], cmap=DIFFERENCE, vmin=-1, vmax=1, interpolation="nearest")
            ax.set_title(f"channel {channel}" if row == 0 else "", fontsize=TEXT)
        axes[row, 0].set_ylabel(f"{label}: {grid.shape[0]} x {grid.shape[1]}", fontsize=TEXT)
        alike = _show_similarity(for_image(axes[row, -1]), grid)
        axes[row, -1].set_title("like the middle" if row == 0 else "", fontsize=TEXT)
    colour_bar(left, image, axes[:, :-1].ravel().tolist(), "value")
    colour_bar(left, alike, axes[:, -1].tolist(), "cosine")
    _along_the_middle(right, small, large, labels, channels[0])
    return figure


def _show_similarity(ax, grid: np.ndarray):
    middle = (grid.shape[0] // 2, grid.shape[1] // 2)
    length = np.linalg.norm(grid, axis=-1, keepdims=True)
    unit = grid / np.where(length == 0, 1, length)
    image = ax.imshow(unit @ unit[middle], cmap=AMOUNT, vmin=0, vmax=1, interpolation="nearest")
    ax.plot(middle[1], middle[0], "+", color=MARK, markersize=6)
    return image


def _along_the_middle(figure, small, large, labels, channel: int) -> None:
    ax = axes_grid(figure, 1, 1)[0, 0]
    for grid, label, style in zip((large, small), labels[::-1], ("-", "o"), strict=True):
        line = grid[grid.shape[0] // 2, :, channel]
        colour = COLOURS[1] if style == "o" else COLOURS[0]
        ax.plot(np.arange(len(line)) / len(line), line, style, color=colour, markersize=3.5, label=label)
    for_curves(ax, "share of the width", f"channel {channel}, middle row")
    legend(ax, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def timestep_modulation(values: np.ndarray, timesteps: Sequence[float], layers: Sequence[int] | None = None) -> Figure:
    """Draw shift, scale and gate of adaLN-single by layer and timestep, as root mean squares over the channels.

    Args:
        values: (T, layers, 6, D), in the order of ``MODULATION``.

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
    for number, (ax, name) in enumerate(zip(axes.ravel(), MODULATION, strict=True)):
        image = ax.imshow(strength[:, :, number].T, cmap=AMOUNT, aspect="auto", interpolation="nearest")
        ax.set_title(name, fontsize=TEXT)
        colour_bar(figure, image, ax, "rms over channels" if number % 3 == 2 else "")
    axes[0, 0].set_yticks(range(0, len(layers), every), layers[::every])
    axes[0, 0].set_xticks(range(0, len(timesteps), step), [f"{t:.0f}" for t in timesteps[::step]])
    for ax in axes[:, 0]:
        ax.set_ylabel("layer", fontsize=SMALL)
    for ax in axes[1]:
        ax.set_xlabel("timestep", fontsize=SMALL)
    return figure
