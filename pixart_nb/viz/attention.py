"""Figures of attention: words over the image, the view of one patch, layers x heads, statistics.

Attention is a share: what one patch gives to all keys sums to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import cm
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz.figures import require_as_many
from pixart_nb.viz.overlay import as_float, check_cells, overlay, shrunk, spread_cells
from pixart_nb.viz.style import (
    BAR_HEIGHT,
    DIFFERENCE,
    HEAT,
    MARK,
    SMALL,
    TEXT,
    WIDTH,
    Figure,
    axes_grid,
    colour_bar,
    for_image,
    new_figure,
)

#: More cells a side than this are drawn without lines between them.
MOST_LINES = 32
SHARE = "share of a patch's attention"
#: Inches that a letter of a title takes along its line, with some room.
_LETTER = 0.09


def word_heat_maps(
    image: np.ndarray,
    maps: Mapping[str, np.ndarray],
    threshold: float | None = None,
    columns: int | None = None,
    own_scale: bool = False,
) -> Figure:
    """Draw the image and, for each word, a heat map of the attention that the patches give to it.

    Args:
        image: (H, W, 3), float in [0, 1] or uint8.
        maps: word -> (h, w) share of each patch's attention.
        threshold: Share of the scale below which cells stay grey.
        own_scale: Scale each word from 0 to its own largest share. Otherwise all words share one scale and colour bar.

    >>> figure = word_heat_maps(np.zeros((8, 8, 3)), {"red": np.eye(2), "cup": np.ones((2, 2))})
    >>> [place.get_title() for place in figure.axes[:3]]
    ['image', 'red', 'cup']
    """
    if not maps:
        raise PixArtNBError("there is no word to show; give at least one map")
    columns, image = min(columns or 5, len(maps) + 1), shrunk(image)
    highest = {word: float(np.max(heat)) for word, heat in maps.items()}
    if not own_scale:
        highest = dict.fromkeys(maps, max(highest.values()))
    rows = -(-(len(maps) + 1) // columns)
    figure, axes = image_axes(rows, columns, image, room=0.5 if own_scale else 0.3)
    show_pixels(axes[0], as_float(image), "image")
    for ax, (word, heat) in zip(axes[1:], maps.items(), strict=False):
        text = f"{word}\nup to {highest[word]:.3f}" if own_scale else word
        show_pixels(ax, overlay(image, heat, (0, highest[word]), threshold), text)
    if own_scale:
        text = f"{SHARE}, from 0 (dark) to the number above the map (light)"
        figure.supxlabel(text, fontsize=SMALL)
    else:
        _heat_bar(figure, axes, max(highest.values()), SHARE)
    return figure


def word_strip(
    images: np.ndarray | Sequence[np.ndarray],
    maps: np.ndarray,
    labels: Sequence[str],
    word: str = "",
    threshold: float | None = None,
) -> Figure:
    """Draw the map of one word at each step under the image predicted there, on one scale.

    Args:
        images: (S, H, W, 3).
        maps: (S, h, w).
        labels: One for each step.

    >>> strip = word_strip(np.zeros((2, 8, 8, 3)), np.ones((2, 4, 4)), ["t 999", "t 500"], "cup")
    >>> [place.get_title() for place in strip.axes[:4]]
    ['t 999', 't 500', '', '']
    """
    require_as_many("images", images, len(maps), "maps")
    require_as_many("labels", labels, len(maps), "maps")
    images = [shrunk(image) for image in images]
    figure, axes = image_axes(2, len(maps), images[0], least=2 * _LETTER * len(word))
    highest = float(np.max(maps))
    for number, (image, heat) in enumerate(zip(images, maps, strict=True)):
        show_pixels(axes[number], as_float(image), labels[number])
        show_pixels(axes[len(maps) + number], overlay(image, heat, (0, highest), threshold), "")
    for ax, label in ((axes[0], "image"), (axes[len(maps)], word)):
        ax.set_ylabel(label, fontsize=TEXT)
    _heat_bar(figure, axes, highest, SHARE)
    return figure


def patch_attention(
    image: np.ndarray,
    weights: np.ndarray,
    query: tuple[int, int],
    titles: Sequence[str],
    ratio: int = 1,
    grid: tuple[int, int] | None = None,
    columns: int = 4,
) -> Figure:
    """Draw the attention of one patch, once for each head, layer or step, as cells of R x R tokens over the image.

    Args:
        weights: (n, kh, kw), attention of the patch to every key; ``ratio`` is R of the key grid.
        query: (row, column) of the patch in tokens; it is framed.
        titles: One for each of the n maps.
        grid: (height, width) of the image in tokens, where cells do not fill it.

    >>> figure = patch_attention(np.zeros((8, 8, 3)), np.ones((2, 2, 2)) / 4, (3, 0), ["head 0", "head 1"], ratio=2)
    >>> figure.axes[1].patches[0].get_xy()  # the patch's frame, in tokens
    (0, 3)
    """
    require_as_many("titles", titles, len(weights), "maps")
    grid = check_cells(weights.shape[1:], ratio, grid)
    _check_patch(query, grid)
    columns, image = min(columns, len(weights)), shrunk(image)
    figure, axes = image_axes(-(-len(weights) // columns), columns, image)
    highest = float(np.max(weights))
    for ax, heat, title in zip(axes, weights, titles, strict=False):
        pixels = overlay(image, heat, (0, highest), None, ratio, grid)
        _show_tokens(ax, pixels, grid, title)
        _draw_cells(ax, heat.shape, ratio)
        _frame_patch(ax, query)
    _heat_bar(figure, axes, highest, "share of the patch's attention, a cell")
    return figure


def full_against_compressed(
    image: np.ndarray, full: np.ndarray, compressed: np.ndarray, query: tuple[int, int], ratio: int
) -> Figure:
    """Draw the attention of a patch with full keys (h, w) and compressed keys (kh, kw), and the difference per token.

    The share of a compressed key is divided evenly among its tokens, so that all panels have one unit. The title of the
    difference gives the overlap, 1 - sum |difference| / 2, which is 1 for equal maps.

    >>> figure = full_against_compressed(np.zeros((8, 8, 3)), np.eye(4) / 4, np.eye(2) / 2, (0, 0), 2)
    >>> figure.axes[2].get_title()
    'compressed - full\\n50% of the attention is the same'
    """
    grid, image = full.shape, shrunk(image)
    spread = spread_cells(compressed, ratio, grid)
    _check_patch(query, grid)
    figure, axes = image_axes(1, 3, image, cell=2.6)
    highest = float(max(full.max(), spread.max()))
    panels = ((full, 1, f"full: {full.size} keys"), (compressed, ratio, f"compressed: {compressed.size} keys"))
    for ax, (heat, side, title) in zip(axes, panels, strict=False):
        shares = heat / side**2
        _show_tokens(ax, overlay(image, shares, (0, highest), None, side, grid), grid, title)
        _draw_cells(ax, heat.shape, side)
    difference = spread - full
    same = 1 - np.abs(difference).sum() / 2
    heat_image = _show_difference(axes[2], difference, grid)
    axes[2].set_title(f"compressed - full\n{same:.0%} of the attention is the same", fontsize=TEXT)
    for ax in axes:
        _frame_patch(ax, query)
    _heat_bar(figure, axes[:2], highest, "share of attention, a token")
    colour_bar(figure, heat_image, axes[2], "difference of shares")
    return figure


def overview_grid(
    maps: np.ndarray,
    layers: Sequence[str | int],
    heads: Sequence[int],
    image: np.ndarray | None = None,
    label: str = SHARE,
) -> Figure:
    """Draw maps (layers, heads, h, w) as a grid with one row per layer, each scaled from its minimum to its maximum.

    >>> grid = overview_grid(np.random.default_rng(0).random((2, 3, 4, 4)), [0, 14], [0, 1, 2])
    >>> [place.get_title() for place in grid.axes[:3]], [place.get_ylabel() for place in grid.axes[::3]]
    (['head 0', 'head 1', 'head 2'], ['layer 0', 'layer 14'])
    """
    if maps.shape[:2] != (len(layers), len(heads)):
        raise PixArtNBError(f"maps have shape {maps.shape}; expected {len(layers)} layers x {len(heads)} heads")
    aspect, cell = maps.shape[2] / maps.shape[3], min(1.3, WIDTH / len(heads))
    image = None if image is None else shrunk(image, 256)
    figure = new_figure(len(heads) * cell + 0.4, len(layers) * cell * aspect + 0.6)
    axes = axes_grid(figure, len(layers), len(heads))
    for row, layer in enumerate(layers):
        for column, head in enumerate(heads):
            ax, heat = for_image(axes[row, column]), maps[row, column]
            limits = (float(heat.min()), float(heat.max()))
            if image is None:
                ax.imshow(heat, cmap=HEAT, vmin=limits[0], vmax=limits[1], interpolation="nearest")
            else:
                ax.imshow(overlay(image, heat, limits), interpolation="nearest")
            ax.set_title(f"head {head}" if row == 0 else "", fontsize=SMALL)
        axes[row, 0].set_ylabel(f"layer {layer}", fontsize=SMALL)
    figure.supxlabel(f"{label}: each map from its smallest (dark) to its largest value", fontsize=SMALL)
    return figure


def image_axes(rows: int, columns: int, image: np.ndarray, cell: float = 0.0, least: float = 0.0, room: float = 0.3):
    """Return a figure and a flat list of its axes, for images of one shape.

    ``cell`` is the width of an image, ``least`` the smallest height of the figure and ``room`` the height of the
    titles of a row, in inches.
    """
    aspect = image.shape[0] / image.shape[1]
    cell = cell or min(2.2, (WIDTH - 0.9) / columns)
    figure = new_figure(columns * cell + 0.9, max(BAR_HEIGHT, least, rows * ((cell - 0.1) * aspect + room)))
    axes = list(axes_grid(figure, rows, columns).ravel())
    for ax in axes:
        for_image(ax)
    return figure, axes


def show_pixels(ax: Axes, pixels: np.ndarray, title: str) -> None:
    ax.imshow(pixels, interpolation="nearest")
    ax.set_title(title, fontsize=TEXT)


def _show_tokens(ax: Axes, pixels: np.ndarray, grid: tuple[int, int], title: str) -> None:
    """Show pixels on axes that count tokens."""
    ax.imshow(pixels, interpolation="nearest", extent=(0, grid[1], grid[0], 0), aspect=_aspect(pixels, grid))
    ax.set_title(title, fontsize=TEXT)


def _aspect(pixels: np.ndarray, grid: tuple[int, int]) -> float:
    """Return the height of a token divided by its width."""
    return (pixels.shape[0] / grid[0]) / (pixels.shape[1] / grid[1])


def _show_difference(ax: Axes, difference: np.ndarray, grid: tuple[int, int]):
    most = float(np.abs(difference).max()) or 1.0
    extent = (0, grid[1], grid[0], 0)
    return ax.imshow(difference, cmap=DIFFERENCE, vmin=-most, vmax=most, interpolation="nearest", extent=extent)


def _draw_cells(ax: Axes, cells: tuple[int, int], ratio: int) -> None:
    """Draw lines between the cells of the key grid."""
    if max(cells) > MOST_LINES:
        return
    rows, columns = (np.arange(side + 1) * ratio for side in cells)
    ax.hlines(rows, 0, columns[-1], color="white", linewidth=0.4, alpha=0.6)
    ax.vlines(columns, 0, rows[-1], color="white", linewidth=0.4, alpha=0.6)


def _frame_patch(ax: Axes, query: tuple[int, int]) -> None:
    frame = Rectangle((query[1], query[0]), 1, 1, fill=False, edgecolor=MARK, linewidth=1.8)
    ax.add_patch(frame)


def _check_patch(query: tuple[int, int], grid: tuple[int, int]) -> None:
    if not all(0 <= ax < side for ax, side in zip(query, grid, strict=True)):
        raise PixArtNBError(
            f"there is no patch {tuple(query)}; rows are 0 to {grid[0] - 1}, columns 0 to {grid[1] - 1}"
        )


def _heat_bar(figure: Figure, axes: Sequence[Axes], highest: float, label: str) -> Any:
    colour_bar(figure, cm.ScalarMappable(Normalize(0, highest), HEAT), axes, label)
