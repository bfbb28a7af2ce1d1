"""Batches for the bundled model. A batch depends on its step alone, so that a resumed run sees the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.training.batches import logit_normal
from pixart_nb.core.training.loss import coefficients
from pixart_nb.pixelart.captions import caption
from pixart_nb.pixelart.scenes import Scene, draw


def generator(*key: int) -> np.random.Generator:
    """Return a random generator for a key such as (seed, step)."""
    return np.random.default_rng(key)


def draw_scenes(scenes: Sequence[Scene], rng: np.random.Generator, height: int = 256, width: int = 256) -> np.ndarray:
    """Draw scenes: (N, height, width, 3) uint8."""
    return np.stack([draw(scene, rng, height, width) for scene in scenes])


Tokenize = Callable[[list[str], int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class CaptionPool:
    """Captions of cached images in a few lengths, so that a batch has little padding.

    ``ids`` and ``mask`` are (M, longest), ``image`` (M,) the image number of each caption, ``length`` (M,) its padded
    number of tokens.
    """

    ids: np.ndarray
    mask: np.ndarray
    image: np.ndarray
    length: np.ndarray

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Return the numbers of ``size`` captions of one length; lengths are drawn as often as they occur."""
        length = self.length[rng.integers(0, len(self.length))]
        return rng.choice(np.flatnonzero(self.length == length), size)


def caption_pool(
    scenes: Sequence[Scene], tokenize: Tokenize, lengths: Sequence[int], copies: int, rng: np.random.Generator
) -> CaptionPool:
    """Return ``copies`` captions of every image, each padded to the first of ``lengths`` that holds it.

    ``scenes`` are those of the images, in order.
    """
    image = np.tile(np.arange(len(scenes)), copies)
    ids, mask = tokenize([caption(scenes[i], rng) for i in image], lengths[-1])
    padded = np.array(lengths)[np.searchsorted(lengths, mask.sum(1))]
    return CaptionPool(ids, mask, image, padded)


def diffusion_batches(
    latents: np.ndarray,
    pool: CaptionPool,
    embed: Callable[[np.ndarray, np.ndarray], np.ndarray],
    empty: tuple[np.ndarray, np.ndarray],
    size: int,
    caption_drop: float,
    seed: int,
    timesteps: Callable[[np.random.Generator, int], np.ndarray] = logit_normal,
    further: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, ...]] = lambda images, timesteps: (),
):
    """Return batches of latents, noise, loss coefficients, timesteps, caption embeddings and mask.

    ``embed`` encodes token ids and mask (N, T) to (N, T, C). A dropped caption becomes ``empty``, the ids and mask of
    the empty caption, as in sampling. ``further`` returns further arrays from the numbers of the images and the
    timesteps, both (N,).
    """

    def batch(step: int) -> tuple[np.ndarray, ...]:
        rng = generator(seed, step)
        chosen = pool.draw(rng, size)
        length = pool.length[chosen[0]]
        dropped = (rng.random(size) < caption_drop)[:, None]
        ids = np.where(dropped, empty[0][:, :length], pool.ids[chosen, :length])
        mask = np.where(dropped, empty[1][:, :length], pool.mask[chosen, :length])
        times, images = timesteps(rng, size), pool.image[chosen]
        noise = rng.standard_normal((size, *latents.shape[1:]), dtype=np.float32)
        start, table, embedded = latents[images].astype(np.float32), coefficients(times), embed(ids, mask)
        return start, noise, table, times.astype(np.float32), embedded, mask, *further(images, times)

    return batch


def trained_parameters(net: PixArt) -> dict[str, ms.Parameter]:
    """Return the parameters to train. y_embedding is the empty caption's embedding, which is set instead."""
    return {name: p for name, p in net.parameters_and_names() if name != "y_embedder.y_embedding"}


def set_weights(parameters: Mapping[str, ms.Parameter], weights: Mapping[str, np.ndarray]) -> None:
    """Give parameters the trained weights of the same names."""
    for name, values in weights.items():
        parameters[name].set_data(ms.Tensor(values))
