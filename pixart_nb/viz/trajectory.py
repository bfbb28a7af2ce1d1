"""Figures of the trajectory from noise to an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pixart_nb.viz.figures import as_image, require_as_many
from pixart_nb.viz.style import (
    SMALL,
    TEXT,
    WIDTH,
    Figure,
    axes_grid,
    for_curves,
    for_image,
    legend,
    line_style,
    new_figure,
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

    >>> numbers = trajectory_numbers(np.ones((3, 1, 2, 2)), np.ones((2, 1, 2, 2)))
    >>> numbers["latents"].tolist(), numbers["step"].tolist(), numbers["distance"].tolist()
    ([1.0, 1.0], [0.0, 0.0], [0.0, 0.0])
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
    return np.sqrt(np.square(values, dtype=np.float64).reshape(len(values), -1).mean(1))


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (values.reshape(len(values), -1).astype(np.float64) for values in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.where(norms == 0, 1, norms)


PANELS = (
    ("size, rms", {"latents": "latents", "denoised": "predicted image"}),
    (
        "distance, rms",
        {"step": "moved by this step", "change": "prediction changed", "distance": "prediction to the end"},
    ),
    ("size of guidance, rms", {"guidance": "guidance"}),
    ("cosine of two directions", {"turn": "guidance, with the step before"}),
)


def denoising_trajectory(
    images: Sequence[np.ndarray] | np.ndarray,
    timesteps: Sequence[float],
    latents: np.ndarray,
    denoised: np.ndarray,
    guidance: np.ndarray | None = None,
) -> Figure:
    """Draw the predicted image at each step above the curves of ``trajectory_numbers`` over the timesteps.

    ``images`` (S, H, W, 3) are the decoded ``denoised``; at most ten are shown, evenly spaced.

    >>> z = np.random.default_rng(0).standard_normal((4, 4, 2, 2))
    >>> figure = denoising_trajectory(np.zeros((3, 8, 8, 3)), [999, 600, 200], z, z[1:], z[1:])
    >>> [place.get_title() for place in figure.axes if place.images]
    ['t 999', 't 600', 't 200']
    """
    require_as_many("images", images, len(timesteps), "timesteps")
    numbers = trajectory_numbers(latents, denoised, guidance)
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
        _draw_lines(ax, timesteps, ylabel, {label: numbers[name] for name, label in lines.items()})
    return figure


def _draw_lines(ax: Any, timesteps: Sequence[float], ylabel: str, lines: dict[str, np.ndarray]) -> None:
    for number, (label, values) in enumerate(lines.items()):
        ax.plot(list(timesteps), values, label=label, **line_style(number))
    for_curves(ax, "timestep", ylabel)
    ax.invert_xaxis()
    low, high = min(0, ax.get_ylim()[0]), ax.get_ylim()[1]
    ax.set_ylim(low, high + 0.04 * (high - low))
    legend(ax, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    ax.title.set_size(TEXT)
