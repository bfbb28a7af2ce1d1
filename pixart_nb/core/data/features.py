"""Feature cache: latents and caption embeddings of a data set, computed once and stored in shards."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from safetensors import safe_open
from tqdm.auto import tqdm

from pixart_nb.core.data.buckets import Size
from pixart_nb.core.data.control import ControlImages
from pixart_nb.core.data.files import DataError
from pixart_nb.core.data.images import ImageError, fit, load_image, to_signed
from pixart_nb.core.data.labels import Label
from pixart_nb.core.errors import FolderInUseError, WriteError
from pixart_nb.core.io import (
    CRC,
    CheckpointError,
    check_sums,
    folder_lock,
    load_metadata,
    load_tensors,
    save_tensors,
    tensor_crc,
)

#: Images of one shard: an interruption loses the work of one, and the memory holds one.
SHARD = 64
#: Shards that are kept open at once.
OPEN_SHARDS = 1024
DTYPES = {"fp16": np.float16, "fp32": np.float32}
LATENTS, CONTROL, CAPTIONS = "latents", "control", "captions"

#: Images (N, 3, H, W) float32 in -1..1 -> mean and standard deviation of their latents, each (N, C, h, w).
Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
#: N captions -> embeddings (N, T, C) and mask (N, T) bool, True = token.
Embed = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]


class FeatureError(DataError):
    """A feature cache that is incomplete or damaged."""


@dataclass(frozen=True)
class MadeBy:
    """Networks (their ``fingerprint``) and settings that features depend on, besides the labels.

    ``max_length``: tokens of the longest caption. ``dtype`` of the stored features: ``fp16`` | ``fp32``.
    """

    vae: str
    text_encoder: str
    max_length: int = 300
    clean_caption: bool = True
    dtype: str = "fp16"

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise DataError(f"dtype of the features is {self.dtype!r}; expected one of {', '.join(DTYPES)}")


def fingerprint(*paths: str | os.PathLike[str]) -> str:
    """Return a short text that distinguishes networks by the files in their folders, wherever the folders are.

    It depends on names, sizes and evenly spaced blocks of every file: training changes weights everywhere.
    """
    digest = hashlib.sha256()
    for folder in map(Path, paths):
        files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else [folder]
        if not files or not files[0].is_file():
            raise DataError(f"{folder} holds no files; expected the folder of a network")
        for path in files:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            for content in _blocks(path, 64, 65_536):
                digest.update(content)
    return digest.hexdigest()[:16]


class FeatureCache:
    """Features of labels in a folder, in shards of ``SHARD`` images that are named after what they were made from.

    That is, for ``latents-HASH.safetensors``: the image files, training sizes, VAE and dtype; for
    ``captions-HASH.safetensors``: the captions, text encoder, its settings and dtype. So several data sets can share a
    folder, and a shard is never rewritten. ``control`` adds the latents of condition images, ``control-HASH``.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        labels: Sequence[Label],
        sizes: Sequence[Size],
        made_by: MadeBy,
        control: ControlImages | None = None,
    ):
        if len(labels) != len(sizes):
            raise DataError(f"{len(labels)} labels and {len(sizes)} sizes; expected a size for each label")
        self.folder, self.labels, self.sizes, self.made_by = Path(folder), labels, sizes, made_by
        self.control = control
        self._opened = lru_cache(maxsize=OPEN_SHARDS)(_open)

    def unusable(self) -> dict[tuple[str, int], str]:
        """Return the shards that cannot be used, with the reason, ``missing`` or ``damaged``."""
        states = {shard: _state(path) for shard, path in self.paths.items()}
        return {shard: state for shard, state in states.items() if state}

    def remove_damaged(self) -> None:
        """Read every shard, and remove those with values that do not have their checksums."""
        for path in filter(Path.exists, self.paths.values()):
            try:
                load_tensors(path)
            except CheckpointError:
                path.unlink()

    def unused(self) -> list[Path]:
        """Return the shards in the folder that belong to other data, networks or settings."""
        return sorted(set(self.folder.glob("*.safetensors")) - set(self.paths.values()))

    def check(self) -> None:
        """Raise ``FeatureError`` unless all shards exist."""
        if unusable := self.unusable():
            reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(unusable.values()).items())
            other = f"; {len(self.unused())} shards are of other data, networks or settings" * bool(self.unused())
            raise FeatureError(
                f"{self.folder}: {len(unusable)} of {len(self.paths)} shards of features cannot be used: {reasons}"
                f"{other}. Make them with `pixart-nb dataset features -c` and the configuration."
            )

    @cached_property
    def paths(self) -> dict[tuple[str, int], Path]:
        """Path of every shard by feature (such as latents) and number, in the order in which they are made."""
        count = -(-len(self.labels) // SHARD)
        features = (LATENTS, CONTROL, CAPTIONS) if self.control else (LATENTS, CAPTIONS)
        shards = [(feature, number) for feature in features for number in range(count)]
        return {
            (feature, number): self.folder / f"{feature}-{_hash(self._source(feature, number))}.safetensors"
            for feature, number in shards
        }

    def _source(self, feature: str, number: int) -> list[object]:
        """Return everything that the features of a shard depend on."""
        rows, made_by = self._rows(number), self.made_by
        if feature != CAPTIONS:
            files = [self.control.file(self.labels[i]) if feature == CONTROL else self.labels[i].file for i in rows]
            edges = self.control.settings if feature == CONTROL else []
            images = [_image_hash(file) for file in files]
            return [images, [self.sizes[i] for i in rows], made_by.vae, made_by.dtype, *edges]
        settings = [made_by.text_encoder, made_by.max_length, made_by.clean_caption, made_by.dtype]
        return [[self.labels[i].captions for i in rows], *settings]

    def _rows(self, number: int) -> range:
        return range(number * SHARD, min((number + 1) * SHARD, len(self.labels)))

    def write(self, encode: Encode, embed: Embed, batch_size: int = 8, rank: int = 0, world: int = 1) -> dict[str, int]:
        """Make every shard of this worker that is missing or damaged; return their number by reason.

        Worker ``rank`` of ``world`` makes every ``world``-th shard; ``wait`` waits for those of the others. Interrupted
        at any moment, it leaves complete shards, and the next call makes the others. ``encode`` is not called after
        ``embed``. Raises ``FolderInUseError`` while another process writes into the folder, ``ImageError`` and
        ``DataError`` for images and features that cannot be used, ``WriteError`` for a full disk.
        """
        if not self.unusable():
            self._remove_stale_lock()
            return {}
        own = set(list(self.paths)[rank::world])
        with folder_lock(self.folder, name=f".lock-{rank}" if rank else ".lock"):
            todo = {shard: reason for shard, reason in self.unusable().items() if shard in own}
            counts = {shard: len(self._rows(shard[1])) for shard in self.paths if shard in own}
            done = sum(count for shard, count in counts.items() if shard not in todo)
            with tqdm(total=sum(counts.values()), initial=done, desc="features") as bar, _warned_once():
                for feature, number in todo:
                    if feature == CAPTIONS:
                        tensors = self._captions(number, embed, batch_size)
                    else:
                        tensors = self._latents(feature, number, encode, batch_size)
                    save_tensors(self.paths[feature, number], dict(tensors))
                    bar.update(counts[feature, number])
        self._opened.cache_clear()
        return dict(Counter(todo.values()))

    def wait(self, seconds: float = 1.0) -> None:
        """Wait until every shard is usable, looking every few ``seconds``.

        Workers wait for files, as a collective would time out while others encode. If a worker fails, msrun ends all.
        """
        for path in self.paths.values():
            while _state(path):
                time.sleep(seconds)

    def _remove_stale_lock(self) -> None:
        """Remove the lock file of a writer that was killed after its last shard."""
        if (self.folder / ".lock").exists():
            with suppress(FolderInUseError, WriteError), folder_lock(self.folder):
                pass

    def _latents(self, feature: str, number: int, encode: Encode, batch_size: int) -> Iterator[tuple[str, np.ndarray]]:
        read = self.control.pixels if feature == CONTROL else image_pixels
        for size, rows in _grouped(self._rows(number), self.sizes.__getitem__, batch_size):
            pixels = np.stack([read(self.labels[i], size) for i in rows])
            for i, mean, std in zip(rows, *encode(to_signed(pixels)), strict=True):
                yield f"{i % SHARD}/mean", self._stored(mean, self.labels[i].path)
                if feature == LATENTS:
                    yield f"{i % SHARD}/std", self._stored(std, self.labels[i].path)

    def _captions(self, number: int, embed: Embed, batch_size: int) -> Iterator[tuple[str, np.ndarray]]:
        texts = {"empty": ""}
        for i in self._rows(number):
            texts |= {f"{i % SHARD}/{k}": text for k, text in enumerate(self.labels[i].captions)}
        names = sorted(texts, key=lambda name: len(texts[name]))  # those of a batch are padded to its longest
        for _, part in _grouped(names, lambda name: None, batch_size):
            embeds, mask = embed([texts[name] for name in part])
            for name, tokens, row_mask in zip(part, embeds, mask, strict=True):
                yield name, self._stored(tokens[row_mask], f"caption {texts[name][:60]!r}")

    def _stored(self, values: np.ndarray, source: str) -> np.ndarray:
        with np.errstate(over="ignore"):
            stored = values.astype(DTYPES[self.made_by.dtype])
        if not np.isfinite(stored).all():
            raise DataError(
                f"{source}: its features are not finite as {self.made_by.dtype} (up to {np.abs(values).max():.3g}); "
                "store them as fp32, or check the dtype of the network"
            )
        return stored

    def latents(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation (C, h, w) of the latents of image ``index``, as stored."""
        return tuple(self._tensor(LATENTS, index // SHARD, f"{index % SHARD}/{part}") for part in ("mean", "std"))

    def control_latents(self, index: int) -> np.ndarray:
        """Return the latents (C, h, w) of the condition of image ``index``, as stored."""
        return self._tensor(CONTROL, index // SHARD, f"{index % SHARD}/mean")

    def caption(self, index: int, number: int = 0) -> np.ndarray:
        """Return the embedding (tokens, C) of a caption of image ``index``, counted as in ``Label.captions``."""
        return self._tensor(CAPTIONS, index // SHARD, f"{index % SHARD}/{number}")

    def empty_caption(self) -> np.ndarray:
        """Return the embedding (tokens, C) of the empty caption, which a dropped caption becomes."""
        return self._tensor(CAPTIONS, 0, "empty")

    def _tensor(self, feature: str, number: int, name: str) -> np.ndarray:
        path = self.paths[feature, number]
        content, sums = self._opened(path)
        tensor = content.get_tensor(name)
        try:
            check_sums(path, sums, {name: tensor_crc(tensor)})
        except CheckpointError as error:
            raise FeatureError(f"{path} is damaged; make it again with `pixart-nb dataset features`") from error
        return tensor


def image_pixels(label: Label, size: Size) -> np.ndarray:
    """Return an image scaled and cropped to its training size: (height, width, 3) uint8."""
    return fit(load_image(label.file), *size)


def _state(path: Path) -> str:
    try:
        load_metadata(path)
    except CheckpointError:
        return "damaged" if path.exists() else "missing"
    return ""


def _open(path: Path) -> tuple[object, str]:
    content = safe_open(path, framework="numpy")
    return content, (content.metadata() or {}).get(CRC, "{}")


def images_fingerprint(paths: Iterable[Path]) -> str:
    """Return a short text that distinguishes image files by their content, wherever and however old they are."""
    return _hash([_image_hash(path, dated=False) for path in paths])


def _image_hash(path: Path, dated: bool = True) -> str:
    """Return a hash of an image file: its size, blocks of its content, and, if ``dated``, its time of change."""
    try:
        status = path.stat()
        content = b"".join(_blocks(path, 8, 8192))
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from None
    changed = f"{status.st_mtime_ns} " if dated else ""
    return hashlib.sha256(f"{status.st_size} {changed}".encode() + content).hexdigest()[:16]


def _blocks(path: Path, count: int, size: int) -> Iterator[bytes]:
    """Yield evenly spaced blocks of a file, the whole file if it is small."""
    last = max(path.stat().st_size - size, 0)
    with path.open("rb") as file:
        for start in sorted({last * i // (count - 1) for i in range(count)}):
            file.seek(start)
            yield file.read(size)


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _grouped(items, key: Callable, size: int) -> Iterator[tuple[object, list]]:
    """Yield items of the same key together, at most ``size`` at once, with their key."""
    groups: dict[object, list] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    for name, members in groups.items():
        for start in range(0, len(members), size):
            yield name, members[start : start + size]


@contextmanager
def _warned_once() -> Iterator[None]:
    """Give one warning, with a count, instead of one for each caption that is truncated or has unknown characters."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    if caught:
        more = f" ({len(caught) - 1} more like it)" if len(caught) > 1 else ""
        warnings.warn(f"{caught[0].message}{more}", stacklevel=4)
