"""Batches for the bundled model. A batch depends on its step alone, so that a resumed run sees the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from pixart_nb.core.backend import ms
from pixart_nb.core.data.images import to_signed
from pixart_nb.core.io import load_tensors, save_tensors
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.training.batches import logit_normal
from pixart_nb.core.training.loss import coefficients
from pixart_nb.pixelart.captions import caption
from pixart_nb.pixelart.scenes import COLOURS, OBJECTS, SETTINGS, Scene, draw

SHARD = 2048


def generator(*key: int) -> np.random.Generator:
    """Return a random generator for a key such as (seed, step)."""
    return np.random.default_rng(key)


def draw_scenes(scenes: Sequence[Scene], rng: np.random.Generator, height: int = 128, width: int = 128) -> np.ndarray:
    """Draw scenes: (N, height, width, 3) uint8."""
    return np.stack([draw(scene, rng, height, width) for scene in scenes])


def choose(scenes: Sequence[Scene], rng: np.random.Generator, count: int) -> list[Scene]:
    """Choose ``count`` scenes with replacement."""
    return [scenes[i] for i in rng.integers(0, len(scenes), count)]


def autoencoder_batches(scenes: Sequence[Scene], size: int, crop: int, latent_channels: int, seed: int):
    """Return batches of (images (size, 3, crop, crop), noise); crops start on the grid of the latents."""

    def batch(step: int) -> tuple[np.ndarray, ...]:
        rng = generator(seed, step)
        images = to_signed(draw_scenes(choose(scenes, rng, size), rng))
        rows, columns = 8 * rng.integers(0, (128 - crop) // 8 + 1, (2, size))
        crops = [p[:, r : r + crop, c : c + crop] for p, r, c in zip(images, rows, columns, strict=True)]
        noise = rng.standard_normal((size, latent_channels, crop // 8, crop // 8), dtype=np.float32)
        return np.stack(crops), noise

    return batch


def attributes(scenes: Sequence[Scene]) -> np.ndarray:
    """Return the numbers of object, colour and setting: (N, 3) int32."""
    numbers = [(OBJECTS.index(s.object), COLOURS.index(s.colour), SETTINGS.index(s.setting)) for s in scenes]
    return np.array(numbers, np.int32)


Tokenize = Callable[[list[str], int], tuple[np.ndarray, np.ndarray]]


def caption_batches(scenes: Sequence[Scene], tokenize: Tokenize, size: int, length: int, seed: int):
    """Return batches of (token ids (size, length), mask, attributes (size, 3)) of captions in many wordings."""

    def batch(step: int) -> tuple[np.ndarray, ...]:
        rng = generator(seed, step)
        chosen = choose(scenes, rng, size)
        ids, mask = tokenize([caption(scene, rng) for scene in chosen], length)
        return ids, mask, attributes(chosen)

    return batch


def cached_latents(
    encode: Callable[[np.ndarray], np.ndarray], scenes: Sequence[Scene], folder: Path, count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return latent means of ``count`` drawn images, (count, C, h, w) float32, and the scene number of each.

    ``encode`` maps (N, 3, H, W) to means. Shards that exist in ``folder`` are not computed again.
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
    images = [draw_scenes([scenes[i] for i in part], rng) for part in np.array_split(numbers, SHARD // 32)]
    means = np.concatenate([encode(to_signed(part)) for part in images])
    return {"mean": means.astype(np.float16), "scene": numbers.astype(np.int32)}


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
    scenes: Sequence[Scene], numbers: np.ndarray, tokenize: Tokenize, lengths: Sequence[int], copies: int, seed: int
) -> CaptionPool:
    """Return ``copies`` captions of every cached image, each padded to the first of ``lengths`` that holds it."""
    rng = generator(seed, 6)
    image = np.tile(np.arange(len(numbers)), copies)
    ids, mask = tokenize([caption(scenes[numbers[i]], rng) for i in image], lengths[-1])
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
):
    """Return batches of latents, noise, loss coefficients, timesteps, caption embeddings and mask.

    ``embed`` encodes token ids and mask (N, T) to (N, T, C). A dropped caption becomes ``empty``, the ids and mask of
    the empty caption, as in sampling.
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
        start = latents[pool.image[chosen]].astype(np.float32)
        return start, noise, coefficients(timesteps), timesteps.astype(np.float32), embed(ids, mask), mask

    return batch


def trained_parameters(net: PixArt) -> dict[str, ms.Parameter]:
    """Return the parameters to train. y_embedding is the empty caption's embedding, which is set instead."""
    return {name: p for name, p in net.parameters_and_names() if name != "y_embedder.y_embedding"}


def set_weights(parameters: Mapping[str, ms.Parameter], weights: Mapping[str, np.ndarray]) -> None:
    """Give parameters the trained weights of the same names."""
    for name, values in weights.items():
        parameters[name].set_data(ms.Tensor(values))
