"""Textures of images against those of others, level by level of a Laplacian pyramid (Karras et al. 2018, section 5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import convolve1d

from pixart_nb.core.errors import PixArtNBError

PATCH, PATCHES_PER_IMAGE, DIRECTIONS = 7, 128, 512
#: Shorter side in pixels of the coarsest level.
COARSEST = 16
_BINOMIAL = np.array([1, 4, 6, 4, 1], np.float32) / 16


def texture_ratios(
    images: Sequence[np.ndarray], references: Sequence[np.ndarray], others: Sequence[np.ndarray], seed: int = 0
) -> dict[int, float]:
    """Return how far textures of ``images`` are from those of ``references``, in units of those of ``others``.

    1 means as near as another set of the same kind, 2 twice as far. By the shorter side of the level in pixels, the
    finest first. Each argument: images (H, W, 3) uint8 of one size.
    """
    near, far = sliced_wasserstein(others, references, seed), sliced_wasserstein(images, references, seed)
    return {level: far[level] / near[level] for level in far}


def sliced_wasserstein(first: Sequence[np.ndarray], second: Sequence[np.ndarray], seed: int = 0) -> dict[int, float]:
    """Return the sliced Wasserstein distance of patches of two sets of images at each level of their pyramids.

    128 patches of 7 x 7 pixels of each image and level, with mean 0 and variance 1 in each channel, are projected on
    512 random directions; the distance is the mean difference of the sorted projections. Sets of different sizes are
    compared by their quantiles. By the shorter side of the level in pixels.
    """
    if not len(first) or not len(second) or np.shape(first[0]) != np.shape(second[0]):
        raise PixArtNBError(
            f"textures of {len(first)} and {len(second)} images cannot be compared; expected at least one each, of one "
            "size"
        )
    distances = {}
    rng = np.random.default_rng(seed)
    sets = [_patches_by_level(images, np.random.default_rng((seed, 1))) for images in (first, second)]
    for level, patches in sets[0].items():
        directions = rng.standard_normal((PATCH * PATCH * 3, DIRECTIONS)).astype(np.float32)
        directions /= np.linalg.norm(directions, axis=0)
        count = min(len(patches), len(sets[1][level]))
        a, b = (_quantiles(np.sort(_normalized(x) @ directions, axis=0), count) for x in (patches, sets[1][level]))
        distances[level] = float(np.abs(a - b).mean())
    return distances


def level_energies(image: np.ndarray) -> dict[int, float]:
    """Return the mean square of each level of the Laplacian pyramid of an image (H, W, 3) uint8, by its side."""
    return {min(level.shape[:2]): float(np.square(level).mean()) for level in laplacian_pyramid(image)}


def laplacian_pyramid(image: np.ndarray) -> list[np.ndarray]:
    """Return the levels of an image (H, W, 3), float32 in 0..1, the finest first; the last is what is left of it.

    Each level has half the side of the one before, down to ``COARSEST`` pixels.
    """
    rest, levels = np.asarray(image, np.float32) / 255, []
    while min(rest.shape[:2]) >= 2 * COARSEST:
        smaller = _blurred(rest)[::2, ::2]
        levels.append(rest - enlarged(smaller, rest.shape))
        rest = smaller
    return [*levels, rest]


def _blurred(image: np.ndarray, gain: float = 1.0) -> np.ndarray:
    for axis in (0, 1):
        image = convolve1d(image, gain * _BINOMIAL, axis, mode="mirror")
    return image


def enlarged(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return an image at twice its size, smoothed, as ``laplacian_pyramid`` subtracts it."""
    sparse = np.zeros(shape, np.float32)
    sparse[::2, ::2] = image
    return _blurred(sparse, 2.0)


def _patches_by_level(images: Sequence[np.ndarray], rng: np.random.Generator) -> dict[int, np.ndarray]:
    """Return random patches of all images, (patches, 7, 7, 3), by the shorter side of the level."""
    patches: dict[int, list[np.ndarray]] = {}
    for image in images:
        for level in laplacian_pyramid(image):
            height, width = (side - PATCH + 1 for side in level.shape[:2])
            windows = np.lib.stride_tricks.sliding_window_view(level, (PATCH, PATCH), (0, 1))
            rows, columns = rng.integers(height, size=PATCHES_PER_IMAGE), rng.integers(width, size=PATCHES_PER_IMAGE)
            patches.setdefault(min(level.shape[:2]), []).append(windows[rows, columns].transpose(0, 2, 3, 1))
    return {level: np.concatenate(arrays) for level, arrays in patches.items()}


def _normalized(patches: np.ndarray) -> np.ndarray:
    """Return patches as rows, each channel with mean 0 and variance 1 over all patches."""
    axes = (0, 1, 2)
    deviation = np.maximum(patches.std(axes, keepdims=True), 1e-6)
    return ((patches - patches.mean(axes, keepdims=True)) / deviation).reshape(len(patches), -1)


def _quantiles(values: np.ndarray, count: int) -> np.ndarray:
    """Return ``count`` rows of sorted values (N, K), evenly spread."""
    return values[np.linspace(0, len(values) - 1, count).round().astype(int)]
