"""The settings behind the objects: layers with depth, drawn in unit coordinates and quantised to a palette.

y goes from 0 at the top to 1 at the bottom, x is in the same unit. Every random choice depends on the seed of the scene
alone, so that a setting at more cells shows the same image with more detail.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pixart_nb.pixelart.render import BAYER, fractal, value_noise

RGB = tuple[int, int, int]
SAMPLES = 2


class Canvas:
    """Samples of a setting: ``x`` and ``y`` (H, W), ``pixels`` (H, W, 3) in 0..255, and ``cells`` per unit."""

    def __init__(self, height: int, width: int, seed: int):
        rows, columns = height * SAMPLES, width * SAMPLES
        self.cells = height
        self.seed, self.rng = seed, np.random.default_rng((seed, 1))
        self.x, self.y = np.meshgrid(
            (np.arange(columns, dtype=np.float32) + 0.5) / rows, (np.arange(rows, dtype=np.float32) + 0.5) / rows
        )
        self.pixels = np.zeros((rows, columns, 3), np.float32)
        self.shift = float(self.rng.random() * 50)

    def gradient(self, top: RGB, bottom: RGB, first: float = 0.0, last: float = 1.0) -> np.ndarray:
        """Return colours that go from ``top`` at height ``first`` to ``bottom`` at ``last``."""
        t = np.clip((self.y - first) / (last - first), 0, 1)[..., None]
        return np.array(top, np.float32) * (1 - t) + np.array(bottom, np.float32) * t

    def fill(self, where: np.ndarray, colours: np.ndarray | RGB) -> None:
        """Give samples their colours; ``where`` (H, W) is bool, or an opacity 0 to 1."""
        colours = np.asarray(colours, np.float32)
        if where.dtype == bool:
            np.copyto(self.pixels, colours, where=where[..., None])
        else:
            self.pixels += (colours - self.pixels) * where[..., None]

    def shade(self, where: np.ndarray, amount: np.ndarray) -> None:
        """Lighten (above 0) or darken samples by a share of their colour."""
        self.pixels = np.where(where[..., None], self.pixels * (1 + amount[..., None]), self.pixels)

    def noise(self, frequency: float, seed: int, stretch: float = 1.0) -> np.ndarray:
        """Return fractal noise, 0 to 1, with features of 1 / ``frequency`` of the height."""
        return fractal(self.x + self.shift, self.y * stretch, self.seed % 97 + seed, frequency, self.cells)

    def ridge(self, height: float, amplitude: float, frequency: float, seed: int) -> np.ndarray:
        """Return the samples below the outline of a hill."""
        outline = fractal(self.x + self.shift, np.zeros_like(self.y), self.seed % 97 + seed, frequency, self.cells)
        return self.y > height - amplitude * (outline - 0.5)

    def dots(self, count: int, radius: float, first: float, last: float, seed: int) -> np.ndarray:
        """Return the samples of ``count`` seeded dots per unit of width between two heights."""
        rng = np.random.default_rng((self.seed, seed))
        width = self.x.shape[1] / self.x.shape[0]
        where, radius = np.zeros(self.x.shape, bool), max(radius, 0.35 / self.cells)
        for x, y, size in rng.random((count, 3)):
            x, y, r = x * max(width, 1), first + (last - first) * y, radius * (0.6 + 0.8 * size)
            i, j = int(y * self.x.shape[0]), int(x * self.x.shape[0])
            k = int(r * self.x.shape[0]) + 2
            rows, columns = slice(max(i - k, 0), i + k), slice(max(j - k, 0), j + k)
            where[rows, columns] |= (self.x[rows, columns] - x) ** 2 + (self.y[rows, columns] - y) ** 2 < r * r
        return where

    def clouds(self, colour: RGB, last: float, least: float = 0.56) -> None:
        """Draw clouds above the height ``last``."""
        n = fractal((self.x + self.shift) * 0.8, self.y * 1.9, self.seed % 97 + 40, 2.6, self.cells)
        self.fill(np.clip((n - least) * 14, 0, 1) * (self.y < last), colour)

    def pines(self, ground: float, size: float, count: int, colour: RGB, seed: int) -> None:
        """Draw a row of pine trees that stand at the height ``ground``."""
        rng = np.random.default_rng((self.seed, seed))
        width = self.x.shape[1] / self.x.shape[0]
        for x, s in zip(rng.random(count) * max(width, 1), size * (0.7 + 0.6 * rng.random(count)), strict=True):
            v = (self.y - (ground - s)) / s
            step = (v * 3) % 1 if self.cells * s > 12 else v
            reach = s * 0.3 * (np.clip(v, 0, 1) * 0.6 + 0.4 * step)
            tree = (np.abs(self.x - x) < reach) & (v > 0) & (v < 0.88)
            self.fill(tree, colour)
            self.shade(tree & (self.x < x), np.full(self.x.shape, 0.16, np.float32))
            self.fill((np.abs(self.x - x) < s * 0.05) & (v >= 0.88) & (v < 1), (66, 50, 40))


def _grass(c: Canvas) -> None:
    c.pixels[:] = c.gradient((112, 170, 220), (206, 228, 232), 0, 0.6)
    c.fill(((c.x - 0.2 - 0.6 * (c.shift % 1)) ** 2 + (c.y - 0.13) ** 2 < 0.0045), (255, 240, 190))
    c.clouds((244, 248, 250), 0.45)
    c.fill(c.ridge(0.52, 0.22, 1.6, 1), (146, 178, 184))
    c.fill(c.ridge(0.58, 0.14, 2.4, 2), (126, 168, 132))
    c.pines(0.6, 0.13, 9, (86, 132, 96), 3)
    ground = c.ridge(0.64, 0.05, 2.2, 4)
    c.fill(ground, c.gradient((138, 176, 92), (92, 138, 66), 0.6, 1))
    c.shade(ground, 0.3 * (value_noise((c.x + c.shift) * 60, c.y * 22, 5) - 0.5) * min(1, c.cells / 48))
    c.fill(c.dots(26, 0.008, 0.7, 1, 6) & ground, (244, 236, 180))


def _desert(c: Canvas) -> None:
    c.pixels[:] = c.gradient((150, 190, 214), (244, 222, 182), 0, 0.6)
    c.fill((c.x - 0.25 - 0.5 * (c.shift % 1)) ** 2 + (c.y - 0.16) ** 2 < 0.008, (255, 246, 214))
    mesa = np.floor(fractal(c.x + c.shift, 0 * c.y, c.seed % 97 + 1, 2.0, c.cells) * 4) / 4
    c.fill(c.y > 0.62 - 0.3 * (mesa - 0.35), (196, 134, 100))
    c.shade((c.y > 0.62 - 0.3 * (mesa - 0.35)), 0.1 * np.sin(c.y * 90).astype(np.float32))
    for k, colour in enumerate(((228, 190, 132), (214, 172, 112), (200, 156, 98))):
        dune = c.ridge(0.62 + 0.11 * k, 0.1, 1.3 + 0.5 * k, 3 + k)
        c.fill(dune, colour)
        c.shade(
            dune, 0.12 * np.sin(c.y * (70 - 14 * k) + 3 * np.sin(c.x * 5)).astype(np.float32) * min(1, c.cells / 64)
        )
    c.fill(c.dots(14, 0.008, 0.72, 1, 7), (150, 112, 78))


def _snow(c: Canvas) -> None:
    c.pixels[:] = c.gradient((104, 128, 164), (190, 206, 222), 0, 0.6)
    peaks = fractal(c.x + c.shift, 0 * c.y, c.seed % 97 + 1, 2.2, c.cells)
    line = 0.56 - 0.42 * (peaks - 0.35)
    c.fill(c.y > line, (126, 142, 168))
    c.fill((c.y > line) & (c.y < line + 0.09 + 0.05 * value_noise(c.x * 30, c.y * 8, 3)), (230, 238, 246))
    c.pines(0.66, 0.17, 8, (64, 96, 96), 4)
    ground = c.ridge(0.66, 0.05, 1.8, 5)
    c.fill(ground, c.gradient((236, 242, 248), (196, 210, 228), 0.62, 1))
    c.shade(ground, 0.14 * (c.noise(7, 8, 2.2) - 0.5))
    c.fill(c.dots(46, 0.008, 0, 0.9, 6), (248, 250, 252))


def _cave(c: Canvas) -> None:
    rock = c.noise(5, 1)
    c.pixels[:] = c.gradient((52, 46, 60), (92, 82, 92), 0, 0.75) * (0.7 + 0.6 * rock)[..., None]
    light = np.exp(-(((c.x - 0.3 - 0.4 * (c.shift % 1)) / 0.28) ** 2 + ((c.y - 0.42) / 0.3) ** 2))
    c.fill(0.5 * light, (122, 116, 140))
    teeth = value_noise((c.x + c.shift) * 11, 0 * c.y, 4)
    c.fill(c.y < 0.05 + 0.26 * teeth**2, (38, 33, 46))
    c.fill(c.y < 0.03 + 0.13 * value_noise((c.x + c.shift) * 23, 0 * c.y, 5), (28, 24, 36))
    ground = c.ridge(0.7, 0.08, 3, 6)
    c.fill(ground, c.gradient((122, 110, 112), (84, 74, 82), 0.66, 1))
    c.shade(ground, 0.5 * (c.noise(14, 7, 2) - 0.5))
    c.fill(c.dots(7, 0.018, 0.2, 0.6, 8), (104, 190, 196))


def _night(c: Canvas) -> None:
    c.pixels[:] = c.gradient((14, 18, 48), (54, 62, 104), 0, 0.66)
    c.fill(c.dots(60, 0.004, 0, 0.6, 2), (188, 192, 214))
    c.fill(c.dots(16, 0.008, 0, 0.55, 3), (244, 238, 200))
    mx = 0.2 + 0.6 * (c.shift % 1)
    c.fill(
        ((c.x - mx) ** 2 + (c.y - 0.16) ** 2 < 0.007) & ((c.x - mx - 0.04) ** 2 + (c.y - 0.14) ** 2 > 0.006),
        (246, 240, 206),
    )
    c.fill(c.ridge(0.6, 0.2, 1.8, 4), (34, 42, 74))
    c.pines(0.7, 0.2, 9, (22, 32, 50), 5)
    ground = c.ridge(0.7, 0.05, 2, 6)
    c.fill(ground, c.gradient((42, 60, 66), (24, 36, 46), 0.68, 1))
    c.shade(ground, 0.5 * (value_noise((c.x + c.shift) * 50, c.y * 20, 7) - 0.5) * min(1, c.cells / 48))


def _beach(c: Canvas) -> None:
    c.pixels[:] = c.gradient((124, 186, 226), (222, 236, 236), 0, 0.46)
    c.clouds((250, 250, 248), 0.36)
    c.fill(c.ridge(0.44, 0.1, 1.5, 1), (150, 180, 196))
    sea = c.y > 0.46
    c.fill(sea, c.gradient((46, 110, 160), (92, 176, 190), 0.46, 0.7))
    ripple = value_noise((c.x + c.shift) * 7, c.y * 46, 3) + 0.5 * value_noise((c.x + c.shift) * 17, c.y * 110, 4)
    c.fill(sea & (ripple > 1.08), (168, 212, 218))
    island = fractal(c.x + c.shift, 0 * c.y, c.seed % 97 + 1, 1.5, c.cells)
    c.fill(0.5 * (sea & (c.y - 0.46 < 0.02 + 0.09 * (island - 0.5)) & (ripple < 1.0)), (96, 124, 138))
    shore = 0.68 + 0.03 * np.sin((c.x + c.shift) * 9) + 0.02 * np.sin((c.x + c.shift) * 23)
    c.fill(c.y > shore, (234, 244, 240))
    sand = c.y > shore + 0.025
    c.fill(sand, c.gradient((236, 214, 164), (206, 178, 128), 0.7, 1))
    c.shade(sand, 0.16 * (c.noise(26, 5) - 0.5))
    c.fill(c.dots(14, 0.008, 0.78, 1, 6), (250, 244, 232))


def _forest(c: Canvas) -> None:
    c.pixels[:] = c.gradient((140, 170, 126), (86, 116, 84), 0, 0.75)
    for k, (colour, width, count) in enumerate(
        (((104, 128, 96), 0.03, 9), ((72, 82, 62), 0.05, 6), ((52, 46, 40), 0.075, 4))
    ):
        rng = np.random.default_rng((c.seed, 20 + k))
        for x in rng.random(count) * max(c.x.shape[1] / c.x.shape[0], 1):
            trunk = np.abs(c.x - x) < width * (0.5 + 0.12 * (c.y > 0.66)) * (
                0.8 + 0.4 * value_noise(c.y * 9, 0 * c.x, 3)
            )
            c.fill(trunk & (c.y < 0.72 + 0.04 * k), colour)
            c.shade(
                trunk,
                (0.5 * (value_noise((c.x + c.shift) * 60, c.y * 9, 5) - 0.5) * min(1, c.cells / 56)).astype(np.float32),
            )
    leaves = fractal(c.x + c.shift, c.y, c.seed % 97 + 7, 7, c.cells)
    c.fill(c.y < 0.06 + 0.34 * (leaves - 0.2), (52, 84, 52))
    c.fill(c.y < 0.26 * (leaves - 0.2), (36, 62, 42))
    ground = c.ridge(0.72, 0.05, 2.6, 8)
    c.fill(ground, c.gradient((110, 98, 62), (76, 66, 46), 0.68, 1))
    c.shade(ground, 0.6 * (c.noise(16, 9, 1.6) - 0.5))
    c.fill(c.dots(24, 0.01, 0.74, 1, 10), (96, 128, 66))


def _lava(c: Canvas) -> None:
    c.pixels[:] = c.gradient((46, 26, 36), (132, 58, 48), 0, 0.66)
    c.fill(0.6 * np.clip((c.noise(3, 1, 1.6) - 0.5) * 5, 0, 1) * (c.y < 0.6), (84, 54, 60))
    slope = np.abs(c.x - 0.25 - 0.5 * (c.shift % 1)) * 0.9 + 0.26
    c.fill((c.y > slope) & (c.y > 0.3), (58, 38, 44))
    stream = np.abs(c.x - 0.25 - 0.5 * (c.shift % 1) - 0.03 * np.sin(c.y * 24)) < 0.012 + 0.02 * c.y
    c.fill(stream & (c.y > 0.3) & (c.y < 0.7), (246, 134, 44))
    ground = c.ridge(0.68, 0.06, 2.6, 4)
    c.fill(ground, c.gradient((66, 42, 46), (44, 28, 36), 0.66, 1))
    crack = np.abs(c.noise(6, 5, 2) - 0.5)
    c.fill(ground & (crack < 0.07), (236, 108, 36))
    c.fill(ground & (crack < 0.03), (255, 196, 84))
    c.fill(c.dots(22, 0.006, 0.1, 0.7, 6), (250, 156, 60))


SETTINGS: dict[str, Callable[[Canvas], None]] = {
    "grass": _grass, "desert": _desert, "snow": _snow, "cave": _cave,
    "night": _night, "beach": _beach, "forest": _forest, "lava": _lava,
}  # fmt: skip
#: Steps of each colour channel after quantisation.
LEVELS = 17


def draw_setting(name: str, height: int, width: int, seed: int) -> np.ndarray:
    """Draw a setting on a grid of cells: (height, width, 3) float32 in 0..255."""
    canvas = Canvas(height, width, seed)
    SETTINGS[name](canvas)
    pixels = canvas.pixels.reshape(height, SAMPLES, width, SAMPLES, 3).mean((1, 3))
    step = 255 / (LEVELS - 1)
    dither = np.tile(BAYER, (height // 4 + 1, width // 4 + 1))[:height, :width, None] if height >= 48 else 0.0
    return np.clip(np.round(pixels / step + 0.9 * dither) * step, 0, 255).astype(np.float32)
