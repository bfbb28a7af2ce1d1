"""Batches for the embedded model, each a function of the step alone: a resumed run sees what it would have seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from pixart_nb.core.data.images import to_signed
from pixart_nb.core.io import load_tensors, save_tensors
from pixart_nb.core.training.batches import logit_normal
from pixart_nb.core.training.loss import coefficients
from pixart_nb.pixelart.captions import caption
from pixart_nb.pixelart.scenes import COLOURS, OBJECTS, SETTINGS, Scene, draw

SHARD = 2048


def generator(*key: int) -> np.random.Generator:
    """A generator of its own for a key such as (seed, step)."""
    return np.random.default_rng(key)


def draw_scenes(
    scenes: Sequence[Scene], rng: np.random.Generator, height: int = 128, width: int = 128
) -> np.ndarray:
    """Pictures of scenes: (N, height, width, 3) uint8."""
    return np.stack([draw(scene, rng, height, width) for scene in scenes])


def choose(scenes: Sequence[Scene], rng: np.random.Generator, count: int) -> list[Scene]:
    """``count`` scenes drawn with replacement."""
    return [scenes[i] for i in rng.integers(0, len(scenes), count)]


def autoencoder_batches(scenes: Sequence[Scene], size: int, crop: int, latent_channels: int, seed: int):
    """Batches of (pictures (size, 3, crop, crop), noise for the latents): crops on the grid of the latents."""

    def batch(step: int) -> tuple[np.ndarray, ...]:
        rng = generator(seed, step)
        pictures = to_signed(draw_scenes(choose(scenes, rng, size), rng))
        rows, columns = 8 * rng.integers(0, (128 - crop) // 8 + 1, (2, size))
        crops = [p[:, r : r + crop, c : c + crop] for p, r, c in zip(pictures, rows, columns, strict=True)]
        noise = rng.standard_normal((size, latent_channels, crop // 8, crop // 8), dtype=np.float32)
        return np.stack(crops), noise

    return batch


def attributes(scenes: Sequence[Scene]) -> np.ndarray:
    """Numbers of object, colour and setting: (N, 3) int32."""
    places = [(OBJECTS.index(s.object), COLOURS.index(s.colour), SETTINGS.index(s.setting)) for s in scenes]
    return np.array(places, np.int32)


Tokenize = Callable[[list[str], int], tuple[np.ndarray, np.ndarray]]


def caption_batches(scenes: Sequence[Scene], tokenize: Tokenize, size: int, length: int, seed: int):
    """Batches of (token ids (size, length), mask, attributes (size, 3)) of captions in many wordings."""

    def batch(step: int) -> tuple[np.ndarray, ...]:
        rng = generator(seed, step)
        chosen = choose(scenes, rng, size)
        ids, mask = tokenize([caption(scene, rng) for scene in chosen], length)
        return ids, mask, attributes(chosen)

    return batch


def cached_latents(
    encode: Callable[[np.ndarray], np.ndarray], scenes: Sequence[Scene], folder: Path, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Latent means of ``count`` drawn pictures, (count, C, h, w) float32, and the number of each one's scene.

    ``encode`` maps (N, 3, H, W) to means. Shards that ``folder`` holds already are not computed again.
    """
    means, numbers = [], []
    for shard in tqdm(range(-(-count // SHARD)), desc="latents"):
        path = folder / f"latents-{shard:03d}.safetensors"
        if not path.is_file():
            save_tensors(path, _encode_shard(encode, scenes, shard, seed))
        tensors = load_tensors(path)
        means.append(tensors["mean"])
        numbers.append(tensors["scene"])
    return np.concatenate(means)[:count].astype(np.float32), np.concatenate(numbers)[:count]


def _encode_shard(encode, scenes: Sequence[Scene], shard: int, seed: int) -> dict[str, np.ndarray]:
    rng = generator(seed, shard)
    numbers = rng.permutation(np.resize(np.arange(len(scenes)), SHARD) + shard * SHARD) % len(scenes)
    pictures = [draw_scenes([scenes[i] for i in part], rng) for part in np.array_split(numbers, SHARD // 32)]
    means = np.concatenate([encode(to_signed(part)) for part in pictures])
    return {"mean": means.astype(np.float16), "scene": numbers.astype(np.int32)}


@dataclass(frozen=True)
class CaptionPool:
    """Captions of cached pictures, sorted into few lengths, so that a batch carries little padding.

    ``ids`` and ``mask`` are (M, longest), ``picture`` (M,) the number of each caption's picture, ``length`` (M,) the
    tokens that it is padded to.
    """

    ids: np.ndarray
    mask: np.ndarray
    picture: np.ndarray
    length: np.ndarray

    def draw(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Numbers of ``size`` captions of one length; lengths come up as often as they occur."""
        length = self.length[rng.integers(0, len(self.length))]
        return rng.choice(np.flatnonzero(self.length == length), size)


def caption_pool(
    scenes: Sequence[Scene],
    numbers: np.ndarray,
    tokenize: Tokenize,
    lengths: Sequence[int],
    copies: int,
    seed: int,
) -> CaptionPool:
    """``copies`` captions of every cached picture, each padded to the first of ``lengths`` that holds it."""
    rng = generator(seed, 6)
    picture = np.tile(np.arange(len(numbers)), copies)
    ids, mask = tokenize([caption(scenes[numbers[i]], rng) for i in picture], lengths[-1])
    padded = np.array(lengths)[np.searchsorted(lengths, mask.sum(1))]
    return CaptionPool(ids, mask, picture, padded)


def diffusion_batches(
    latents: np.ndarray,
    pool: CaptionPool,
    embed: Callable[[np.ndarray, np.ndarray], np.ndarray],
    empty: tuple[np.ndarray, np.ndarray],
    size: int,
    caption_drop: float,
    seed: int,
):
    """Batches for the loss: latents, noise, loss coefficients, timesteps, caption embeddings and mask.

    ``embed`` encodes token ids and mask (N, T) to (N, T, C). A dropped caption becomes ``empty``, the ids and mask of
    the empty caption, as at sampling.
    """

    def batch(step: int) -> tuple[np.ndarray, ...]:
        rng = generator(seed, step)
        chosen = pool.draw(rng, size)
        length = pool.length[chosen[0]]
        dropped = (rng.random(size) < caption_drop)[:, None]
        ids = np.where(dropped, empty[0][:, :length], pool.ids[chosen, :length])
        mask = np.where(dropped, empty[1][:, :length], pool.mask[chosen, :length])
        timesteps = logit_normal(rng, size)
        noise = rng.standard_normal((size, *latents.shape[1:]), dtype=np.float32)
        start = latents[pool.picture[chosen]]
        return start, noise, coefficients(timesteps), timesteps.astype(np.float32), embed(ids, mask), mask

    return batch
