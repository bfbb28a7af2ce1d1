"""The feature cache: what the autoencoder and the text encoder make of the data, computed once and kept in shards."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from safetensors import safe_open
from tqdm.auto import tqdm

from pixart_nb.core.data.buckets import BucketSampler, Size
from pixart_nb.core.data.errors import DataError
from pixart_nb.core.data.images import fit, load_image, to_signed
from pixart_nb.core.data.labels import Label
from pixart_nb.core.data.reader import Chooser
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import CheckpointError, load_metadata, remove_temporaries, save_tensors

#: Pictures of one shard: an interruption loses the work of one, and the memory holds one.
SHARD = 64
#: Shards that are kept mapped at once.
OPEN = 1024
DTYPES = {"fp16": np.float16, "fp32": np.float32}
LATENTS, CAPTIONS = "latents", "captions"

#: Pictures (N, 3, H, W) float32 in -1..1 -> mean and standard deviation of their latents, each (N, C, h, w).
Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
#: N captions -> embeddings (N, T, C) and mask (N, T) bool, True = token.
Embed = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


class FeatureError(DataError):
    """A feature cache that is not whole, or was made from something else."""


@dataclass(frozen=True)
class MadeBy:
    """What makes features, besides the labels: fingerprints of the networks and how they are used.

    ``vae`` and ``text_encoder`` (with its tokenizer) come from ``fingerprint``. ``max_length``: tokens of the longest
    caption. ``dtype``: ``fp16`` | ``fp32``, what the numbers are stored as.
    """

    vae: str
    text_encoder: str
    max_length: int = 300
    clean_caption: bool = True
    dtype: str = "fp16"

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise PixArtNBError(f"features stored as {self.dtype!r}; expected one of {', '.join(DTYPES)}")


def fingerprint(*places: str | os.PathLike[str], blocks: int = 64, block: int = 65_536) -> str:
    """A short text that tells networks apart by the files in their folders, wherever these lie.

    Names, sizes and ``blocks`` evenly spaced blocks of every file count: training changes weights everywhere, and
    reading 20 GB whole would take longer than many a training step.
    """
    digest = hashlib.sha256()
    for place in map(Path, places):
        files = sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]
        if not files or not files[0].is_file():
            raise DataError(f"{place} holds no files; expected the folder of a network")
        for path in files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for start in sorted({max(size - block, 0) * i // (blocks - 1) for i in range(blocks)}):
                    file.seek(start)
                    digest.update(file.read(block))
    return digest.hexdigest()[:16]


class FeatureCache:
    """The features of labels in a folder: ``latents-00000.safetensors``, ``captions-00000.safetensors``, ...

    Each shard holds ``SHARD`` pictures and says what made it: pictures (path, size and time of change), training
    sizes, captions, networks, dtype. ``write`` makes those that are missing or made from something else; ``check``
    refuses them.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        labels: Sequence[Label],
        sizes: Sequence[Size],
        made_by: MadeBy,
    ):
        if len(labels) != len(sizes):
            raise PixArtNBError(
                f"{len(labels)} labels and {len(sizes)} sizes; expected a size for each label"
            )
        self.folder, self.labels, self.sizes, self.made_by = Path(folder), labels, sizes, made_by
        self._opened = lru_cache(maxsize=OPEN)(lambda path: safe_open(path, framework="numpy"))

    # ---- what there is

    def shards(self) -> list[tuple[str, int]]:
        """Kind and number of every shard, in the order in which they are made."""
        count = -(-len(self.labels) // SHARD)
        return [(kind, number) for kind in (LATENTS, CAPTIONS) for number in range(count)]

    def path(self, kind: str, number: int) -> Path:
        """Where a shard lies."""
        return self.folder / f"{kind}-{number:05d}.safetensors"

    def key(self, kind: str, number: int) -> dict[str, str]:
        """What makes a shard, part by part, as its file says it."""
        rows = self._rows(number)
        labels, made_by = [self.labels[i] for i in rows], self.made_by
        if kind == LATENTS:
            stats = [(label.path, s.st_size, s.st_mtime_ns) for label in labels for s in [label.file.stat()]]
            sizes = [self.sizes[i] for i in rows]
            return {
                "pictures": _hash(stats),
                "sizes": _hash(sizes),
                "vae": made_by.vae,
                "dtype": made_by.dtype,
            }
        return {
            "captions": _hash([(label.prompt, label.sharegpt4v) for label in labels]),
            "text encoder": made_by.text_encoder,
            "caption length": str(made_by.max_length),
            "caption cleaning": str(made_by.clean_caption),
            "dtype": made_by.dtype,
        }

    def unusable(self) -> dict[tuple[str, int], str]:
        """Shards that cannot be used, and why: ``missing``, ``damaged``, or what else they were made from."""
        checked = {shard: self._reason(*shard) for shard in self.shards()}
        return {shard: reason for shard, reason in checked.items() if reason}

    def check(self) -> None:
        """Refuse a cache that is not whole, or was made from other data, networks or settings."""
        if unusable := self.unusable():
            raise FeatureError(
                f"{self.folder}: {len(unusable)} of {len(self.shards())} shards of features cannot be used: "
                f"{_counted(unusable.values())}. Make them with `pixart-nb dataset features -c` and the configuration."
            )

    def _reason(self, kind: str, number: int) -> str:
        path = self.path(kind, number)
        if not path.is_file():
            return "missing"
        try:
            found = load_metadata(path)
        except CheckpointError:
            return "damaged"
        wanted = self.key(kind, number)
        other = [name for name in wanted if found.get(name) != wanted[name]]
        return f"made from other {', '.join(other)}" if other else ""

    def _rows(self, number: int) -> range:
        return range(number * SHARD, min((number + 1) * SHARD, len(self.labels)))

    # ---- making it

    def write(self, encode: Encode, embed: Embed, batch_size: int = 8) -> dict[str, int]:
        """Make every shard that is missing or was made from something else; how many, by reason.

        Stopped at any moment, it leaves whole shards, and the next call goes on after them. Shards of pictures that
        are no longer there are removed. Raises ``ImageError`` for a picture that cannot be read and ``DataError``
        for a full disk and for features that are not finite.
        """
        remove_temporaries(self.folder)
        todo = self.unusable()
        done = sum(len(self._rows(number)) for _, number in self.shards()) - sum(
            len(self._rows(number)) for _, number in todo
        )
        total = 2 * len(self.labels)
        with tqdm(total=total, initial=done, desc="features", disable=not todo) as bar, _warned_once():
            for kind, number in todo:
                parts = self._latents(number, encode, batch_size) if kind == LATENTS else None
                tensors = dict(parts or self._captions(number, embed, batch_size))
                path = self.path(kind, number)
                save_tensors(path, tensors, self.key(kind, number))
                bar.update(len(self._rows(number)))
        self._opened.cache_clear()
        self._remove_others()
        return dict(Counter(todo.values()))

    def _latents(self, number: int, encode: Encode, batch_size: int) -> Iterator[tuple[str, np.ndarray]]:
        for size, rows in _grouped(self._rows(number), self.sizes.__getitem__, batch_size):
            pixels = np.stack([fit(load_image(self.labels[i].file), *size) for i in rows])
            for i, mean, std in zip(rows, *encode(to_signed(pixels)), strict=True):
                yield f"{i}/mean", self._stored(mean, self.labels[i].path)
                yield f"{i}/std", self._stored(std, self.labels[i].path)

    def _captions(self, number: int, embed: Embed, batch_size: int) -> Iterator[tuple[str, np.ndarray]]:
        texts = {"empty": ""}
        for i in self._rows(number):
            label = self.labels[i]
            texts |= {f"{i}/prompt": label.prompt}
            texts |= {f"{i}/sharegpt4v": label.sharegpt4v} if label.sharegpt4v else {}
        names = sorted(texts, key=lambda name: len(texts[name]))  # those of a batch are padded to its longest
        for _, part in _grouped(names, lambda name: None, batch_size):
            embeds, mask = embed([texts[name] for name in part])
            for name, tokens, seen in zip(part, embeds, mask, strict=True):
                yield name, self._stored(tokens[seen], f"caption {texts[name][:60]!r}")

    def _stored(self, values: np.ndarray, source: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            stored = np.asarray(values).astype(DTYPES[self.made_by.dtype])
        if not np.isfinite(stored).all():
            raise DataError(
                f"{source}: its features are not finite as {self.made_by.dtype} (up to {np.abs(values).max():.3g}); "
                "store them as fp32, or look at the network's dtype"
            )
        return stored

    def _remove_others(self) -> None:
        wanted = {self.path(*shard) for shard in self.shards()}
        for kind in (LATENTS, CAPTIONS):
            for path in set(self.folder.glob(f"{kind}-[0-9]*.safetensors")) - wanted:
                path.unlink()

    # ---- reading it

    def latents(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation (C, h, w) of the latents of picture ``index``, as stored."""
        return tuple(self._tensor(LATENTS, index, part) for part in ("mean", "std"))

    def caption(self, index: int, original: bool = True) -> np.ndarray:
        """Embedding (tokens, C) of the original prompt of picture ``index``, or of its ``sharegpt4v`` caption."""
        return self._tensor(CAPTIONS, index, "prompt" if original else "sharegpt4v")

    def empty_caption(self) -> np.ndarray:
        """Embedding (tokens, C) of the empty caption, which a dropped caption becomes."""
        return self._opened(self.path(CAPTIONS, 0)).get_tensor("empty")

    def _tensor(self, kind: str, index: int, part: str) -> np.ndarray:
        return self._opened(self.path(kind, index // SHARD)).get_tensor(f"{index}/{part}")


@dataclass(frozen=True)
class FeatureBatch:
    """A batch from the cache. ``mean`` and ``std`` (N, C, h, w) float32 of the latents, before the scaling factor;
    ``embeds`` (N, T, C) float32 padded with zeros to the longest, ``mask`` (N, T) bool, True = token; ``indices``
    (N,) of the labels. Latents are ``mean + std * noise``."""

    mean: np.ndarray
    std: np.ndarray
    embeds: np.ndarray
    mask: np.ndarray
    indices: np.ndarray


class FeatureReader(Chooser):
    """The batches of ``ImageReader``, the same pictures and captions, as features from a cache."""

    def __init__(self, cache: FeatureCache, sampler: BucketSampler, real_prompt_ratio: float = 0.5):
        cache.check()
        super().__init__(cache.labels, sampler, real_prompt_ratio)
        self.cache = cache

    def batch(self, step: int) -> FeatureBatch:
        """This worker's part of batch ``step``."""
        choice = self.choose(step)
        means, stds = zip(*(self.cache.latents(i) for i in choice.indices), strict=True)
        pairs = zip(choice.indices, choice.original, strict=True)
        embeds, mask = padded([self.cache.caption(i, original) for i, original in pairs])
        return FeatureBatch(
            np.stack(means).astype(np.float32),
            np.stack(stds).astype(np.float32),
            embeds,
            mask,
            choice.indices,
        )


def padded(embeddings: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (tokens, C) of several lengths as one (N, T, C) float32 with zeros behind, and its mask (N, T)."""
    lengths = np.array([len(tokens) for tokens in embeddings])
    mask = np.arange(lengths.max()) < lengths[:, None]
    embeds = np.zeros((*mask.shape, embeddings[0].shape[1]), np.float32)
    embeds[mask] = np.concatenate(embeddings)
    return embeds, mask


def vae_encoder(vae) -> Encode:
    """The encoding side of an ``AutoencoderKL``, as ``FeatureCache.write`` takes it."""
    from pixart_nb.core.backend import ms

    def encode(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        latents = vae.encode(ms.Tensor(pixels))[0]
        mean, logvar = (part.astype(ms.float32).asnumpy() for part in (latents.mean, latents.logvar))
        return mean, np.exp(0.5 * logvar)

    return encode


def text_embedder(tokenizer, text_encoder, max_length: int, clean_caption: bool = True) -> Embed:
    """Tokenizer and T5 encoder, as ``FeatureCache.write`` takes them; prompts are prepared as for sampling."""
    from pixart_nb.core.backend import ms
    from pixart_nb.core.sampling.conditioning import embed

    def embedded(captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        embeds, mask = embed(tokenizer, text_encoder, captions, clean_caption, max_length, trim=True)
        return embeds.astype(ms.float32).asnumpy(), mask

    return embedded


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _counted(reasons) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).items())


def _grouped(items, kind: Callable, size: int) -> Iterator[tuple[object, list]]:
    """Items of the same kind together, at most ``size`` at once, with their kind."""
    groups: dict[object, list] = {}
    for item in items:
        groups.setdefault(kind(item), []).append(item)
    for name, members in groups.items():
        for start in range(0, len(members), size):
            yield name, members[start : start + size]


@contextmanager
def _warned_once() -> Iterator[None]:
    """One warning, with a count, in place of one for each caption that is cut or has unknown characters."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    if caught:
        more = f" ({len(caught) - 1} more like it)" if len(caught) > 1 else ""
        warnings.warn(f"{caught[0].message}{more}", stacklevel=4)
