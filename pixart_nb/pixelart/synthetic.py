"""Varied synthetic images for the VAE, so that it also reconstructs images that are no drawn scenes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pixart_nb.pixelart.render import fractal, smooth

#: Drawings are made at this multiple of the size and reduced, for smooth edges.
SUPERSAMPLE = 2
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789&?!@#%"


def _colour(rng: np.random.Generator) -> tuple[int, ...]:
    """Return a colour: any, a grey, black or white."""
    choice = rng.random()
    if choice < 0.7:
        return tuple(int(v) for v in rng.integers(0, 256, 3))
    return (int(rng.choice((0, 20, 255, 255, rng.integers(256)))),) * 3


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    return np.meshgrid(axis, axis)


def _blend(weight: np.ndarray, first: tuple[int, ...], second: tuple[int, ...]) -> np.ndarray:
    return (np.array(first) * (1 - weight[..., None]) + np.array(second) * weight[..., None]).astype(np.uint8)


def gradient(size: int, rng: np.random.Generator) -> np.ndarray:
    """Linear or radial gradient between two colours, or a flat colour."""
    x, y = _grid(size)
    if rng.random() < 0.3:
        return _blend(np.zeros_like(x), _colour(rng), _colour(rng))
    angle, centre = rng.uniform(0, 2 * np.pi), rng.random(2)
    linear = 0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
    weight = linear if rng.random() < 0.6 else np.hypot(x - centre[0], y - centre[1])
    return _blend(np.clip(weight, 0, 1), _colour(rng), _colour(rng))


def noise(size: int, rng: np.random.Generator) -> np.ndarray:
    """Fractal noise between two colours, stretched, soft or with hard edges."""
    x, y = _grid(size)
    frequency, seed = float(np.exp(rng.uniform(np.log(2), np.log(40)))), int(rng.integers(10**6))
    weight = fractal(x, y * rng.uniform(0.4, 2.5), seed, frequency, size, 4)
    weight = np.clip((weight - 0.5) * rng.choice((1.5, 3, 12)) + 0.5, 0, 1)
    return _blend(weight, _colour(rng), _colour(rng))


def _canvas(size: int, rng: np.random.Generator) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    ground = gradient(size * SUPERSAMPLE, rng) if rng.random() < 0.5 else np.full((size * SUPERSAMPLE,) * 2 + (3,), 255)
    image = Image.fromarray(ground.astype(np.uint8))
    return image, ImageDraw.Draw(image)


def _reduced(image: Image.Image, size: int) -> np.ndarray:
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def dead_leaves(size: int, rng: np.random.Generator) -> np.ndarray:
    """Many overlapping ellipses and rectangles, small ones more often than large ones."""
    image, draw = _canvas(size, rng)
    side = size * SUPERSAMPLE
    for _ in range(int(rng.integers(20, 160))):
        x, y = rng.uniform(-0.1, 1.1, 2) * side
        rx, ry = 0.03 * side * rng.pareto(1.6, 2).clip(0.3, 8)
        shape = draw.ellipse if rng.random() < 0.6 else draw.rectangle
        shape((x - rx, y - ry, x + rx, y + ry), fill=_colour(rng))
    return _reduced(image, size)


def icon(size: int, rng: np.random.Generator) -> np.ndarray:
    """A few smooth or angular shapes with flat fills, and often outlines, as icons and emoji have."""
    image, draw = _canvas(size, rng)
    side = size * SUPERSAMPLE
    outline = _colour(rng) if rng.random() < 0.6 else None
    for scale in np.sort(rng.uniform(0.05, 0.6, int(rng.integers(2, 16))))[::-1]:
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 9))))
        reach = scale * rng.uniform(0.5, 1.0, len(angles))
        points = rng.random(2) + np.stack([reach * np.cos(angles), reach * np.sin(angles)], 1)
        if rng.random() < 0.6:
            points = smooth(*points).polygons[0]
        flat = [tuple(p) for p in points * side]
        draw.polygon(flat, fill=_colour(rng))
        if outline:
            draw.line([*flat, flat[0]], fill=outline, width=max(1, int(side * rng.uniform(0.006, 0.03))), joint="curve")
    return _reduced(image, size)


def strokes(size: int, rng: np.random.Generator) -> np.ndarray:
    """Lines, arcs and letters of several widths and sizes."""
    image, draw = _canvas(size, rng)
    side = size * SUPERSAMPLE
    for _ in range(int(rng.integers(3, 14))):
        width, box = max(1, int(side * rng.uniform(0.006, 0.06))), np.sort(rng.random((2, 2)) * side, 0)
        choice = rng.random()
        if choice < 0.3:
            draw.line([tuple(p) for p in rng.random((int(rng.integers(2, 5)), 2)) * side], _colour(rng), width)
        elif choice < 0.5:
            draw.arc([*box[0], *box[1]], *rng.uniform(0, 360, 2), fill=_colour(rng), width=width)
        else:
            text = "".join(rng.choice(list(LETTERS), int(rng.integers(1, 9))))
            font = ImageFont.load_default(float(side * rng.uniform(0.05, 0.5)))
            draw.text(tuple(rng.uniform(-0.1, 0.8, 2) * side), text, fill=_colour(rng), font=font)
    return _reduced(image, size)


KINDS: tuple[tuple[Callable[[int, np.random.Generator], np.ndarray], float], ...] = (
    (gradient, 0.06), (noise, 0.12), (dead_leaves, 0.2), (icon, 0.42), (strokes, 0.2),
)  # fmt: skip


def synthetic_image(size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw an image of one of ``KINDS``, sometimes with noise on it: (size, size, 3) uint8."""
    kinds, weights = zip(*KINDS, strict=True)
    image = kinds[rng.choice(len(kinds), p=weights)](size, rng)
    if rng.random() < 0.1:
        image = np.clip(image + rng.normal(0, rng.uniform(2, 12), image.shape), 0, 255)
    return image.astype(np.uint8)
