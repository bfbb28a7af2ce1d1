"""Training batches of images and captions; each depends on its number alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pixart_nb.core.data.buckets import BucketSampler
from pixart_nb.core.data.errors import DataError
from pixart_nb.core.data.images import fit, load_image, to_signed
from pixart_nb.core.data.labels import Label


@dataclass(frozen=True)
class ImageBatch:
    """``pixels`` (N, 3, height, width) float32 in -1..1, ``captions`` N texts, ``indices`` (N,) of the labels."""

    pixels: np.ndarray
    captions: list[str]
    indices: np.ndarray


@dataclass(frozen=True)
class BatchChoice:
    """Content of a batch: its size in pixels, labels (N,), and the number (N,) of the caption of each label."""

    size: tuple[int, int]
    indices: np.ndarray
    captions: np.ndarray


class BatchChooser:
    """Chooses the images and captions of each batch, from the seed and the number of the batch alone.

    ``real_prompt_ratio``: probability of an original prompt, any of them; otherwise the ``sharegpt4v`` caption is
    taken, if there is one.
    """

    def __init__(self, labels: Sequence[Label], sampler: BucketSampler, real_prompt_ratio: float = 0.5):
        if not 0 <= real_prompt_ratio <= 1:
            raise DataError(f"real_prompt_ratio is {real_prompt_ratio}; expected 0 to 1")
        self.labels, self.sampler, self.real_prompt_ratio = labels, sampler, real_prompt_ratio
        self._prompts = np.array([len(label.prompts) for label in labels])
        self._described = np.array([bool(label.sharegpt4v) for label in labels])

    def choose(self, step: int) -> BatchChoice:
        """Return this worker's part of batch ``step``."""
        sampler = self.sampler
        size, indices = sampler.batch(step)
        own = slice(sampler.rank * sampler.batch_size, (sampler.rank + 1) * sampler.batch_size)
        drawn = np.random.default_rng((sampler.seed, 2, step)).random(sampler.whole)[own]
        which = np.random.default_rng((sampler.seed, 4, step)).random(sampler.whole)[own]
        original = (drawn < self.real_prompt_ratio) | ~self._described[indices]
        prompts = self._prompts[indices]
        return BatchChoice(size, indices, np.where(original, (which * prompts).astype(int), prompts))

    def captions(self, choice: BatchChoice) -> list[str]:
        """Return the chosen caption of each image of a batch."""
        return [self.labels[i].captions[k] for i, k in zip(choice.indices, choice.captions, strict=True)]


class ImageReader(BatchChooser):
    """Batches decoded from the image files, scaled and cropped to their training size."""

    def batch(self, step: int) -> ImageBatch:
        """Return this worker's part of batch ``step``; ``ImageError`` names a file that cannot be read."""
        choice = self.choose(step)
        pixels = np.stack([fit(load_image(self.labels[i].file), *choice.size) for i in choice.indices])
        return ImageBatch(to_signed(pixels), self.captions(choice), choice.indices)
