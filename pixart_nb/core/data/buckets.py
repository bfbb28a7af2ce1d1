"""Pictures of one size together: which size each is trained at, and which pictures make up which batch."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from pixart_nb.core.data.errors import DataError
from pixart_nb.core.data.labels import Label
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.aspect_ratio import ASPECT_RATIO_BINS, bins_for, closest_bin

Size = tuple[int, int]


def training_sizes(
    labels: Sequence[Label], image_size: int, multi_scale: bool, valid_num: int = 0
) -> list[Size]:
    """(height, width) in pixels at which each picture is trained.

    Without ``multi_scale`` all are squares of ``image_size``. With it, each gets the published size of that table
    whose ratio is nearest; sizes that fewer than ``valid_num`` pictures have are not used (the official code leaves
    those pictures out; here they go to the nearest size that is used).
    """
    if image_size < 16 or image_size % 16:
        raise DataError(f"pictures of {image_size} pixels; the model takes sizes that are multiples of 16")
    if not multi_scale:
        return [(image_size, image_size)] * len(labels)
    bins = bins_for(image_size)
    if bins is None:
        known = ", ".join(map(str, sorted(ASPECT_RATIO_BINS)))
        raise DataError(
            f"multi_scale: no table of sizes was published for {image_size} pixels, only for {known}; "
            "take one of these, or multi_scale: False"
        )
    counts = Counter(closest_bin(label.height, label.width, bins) for label in labels)
    used = {ratio: size for ratio, size in bins.items() if counts[size] >= max(valid_num, 1)}
    if not used:
        raise DataError(
            f"valid_num is {valid_num}, and of {len(labels)} pictures at most {max(counts.values(), default=0)} have "
            "the same size; lower it"
        )
    return [closest_bin(label.height, label.width, used) for label in labels]


class BucketSampler:
    """Which pictures make up each batch: a function of the seed and the number of the batch alone.

    ``sizes`` has the training size of every picture, ``batch_size`` is that of one worker, ``world`` the number of
    workers. Every worker takes its slice of the same batch of ``batch_size * world`` pictures of one size, so that
    the order does not depend on how many share it, and a resumed run needs nothing but the number of its step.

    The pictures of a size come in a fresh order again and again; batches are cut from that endless row. What is left
    over at the end of an epoch, less than a batch, begins the next epoch's first batch of that size. So every picture
    is shown as often as any other, give or take once, and none is left out; epochs differ by some batches in length.
    """

    def __init__(self, sizes: Sequence[Size], batch_size: int, seed: int, rank: int = 0, world: int = 1):
        if batch_size < 1 or world < 1 or not 0 <= rank < world:
            raise PixArtNBError(
                f"batch_size {batch_size}, rank {rank} of {world}; expected 1 or more, and a rank below"
            )
        self.batch_size, self.seed, self.rank, self.world = batch_size, seed, rank, world
        self.whole = batch_size * world
        if len(sizes) < self.whole:
            workers = f" x {world} workers" if world > 1 else ""
            raise DataError(
                f"a batch has {batch_size}{workers} = {self.whole} pictures, but there are only {len(sizes)}; "
                "lower batch_size or bring more pictures"
            )
        members: dict[Size, list[int]] = {size: [] for size in sorted(set(sizes))}
        for index, size in enumerate(sizes):
            members[size].append(index)
        self.buckets = {size: np.array(indices) for size, indices in members.items()}
        self._counts = np.array([len(members) for members in self.buckets.values()])
        self._order = lru_cache(maxsize=4)(self._epoch_order)
        self._shuffled = lru_cache(maxsize=2 * len(self.buckets))(self._permutation)

    def batch(self, step: int) -> tuple[Size, np.ndarray]:
        """Size and picture numbers (batch_size,) of this worker's part of batch ``step``, counted from 0."""
        size, indices = self.whole_batch(step)
        return size, indices[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]

    def whole_batch(self, step: int) -> tuple[Size, np.ndarray]:
        """Size and picture numbers (batch_size * world,) of batch ``step``, those of all workers."""
        if step < 0:
            raise PixArtNBError(f"batch {step}; batches are counted from 0")
        epoch = self.epoch(step)
        bucket, number = self._order(epoch)[step - self.batches(epoch)]
        size = list(self.buckets)[bucket]
        members = self._counts[bucket]
        places = np.arange(number * self.whole, (number + 1) * self.whole)
        rounds = range(places[0] // members, places[-1] // members + 1)
        row = np.concatenate([self._shuffled(int(bucket), turn) for turn in rounds])
        return size, row[places - rounds[0] * members]

    def batches(self, epochs: int) -> int:
        """Batches in the first ``epochs`` epochs."""
        return int((epochs * self._counts // self.whole).sum())

    def epoch(self, step: int) -> int:
        """Epoch, counted from 0, that batch ``step`` belongs to."""
        # n epochs have at most n * pictures / whole batches, and at most one less for each bucket
        least = step * self.whole // int(self._counts.sum())
        return bisect_right(range(least + len(self.buckets) + 3), step, lo=least, key=self.batches) - 1

    def describe(self) -> str:
        """A line for each size: how many pictures, and what becomes of those that fill no batch."""
        lines = []
        for (height, width), members in self.buckets.items():
            line = f"{height}x{width}: {len(members)} pictures"
            if len(members) < self.whole:
                line += (
                    f", fewer than the {self.whole} of a batch: it shows them more than once, "
                    f"every {self.whole / len(members):.3g} epochs"
                )
            lines.append(line)
        return "\n".join(lines)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """(batches of the epoch, 2): bucket and the batch's number within it, in a chance order."""
        first, end = epoch * self._counts // self.whole, (epoch + 1) * self._counts // self.whole
        pairs = [(bucket, n) for bucket in range(len(first)) for n in range(first[bucket], end[bucket])]
        return np.random.default_rng((self.seed, 0, epoch)).permutation(np.array(pairs).reshape(-1, 2))

    def _permutation(self, bucket: int, turn: int) -> np.ndarray:
        members = list(self.buckets.values())[bucket]
        return np.random.default_rng((self.seed, 1, bucket, turn)).permutation(members)
