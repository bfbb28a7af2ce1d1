"""The way from noise to a picture: what is predicted at each step, and how far each step goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pixart_nb.viz.figures import as_picture, require_as_many
from pixart_nb.viz.style import (
    SMALL,
    TEXT,
    WIDTH,
    axes_grid,
    for_curves,
    for_picture,
    legend,
    line_style,
    new_figure,
)


def trajectory_numbers(
    latents: np.ndarray, denoised: np.ndarray, guidance: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Numbers of each of S steps, as root mean squares over a picture's latents.

    Args:
        latents: (S + 1, C, h, w): the noise at the start, then what each step left.
        denoised: (S, C, h, w): the clean picture that each step predicts.
        guidance: (S, C, h, w): conditional minus unconditional prediction of the noise.

    Returns:
        ``latents`` and ``denoised``: their size; ``step``: how far a step moves the latents; ``change``: how much the
        predicted picture differs from the step before (nan at the first); ``distance``: from the predicted picture to
        the last one; and with guidance ``guidance``: its size, and ``turn``: cosine of its angle with the step before.

    >>> numbers = trajectory_numbers(np.ones((3, 1, 2, 2)), np.ones((2, 1, 2, 2)))
    >>> numbers["latents"].tolist(), numbers["step"].tolist(), numbers["distance"].tolist()
    ([1.0, 1.0], [0.0, 0.0], [0.0, 0.0])
    """
    require_as_many("latents after the first", latents[1:], len(denoised), "predicted pictures")
    numbers = {
        "latents": _size(latents[1:]),
        "denoised": _size(denoised),
        "step": _size(np.diff(latents, axis=0)),
        "change": np.append(np.nan, _size(np.diff(denoised, axis=0))),
        "distance": _size(denoised - denoised[-1]),
    }
    if guidance is not None:
        require_as_many("guidance directions", guidance, len(denoised), "predicted pictures")
        numbers |= {
            "guidance": _size(guidance),
            "turn": np.append(np.nan, _cosine(guidance[1:], guidance[:-1])),
        }
    return numbers


def _size(values: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(values, dtype=np.float64).reshape(len(values), -1).mean(1))


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (values.reshape(len(values), -1).astype(np.float64) for values in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / np.where(norms == 0, 1, norms)


PANELS = (
    ("size, rms", {"latents": "latents", "denoised": "predicted picture"}),
    (
        "distance, rms",
        {"step": "moved by this step", "change": "prediction changed", "distance": "prediction to the end"},
    ),
    ("guidance", {"guidance": "size, rms", "turn": "cosine with the step before"}),
)


def denoising_trajectory(
    pictures: Sequence[np.ndarray] | np.ndarray,
    timesteps: Sequence[float],
    latents: np.ndarray,
    denoised: np.ndarray,
    guidance: np.ndarray | None = None,
) -> Figure:
    """The predicted picture at each step, and below it the numbers of ``trajectory_numbers`` over the timesteps.

    pictures (S, H, W, 3) are the decoded ``denoised``; at most ten of them are shown, evenly spread.

    >>> z = np.random.default_rng(0).standard_normal((4, 4, 2, 2))
    >>> figure = denoising_trajectory(np.zeros((3, 8, 8, 3)), [999, 600, 200], z, z[1:], z[1:])
    >>> [place.get_title() for place in figure.axes if place.images]
    ['t 999', 't 600', 't 200']
    """
    require_as_many("pictures", pictures, len(timesteps), "timesteps")
    numbers = trajectory_numbers(latents, denoised, guidance)
    shown = np.unique(np.linspace(0, len(timesteps) - 1, min(10, len(timesteps))).round().astype(int))
    aspect = pictures[0].shape[0] / pictures[0].shape[1]
    strip_height = min(1.6, WIDTH / len(shown)) * aspect + 0.3
    figure = new_figure(WIDTH, strip_height + 2.8)
    above, below = figure.subfigures(2, 1, height_ratios=[strip_height, 2.8])
    for place, step in zip(axes_grid(above, 1, len(shown))[0], shown, strict=True):
        for_picture(place).imshow(as_picture(pictures[step]), interpolation="nearest")
        place.set_title(f"t {timesteps[step]:.0f}", fontsize=SMALL)
    panels = [panel for panel in PANELS if set(panel[1]) & set(numbers)]
    for place, (ylabel, lines) in zip(axes_grid(below, 1, len(panels))[0], panels, strict=True):
        _draw_lines(place, timesteps, ylabel, {label: numbers[name] for name, label in lines.items()})
    return figure


def _draw_lines(place: Any, timesteps: Sequence[float], ylabel: str, lines: dict[str, np.ndarray]) -> None:
    for number, (label, values) in enumerate(lines.items()):
        place.plot(list(timesteps), values, label=label, **line_style(number))
    for_curves(place, "timestep", ylabel)
    place.invert_xaxis()
    low, high = min(0, place.get_ylim()[0]), place.get_ylim()[1]
    place.set_ylim(low, high + 0.04 * (high - low))
    legend(place, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    place.title.set_size(TEXT)
