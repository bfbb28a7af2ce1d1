"""Batches of a diffusion training: features of images and captions, with the noise that belongs to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.data.reader import FeatureBatch, FeatureReader, LiveFeatures, padded
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.training.loss import coefficients

#: Caption lengths are padded to multiples of this for graphs that a CPU compiles: few graphs, little padding.
LENGTH_STEP = 20


def logit_normal(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw timesteps (count,) int64 that favour the middle of the schedule: 1000 sigmoid(1.1 n + 0.4).

    One in seven is uniform, so that both ends of the schedule are trained too.
    """
    middle = 1000 / (1 + np.exp(-1.1 * rng.standard_normal(count) - 0.4))
    anywhere = rng.random(count) * 1000
    return np.where(rng.random(count) < 1 / 7, anywhere, middle).astype(np.int64).clip(0, 999)


TIMESTEPS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "uniform": lambda rng, count: rng.integers(0, 1000, count),
    "logit_normal": logit_normal,
}


@dataclass(frozen=True)
class Noise:
    """Noise, timesteps and dropped captions of a batch.

    Each row has a random generator keyed by seed, batch and row in the whole batch, so that a batch does not depend on
    the number of workers.

    Args:
        timesteps: ``uniform`` as in the official code, or ``logit_normal``.
        offset: scale of the noise that is added to whole channels.
        caption_drop: probability that a caption is replaced by the empty one.
        spacing: timesteps are rounded up to the last of so many: 19, 39, ... 999 for 20.
    """

    seed: int
    timesteps: str = "uniform"
    offset: float = 0.0
    caption_drop: float = 0.1
    spacing: int = 1

    def draw(self, number: int, first_row: int, shape: Sequence[int]) -> tuple[np.ndarray, ...]:
        """Return timesteps (N,), dropped (N,) bool, noise of the latents and noise to predict, both of ``shape``."""
        rows = [self._row(number, first_row + i, tuple(shape[1:])) for i in range(shape[0])]
        return tuple(np.stack(parts) for parts in zip(*rows, strict=True))

    def _row(self, number: int, row: int, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
        rng = np.random.default_rng((self.seed, 3, number, row))
        timestep = (TIMESTEPS[self.timesteps](rng, 1)[0] // self.spacing + 1) * self.spacing - 1
        dropped = rng.random() < self.caption_drop
        own, noise = rng.standard_normal((2, *shape), dtype=np.float32)
        offset = rng.standard_normal((shape[0], 1, 1), dtype=np.float32)
        return timestep, dropped, own, noise + np.float32(self.offset) * offset


@dataclass
class DiffusionBatches:
    """``batch(number)`` of a ``Trainer``: the arguments of ``diffusion_loss``.

    Args:
        features: latents and caption embeddings of a batch.
        empty: embedding (tokens, C) of the empty caption.
        first_row: first row of this worker in the whole batch.
        weights: function from timesteps (N,) to weights of the squared error (N,).
        length_multiple: captions are padded to multiples of this number of tokens, for compiled graphs.
        micro: function from indices (N,) of the labels to micro conditions (N, 3), for models that have them.
        shift_factor: subtracted from the latents before they are scaled.
        extras: function of the number of the batch, its first row, its timesteps (N,) and the shape of its latents;
            what it returns is passed to the loss before the micro conditions.
    """

    features: FeatureReader | LiveFeatures
    noise: Noise
    net: PixArt
    scaling_factor: float
    empty: np.ndarray
    first_row: int = 0
    weights: Callable[[np.ndarray], np.ndarray] = np.ones_like
    length_multiple: int = 1
    micro: Callable[[np.ndarray], np.ndarray] | None = None
    shift_factor: float | None = None
    extras: Callable[[int, int, np.ndarray, tuple[int, ...]], tuple] | None = None

    def __call__(self, number: int) -> tuple[np.ndarray | ms.Tensor, ...]:
        part = self.features.batch(number)
        timesteps, dropped, own, noise = self.noise.draw(number, self.first_row, part.mean.shape)
        latents = self._scaled(part.mean + part.std * own)
        embeds, mask = self._captions(part, dropped)
        return (
            latents,
            noise,
            coefficients(timesteps.astype(np.int64)),
            timesteps.astype(np.float32),
            embeds,
            mask,
            self.weights(timesteps).astype(np.float32),
            self.net.positions(*latents.shape[2:]),
            *([] if part.control is None else [self._scaled(part.control)]),
            *(self.extras(number, self.first_row, timesteps, latents.shape) if self.extras else ()),
            *([self.micro(part.indices)] if self.micro else []),
        )

    def _scaled(self, latents: np.ndarray) -> np.ndarray:
        return (latents - np.float32(self.shift_factor or 0.0)) * np.float32(self.scaling_factor)

    def _captions(self, part: FeatureBatch, dropped: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = [
            self.empty.astype(np.float32) if drop else embeds[seen]
            for embeds, seen, drop in zip(part.embeds, part.mask, dropped, strict=True)
        ]
        embeds, mask = padded(rows)
        more = -mask.shape[1] % self.length_multiple
        return np.pad(embeds, ((0, 0), (0, more), (0, 0))), np.pad(mask, ((0, 0), (0, more)))


def caption_multiple(mode: int, max_length: int) -> int:
    """Return the number of tokens to whose multiples captions are padded.

    Compiled graphs (mode 0) have a length each. On Ascend, where compiling takes minutes and flash attention masks the
    padding, all captions have ``max_length`` tokens, so that one graph serves every batch of a size.
    """
    if mode != 0:
        return 1
    return max_length if backend.on_ascend() else LENGTH_STEP


def micro_conditions(
    sizes: Sequence[tuple[int, int]], trained: Sequence[tuple[int, int]], ratios: dict[tuple[int, int], float]
) -> Callable[[np.ndarray], np.ndarray]:
    """Return the micro conditions of images by index: (N,) -> (N, 3) float32, height, width, ratio.

    As in the official ``InternalDataMS``: height and width are those of the original image (``sizes``), the ratio is
    that of the training size (``trained``) as the published table rounds it (``ratios``), 1 for squares.
    """
    rows = [(*size, ratios.get(train, train[0] / train[1])) for size, train in zip(sizes, trained, strict=True)]
    table = np.array(rows, np.float32)
    return lambda indices: table[indices]
