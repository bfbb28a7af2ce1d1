"""Vector shapes in unit coordinates, rendered with supersampling, shaded, textured and quantised to palettes.

A drawing is a list of ``Piece``; x goes right and y down, both 0 to 1. Noise is a function of unit coordinates, not of
cells, so that the same drawing at more cells shows the same image with more detail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt

#: Samples per cell and direction, by the number of cells of the drawing.
SUPERSAMPLES = ((24, 8), (64, 4), (160, 3), (10**6, 2))
#: 4 x 4 ordered dithering, -0.5 to 0.5.
BAYER = (np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) + 0.5) / 16 - 0.5
#: Direction of the light: x, y, towards the viewer; of length 1.
LIGHT = (-0.559, -0.652, 0.512)

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Shape:
    """Outline of a part: polygons (N, 2) in unit coordinates that are united."""

    polygons: tuple[np.ndarray, ...]

    def __or__(self, other: Shape) -> Shape:
        return Shape(self.polygons + other.polygons)


def polygon(*points: tuple[float, float]) -> Shape:
    """Polygon with straight edges."""
    return Shape((np.array(points, float),))


def smooth(*points: tuple[float, float], steps: int = 10) -> Shape:
    """Closed Catmull-Rom spline through the points."""
    p = np.array(points, float)
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    a, b, c, d = (np.roll(p, k, axis=0) for k in (1, 0, -1, -2))
    parts = [
        0.5 * (2 * b[i] + (c[i] - a[i]) * t + (2 * a[i] - 5 * b[i] + 4 * c[i] - d[i]) * t**2
               + (3 * b[i] - a[i] - 3 * c[i] + d[i]) * t**3)
        for i in range(len(p))
    ]  # fmt: skip
    return Shape((np.concatenate(parts),))


def ellipse(x: float, y: float, rx: float, ry: float | None = None, turn: float = 0.0) -> Shape:
    """Ellipse around (x, y), turned clockwise by ``turn`` degrees."""
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    points = np.stack([rx * np.cos(angle), (rx if ry is None else ry) * np.sin(angle)], 1)
    a = np.deg2rad(turn)
    return Shape((points @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]]) + (x, y),))


def box(x0: float, y0: float, x1: float, y1: float) -> Shape:
    """Rectangle."""
    return polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def stroke(*points: tuple[float, float], width: float) -> Shape:
    """Thick line with round ends through the points."""
    shape = Shape(())
    for (x0, y0), (x1, y1) in pairwise(points):
        length = max(np.hypot(x1 - x0, y1 - y0), 1e-9)
        dx, dy = -(y1 - y0) / length * width / 2, (x1 - x0) / length * width / 2
        shape |= polygon((x0 + dx, y0 + dy), (x1 + dx, y1 + dy), (x1 - dx, y1 - dy), (x0 - dx, y0 - dy))
    for x, y in points:
        shape |= ellipse(x, y, width / 2)
    return shape


@dataclass(frozen=True)
class Piece:
    """A shape with a material, from back to front in a drawing.

    ``material``: ``main`` is the object's colour, others are in ``MATERIALS``. ``round``: 0 is flat, 1 a ball.
    ``tone`` is added to the lightness. ``texture``: a function of unit coordinates, see ``TEXTURES``. ``detail``: the
    least number of cells of the drawing at which the part is drawn.
    """

    shape: Shape
    material: str = "main"
    round: float = 0.7
    tone: float = 0.0
    texture: str = ""
    detail: int = 0


# ---- noise and textures


@lru_cache(maxsize=64)
def _lattice(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((256, 256)).astype(np.float32)


def value_noise(x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """Smooth noise 0 to 1 with one value per unit of x and y."""
    table, xi, yi = _lattice(seed), np.floor(x).astype(int), np.floor(y).astype(int)
    fx, fy = x - xi, y - yi
    fx, fy = fx * fx * (3 - 2 * fx), fy * fy * (3 - 2 * fy)
    corner = lambda i, j: table[(yi + j) & 255, (xi + i) & 255]  # noqa: E731
    top = corner(0, 0) * (1 - fx) + corner(1, 0) * fx
    return top * (1 - fy) + (corner(0, 1) * (1 - fx) + corner(1, 1) * fx) * fy


def fractal(x: np.ndarray, y: np.ndarray, seed: int, frequency: float, cells: float, octaves: int = 6) -> np.ndarray:
    """Sum of octaves of noise, 0 to 1, up to the frequency that ``cells`` per unit can show."""
    total, weight, amplitude = np.zeros_like(x), 0.0, 1.0
    for k in range(octaves):
        rate = frequency * 2**k
        if k and rate > cells / 2:
            break
        total = total + amplitude * value_noise(x * rate + 17 * k, y * rate + 31 * k, seed + k)
        weight, amplitude = weight + amplitude, amplitude / 2
    return total / weight


def _scales(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    row = np.floor(y * 9)
    u = (x * 9 + 0.5 * (row % 2)) % 1 - 0.5
    v = y * 9 - row
    return np.where(np.hypot(u, v) > 0.52, -0.22, 0.08 - 0.1 * v)


def _bricks(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    row = np.floor(y * 8)
    u = (x * 5 + 0.5 * (row % 2)) % 1
    return np.where((y * 8 - row < 0.2) | (u < 0.1), -0.25, 0.04)


def _bark(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 0.5 * (value_noise(x * 26, y * 5, 91) - 0.5)


def _fur(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 0.36 * (value_noise(x * 30 + y * 12, y * 12 - x * 5, 92) - 0.5)


def _leaves(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 0.5 * (value_noise(x * 13, y * 13, 93) - 0.5) + 0.3 * (value_noise(x * 29, y * 29, 94) - 0.5)


def _wood(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 0.16 * np.sin(2 * np.pi * (y * 7 + 1.2 * value_noise(x * 3, y * 3, 95)))


def _stripes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where((x * 6) % 1 < 0.5, -0.16, 0.06)


#: Texture -> (function of unit coordinates that is added to the lightness, cells per unit from which it is shown).
TEXTURES: dict[str, tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], int]] = {
    "scales": (_scales, 30), "bricks": (_bricks, 28), "bark": (_bark, 36), "fur": (_fur, 40),
    "leaves": (_leaves, 26), "wood": (_wood, 30), "stripes": (_stripes, 20),
}  # fmt: skip


# ---- materials


def ramp(red: int, green: int, blue: int) -> np.ndarray:
    """Outline, dark, middle, light and highlight shade (5, 3) of a colour, shifted to violet in the dark."""
    base = np.array([red, green, blue], float)
    shades = [base * 0.25 + (10, 4, 18), base * 0.62 + (8, 0, 14), base, base + (255 - base) * 0.34]
    return np.array([*shades, base + (255 - base) * 0.75])


MATERIALS: dict[str, np.ndarray] = {
    "wood": ramp(140, 90, 52), "gold": ramp(232, 186, 64), "steel": ramp(150, 160, 178), "leaf": ramp(86, 158, 66),
    "glass": ramp(170, 220, 236), "cream": ramp(238, 218, 182), "ink": ramp(40, 34, 48), "white": ramp(240, 240, 236),
    "flame": ramp(238, 110, 40), "stone": ramp(128, 124, 132), "skin": ramp(226, 178, 140),
    "paper": ramp(246, 240, 222),
}  # fmt: skip


# ---- rendering


@dataclass(frozen=True)
class Rendered:
    """A drawing on a grid of cells (H, W): covered cells (bool), number in ``materials``, and shade 0 to 4 of each."""

    mask: np.ndarray
    materials: tuple[str, ...]
    material: np.ndarray
    shade: np.ndarray

    def colours(self, ramp: np.ndarray) -> np.ndarray:
        """Return the colours (H, W, 3) in 0..255, with the ramp (5, 3) of the material ``main``."""
        ramps = np.stack([ramp if name == "main" else MATERIALS[name] for name in self.materials])
        return ramps[self.material, self.shade]


def supersampling(cells: int) -> int:
    """Return the samples per cell and direction of a drawing of so many cells."""
    return next(samples for limit, samples in SUPERSAMPLES if cells <= limit)


def coverage(shape: Shape, height: int, width: int, origin: tuple[float, float], scale: float) -> np.ndarray:
    """Return the samples (height, width) bool inside a shape; (x, y) is at ``origin + scale * (x, y)`` in samples."""
    image = Image.new("L", (width, height))
    draw = ImageDraw.Draw(image)
    for points in shape.polygons:
        draw.polygon([tuple(point) for point in points * scale + np.array(origin) - 0.5], fill=255)
    return np.asarray(image) > 0


def _lightness(part: Piece, inside: np.ndarray, x: np.ndarray, y: np.ndarray, scale: float, cells: float) -> np.ndarray:
    """Return the lightness 0 to 1 of the samples of a part: a bevel lit from the upper left, and its texture."""
    light = np.full(inside.shape, 0.55 + part.tone, np.float32)
    if part.round:
        depth = distance_transform_edt(inside).astype(np.float32)
        radius = max(float(depth.max()), 1.0)
        height = np.sqrt(np.clip(1 - (1 - depth / radius) ** 2, 0, 1)) * radius * part.round
        down, right = np.gradient(height)
        facing = (LIGHT[2] - LIGHT[0] * right - LIGHT[1] * down) / np.sqrt(1 + right * right + down * down)
        light += 0.5 * (facing - 0.5)
    if part.texture:
        texture, least = TEXTURES[part.texture]
        light += texture(x, y) * np.clip((cells - least) / least + 0.5, 0, 1)
    return light


def render(parts: Sequence[Piece], height: int, width: int, x: float, y: float, size: float) -> Rendered:
    """Draw parts onto a grid of ``height`` x ``width`` cells.

    The unit square of the drawing has its upper left corner at the cell (x, y), fractions allowed, and ``size`` cells
    a side.
    """
    samples = supersampling(round(size))
    rows, columns = height * samples, width * samples
    top = np.full((rows, columns), -1, np.int16)
    light = np.zeros((rows, columns), np.float32)
    scale = size * samples
    sx = (np.arange(columns, dtype=np.float32) + 0.5 - x * samples) / scale
    sy = (np.arange(rows, dtype=np.float32) + 0.5 - y * samples) / scale
    used = [part for part in parts if size >= part.detail]
    for number, part in enumerate(used):
        shape = part.shape
        points = np.concatenate(shape.polygons) * scale + (x * samples, y * samples)
        (left, first), (right, last) = (np.floor(points.min(0)).astype(int) - 2, np.ceil(points.max(0)).astype(int) + 2)
        left, first, right, last = max(left, 0), max(first, 0), min(right, columns), min(last, rows)
        if left >= right or first >= last:
            continue
        inside = coverage(shape, last - first, right - left, (x * samples - left, y * samples - first), scale)
        grid_x, grid_y = np.meshgrid(sx[left:right], sy[first:last])
        shaded = _lightness(part, inside, grid_x, grid_y, scale, size)
        top[first:last, left:right][inside] = number
        light[first:last, left:right][inside] = shaded[inside]
    return _to_cells(top, light, tuple(part.material for part in used), samples, size)


def _to_cells(top: np.ndarray, light: np.ndarray, materials: tuple[str, ...], samples: int, size: float) -> Rendered:
    """Reduce samples to cells: the part that covers most of a cell, its mean lightness, outlines and dithering."""
    height, width = top.shape[0] // samples, top.shape[1] // samples
    parts = len(materials)
    cell = np.repeat(np.arange(height), samples)[:, None] * width + np.repeat(np.arange(width), samples)
    covered = top >= 0
    index = cell[covered] * parts + top[covered]
    count = np.bincount(index, minlength=height * width * parts).reshape(height, width, parts)
    total = np.bincount(index, light[covered], height * width * parts).reshape(height, width, parts)
    mask = count.sum(2) >= samples * samples / 2
    best = count.argmax(2)
    lightness = np.take_along_axis(total / np.maximum(count, 1), best[..., None], 2)[..., 0]
    edge = _edges(best, mask)
    lightness = np.where(edge, lightness - 0.14, lightness)
    spread = 0.16 if size >= 40 else 0.0
    dither = np.tile(BAYER, (height // 4 + 1, width // 4 + 1))[:height, :width]
    shade = np.digitize(lightness + spread * dither, (0.4, 0.62, 0.82)) + 1
    padded = np.pad(mask, 1)
    inner = mask.copy()
    thickness = max(1, round(size / 56))
    for _ in range(thickness):
        inner &= padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        padded = np.pad(inner, 1)
    shade = np.where(mask & ~inner, 0, shade)
    return Rendered(mask, materials, best, shade)


def _edges(best: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the cells whose lower or right neighbour is another part of the object, which lies in front."""
    edge = np.zeros_like(mask)
    for axis in (0, 1):
        other = np.roll(best, -1, axis)
        both = mask & np.roll(mask, -1, axis)
        edge |= both & (other > best)
        edge |= np.roll(both & (other < best), 1, axis)
    return edge
