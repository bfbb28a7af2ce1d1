"""Figures of a model from inside: the trajectory to an image, the positional embedding, the timestep modulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz import style
from pixart_nb.viz.figures import as_image, require_as_many
from pixart_nb.viz.style import SMALL, TEXT, WIDTH, Figure, axes_grid, for_curves, for_image, new_figure

#: The six parts of adaLN-single's modulation, in the order of ``scale_shift_table``.
MODULATION = (
    "shift, self-attention",
    "scale, self-attention",
    "gate, self-attention",
    "shift, MLP",
    "scale, MLP",
    "gate, MLP",
)
#: Panels of ``denoising_trajectory``: name of the axis, names of ``trajectory_numbers`` and their labels.
PANELS = (
    ("size, rms", {"latents": "latents", "denoised": "predicted image"}),
    (
        "distance, rms",
        {"step": "moved by this step", "change": "prediction changed", "distance": "prediction to the end"},
    ),
    ("size of guidance, rms", {"guidance": "guidance"}),
    ("cosine of two directions", {"turn": "guidance, with the step before"}),
)


def trajectory_numbers(
    latents: np.ndarray, denoised: np.ndarray, guidance: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Return root mean squares over the latents of an image for each of S steps.

    Args:
        latents: (S + 1, C, h, w), initial noise and the result of each step.
        denoised: (S, C, h, w), clean image that each step predicts.
        guidance: (S, C, h, w), conditional minus unconditional prediction of the noise.

    Returns:
        ``latents`` and ``denoised``: their magnitude. ``step``: movement of the latents. ``change``: difference of the
        predicted image to the step before (nan at the first). ``distance``: of the predicted image to the last one.
        With guidance, ``guidance``: its magnitude, and ``turn``: cosine of its angle with the step before.
    """
    require_as_many("latents after the first", latents[1:], len(denoised), "predicted images")
    numbers = {
        "latents": _size(latents[1:]),
        "denoised": _size(denoised),
        "step": _size(np.diff(latents, axis=0)),
        "change": np.append(np.nan, _size(np.diff(denoised, axis=0))),
        "distance": _size(denoised - denoised[-1]),
    }
    if guidance is not None:
        require_as_many("guidance directions", guidance, len(denoised), "predicted images")
        numbers |= {"guidance": _size(guidance), "turn": np.append(np.nan, _cosine(guidance[1:], guidance[:-1]))}
    return numbers


def _size(values: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(_rows(values)).mean(1))


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = _rows(a), _rows(b)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.where(norms == 0, 1, norms)


def _rows(values: np.ndarray) -> np.ndarray:
    """Return (N, ...) as (N, D) float64; N may be 0, as the differences of a single step are."""
    return values.reshape(len(values), math.prod(values.shape[1:])).astype(np.float64)


def denoising_trajectory(
    images: Sequence[np.ndarray] | np.ndarray,
    timesteps: Sequence[float],
    latents: np.ndarray,
    denoised: np.ndarray,
    guidance: np.ndarray | None = None,
) -> Figure:
    """Draw the predicted image at each step above the curves of ``trajectory_numbers`` over the timesteps.

    ``images`` (S, H, W, 3) are the decoded ``denoised``; at most ten are shown, evenly spaced.
    """
    require_as_many("images", images, len(timesteps), "timesteps")
    numbers = trajectory_numbers(latents, denoised, guidance)
    numbers = {name: values for name, values in numbers.items() if np.isfinite(values).any()}  # one step has no changes
    shown = np.unique(np.linspace(0, len(timesteps) - 1, min(10, len(timesteps))).round().astype(int))
    aspect = images[0].shape[0] / images[0].shape[1]
    strip_height = min(1.6, WIDTH / len(shown)) * aspect + 0.3
    figure = new_figure(WIDTH, strip_height + 2.8)
    above, below = figure.subfigures(2, 1, height_ratios=[strip_height, 2.8])
    for ax, step in zip(axes_grid(above, 1, len(shown))[0], shown, strict=True):
        for_image(ax).imshow(as_image(images[step]), interpolation="nearest")
        ax.set_title(f"t {timesteps[step]:.0f}", fontsize=SMALL)
    panels = [panel for panel in PANELS if set(panel[1]) & set(numbers)]
    for ax, (ylabel, lines) in zip(axes_grid(below, 1, len(panels))[0], panels, strict=True):
        _draw_lines(ax, timesteps, ylabel, {label: numbers[name] for name, label in lines.items() if name in numbers})
    return figure


def _draw_lines(ax: Any, timesteps: Sequence[float], ylabel: str, lines: dict[str, np.ndarray]) -> None:
    for number, (label, values) in enumerate(lines.items()):
        ax.plot(list(timesteps), values, label=label, **style.line_style(number))
    for_curves(ax, "timestep", ylabel)
    ax.invert_xaxis()
    low, high = min(0, ax.get_ylim()[0]), ax.get_ylim()[1]
    ax.set_ylim(low, high + 0.04 * (high - low))
    style.legend(ax, "above")
    ax.title.set_size(TEXT)


def position_interpolation(
    small: np.ndarray, large: np.ndarray, labels: tuple[str, str], channels: Sequence[int] = (0, 8, 24)
) -> Figure:
    """Draw how the positional embedding of a small grid is interpolated to a large one.

    Top and bottom: channels of both over their grids, and the similarity of each position to the middle one. Right: the
    first of the channels along the middle row, over the relative position in the image.

    Args:
        small, large: (h, w, D) embeddings; grids of any two sizes.
        labels: Names of the two.
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
            image = ax.imshow(grid[..., channel], cmap=style.DIFFERENCE, vmin=-1, vmax=1, interpolation="nearest")
            ax.set_title(f"channel {channel}" if row == 0 else "", fontsize=TEXT)
        axes[row, 0].set_ylabel(f"{label}: {grid.shape[0]} x {grid.shape[1]}", fontsize=TEXT)
        alike = _show_similarity(for_image(axes[row, -1]), grid)
        axes[row, -1].set_title("like the middle" if row == 0 else "", fontsize=TEXT)
    style.colour_bar(left, image, axes[:, :-1].ravel().tolist(), "value")
    style.colour_bar(left, alike, axes[:, -1].tolist(), "cosine")
    _along_the_middle(right, small, large, labels, channels[0])
    return figure


def _show_similarity(ax, grid: np.ndarray):
    middle = (grid.shape[0] // 2, grid.shape[1] // 2)
    length = np.linalg.norm(grid, axis=-1, keepdims=True)
    unit = grid / np.where(length == 0, 1, length)
    image = ax.imshow(unit @ unit[middle], cmap=style.AMOUNT, vmin=0, vmax=1, interpolation="nearest")
    ax.plot(middle[1], middle[0], "+", color=style.MARK, markersize=6)
    return image


def _along_the_middle(figure, small, large, labels, channel: int) -> None:
    ax = axes_grid(figure, 1, 1)[0, 0]
    for grid, label, mark in zip((large, small), labels[::-1], ("-", "o"), strict=True):
        line = grid[grid.shape[0] // 2, :, channel]
        colour = style.COLOURS[1] if mark == "o" else style.COLOURS[0]
        ax.plot(np.arange(len(line)) / len(line), line, mark, color=colour, markersize=3.5, label=label)
    for_curves(ax, "share of the width", f"channel {channel}, middle row")
    style.legend(ax, "above", ncols=2)


def timestep_modulation(values: np.ndarray, timesteps: Sequence[float], layers: Sequence[int] | None = None) -> Figure:
    """Draw shift, scale and gate of adaLN-single by layer and timestep, as root mean squares over the channels.

    Args:
        values: (T, layers, 6, D), in the order of ``MODULATION``.
    """
    if values.ndim != 4 or values.shape[2] != len(MODULATION) or len(values) != len(timesteps):
        raise PixArtNBError(
            f"values have shape {values.shape}; expected ({len(timesteps)} timesteps, layers, {len(MODULATION)}, D)"
        )
    strength = np.sqrt(np.square(values, dtype=np.float64).mean(-1))
    layers = list(range(values.shape[1])) if layers is None else list(layers)
    figure = new_figure(WIDTH, max(4.2, 0.3 * len(layers) + 1.6))
    axes = axes_grid(figure, 2, 3, sharex=True, sharey=True)
    for number, (ax, name) in enumerate(zip(axes.ravel(), MODULATION, strict=True)):
        image = ax.imshow(strength[:, :, number].T, cmap=style.AMOUNT, aspect="auto", interpolation="nearest")
        ax.set_title(name, fontsize=TEXT)
        style.colour_bar(figure, image, ax, "rms over channels" if number % 3 == 2 else "")
    style.label_every(axes[0, 0].set_yticks, layers)
    style.label_every(axes[0, 0].set_xticks, [f"{t:.0f}" for t in timesteps], 5)
    for ax in axes[:, 0]:
        ax.set_ylabel("layer", fontsize=SMALL)
    for ax in axes[1]:
        ax.set_xlabel("timestep", fontsize=SMALL)
    return figure
