"""Progressive upscaling: large images of a model that was trained at a small size.

A model that sees 64 tokens in training fails at 65,536. Two things keep it close to its training. Each size starts from
the previous image, upscaled, with noise added (SDEdit, Meng et al. 2022), so that the composition is decided at the
model's own size. And the compression of keys and values (PixArt-Sigma, section 3.2) grows with the image, so that a
query always has as many keys. Positions span the same coordinates at any size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.config import GUIDANCE_SCALE, SAMPLING_STEPS, InferenceConfig
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.tiling import tile_starts
from pixart_nb.core.models.transformer import PixArt, PixArtConfig, compression_kept
from pixart_nb.core.run_plan import FAR
from pixart_nb.core.sampling import generate
from pixart_nb.core.sampling.images import resize_latents
from pixart_nb.core.sampling.samplers import image_generators, steps_taken
from pixart_nb.core.sampling.stages import StagedImage

#: Default strengths of the sizes after the first; the last one holds for all after it.
STRENGTHS = (0.5, 0.4, 0.3, 0.25)
#: Pixels of a latent cell.
CELL = 8
#: Least size, as a share of the model's own, that an image begins with by default.
_LEAST_SHARE = 0.9
#: Least ratio of a size to the one before it by default.
_LEAST_STEP = 1.6


@dataclass(frozen=True)
class UpscaleSize:
    """One size of progressive upscaling, in pixels.

    ``strength``: share of the steps taken from the previous image, upscaled; 1 starts from noise alone.
    ``ratio``: compression of the keys and values of all layers, besides that of the model itself; 1 for none.
    """

    height: int
    width: int
    strength: float = 1.0
    ratio: int = 1


def default_factors(config: PixArtConfig, height: int, width: int) -> list[int]:
    """Return powers of two, falling to 1, that divide an image down to about the model's own size.

    Where they end far above it, other divisors are taken, about the half of one after the other.

    >>> default_factors(PixArtConfig(input_size=16), 1024, 512), default_factors(PixArtConfig(input_size=32), 720, 720)
    ([4, 2, 1], [3, 1])
    """
    unit, own, side = CELL * config.patch_size, CELL * config.input_size, min(height, width)
    tokens = math.gcd(height // unit, width // unit)  # the factors divide it
    factors = [1]
    while tokens % (2 * factors[0]) == 0 and side // (2 * factors[0]) >= own:
        factors[0] *= 2
    if side / factors[0] > FAR * own:
        factors[0] = max(n for n in range(1, max(factors[0], int(side / (_LEAST_SHARE * own))) + 1) if tokens % n == 0)
    while factors[-1] > 1:
        smaller = (n for n in range(1, int(factors[-1] / _LEAST_STEP) + 1) if tokens % n == 0)
        factors.append(min(smaller, key=lambda n: abs(math.log(2 * n / factors[-1]))))
    return factors


def default_strengths(count: int) -> list[float]:
    """Return the strengths of ``count`` sizes but the first."""
    return [STRENGTHS[min(n, len(STRENGTHS) - 1)] for n in range(count - 1)]


def upscale_sizes(
    config: PixArtConfig,
    height: int,
    width: int,
    factors: Sequence[int] = (),
    strengths: Sequence[float] = (),
    keys: int = 0,
) -> list[UpscaleSize]:
    """Return the sizes of an image of height x width that is drawn smaller by each of ``factors`` (32, 16, ... 1).

    ``strengths``: of every size but the first. ``keys``: about the highest number of keys along a side, by default
    that of the model's training. Layers that compress by themselves have fewer. Factors and strengths that are not
    given have defaults.
    """
    factors = list(factors) or default_factors(config, height, width)
    strengths = list(strengths) or default_strengths(len(factors))
    if factors != sorted(set(factors), reverse=True) or factors[-1] < 1:
        raise PixArtNBError(f"factors are {factors}; expected them to fall, for example 4, 2, 1")
    if len(strengths) != len(factors) - 1:
        raise PixArtNBError(f"{len(strengths)} strengths for {len(factors)} sizes; expected one for all but the first")
    unit, sizes = CELL * config.patch_size, []
    keys = keys or config.input_size // config.patch_size
    for factor, strength in zip(factors, [1.0, *strengths], strict=True):
        steps_taken(1, strength)
        if height % (unit * factor) or width % (unit * factor):
            raise PixArtNBError(f"{height}x{width} divided by {factor} is no multiple of {unit} pixels")
        sides = height // factor, width // factor
        ratio = max(1, min(sides) // unit // keys)
        sizes.append(UpscaleSize(*sides, strength, ratio))
    return sizes


def compress_keys(net: PixArt, ratio: int, operator: str = "mean") -> None:
    """Compress the keys and values of all layers by ``ratio``, without new parameters; 1 changes nothing.

    ``operator``: mean, or ave or uniform, which pick one token of each cell. A layer that compresses already does so by
    its own operator, to cells ``ratio`` times larger: a learned one averages its convolution over them.
    """
    if operator not in ("mean", "ave", "uniform") or ratio < 1:
        raise PixArtNBError(f"{operator!r} by {ratio}: expected mean, ave or uniform, by at least 1")
    for layer in (block.attn for block in net.blocks if ratio > 1):
        if layer.ratio == 1:
            layer.operator = operator
        elif layer.sr is not None:
            layer.replace_reduction(layer.sr.enlarged(ratio))
        layer.ratio *= ratio


def upscale_latents(
    pipe: Any,
    prompts: Sequence[str],
    sizes: Sequence[UpscaleSize],
    counts: Sequence[int] | None = None,
    steps: int = SAMPLING_STEPS,
    guidance: float = GUIDANCE_SCALE,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Yield the latents (n, C, height / 8, width / 8) of every size, of the first ``counts`` prompts, by default all.

    The pipeline is left as it was.
    """
    latents = None
    for size, count in zip(sizes, counts or [len(prompts)] * len(sizes), strict=True):
        source = None
        if latents is not None and size.strength < 1:
            source = resize_latents(latents[:count], size.height // CELL, size.width // CELL)
        with compression_kept(pipe.transformer):
            compress_keys(pipe.transformer, size.ratio)
            _, *records = pipe.sample(
                list(prompts[:count]),
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=size.height,
                width=size.width,
                generator=image_generators(seed, range(count)),
                image_latents=source,
                strength=size.strength,
            )
        latents = records[-1].latents
        yield latents


# ---- in resumable stages


def upscaled_images(config: InferenceConfig, sizes: Sequence[UpscaleSize]) -> list[StagedImage]:
    """Return the ``StagedImage`` of each size, for the first prompt of a configuration.

    Each has a folder named after its size in ``config.stages_path``, and starts from the one before.
    """
    identity, images = generate.network_identity(config), []
    request = generate.requests_of(config)[0]
    for size in sizes:
        drawn = (size.height, size.width)
        images.append(
            generate.staged_image(
                config,
                request,
                Path(config.stages_path) / f"{size.height}x{size.width}-keys-{size.ratio}",
                (drawn, drawn),
                identity | {"keys": f"mean of {size.ratio} x {size.ratio}"},
                images[-1].folder if size.strength < 1 else None,
                size.strength,
            )
        )
    return images


def load_compressed(config: InferenceConfig, size: UpscaleSize, names: Sequence[str]) -> Any:
    """Load components of a configuration's pipeline, whose transformer compresses by the ratio of a size."""
    pipe = generate.load_pipeline(config, names)
    if pipe.transformer is not None:
        compress_keys(pipe.transformer, size.ratio)
    return pipe


def upscale(config: InferenceConfig, sizes: Sequence[UpscaleSize]) -> list[StagedImage]:
    """Draw an image through growing sizes in resumable stages, with progress bars; returns the image of each size."""
    images = upscaled_images(config, sizes)
    for size, image in zip(sizes, images, strict=True):
        generate.show_progress([image], lambda names, size=size: load_compressed(config, size, names))
    return images


# ---- edges of decoded tiles


@dataclass(frozen=True, eq=False)
class TileArtifacts:
    """Jumps of brightness across the edges of tiles, and across all other lines between latent cells.

    ``edges``: pixels at which tiles begin or end, by axis (rows, columns). ``jumps`` at the edges and ``others`` at the
    other lines are mean absolute differences of the pixels on both sides, 0..255. Images that were upscaled by twos
    change more at coarse cells, so an edge is compared with the lines that the same power of two divides. ``ratio`` is
    its jump over their mean, the median of all edges: about 1 without visible edges. ``rank`` is the mean share of them
    that jump more: about 0.5 without visible edges, near 0 with them.
    """

    edges: tuple[list[int], list[int]]
    jumps: np.ndarray
    others: np.ndarray
    ratio: float
    rank: float


def measure_tile_artifacts(image: np.ndarray, tile: int, overlap_factor: float = 0.25) -> TileArtifacts:
    """Measure an image (H, W, 3) uint8 that was decoded in tiles of ``tile`` pixels.

    The image's own lines count too, so small artifacts show only in smooth images or with many tiles.
    """
    edges = tuple(tile_edges(side, tile, overlap_factor) for side in image.shape[:2])
    jumps, others, ratios, ranks = [], [], [], []
    for axis, lines in enumerate(edges):
        differences = np.abs(np.diff(image.astype(np.int16), axis=axis)).mean((1 - axis, 2))
        by_line = {line: float(differences[line - 1]) for line in range(CELL, image.shape[axis], CELL)}
        rest = {line: jump for line, jump in by_line.items() if line not in lines}
        others += rest.values()
        for line in lines:
            alike = np.array([jump for other, jump in rest.items() if other & -other == line & -line])
            jumps.append(by_line[line])
            if len(alike) >= 4:
                ratios.append(by_line[line] / max(alike.mean(), 1e-9))
                ranks.append(float((alike > by_line[line]).mean()))
    ratio, rank = (float(np.median(ratios)), float(np.mean(ranks))) if ratios else (1.0, 0.5)
    return TileArtifacts(edges, np.array(jumps), np.array(others), ratio, rank)


def tile_edges(length: int, tile: int, overlap_factor: float = 0.25) -> list[int]:
    """Return the pixels at which tiles begin or end within an axis of ``length`` pixels.

    >>> tile_edges(128, 64, 0.25)
    [32, 64, 96]
    """
    cells, size = length // CELL, tile // CELL
    starts = tile_starts(cells, size, int(size * overlap_factor))
    edges = {edge for start in starts for edge in (start, start + size)}
    return [CELL * edge for edge in sorted(edges) if 0 < edge < cells]
