"""Large pictures of a model that was trained at a small size: drawn small, enlarged, drawn anew in part, and again.

A model that sees 64 tokens in training does not know what to do with 65,536. Two things keep it near to what it knows.
Each size begins with the picture before, enlarged, to which noise is added (SDEdit, Meng et al. 2022), so that where
things are is decided at the model's own size. And the compression of keys and values (PixArt-Sigma, section 3.2) grows
with the picture, so that a query always chooses between as many keys; positions span the same coordinates at any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixart_nb.config import GUIDANCE_SCALE, SAMPLING_STEPS
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.transformer import PixArt, PixArtConfig
from pixart_nb.core.sampling.images import enlarged
from pixart_nb.core.sampling.randomness import picture_generators
from pixart_nb.core.sampling.step import steps_taken


@dataclass(frozen=True)
class Size:
    """One size of a growing picture, in pixels.

    ``strength``: share of the steps that are taken on the picture before, enlarged; 1 begins with noise alone.
    ``ratio``: compression of the keys and values of all layers, 1 for none.
    """

    height: int
    width: int
    strength: float = 1.0
    ratio: int = 1


#: Keys a side, unless told: what the embedded model was trained with.
KEYS = 8
#: Strengths of the sizes after the first, unless told; the last one holds for all after it.
STRENGTHS = (0.5, 0.3, 0.25, 0.2)


def usual_factors(config: PixArtConfig, height: int, width: int) -> list[int]:
    """Powers of two, falling to 1, by which a picture is divided to come down to about the model's own size.

    >>> usual_factors(PixArtConfig(input_size=16), 1024, 512)
    [4, 2, 1]
    """
    factors, unit = [1], 8 * config.patch_size
    while min(height, width) // (2 * factors[0]) >= 8 * config.input_size:
        if height % (2 * factors[0] * unit) or width % (2 * factors[0] * unit):
            break
        factors.insert(0, 2 * factors[0])
    return factors


def usual_strengths(count: int) -> list[float]:
    """Strengths of so many sizes but the first."""
    return [STRENGTHS[min(n, len(STRENGTHS) - 1)] for n in range(count - 1)]


def growing_sizes(
    config: PixArtConfig,
    height: int,
    width: int,
    factors: Sequence[int],
    strengths: Sequence[float],
    keys: int,
) -> list[Size]:
    """The sizes of a picture of height x width that is drawn smaller by each of ``factors`` (32, 16, ... 1) in turn.

    ``strengths``: of every size but the first. ``keys``: a side of a picture is never more keys than about these.
    """
    if list(factors) != sorted(set(factors), reverse=True) or not factors or factors[-1] < 1:
        raise PixArtNBError(f"factors are {list(factors)}; expected them to fall, for example 4, 2, 1")
    if len(strengths) != len(factors) - 1:
        raise PixArtNBError(
            f"{len(strengths)} strengths for {len(factors)} sizes; expected one for all but the first"
        )
    for strength in strengths:
        steps_taken(1, strength)
    unit, found = 8 * config.patch_size, []
    for factor, strength in zip(factors, [1.0, *strengths], strict=True):
        if height % (unit * factor) or width % (unit * factor):
            raise PixArtNBError(f"{height}x{width} divided by {factor} is no multiple of {unit} pixels")
        sides = height // factor, width // factor
        found.append(Size(*sides, strength, max(1, min(sides) // unit // keys)))
    return found


def shrink_keys(net: PixArt, ratio: int, operator: str = "mean") -> None:
    """Let all layers of a transformer compress keys and values by ``ratio``, without parameters; 1 for not at all.

    ``operator``: mean, or ave or uniform, which pick one token of each cell. Raises ValueError for a transformer that
    has learned to compress, by one ratio, and for operators that learn.
    """
    layers = [block.attn for block in net.blocks]
    if operator not in ("mean", "ave", "uniform") or ratio < 1:
        raise PixArtNBError(f"{operator!r} by {ratio}: expected mean, ave or uniform, by at least 1")
    if any(layer.sr is not None for layer in layers):
        raise PixArtNBError("this transformer has learned to compress by one ratio, which cannot be changed")
    for layer in layers:
        layer.ratio, layer.operator = ratio, operator


def grow(
    pipe: Any,
    prompts: Sequence[str],
    sizes: Sequence[Size],
    counts: Sequence[int] | None = None,
    steps: int = SAMPLING_STEPS,
    guidance: float = GUIDANCE_SCALE,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Yield the latents (n, C, height / 8, width / 8) of every size, of the first ``counts`` prompts, by default all.

    The pipeline is left as it was.
    """
    layers, latents = [block.attn for block in pipe.transformer.blocks], None
    own = [(layer.ratio, layer.operator) for layer in layers]
    try:
        for size, count in zip(sizes, counts or [len(prompts)] * len(sizes), strict=True):
            shrink_keys(pipe.transformer, size.ratio)
            start = None
            if latents is not None and size.strength < 1:
                start = enlarged(latents[:count], size.height // 8, size.width // 8)
            run = pipe.sample(
                list(prompts[:count]),
                num_inference_steps=steps,
                guidance_scale=guidance,
                height=size.height,
                width=size.width,
                generator=picture_generators(seed, range(count)),
                start=start,
                strength=size.strength,
            )
            next(run)
            for step in run:
                latents = step.latents
            yield latents
    finally:
        for layer, (ratio, operator) in zip(layers, own, strict=True):
            layer.ratio, layer.operator = ratio, operator
