"""Aspect-ratio buckets: the training size of each image, and the images of each batch."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from pixart_nb.core.data.files import DataError
from pixart_nb.core.data.labels import Label
from pixart_nb.core.sampling.images import ASPECT_RATIO_BINS, bins_for, closest_bin

Size = tuple[int, int]


def training_sizes(labels: Sequence[Label], image_size: int, multi_scale: bool, valid_num: int = 0) -> list[Size]:
    """Return the (height, width) in pixels at which each image is trained.

    Without ``multi_scale`` all are squares of ``image_size``. With it, each gets the published size of that table
    whose ratio is nearest; sizes of fewer than ``valid_num`` images are not used (the official code leaves their
    images out; here they get the nearest size that is used).
    """
    if image_size < 16 or image_size % 16:
        raise DataError(f"image size is {image_size} pixels; expected a multiple of 16")
    if not multi_scale:
        return [(image_size, image_size)] * len(labels)
    bins = bins_for(image_size)
    if bins is None:
        raise DataError(
            f"multi_scale: no table of sizes was published for {image_size} pixels; expected one of "
            f"{', '.join(map(str, sorted(ASPECT_RATIO_BINS)))}, or multi_scale: False"
        )
    counts = Counter(closest_bin(label.height, label.width, bins) for label in labels)
    used = {ratio: size for ratio, size in bins.items() if counts[size] >= max(valid_num, 1)}
    if not used:
        raise DataError(
            f"valid_num is {valid_num}; expected at most {max(counts.values(), default=0)}, the images of the most "
            f"frequent size among {len(labels)}"
        )
    return [closest_bin(label.height, label.width, used) for label in labels]


class BucketSampler:
    """Choose the images of each batch, from the seed and the number of the batch alone.

    ``sizes`` has the training size of every image, ``batch_size`` is that of one worker, ``world`` the number of
    workers. Every worker takes its slice of the same batch of ``batch_size * world`` images of one size, so the order
    does not depend on the number of workers, and a resumed run needs only the number of its step.

    The images of each size are shuffled again and again, and batches are cut from that endless sequence. The rest of
    an epoch, less than a batch, begins the first batch of that size in the next. So every image is shown equally
    often, plus or minus one, none is left out, and the number of batches differs a little between epochs.
    """

    def __init__(self, sizes: Sequence[Size], batch_size: int, seed: int, rank: int = 0, world: int = 1):
        if batch_size < 1 or world < 1 or not 0 <= rank < world:
            raise DataError(
                f"batch_size is {batch_size} and rank {rank} of {world} workers; expected 1 or more, and a rank below"
            )
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.whole = batch_size * world
        if len(sizes) < self.whole:
            batch = f"{batch_size} x {world} workers = {self.whole}" if world > 1 else f"{batch_size}"
            raise DataError(
                f"a batch has {batch} images, but there are only {len(sizes)}; lower batch_size or add images"
            )
        members: dict[Size, list[int]] = {size: [] for size in sorted(set(sizes))}
        for index, size in enumerate(sizes):
            members[size].append(index)
        self.buckets = {size: np.array(indices) for size, indices in members.items()}
        self._counts = np.array([len(members) for members in self.buckets.values()])
        self._order = lru_cache(maxsize=4)(self._epoch_order)
        self._shuffled = lru_cache(maxsize=2 * len(self.buckets))(self._permutation)

    def batch(self, step: int) -> tuple[Size, np.ndarray]:
        """Return the size and image numbers (batch_size,) of this worker's part of batch ``step``, counted from 0."""
        size, indices = self.whole_batch(step)
        return size, indices[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

    def whole_batch(self, step: int) -> tuple[Size, np.ndarray]:
        """Return the size and image numbers (batch_size * world,) of batch ``step``, for all workers."""
        if step < 0:
            raise DataError(f"batch {step}; batches are counted from 0")
        epoch = self.epoch(step)
        bucket, number = self._order(epoch)[step - self.batches(epoch)]
        size = list(self.buckets)[bucket]
        members = self._counts[bucket]
        positions = np.arange(number * self.whole, (number + 1) * self.whole)
        rounds = range(positions[0] // members, positions[-1] // members + 1)
        row = np.concatenate([self._shuffled(int(bucket), turn) for turn in rounds])
        return size, row[positions - rounds[0] * members]

    def batches(self, epochs: int) -> int:
        """Return the number of batches in the first ``epochs`` epochs."""
        return int((epochs * self._counts // self.whole).sum())

    def epoch(self, step: int) -> int:
        """Return the epoch, counted from 0, of batch ``step``."""
        # n epochs have at most n * images / whole batches, and at most one less for each bucket
        least = step * self.whole // int(self._counts.sum())
        return bisect_right(range(least + len(self.buckets) + 3), step, lo=least, key=self.batches) - 1

    def describe(self) -> str:
        """Return a line for each size with the number of its images."""
        lines = []
        for (height, width), members in self.buckets.items():
            line = f"{height}x{width}: {len(members)} images"
            if len(members) < self.whole:
                line += (
                    f", fewer than the {self.whole} of a batch: a batch shows them more than once, "
                    f"every {self.whole / len(members):.3g} epochs"
                )
            lines.append(line)
        return "\n".join(lines)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """Return (batches of the epoch, 2): bucket and the number of the batch in it, in random order."""
        first, end = epoch * self._counts // self.whole, (epoch + 1) * self._counts // self.whole
        pairs = [(bucket, n) for bucket in range(len(first)) for n in range(first[bucket], end[bucket])]
        return np.random.default_rng((self.seed, 0, epoch)).permutation(np.array(pairs).reshape(-1, 2))

    def _permutation(self, bucket: int, turn: int) -> np.ndarray:
        members = list(self.buckets.values())[bucket]
        return np.random.default_rng((self.seed, 1, bucket, turn)).permutation(members)
