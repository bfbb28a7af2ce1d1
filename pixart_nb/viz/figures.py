"""Figures of images side by side and of curves. The global state of pyplot is not used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import atomic_write
from pixart_nb.viz.style import (
    HEAT,
    SMALL,
    TEXT,
    Figure,
    axes_grid,
    colour_bar,
    for_curves,
    for_image,
    legend,
    line_style,
    new_figure,
)

Curve = tuple[Sequence[float], Sequence[float]]


def image_grid(
    images: Sequence[np.ndarray] | np.ndarray,
    titles: Sequence[str] | None = None,
    columns: int | None = None,
    row_labels: Sequence[str] | None = None,
    cell: float = 1.8,
) -> Figure:
    """Draw images in rows and columns with their titles.

    Args:
        images: (H, W, 3) or (H, W), float in [0, 1] or uint8; their sizes may differ.
        titles: One for each image.
        columns: Images per row; by default about as many as rows.
        row_labels: One for each row, at its left.
        cell: Width of an image in inches.

    >>> image_grid(np.zeros((6, 8, 8, 3)), columns=3).axes[0].get_subplotspec().get_gridspec().ncols
    3
    """
    images = [as_image(image) for image in images]
    if not images:
        raise PixArtNBError("an image grid needs at least one image, got none")
    require_as_many("titles", titles, len(images), "images")
    columns = min(columns or int(np.ceil(np.sqrt(len(images)))), len(images))
    rows = -(-len(images) // columns)
    require_as_many("row labels", row_labels, rows, "rows")
    titles = [_folded(title, int(cell * 15.5)) for title in titles or [""] * len(images)]
    aspect = max(p.shape[0] / p.shape[1] for p in images)
    figure, axes = _empty_grid(rows, columns, cell, aspect, titles)
    for ax, image, title in zip(axes, images, titles, strict=False):
        _show(ax, image, title)
    for number, label in enumerate(row_labels or ()):
        axes[number * columns].set_ylabel(_folded(label, max(8, int(cell * aspect * 14))), fontsize=SMALL)
    return figure


def comparison_grid(
    rows: Mapping[str, Sequence[np.ndarray] | np.ndarray], columns: Sequence[str], cell: float = 1.8
) -> Figure:
    """Draw images by two variables: a labelled row per value of one, a column per value of the other.

    Images of different sizes are shown at one scale. Images as for ``image_grid``.

    >>> grid = comparison_grid({"euler": np.zeros((2, 8, 8, 3)), "ddim": np.ones((2, 8, 8, 3))}, ["4 steps", "8 steps"])
    >>> [place.get_ylabel() for place in grid.axes], [place.get_title() for place in grid.axes]
    (['euler', '', 'ddim', ''], ['4 steps', '8 steps', '', ''])
    """
    for label, images in rows.items():
        require_as_many(f"images in row {label!r}", images, len(columns), "columns")
    images = [as_image(image) for row in rows.values() for image in row]
    figure = image_grid(_on_equal_ground(images), columns=len(columns) or None, row_labels=list(rows), cell=cell)
    for ax, label in zip(figure.axes, columns, strict=False):
        ax.set_title(_folded(label, int(cell * 15.5)), fontsize=SMALL)
    return figure


def film_strip(images: Sequence[np.ndarray] | np.ndarray, labels: Sequence[str]) -> Figure:
    """Draw the images of a sequence in one row with a label under each.

    >>> strip = film_strip(np.zeros((3, 8, 8, 3)), ["start", "middle", "end"])
    >>> [place.get_xlabel() for place in strip.axes]
    ['start', 'middle', 'end']
    """
    figure = image_grid(images, columns=len(images) or None, cell=1.3)
    require_as_many("labels", labels, len(images), "images")
    for ax, label in zip(figure.axes, labels, strict=True):
        ax.set_xlabel(label, fontsize=SMALL)
    return figure


def image_differences(
    rows: Mapping[str, tuple[np.ndarray, np.ndarray]], columns: tuple[str, str] = ("before", "after")
) -> Figure:
    """Draw pairs of images of one size and their difference, one row per pair.

    The difference is the mean of |second - first| over the colours, on one scale for all rows.

    >>> figure = image_differences({"head 3 off": (np.zeros((8, 8, 3)), np.ones((8, 8, 3)))})
    >>> [place.get_title() for place in figure.axes[:3]], float(figure.axes[2].images[0].get_array().max())
    (['before', 'after', 'difference, rms 1.000'], 1.0)
    """
    if not rows:
        raise PixArtNBError("there is no pair of images to compare")
    pairs = [tuple(as_share(image) for image in pair) for pair in rows.values()]
    for label, (first, second) in zip(rows, pairs, strict=True):
        if first.shape != second.shape:
            raise PixArtNBError(f"the images of {label!r} are {first.shape} and {second.shape}; sizes must agree")
    differences = [np.abs(second - first).reshape(*first.shape[:2], -1).mean(2) for first, second in pairs]
    most = max(float(difference.max()) for difference in differences) or 1.0
    aspect = pairs[0][0].shape[0] / pairs[0][0].shape[1]
    figure = new_figure(3 * 2.1 + 0.9, len(rows) * (2.0 * aspect + 0.25) + 0.1)
    axes = axes_grid(figure, len(rows), 3)
    for row, (ax, pair, difference) in enumerate(zip(axes, pairs, differences, strict=True)):
        label = _folded(list(rows)[row], max(8, int(2.0 * aspect * 13))) if len(rows) > 1 else ""
        _show_pair(ax, pair, ("", "") if row else columns, label)
        heat = for_image(ax[2]).imshow(difference, cmap=HEAT, vmin=0, vmax=most, interpolation="nearest")
        distance = float(np.sqrt(np.square(pair[1] - pair[0]).mean()))
        ax[2].set_title(f"difference, rms {distance:.3f}", fontsize=TEXT)
    colour_bar(figure, heat, axes[:, 2].tolist(), "|difference| of colours, 0..1")
    return figure


def as_share(image: np.ndarray) -> np.ndarray:
    """Return an image as float in [0, 1]."""
    image = as_image(image)
    return image / 255.0 if image.dtype == np.uint8 else image.astype(float)


def _show_pair(axes: Sequence[Axes], pair: Sequence[np.ndarray], titles: Sequence[str], label: str) -> None:
    for ax, image, title in zip(axes, pair, titles, strict=False):
        for_image(ax).imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        ax.set_title(title, fontsize=TEXT)
    axes[0].set_ylabel(label, fontsize=SMALL)


def training_curves(curves: Mapping[str, Curve], ylabel: str = "loss", logarithmic: bool = False) -> Figure:
    """Draw one line per name from ``curves[name] = (steps, values)``, two sequences of equal length.

    >>> training_curves({"train": ([0, 10], [1.0, 0.5])}).axes[0].lines[0].get_ydata().tolist()
    [1.0, 0.5]
    """
    figure = new_figure(7, 3.5)
    ax = for_curves(axes_grid(figure, 1, 1)[0, 0], "step", ylabel)
    for number, (name, (steps, values)) in enumerate(curves.items()):
        require_as_many(f"values of {name!r}", values, len(steps), "steps")
        style = line_style(number) | {"marker": None}
        ax.plot(np.asarray(steps), np.asarray(values, dtype=float), label=name, **style)
    ax.set_yscale("log" if logarithmic else "linear")
    if curves:
        legend(ax)
    return figure


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> Figure:
    """Write a figure as a PNG atomically, and return it, so that a notebook shows it."""
    with atomic_write(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
    return figure


def as_image(image: np.ndarray) -> np.ndarray:
    """Return an image (H, W, 3) or (H, W), uint8 or float clipped to [0, 1].

    Raises:
        PixArtNBError: another shape, or values that are not finite.
    """
    image = np.asarray(image)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise PixArtNBError(f"an image must be (H, W, 3) or (H, W), got {image.shape}")
    if image.dtype == np.uint8:
        return image
    if not np.isfinite(image).all():
        raise PixArtNBError("an image must have finite values only, got nan or infinity")
    return np.clip(image, 0, 1)


def _on_equal_ground(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Centre each image on white of the largest height and width."""
    height, width = (max((image.shape[side] for image in images), default=0) for side in (0, 1))
    grounds = []
    for image in images:
        white = 255 if image.dtype == np.uint8 else 1
        ground = np.full((height, width, *image.shape[2:]), white, image.dtype)
        top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
        ground[top : top + image.shape[0], left : left + image.shape[1]] = image
        grounds.append(ground)
    return grounds


def require_as_many(what: str, sequence: Sequence | None, count: int, of_what: str) -> None:
    """Refuse a sequence that does not have ``count`` members; None is accepted."""
    if sequence is not None and len(sequence) != count:
        raise PixArtNBError(f"need as many {what} as {of_what}, got {len(sequence)} for {count}")


def _empty_grid(
    rows: int, columns: int, cell: float, aspect: float, titles: Sequence[str]
) -> tuple[Figure, list[Axes]]:
    lines = max(title.count("\n") + 1 if title else 0 for title in titles)
    title_room = 0.16 + 0.14 * lines if lines else 0.08
    size = (columns * cell + 0.3, rows * (cell * aspect + title_room) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for ax in axes:
        ax.set(xticks=[], yticks=[])
        ax.set_frame_on(False)
    return figure, axes


def _show(ax: Axes, image: np.ndarray, title: str) -> None:
    limits = {"cmap": "gray", "vmin": 0, "vmax": 255 if image.dtype == np.uint8 else 1}
    ax.imshow(image, interpolation="nearest", **(limits if image.ndim == 2 else {}))
    ax.set_title(title, fontsize=SMALL)


def _folded(words: str, width: int) -> str:
    """Wrap words into lines of at most ``width`` letters."""
    lines: list[str] = []
    for word in words.split():
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += " " + word
        else:
            lines.append(word)
    return "\n".join(lines)
