"""Batches of a diffusion training: features of pictures and captions, with the noise that belongs to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.data.features import Embed, Encode, FeatureBatch, padded
from pixart_nb.core.data.reader import ImageBatch
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.training.loss import coefficients
from pixart_nb.pixelart.batches import middle_timesteps

#: Caption lengths of compiled graphs are multiples of this: few graphs, little padding.
_LENGTH_STEP = 20
TIMESTEPS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "uniform": lambda rng, count: rng.integers(0, 1000, count),
    "logit_normal": middle_timesteps,
}


class Features(Protocol):
    """What gives the features of a batch: ``FeatureReader``, or ``LiveFeatures``."""

    def batch(self, step: int) -> FeatureBatch:
        """Features of this worker's part of batch ``step``."""


class LiveFeatures:
    """Features computed when they are asked for, of pictures that were read ahead."""

    def __init__(self, read: Callable[[int], ImageBatch], encode: Encode, embed: Embed):
        self.read, self.encode, self.embed = read, encode, embed

    def batch(self, step: int) -> FeatureBatch:
        """Features of this worker's part of batch ``step``."""
        pictures = self.read(step)
        mean, std = self.encode(pictures.pixels)
        embeds, mask = self.embed(pictures.captions)
        return FeatureBatch(mean, std, embeds, mask, pictures.indices)


class ReadAhead:
    """A function of the number of a batch, the next ``depth`` of which are computed in threads meanwhile."""

    def __init__(self, function: Callable[[int], Any], depth: int):
        self.function, self.depth = function, depth
        self._pool = ThreadPoolExecutor(max(1, depth))
        self._pending: dict[int, Future] = {}

    def __call__(self, number: int) -> Any:
        wanted = range(number, number + self.depth + 1)
        for other in [n for n in self._pending if n not in wanted]:
            self._pending.pop(other).cancel()
        for n in wanted:
            if n not in self._pending:
                self._pending[n] = self._pool.submit(self.function, n)
        return self._pending.pop(number).result()


@dataclass(frozen=True)
class Noise:
    """How a batch is noised. Row by row, from a generator keyed by seed, batch and the row in the whole batch.

    So a batch is the same whoever computes which part of it. ``timesteps``: ``uniform`` as in the official code, or
    ``middle``, most of them where shapes are decided. ``offset`` is added to whole channels; ``caption_drop``: chance
    that a caption is replaced by the empty one.
    """

    seed: int
    timesteps: str = "uniform"
    offset: float = 0.0
    caption_drop: float = 0.1

    def draw(self, number: int, first_row: int, shape: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Timesteps (N,), dropped (N,) bool; noise of the latents themselves, and noise to predict, of ``shape``."""
        rows = [self._row(number, first_row + i, tuple(shape[1:])) for i in range(shape[0])]
        return tuple(np.stack(parts) for parts in zip(*rows, strict=True))

    def _row(self, number: int, row: int, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng((self.seed, 3, number, row))
        timestep = TIMESTEPS[self.timesteps](rng, 1)[0]
        dropped = rng.random() < self.caption_drop
        own, noise = rng.standard_normal((2, *shape), dtype=np.float32)
        offset = rng.standard_normal((shape[0], 1, 1), dtype=np.float32)
        return timestep, dropped, own, noise + np.float32(self.offset) * offset


class DiffusionBatches:
    """``batch(number)`` for the trainer: what ``objective.diffusion_loss`` takes."""

    def __init__(
        self,
        features: Features,
        noise: Noise,
        net: PixArt,
        scaling_factor: float,
        empty: np.ndarray,
        first_row: int = 0,
        weights: Callable[[np.ndarray], np.ndarray] | None = None,
        fixed_lengths: bool = False,
    ):
        """``empty``: embedding (tokens, C) of the empty caption. ``first_row``: of this worker in the whole batch.

        ``weights``: timesteps (N,) -> weights of the squared error (N,). ``fixed_lengths`` pads captions to multiples
        of 20, for compiled graphs.
        """
        self.features, self.noise, self.net, self.empty = features, noise, net, empty
        self.scaling_factor, self.first_row = scaling_factor, first_row
        self.weights, self.fixed_lengths = weights or np.ones_like, fixed_lengths

    def __call__(self, number: int) -> tuple[np.ndarray | ms.Tensor, ...]:
        part = self.features.batch(number)
        timesteps, dropped, own, noise = self.noise.draw(number, self.first_row, part.mean.shape)
        latents = (part.mean + part.std * own) * np.float32(self.scaling_factor)
        embeds, mask = self._captions(part, dropped)
        height, width = latents.shape[2:]
        arrays = [
            latents,
            noise,
            coefficients(timesteps.astype(np.int64)),
            timesteps.astype(np.float32),
            embeds,
            mask,
            self.weights(timesteps).astype(np.float32),
            self.net.positions(height, width),
        ]
        if self.net.config.micro_condition:
            size = [8 * height, 8 * width, height / width]
            arrays.append(np.tile(np.array([size], np.float32), (len(latents), 1)))
        return tuple(arrays)

    def _captions(self, part: FeatureBatch, dropped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = [
            self.empty.astype(np.float32) if drop else embeds[seen]
            for embeds, seen, drop in zip(part.embeds, part.mask, dropped, strict=True)
        ]
        embeds, mask = padded(rows)
        length = mask.shape[1]
        more = -length % _LENGTH_STEP if self.fixed_lengths else 0
        return np.pad(embeds, ((0, 0), (0, more), (0, 0))), np.pad(mask, ((0, 0), (0, more)))
