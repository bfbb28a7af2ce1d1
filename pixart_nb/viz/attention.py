"""Figures of attention: words over the image, the view of one patch, layers x heads, statistics, located objects.

Attention is a share: what one patch gives to all keys sums to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz import style
from pixart_nb.viz.figures import require_as_many
from pixart_nb.viz.overlay import as_float, check_cells, heat_bar, overlay, shrunk, spread_cells
from pixart_nb.viz.style import SMALL, TEXT, WIDTH, Figure, axes_grid, colour_bar, for_curves, new_figure

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
        text = f"{SHARE}, from 0 (grey) to the number above the map (light)"
        figure.supxlabel(text, fontsize=SMALL)
    else:
        heat_bar(figure, axes, max(highest.values()), SHARE, image)
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
    heat_bar(figure, axes, highest, SHARE, images[0])
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
    """
    require_as_many("titles", titles, len(weights), "maps")
    grid = check_cells(weights.shape[1:], ratio, grid)
    check_patch(query, grid)
    columns, image = min(columns, len(weights)), shrunk(image)
    figure, axes = image_axes(-(-len(weights) // columns), columns, image)
    highest = float(np.max(weights))
    for ax, heat, title in zip(axes, weights, titles, strict=False):
        pixels = overlay(image, heat, (0, highest), None, ratio, grid)
        _show_tokens(ax, pixels, grid, title)
        _faint_cells(ax, heat.shape, ratio)
        _frame_patch(ax, query)
    heat_bar(figure, axes, highest, "share of the patch's attention, a cell", image)
    return figure


def full_against_compressed(
    image: np.ndarray, full: np.ndarray, compressed: np.ndarray, query: tuple[int, int] | None, ratio: int
) -> Figure:
    """Draw the attention of a patch with full keys (h, w) and compressed keys (kh, kw), and the difference per token.

    The share of a compressed key is divided evenly among its tokens, so that all panels have one unit. The title of the
    difference gives the overlap, 1 - sum |difference| / 2, which is 1 for equal maps.
    """
    grid, image = full.shape, shrunk(image)
    spread = spread_cells(compressed, ratio, grid)
    if query is not None:
        check_patch(query, grid)
    figure, axes = image_axes(1, 3, image, cell=2.6)
    highest = float(max(full.max(), spread.max()))
    panels = ((full, 1, f"full: {full.size} keys"), (compressed, ratio, f"compressed: {compressed.size} keys"))
    for ax, (heat, side, title) in zip(axes, panels, strict=False):
        shares = heat / side**2
        _show_tokens(ax, overlay(image, shares, (0, highest), None, side, grid), grid, title)
        _faint_cells(ax, heat.shape, side)
    difference = spread - full
    same = 1 - np.abs(difference).sum() / 2
    heat_image = _show_difference(axes[2], difference, grid)
    axes[2].set_title(f"compressed - full\n{same:.0%} of the attention is the same", fontsize=TEXT)
    for ax in axes if query is not None else ():
        _frame_patch(ax, query)
    heat_bar(figure, axes[:2], highest, "share of attention, a token", image)
    colour_bar(figure, heat_image, axes[2], "difference of shares")
    return figure


def overview_grid(
    maps: np.ndarray,
    layers: Sequence[str | int],
    heads: Sequence[int],
    image: np.ndarray | None = None,
    label: str = SHARE,
) -> Figure:
    """Draw maps (layers, heads, h, w) as a grid with one row per layer, each scaled from its minimum to its maximum."""
    if maps.shape[:2] != (len(layers), len(heads)):
        raise PixArtNBError(f"maps have shape {maps.shape}; expected {len(layers)} layers x {len(heads)} heads")
    aspect, cell = maps.shape[2] / maps.shape[3], min(1.3, WIDTH / len(heads))
    image = None if image is None else shrunk(image, 256)
    figure = new_figure(len(heads) * cell + 0.4, len(layers) * cell * aspect + 0.6)
    axes = axes_grid(figure, len(layers), len(heads))
    for row, layer in enumerate(layers):
        for column, head in enumerate(heads):
            ax, heat = style.for_image(axes[row, column]), maps[row, column]
            limits = (float(heat.min()), float(heat.max()))
            if image is None:
                ax.imshow(heat, cmap=style.HEAT, vmin=limits[0], vmax=limits[1], interpolation="nearest")
            else:
                ax.imshow(overlay(image, heat, limits), interpolation="nearest")
            ax.set_title(f"head {head}" if row == 0 else "", fontsize=SMALL)
        axes[row, 0].set_ylabel(f"layer {layer}", fontsize=SMALL)
    figure.supxlabel(f"{label}: each map from its smallest (grey) to its largest value", fontsize=SMALL)
    return figure


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
    """
    if values.ndim != 3 or values.shape[:2] != (len(layers), len(timesteps)):
        raise PixArtNBError(
            f"values have shape {values.shape}; expected {len(layers)} layers, {len(timesteps)} steps, heads"
        )
    heads = list(range(values.shape[2])) if heads is None else heads
    figure = new_figure(WIDTH, max(2.8, 0.22 * len(layers) + 1.2))
    left, right = axes_grid(figure, 1, 2, width_ratios=[1, 1.4])[0]
    image = left.imshow(values.mean(1), cmap=style.AMOUNT, aspect="auto", interpolation="nearest")
    left.set(xlabel="head", ylabel="layer")
    left.set_title("mean over steps", fontsize=TEXT)
    left.set_xticks(range(len(heads)), heads)
    style.label_every(left.set_yticks, layers)
    colour_bar(figure, image, left, label)
    _by_timestep(right, values.mean(2), layers, timesteps, most)
    for_curves(right, "timestep (sampling runs to the right)", label).set_title("mean over heads", fontsize=TEXT)
    return figure


def _by_timestep(ax: Axes, values: np.ndarray, layers, timesteps, most: float | None) -> None:
    """Draw one line per layer, at most eight of them, evenly spaced."""
    shown = np.unique(np.linspace(0, len(layers) - 1, min(8, len(layers))).round().astype(int))
    for number, row in enumerate(shown):
        ax.plot(timesteps, values[row], label=f"layer {layers[row]}", **style.line_style(number))
    if most is not None:
        ax.axhline(most, color="0.4", linewidth=0.8)
        across = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        ax.text(0.99, most, f"most: {most:.2f}", fontsize=SMALL, **across)
        lowest = ax.get_ylim()[0]
        ax.set_ylim(lowest, most + 0.12 * (most - lowest))
    ax.invert_xaxis()
    style.legend(ax, "right")


def overlap_bars(overlaps: Mapping[str, np.ndarray], least: int = 5) -> Figure:
    """Draw the mean overlap (IoU) of each word's map with the object, its standard error, and the position prior.

    Args:
        overlaps: word -> overlaps, one for each image; ``position prior`` is drawn as a line.
        least: words that occur in fewer images are left out.
    """
    words = {word: values for word, values in overlaps.items() if word != "position prior"}
    words = {word: values for word, values in words.items() if len(values) >= least} or words
    order = sorted(words, key=lambda word: float(np.mean(words[word])))
    means = [float(np.mean(words[word])) for word in order]
    errors = [float(np.std(words[word], ddof=min(1, len(words[word]) - 1)) / len(words[word]) ** 0.5) for word in order]
    height, xlabel = max(2.2, 0.34 * len(order) + 1.0), "overlap with the object (IoU), mean and standard error"
    figure, ax = style.curve_axes(6.5, height, xlabel, "")
    colours = [style.COLOURS[0] if word == "object" else "0.7" for word in order]
    ax.barh(range(len(order)), means, xerr=errors, color=colours, height=0.7, capsize=3)
    ax.set_yticks(range(len(order)), [f"{word} (n = {len(words[word])})" for word in order], fontsize=TEXT)
    if "position prior" in overlaps:
        prior = float(np.mean(overlaps["position prior"]))
        ax.axvline(prior, color=style.COLOURS[1], linewidth=1.6, linestyle="--")
        figure.suptitle(f"dashed: position prior without a model, {prior:.2f}", fontsize=TEXT)
    ax.set_xlim(0, 1)
    return figure


def located_words(
    images: Sequence[np.ndarray], maps: Sequence[np.ndarray], masks: Sequence[np.ndarray], titles: Sequence[str]
) -> Figure:
    """Draw images (H, W, 3) under the thresholded map (h, w) of a word, with the outline of the mask (H, W) bool."""
    require_as_many("titles", titles, len(images), "images")
    columns = min(3, len(images))
    figure, axes = image_axes(-(-len(images) // columns), columns, images[0], cell=2.3, room=0.35)
    for ax, image, heat, mask, title in zip(axes, images, maps, masks, titles, strict=False):
        show_pixels(ax, overlay(image, heat, (float(heat.min()), float(heat.max())), 0.5), title)
        ax.contour(mask.astype(float), [0.5], colors=[style.MARK], linewidths=1.4)
    return figure


# ---- parts


def image_axes(rows: int, columns: int, image: np.ndarray, cell: float = 0.0, least: float = 0.0, room: float = 0.3):
    """Return a figure and a flat list of its axes, for images of one shape.

    ``cell`` is the width of an image, ``least`` the smallest height of the figure and ``room`` the height of the
    titles of a row, in inches.
    """
    aspect = image.shape[0] / image.shape[1]
    cell = cell or min(2.2, (WIDTH - 0.9) / columns)
    figure = new_figure(columns * cell + 0.9, max(style.BAR_HEIGHT, least, rows * ((cell - 0.1) * aspect + room)))
    axes = list(axes_grid(figure, rows, columns).ravel())
    for ax in axes:
        style.for_image(ax)
    return figure, axes


def show_pixels(ax: Axes, pixels: np.ndarray, title: str) -> None:
    """Show an image with a title."""
    ax.imshow(pixels, interpolation="nearest")
    ax.set_title(title, fontsize=TEXT)


def _show_tokens(ax: Axes, pixels: np.ndarray, grid: tuple[int, int], title: str) -> None:
    """Show pixels on axes that count tokens."""
    aspect = (pixels.shape[0] / grid[0]) / (pixels.shape[1] / grid[1])
    ax.imshow(pixels, interpolation="nearest", extent=(0, grid[1], grid[0], 0), aspect=aspect)
    ax.set_title(title, fontsize=TEXT)


def _show_difference(ax: Axes, difference: np.ndarray, grid: tuple[int, int]):
    most = float(np.abs(difference).max()) or 1.0
    look = {"cmap": style.DIFFERENCE, "vmin": -most, "vmax": most, "interpolation": "nearest"}
    return ax.imshow(difference, extent=(0, grid[1], grid[0], 0), **look)


def draw_cells(ax: Axes, cells: tuple[int, int], ratio: int, **look) -> None:
    """Draw white lines between the cells of the key grid, on axes that count tokens."""
    rows, columns = (np.arange(side + 1) * ratio for side in cells)
    ax.hlines(rows, 0, columns[-1], color="white", **look)
    ax.vlines(columns, 0, rows[-1], color="white", **look)


def _faint_cells(ax: Axes, cells: tuple[int, int], ratio: int) -> None:
    if max(cells) <= MOST_LINES:
        draw_cells(ax, cells, ratio, linewidth=0.4, alpha=0.6)


def _frame_patch(ax: Axes, query: tuple[int, int]) -> None:
    frame = Rectangle((query[1], query[0]), 1, 1, fill=False, edgecolor=style.MARK, linewidth=1.8)
    ax.add_patch(frame)


def check_patch(query: tuple[int, int], grid: tuple[int, int]) -> None:
    """Refuse a patch (row, column) that is not on the grid."""
    if not all(0 <= index < side for index, side in zip(query, grid, strict=True)):
        rows, columns = (side - 1 for side in grid)
        raise PixArtNBError(f"there is no patch {tuple(query)}; rows are 0 to {rows}, columns 0 to {columns}")
