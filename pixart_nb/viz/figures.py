"""Pictures side by side and curves: NumPy in, a matplotlib ``Figure`` out. No global state of pyplot is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import atomic_write
from pixart_nb.viz.style import (
    HEAT,
    SMALL,
    TEXT,
    axes_grid,
    colour_bar,
    for_curves,
    for_picture,
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
    """Pictures in rows and columns, each with its title.

    Args:
        images: pictures (H, W, 3) or (H, W), float in [0, 1] or uint8; their sizes may differ.
        titles: one for each picture.
        columns: pictures in a row; by default about as many as rows.
        row_labels: one for each row, at its left.
        cell: width of a picture in inches.

    >>> image_grid(np.zeros((6, 8, 8, 3)), columns=3).axes[0].get_subplotspec().get_gridspec().ncols
    3
    """
    pictures = [as_picture(image) for image in images]
    if not pictures:
        raise PixArtNBError("an image grid needs at least one picture, got none")
    require_as_many("titles", titles, len(pictures), "pictures")
    columns = min(columns or int(np.ceil(np.sqrt(len(pictures)))), len(pictures))
    rows = -(-len(pictures) // columns)
    require_as_many("row labels", row_labels, rows, "rows")
    titles = [_folded(title, int(cell * 15.5)) for title in titles or [""] * len(pictures)]
    aspect = max(p.shape[0] / p.shape[1] for p in pictures)
    figure, axes = _empty_grid(rows, columns, cell, aspect, titles)
    for place, picture, title in zip(axes, pictures, titles, strict=False):
        _show(place, picture, title)
    for number, label in enumerate(row_labels or ()):
        axes[number * columns].set_ylabel(_folded(label, max(8, int(cell * aspect * 14))), fontsize=SMALL)
    return figure


def comparison_grid(
    rows: Mapping[str, Sequence[np.ndarray] | np.ndarray], columns: Sequence[str], cell: float = 1.8
) -> Figure:
    """Pictures by two choices: a row, with its label, for each value of one, a column for each value of the other.

    Pictures of different sizes are shown to one scale. Pictures as for ``image_grid``.

    >>> grid = comparison_grid({"euler": np.zeros((2, 8, 8, 3)), "ddim": np.ones((2, 8, 8, 3))}, ["4 steps", "8 steps"])
    >>> [place.get_ylabel() for place in grid.axes], [place.get_title() for place in grid.axes]
    (['euler', '', 'ddim', ''], ['4 steps', '8 steps', '', ''])
    """
    for label, pictures in rows.items():
        require_as_many(f"pictures in row {label!r}", pictures, len(columns), "columns")
    pictures = [as_picture(picture) for row in rows.values() for picture in row]
    figure = image_grid(
        _on_equal_ground(pictures), columns=len(columns) or None, row_labels=list(rows), cell=cell
    )
    for place, label in zip(figure.axes, columns, strict=False):
        place.set_title(_folded(label, int(cell * 15.5)), fontsize=SMALL)
    return figure


def film_strip(images: Sequence[np.ndarray] | np.ndarray, labels: Sequence[str]) -> Figure:
    """Pictures of one development in a single row, in order, with a label under each.

    >>> strip = film_strip(np.zeros((3, 8, 8, 3)), ["start", "middle", "end"])
    >>> [place.get_xlabel() for place in strip.axes]
    ['start', 'middle', 'end']
    """
    figure = image_grid(images, columns=len(images) or None, cell=1.3)
    require_as_many("labels", labels, len(images), "pictures")
    for place, label in zip(figure.axes, labels, strict=True):
        place.set_xlabel(label, fontsize=SMALL)
    return figure


def picture_differences(
    rows: Mapping[str, tuple[np.ndarray, np.ndarray]], columns: tuple[str, str] = ("before", "after")
) -> Figure:
    """Two pictures of one size and where they differ, a row for each pair: prompts, seeds, checkpoints, interventions.

    The difference is the mean over the colours of |second - first|, on one scale for all rows.

    >>> figure = picture_differences({"head 3 off": (np.zeros((8, 8, 3)), np.ones((8, 8, 3)))})
    >>> [place.get_title() for place in figure.axes[:3]], float(figure.axes[2].images[0].get_array().max())
    (['before', 'after', 'difference, rms 1.000'], 1.0)
    """
    if not rows:
        raise PixArtNBError("there is no pair of pictures to compare")
    pairs = [tuple(as_share(picture) for picture in pair) for pair in rows.values()]
    for label, (first, second) in zip(rows, pairs, strict=True):
        if first.shape != second.shape:
            raise PixArtNBError(
                f"the pictures of {label!r} are {first.shape} and {second.shape}; sizes must agree"
            )
    apart = [np.abs(second - first).reshape(*first.shape[:2], -1).mean(2) for first, second in pairs]
    most = max(float(difference.max()) for difference in apart) or 1.0
    aspect = pairs[0][0].shape[0] / pairs[0][0].shape[1]
    figure = new_figure(3 * 2.1 + 0.9, len(rows) * (2.0 * aspect + 0.25) + 0.1)
    axes = axes_grid(figure, len(rows), 3)
    for row, (place, pair, difference) in enumerate(zip(axes, pairs, apart, strict=True)):
        label = _folded(list(rows)[row], max(8, int(2.0 * aspect * 13))) if len(rows) > 1 else ""
        _show_pair(place, pair, ("", "") if row else columns, label)
        image = for_picture(place[2]).imshow(
            difference, cmap=HEAT, vmin=0, vmax=most, interpolation="nearest"
        )
        distance = float(np.sqrt(np.square(pair[1] - pair[0]).mean()))
        place[2].set_title(f"difference, rms {distance:.3f}", fontsize=TEXT)
    colour_bar(figure, image, axes[:, 2].tolist(), "|difference| of colours, 0..1")
    return figure


def as_share(picture: np.ndarray) -> np.ndarray:
    """A picture as float in [0, 1]."""
    picture = as_picture(picture)
    return picture / 255.0 if picture.dtype == np.uint8 else picture.astype(float)


def _show_pair(places: Sequence[Axes], pair: Sequence[np.ndarray], titles: Sequence[str], label: str) -> None:
    for place, picture, title in zip(places, pair, titles, strict=False):
        for_picture(place).imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        place.set_title(title, fontsize=TEXT)
    places[0].set_ylabel(label, fontsize=SMALL)


def training_curves(curves: Mapping[str, Curve], ylabel: str = "loss", logarithmic: bool = False) -> Figure:
    """One line for each name: ``curves[name] = (steps, values)``, two sequences of one length.

    >>> training_curves({"train": ([0, 10], [1.0, 0.5])}).axes[0].lines[0].get_ydata().tolist()
    [1.0, 0.5]
    """
    figure = new_figure(7, 3.5)
    place = for_curves(axes_grid(figure, 1, 1)[0, 0], "step", ylabel)
    for number, (name, (steps, values)) in enumerate(curves.items()):
        require_as_many(f"values of {name!r}", values, len(steps), "steps")
        style = line_style(number) | {"marker": None}
        place.plot(np.asarray(steps), np.asarray(values, dtype=float), label=name, **style)
    place.set_yscale("log" if logarithmic else "linear")
    if curves:
        legend(place)
    return figure


def save_figure(figure: Figure, path: str | Path, dpi: int = 150) -> Figure:
    """Write a figure as a PNG, whole or not at all; returns the figure, so that a notebook shows it too."""
    with atomic_write(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)
    return figure


def as_picture(image: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) or (H, W), uint8 or float clipped to [0, 1]; ValueError for anything else."""
    image = np.asarray(image)
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise PixArtNBError(f"a picture must be (H, W, 3) or (H, W), got {image.shape}")
    if image.dtype == np.uint8:
        return image
    if not np.isfinite(image).all():
        raise PixArtNBError("a picture must have finite values only, got nan or infinity")
    return np.clip(image, 0, 1)


def _on_equal_ground(pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each picture in the middle of white, all of the height of the highest and the width of the widest."""
    height, width = (max((picture.shape[side] for picture in pictures), default=0) for side in (0, 1))
    grounds = []
    for picture in pictures:
        white = 255 if picture.dtype == np.uint8 else 1
        ground = np.full((height, width, *picture.shape[2:]), white, picture.dtype)
        top, left = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
        ground[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
        grounds.append(ground)
    return grounds


def require_as_many(what: str, given: Sequence | None, count: int, of_what: str) -> None:
    """Refuse a sequence that does not have ``count`` members; None is fine."""
    if given is not None and len(given) != count:
        raise PixArtNBError(f"need as many {what} as {of_what}, got {len(given)} for {count}")


def _empty_grid(
    rows: int, columns: int, cell: float, aspect: float, titles: Sequence[str]
) -> tuple[Figure, list[Axes]]:
    lines = max(title.count("\n") + 1 if title else 0 for title in titles)
    title_room = 0.16 + 0.14 * lines if lines else 0.08
    size = (columns * cell + 0.3, rows * (cell * aspect + title_room) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for place in axes:
        place.set(xticks=[], yticks=[])
        place.set_frame_on(False)
    return figure, axes


def _show(place: Axes, picture: np.ndarray, title: str) -> None:
    limits = {"cmap": "gray", "vmin": 0, "vmax": 255 if picture.dtype == np.uint8 else 1}
    place.imshow(picture, interpolation="nearest", **(limits if picture.ndim == 2 else {}))
    place.set_title(title, fontsize=SMALL)


def _folded(words: str, width: int) -> str:
    """The words on lines of at most ``width`` letters, unless one word alone is longer."""
    lines: list[str] = []
    for word in words.split():
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += " " + word
        else:
            lines.append(word)
    return "\n".join(lines)
