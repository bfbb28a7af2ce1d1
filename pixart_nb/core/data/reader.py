"""Training batches of pictures and captions, each a function of its number alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pixart_nb.core.data.buckets import BucketSampler
from pixart_nb.core.data.images import fit, load_image, to_signed
from pixart_nb.core.data.labels import Label
from pixart_nb.core.errors import PixArtNBError


@dataclass(frozen=True)
class ImageBatch:
    """``pixels`` (N, 3, height, width) float32 in -1..1, ``captions`` N texts, ``indices`` (N,) of the labels."""

    pixels: np.ndarray
    captions: list[str]
    indices: np.ndarray


@dataclass(frozen=True)
class Choice:
    """What a batch is made of: its size in pixels, the labels (N,), and whether each shows its original prompt."""

    size: tuple[int, int]
    indices: np.ndarray
    original: np.ndarray


class Chooser:
    """Which pictures and which of their captions make up a batch.

    ``real_prompt_ratio``: chance of the original prompt; otherwise the ``sharegpt4v`` caption is taken, where there is
    one. Like the order of the sampler, it depends on the seed and the number of the batch only.
    """

    def __init__(self, labels: Sequence[Label], sampler: BucketSampler, real_prompt_ratio: float = 0.5):
        if not 0 <= real_prompt_ratio <= 1:
            raise PixArtNBError(f"real_prompt_ratio is {real_prompt_ratio}; expected 0 to 1")
        self.labels, self.sampler, self.real_prompt_ratio = labels, sampler, real_prompt_ratio
        self._described = np.array([bool(label.sharegpt4v) for label in labels])

    def choose(self, step: int) -> Choice:
        """This worker's part of batch ``step``."""
        sampler = self.sampler
        size, indices = sampler.batch(step)
        drawn = np.random.default_rng((sampler.seed, 2, step)).random(sampler.whole)
        mine = drawn[sampler.rank * sampler.batch_size :][: sampler.batch_size]
        return Choice(size, indices, (mine < self.real_prompt_ratio) | ~self._described[indices])

    def captions(self, choice: Choice) -> list[str]:
        """The chosen caption of each picture of a batch."""
        pairs = zip(choice.indices, choice.original, strict=True)
        return [self.labels[i].prompt if original else self.labels[i].sharegpt4v for i, original in pairs]


class ImageReader(Chooser):
    """Batches decoded from the picture files, scaled and cut to their training size."""

    def batch(self, step: int) -> ImageBatch:
        """This worker's part of batch ``step``; ``ImageError`` names a file that cannot be read."""
        choice = self.choose(step)
        pixels = np.stack([fit(load_image(self.labels[i].file), *choice.size) for i in choice.indices])
        return ImageBatch(to_signed(pixels), self.captions(choice), choice.indices)
