"""Figures of attention statistics, and of how well the maps of words locate objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz.attention import image_axes, show_pixels
from pixart_nb.viz.figures import require_as_many
from pixart_nb.viz.overlay import overlay
from pixart_nb.viz.style import (
    AMOUNT,
    COLOURS,
    MARK,
    SMALL,
    TEXT,
    WIDTH,
    Figure,
    axes_grid,
    colour_bar,
    for_curves,
    legend,
    line_style,
    new_figure,
)


def attention_statistics(
    values: np.ndarray,
    layers: Sequence[str | int],
    timesteps: Sequence[float],
    label: str,
    heads: Sequence[int] | None = None,
    most: float | None = None,
) -> Figure:
    """Draw a statistic of attention, such as the entropy in nats, by layer and head, and by timestep.

    Args:
        values: (layers, steps, heads).
        most: Upper bound of the statistic (log of the number of keys for entropy), drawn as a line.

    >>> figure = attention_statistics(np.ones((3, 2, 4)), [0, 1, 2], [999, 500], "entropy, nats")
    >>> figure.axes[0].images[0].get_array().shape, len(figure.axes[1].lines)
    ((3, 4), 3)
    """
    if values.ndim != 3 or values.shape[:2] != (len(layers), len(timesteps)):
        raise PixArtNBError(
            f"values have shape {values.shape}; expected {len(layers)} layers, {len(timesteps)} steps, heads"
        )
    heads = list(range(values.shape[2])) if heads is None else heads
    figure = new_figure(WIDTH, max(2.8, 0.22 * len(layers) + 1.2))
    left, right = axes_grid(figure, 1, 2, width_ratios=[1, 1.4])[0]
    image = left.imshow(values.mean(1), cmap=AMOUNT, aspect="auto", interpolation="nearest")
    left.set(xlabel="head", ylabel="layer")
    left.set_title("mean over steps", fontsize=TEXT)
    left.set_xticks(range(len(heads)), heads)
    every = -(-len(layers) // 14)
    left.set_yticks(range(0, len(layers), every), list(layers)[::every])
    colour_bar(figure, image, left, label)
    _by_timestep(right, values.mean(2), layers, timesteps, most)
    for_curves(right, "timestep (sampling runs to the right)", label).set_title("mean over heads", fontsize=TEXT)
    return figure


def _by_timestep(ax: Axes, values: np.ndarray, layers, timesteps, most: float | None) -> None:
    """Draw one line per layer, at most eight of them, evenly spaced."""
    shown = np.unique(np.linspace(0, len(layers) - 1, min(8, len(layers))).round().astype(int))
    for number, row in enumerate(shown):
        ax.plot(timesteps, values[row], label=f"layer {layers[row]}", **line_style(number))
    if most is not None:
        ax.axhline(most, color="0.4", linewidth=0.8)
        ax.text(
            0.99, most, f"most: {most:.2f}", transform=ax.get_yaxis_transform(), fontsize=SMALL, ha="right", va="bottom"
        )
        lowest = ax.get_ylim()[0]
        ax.set_ylim(lowest, most + 0.12 * (most - lowest))
    ax.invert_xaxis()
    legend(ax, loc="center left", bbox_to_anchor=(1.01, 0.5))


def overlap_bars(overlaps: Mapping[str, np.ndarray], least: int = 5) -> Figure:
    """Mean overlap (IoU) with the object of each word, with its standard error, and the position prior as a line.

    Args:
        overlaps: word -> overlaps, one for each image; ``position prior`` is drawn as a line.
        least: words that occur in fewer images are left out.

    >>> figure = overlap_bars({"object": np.full(6, 0.6), "on": np.full(6, 0.4), "position prior": np.full(6, 0.7)})
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['on (n = 6)', 'object (n = 6)']
    """
    words = {word: values for word, values in overlaps.items() if word != "position prior"}
    words = {word: values for word, values in words.items() if len(values) >= least} or words
    order = sorted(words, key=lambda word: float(np.mean(words[word])))
    means = [float(np.mean(words[word])) for word in order]
    errors = [float(np.std(words[word], ddof=min(1, len(words[word]) - 1)) / len(words[word]) ** 0.5) for word in order]
    figure = new_figure(6.5, max(2.2, 0.34 * len(order) + 1.0))
    ax = for_curves(axes_grid(figure, 1, 1)[0, 0], "overlap with the object (IoU), mean and standard error", "")
    colours = [COLOURS[0] if word == "object" else "0.7" for word in order]
    ax.barh(range(len(order)), means, xerr=errors, color=colours, height=0.7, capsize=3)
    ax.set_yticks(range(len(order)), [f"{word} (n = {len(words[word])})" for word in order], fontsize=TEXT)
    if "position prior" in overlaps:
        prior = float(np.mean(overlaps["position prior"]))
        ax.axvline(prior, color=COLOURS[1], linewidth=1.6, linestyle="--")
        figure.suptitle(f"dashed: position prior without a model, {prior:.2f}", fontsize=TEXT)
    ax.set_xlim(0, 1)
    return figure


def located_words(
    images: Sequence[np.ndarray], maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], titles: Sequence[str]
) -> Figure:
    """Images covered by the thresholded map of a word, with the outline of the object: (H, W, 3), (h, w), (H, W) bool.

    >>> mask = np.pad(np.ones((4, 4), bool), 2)
    >>> len(located_words([np.zeros((8, 8, 3))], [np.eye(2)], [mask], ["cup: 0.5"]).axes[0].collections)
    1
    """
    require_as_many("titles", titles, len(images), "images")
    columns = min(3, len(images))
    figure, axes = image_axes(-(-len(images) // columns), columns, images[0], cell=2.3, room=0.35)
    for ax, image, heat, mask, title in zip(axes, images, maps, masks, titles, strict=False):
        show_pixels(ax, overlay(image, heat, (float(heat.min()), float(heat.max())), 0.5), title)
        ax.contour(mask.astype(float), [0.5], colors=[MARK], linewidths=1.4)
    return figure


# ---- parts
