"""Figures of images side by side. The global state of pyplot is not used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import atomic_write
from pixart_nb.viz.style import HEAT, LARGE, SMALL, TEXT, WIDTH, Figure, axes_grid, colour_bar, for_image, new_figure

#: Inches beside the images of a grid, with row labels and without.
_LABEL_MARGIN, _MARGIN = 0.28, 0.1
#: Letters per inch of a title and of a row label, and inches per line of a title, in a font of one point.
_TITLE_LETTERS, _ROW_LETTERS, _TITLE_LINE = 124, 112, 0.0185


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
        cell: Width of an image in inches; less if the row would be wider than a notebook. Labels of wide images are
            larger.
    """
    images = [as_image(image) for image in images]
    if not images:
        raise PixArtNBError("an image grid needs at least one image, got none")
    require_as_many("titles", titles, len(images), "images")
    columns = min(columns or int(np.ceil(np.sqrt(len(images)))), len(images))
    margin = _LABEL_MARGIN if row_labels else _MARGIN
    cell = min(cell, (WIDTH - margin) / columns)
    rows = -(-len(images) // columns)
    require_as_many("row labels", row_labels, rows, "rows")
    points = float(np.clip(5 * cell, SMALL, LARGE))
    titles = [_folded(title, int(cell * _TITLE_LETTERS / points)) for title in titles or [""] * len(images)]
    lines = [max(title.count("\n") + bool(title) for title in titles[k * columns :][:columns]) for k in range(rows)]
    title_rooms = sum(0.15 + _TITLE_LINE * points * count if count else 0.08 for count in lines)
    aspects = [max(image.shape[0] / image.shape[1] for image in images[k * columns :][:columns]) for k in range(rows)]
    figure = new_figure(columns * cell + margin, cell * sum(aspects) + title_rooms + 0.1)
    figure.set_layout_engine("compressed")  # no gaps between rows of images with a fixed aspect
    axes = figure.subplots(rows, columns, squeeze=False, height_ratios=aspects)
    axes = [for_image(ax) for ax in axes.ravel()]
    for number, (ax, image, title) in enumerate(zip(axes, images, titles, strict=False)):
        limits = {"cmap": "gray", "vmin": 0, "vmax": 255 if image.dtype == np.uint8 else 1}
        # averages where the figure has fewer pixels than the image
        ax.imshow(image, interpolation="antialiased", **(limits if image.ndim == 2 else {}))
        ax.set_ylim(image.shape[1] * aspects[number // columns] - 0.5, -0.5)  # room below the lower ones of a row
        ax.set_title(title, fontsize=points)
        ax.set_anchor("S")  # titles have the room that is left
    for number, label in enumerate(row_labels or ()):
        letters = max(8, int(cell * aspects[number] * _ROW_LETTERS / points))
        axes[number * columns].set_ylabel(_folded(label, letters), fontsize=points)
    return figure


def comparison_grid(
    rows: Mapping[str, Sequence[np.ndarray] | np.ndarray], columns: Sequence[str], cell: float = 1.8
) -> Figure:
    """Draw images by two variables: a labelled row per value of one, a column per value of the other.

    Images of different sizes are shown at one scale. Images as for ``image_grid``. A single column is laid out in rows
    of up to five, with the labels above.
    """
    for label, images in rows.items():
        require_as_many(f"images in row {label!r}", images, len(columns), "columns")
    images = [as_image(image) for row in rows.values() for image in row]
    if len(columns) == 1 and len(images) > 1:
        figure = image_grid(_on_equal_ground(images), list(rows), min(5, len(images)), cell=cell)
        title = _folded(columns[0], int((figure.get_figwidth() - 0.3) * _TITLE_LETTERS / TEXT))
        figure.suptitle(title, fontsize=TEXT)
        lines = title.count("\n") + 1
        figure.set_figheight(figure.get_figheight() + 0.05 + _TITLE_LINE * TEXT * lines)
        return figure
    titles = [*columns, *[""] * (len(images) - len(columns))]
    return image_grid(_on_equal_ground(images), titles, len(columns) or None, list(rows), cell)


def film_strip(images: Sequence[np.ndarray] | np.ndarray, labels: Sequence[str]) -> Figure:
    """Draw the images of a sequence in one row with a label under each."""
    figure = image_grid(images, columns=len(images) or None, cell=1.3)
    require_as_many("labels", labels, len(images), "images")
    for ax, label in zip(figure.axes, labels, strict=True):
        ax.set_xlabel(label, fontsize=SMALL)
    figure.set_figheight(figure.get_figheight() + _TITLE_LINE * SMALL)
    return figure


def image_differences(
    rows: Mapping[str, tuple[np.ndarray, np.ndarray]], columns: tuple[str, str] = ("before", "after")
) -> Figure:
    """Draw pairs of images of one size and their difference, one row per pair.

    The difference is the mean of |second - first| over the colours, on one scale for all rows.
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


def _show_pair(axes: Sequence[Axes], pair: Sequence[np.ndarray], titles: Sequence[str], label: str) -> None:
    for ax, image, title in zip(axes, pair, titles, strict=False):
        for_image(ax).imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        ax.set_title(title, fontsize=TEXT)
    axes[0].set_ylabel(label, fontsize=SMALL)


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


def as_share(image: np.ndarray) -> np.ndarray:
    """Return an image as float in [0, 1]."""
    image = as_image(image)
    return image / 255.0 if image.dtype == np.uint8 else image.astype(float)


def require_as_many(what: str, sequence: Sequence | None, count: int, of_what: str) -> None:
    """Refuse a sequence that does not have ``count`` members; None is accepted."""
    if sequence is not None and len(sequence) != count:
        raise PixArtNBError(f"need as many {what} as {of_what}, got {len(sequence)} for {count}")


def _on_equal_ground(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Centre each image on white of the largest height and width."""
    size = [max((image.shape[side] for image in images), default=0) for side in (0, 1)]
    grounds = []
    for image in images:
        room = [(whole - side, (whole - side) // 2) for whole, side in zip(size, image.shape, strict=False)]
        pads = [(before, whole - before) for whole, before in room] + [(0, 0)] * (image.ndim - 2)
        grounds.append(np.pad(image, pads, constant_values=255 if image.dtype == np.uint8 else 1))
    return grounds


def _folded(words: str, width: int) -> str:
    """Wrap words into lines of at most ``width`` letters, at middle dots if there are any; a longer word is broken."""
    lines = [""]
    for part in " ".join(words.split()).split(" · "):
        joined = f"{lines[-1]} · {part}" if lines[-1] else part
        if len(joined) <= width:
            lines[-1] = joined
        else:
            lines += fill(part, max(1, width), break_on_hyphens=False).split("\n")
    return "\n".join(lines).lstrip("\n")
