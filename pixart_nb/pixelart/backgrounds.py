"""The eight settings behind the objects, each a seeded grid of muted colours with its own layout.

A painter takes a random generator and the size of the grid in cells, and returns (gh, gw, 3) float32 in 0..255. The
colours are less saturated than those of the objects, so that every object stays visible in every setting.
"""

from collections.abc import Callable

import numpy as np

RGB = tuple[int, int, int]
Painter = Callable[[np.random.Generator, int, int], np.ndarray]


def _horizon(rng: np.random.Generator, height: int) -> int:
    """Return the first row of the ground, below the middle, so that the object stands on it; it varies by one row."""
    return height // 2 + 3 + int(rng.integers(-1, 2))


def _bands(height: int, width: int, horizon: int, above: RGB, below: RGB) -> np.ndarray:
    grid = np.empty((height, width, 3), dtype=np.float32)
    grid[:horizon] = above
    grid[horizon:] = below
    return grid


def _speckle(rng: np.random.Generator, region: np.ndarray, share: float, colour: RGB) -> None:
    """Recolour a random share of the cells of a (rows, columns, 3) view in place."""
    region[rng.random(region.shape[:2]) < share] = colour


def _hang(rng: np.random.Generator, grid: np.ndarray, longest: int, colour: RGB) -> None:
    """Draw columns of 1 to ``longest`` cells that hang from the top, in place."""
    lengths = rng.integers(1, longest + 1, size=grid.shape[1])
    grid[np.arange(grid.shape[0])[:, None] < lengths] = colour


def _grass(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    horizon = _horizon(rng, height)
    grid = _bands(height, width, horizon, (146, 184, 206), (108, 142, 84))
    row, column = rng.integers(0, 3), rng.integers(0, width - 4)
    grid[row, column + 1 : column + 3] = grid[row + 1, column : column + 4] = (196, 212, 220)
    grid[horizon] = (130, 162, 96)
    _speckle(rng, grid[horizon:], 0.14, (84, 118, 68))
    return grid


def _desert(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    horizon = _horizon(rng, height)
    grid = _bands(height, width, horizon, (224, 206, 172), (200, 164, 106))
    dune = int(rng.integers(0, width - 6))
    grid[horizon - 1, dune : dune + 7] = (200, 164, 106)
    _speckle(rng, grid[horizon + 1 :], 0.16, (176, 140, 86))
    return grid


def _snow(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    horizon = _horizon(rng, height)
    grid = _bands(height, width, horizon, (134, 152, 178), (204, 214, 226))
    _speckle(rng, grid[:horizon], 0.1, (210, 220, 232))
    _speckle(rng, grid[horizon + 1 :], 0.12, (180, 196, 214))
    return grid


def _cave(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    horizon = _horizon(rng, height)
    grid = _bands(height, width, horizon, (78, 70, 82), (108, 98, 102))
    _hang(rng, grid, 3, (48, 42, 54))
    _speckle(rng, grid[horizon:], 0.14, (86, 78, 84))
    return grid


def _night(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    horizon = _horizon(rng, height)
    grid = _bands(height, width, horizon, (24, 28, 62), (32, 46, 52))
    _speckle(rng, grid[:horizon], 0.07, (120, 124, 162))
    _speckle(rng, grid[:horizon], 0.04, (214, 212, 178))
    _speckle(rng, grid[horizon:], 0.1, (44, 62, 62))
    return grid


def _beach(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    horizon = _horizon(rng, height)
    grid = _bands(height, width, horizon, (178, 210, 218), (216, 198, 152))
    grid[horizon - 5 : horizon] = (82, 146, 172)
    _speckle(rng, grid[horizon - 4 : horizon - 1], 0.12, (112, 170, 190))
    grid[horizon - 1] = (186, 216, 218)
    _speckle(rng, grid[horizon + 1 :], 0.1, (194, 174, 126))
    return grid


def _forest(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    horizon = _horizon(rng, height)
    grid = _bands(height, width, horizon, (66, 94, 68), (92, 80, 54))
    first = int(rng.integers(0, 4))
    grid[:horizon, first::4] = (58, 58, 46)
    _hang(rng, grid, 4, (42, 66, 46))
    _speckle(rng, grid[horizon:], 0.16, (114, 96, 58))
    return grid


def _lava(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    horizon = _horizon(rng, height)
    grid = _bands(height, width, horizon, (62, 38, 42), (172, 72, 36))
    _speckle(rng, grid[:horizon], 0.12, (84, 48, 46))
    grid[horizon] = (208, 118, 50)
    _speckle(rng, grid[horizon + 1 :], 0.24, (98, 42, 34))
    return grid


BACKGROUNDS: dict[str, Painter] = {
    "grass": _grass,
    "desert": _desert,
    "snow": _snow,
    "cave": _cave,
    "night": _night,
    "beach": _beach,
    "forest": _forest,
    "lava": _lava,
}
