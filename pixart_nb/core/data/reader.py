"""Training batches as features of images and captions, from a cache or computed when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixart_nb.core.data.buckets import BucketSampler, Size
from pixart_nb.core.data.control import ControlImages
from pixart_nb.core.data.features import Embed, Encode, FeatureCache, image_pixels
from pixart_nb.core.data.files import DataError
from pixart_nb.core.data.images import to_signed
from pixart_nb.core.data.labels import Label


@dataclass(frozen=True)
class FeatureBatch:
    """Features of a batch. ``mean`` and ``std`` (N, C, h, w) float32 of the latents, before the scaling factor;
    ``embeds`` (N, T, C) float32 padded with zeros to the longest, ``mask`` (N, T) bool, True = token; ``indices``
    (N,) of the labels. Latents are ``mean + std * noise``. ``control``, of a ControlNet: latents of the conditions."""

    mean: np.ndarray
    std: np.ndarray
    embeds: np.ndarray
    mask: np.ndarray
    indices: np.ndarray
    control: np.ndarray | None = None


class BatchReader:
    """Base class that chooses the images and captions of each batch, from the seed and the number of the batch alone.

    ``real_prompt_ratio``: probability of an original prompt, any of them; otherwise the ``sharegpt4v`` caption is
    taken, if there is one.
    """

    def __init__(self, labels: Sequence[Label], sampler: BucketSampler, real_prompt_ratio: float = 0.5):
        if not 0 <= real_prompt_ratio <= 1:
            raise DataError(f"real_prompt_ratio is {real_prompt_ratio}; expected 0 to 1")
        self.labels, self.sampler, self.real_prompt_ratio = labels, sampler, real_prompt_ratio
        self._prompts = np.array([len(label.prompts) for label in labels])
        self._described = np.array([bool(label.sharegpt4v) for label in labels])

    def choose(self, step: int) -> tuple[Size, np.ndarray, np.ndarray]:
        """Return this worker's part of batch ``step``: size, labels (N,), and the number (N,) of each one's caption."""
        sampler = self.sampler
        size, indices = sampler.batch(step)
        own = slice(sampler.rank * sampler.batch_size, (sampler.rank + 1) * sampler.batch_size)
        drawn, which = (np.random.default_rng((sampler.seed, k, step)).random(sampler.whole)[own] for k in (2, 4))
        original = (drawn < self.real_prompt_ratio) | ~self._described[indices]
        prompts = self._prompts[indices]
        return size, indices, np.where(original, (which * prompts).astype(int), prompts)


class FeatureReader(BatchReader):
    """Batches of features from a complete cache."""

    def __init__(self, cache: FeatureCache, sampler: BucketSampler, real_prompt_ratio: float = 0.5):
        cache.check()
        super().__init__(cache.labels, sampler, real_prompt_ratio)
        self.cache = cache

    def batch(self, step: int) -> FeatureBatch:
        """Return this worker's part of batch ``step``."""
        _, indices, captions = self.choose(step)
        means, stds = zip(*map(self.cache.latents, indices), strict=True)
        embeds, mask = padded(list(map(self.cache.caption, indices, captions)))
        means, stds = np.stack(means).astype(np.float32), np.stack(stds).astype(np.float32)
        conditions = map(self.cache.control_latents, indices) if self.cache.control else ()
        control = np.stack(list(conditions)).astype(np.float32) if self.cache.control else None
        return FeatureBatch(means, stds, embeds, mask, indices, control)


class LiveFeatures(BatchReader):
    """Batches of features that are computed when they are needed; images of the next ``ahead`` batches are read before.

    The batches have the images and captions of those of ``FeatureReader``.
    """

    def __init__(
        self,
        labels: Sequence[Label],
        sampler: BucketSampler,
        real_prompt_ratio: float,
        encode: Encode,
        embed: Embed,
        ahead: int = 0,
        control: ControlImages | None = None,
    ):
        super().__init__(labels, sampler, real_prompt_ratio)
        self.encode, self.embed, self.control = encode, embed, control
        self._read = ReadAhead(self._inputs, ahead) if ahead else self._inputs

    def images(self, step: int) -> tuple[np.ndarray, list[str], np.ndarray]:
        """Return pixels (N, 3, height, width) float32 in -1..1, captions and labels (N,) of batch ``step``.

        Images are scaled and cropped to the training size. ``ImageError`` names a file that cannot be read.
        """
        size, indices, numbers = self.choose(step)
        pixels = np.stack([image_pixels(self.labels[i], size) for i in indices])
        captions = [self.labels[i].captions[k] for i, k in zip(indices, numbers, strict=True)]
        return to_signed(pixels), captions, indices

    def _inputs(self, step: int) -> tuple:
        """Return ``images(step)``, and the pixels of the conditions of a ControlNet or None."""
        if self.control is None:
            return *self.images(step), None
        size, indices, _ = self.choose(step)
        return *self.images(step), to_signed(np.stack([self.control.pixels(self.labels[i], size) for i in indices]))

    def batch(self, step: int) -> FeatureBatch:
        """Return this worker's part of batch ``step``."""
        pixels, captions, indices, conditions = self._read(step)
        control = None if conditions is None else self.encode(conditions)[0]
        return FeatureBatch(*self.encode(pixels), *self.embed(captions), indices, control)


class ReadAhead:
    """Calls ``function(number)`` in threads for the next ``depth`` numbers."""

    def __init__(self, function: Callable[[int], Any], depth: int):
        self.function, self.depth = function, depth
        self._pool = ThreadPoolExecutor(max(1, depth))
        self._pending: dict[int, Future] = {}

    def __call__(self, number: int) -> Any:
        numbers = range(number, number + self.depth + 1)
        for other in self._pending.keys() - set(numbers):
            self._pending.pop(other).cancel()
        for n in numbers:
            if n not in self._pending:
                self._pending[n] = self._pool.submit(self.function, n)
        return self._pending.pop(number).result()


def padded(embeddings: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (tokens, C) of several lengths -> (N, T, C) float32 padded with zeros, and their mask (N, T)."""
    lengths = np.array([len(tokens) for tokens in embeddings])
    mask = np.arange(lengths.max()) < lengths[:, None]
    embeds = np.zeros((*mask.shape, embeddings[0].shape[1]), np.float32)
    embeds[mask] = np.concatenate(embeddings)
    return embeds, mask
