"""Data of a training configuration: validated, counted by size, and turned into features."""

from __future__ import annotations

import re
import warnings

from pixart_nb.config import ConfigError, TrainConfig
from pixart_nb.core.data.buckets import BucketSampler, Size, training_sizes
from pixart_nb.core.data.files import DataError
from pixart_nb.core.data.images import load_image
from pixart_nb.core.data.labels import Label, load_labels
from pixart_nb.core.io import read_json
from pixart_nb.core.sampling.text import prepare_prompt, removed_characters
from pixart_nb.core.training.networks import FrozenNetworks, component_paths
from pixart_nb.core.training.validation import require_disjoint

#: Links, which caption cleaning removes.
_LINK = re.compile(r"https?:|www\.")
#: Image pixels per latent.
FACTOR = 8


def training_data(config: TrainConfig, decode: bool = False) -> tuple[list[Label], list[Size]]:
    """Return the labels of a configuration and the training size of each image.

    The side of the images is ``sample_size`` in pixels, or the model's. Raises ``LabelError`` with all problems of the
    labels, and ``DataError`` for sizes that are not possible.
    """
    labels, cells = load_labels(config.json_path, config.image_dir, decode), config.sample_size
    path = component_paths(config)["transformer"] / "config.json"
    if not cells and path.is_file():
        cells = int(read_json(path).get("sample_size") or 0)
    if not cells:
        raise ConfigError(
            "sample_size is not given and the model does not say it; expected image pixels / 8, 64 for 512"
        )
    return labels, training_sizes(labels, cells * FACTOR, config.multi_scale, config.valid_num)


def checked_data(config: TrainConfig, labels: list[Label], networks: FrozenNetworks) -> list[Label]:
    """Check what a training reads beside its images; return the labels of the held-out images, none without any.

    Raises ``DataError`` for condition images, held-out images and captions that cannot be used, and ``ImageError``.
    Warns once of captions that lose words when they are cleaned.
    """
    _check_captions(labels, config.clean_caption)
    if networks.control:
        networks.control.check(labels)
        for path in config.validation_control_images:
            load_image(path)
    if not config.validation_json_path:
        return []
    held_out = load_labels(config.validation_json_path, config.validation_image_dir or config.image_dir)
    require_disjoint(labels, held_out)
    if networks.control:
        networks.control.check(held_out)
    return held_out


def _check_captions(labels: list[Label], clean: bool) -> None:
    """Refuse captions of which cleaning leaves nothing, and warn where it leaves nothing, or less, of some.

    Only those are cleaned here that can lose all words: in another script, with a link, or of one or two words.
    """
    if not clean:
        return
    captions = [caption for label in labels for caption in label.captions]
    doubtful = {text for text in captions if not text.isascii() or _LINK.search(text) or len(text.split()) < 3}
    cleaned = {text: prepare_prompt(text, True) for text in doubtful if text.strip()}
    empty = [text for text in captions if text in cleaned and not cleaned[text]]
    shorter = [text for text in captions if cleaned.get(text) and removed_characters(text)]
    if not empty and not shorter:
        return
    parts = {"nothing is left of": empty, "Chinese characters are removed from": shorter}
    counts = " and ".join(f"{what} {len(some)} of {len(captions)}" for what, some in parts.items() if some)
    text = f"caption cleaning: {counts} captions, such as {(empty or shorter)[0][:60]!r}"
    if len(empty) == len(captions):
        raise DataError(f"{text}. Write them in English, or set clean_caption to false")
    warnings.warn(f"{text}. clean_caption: false keeps them", stacklevel=4)


def write_features(config: TrainConfig, batch_size: int = 8, stream: bool = False) -> str:
    """Compute what is missing in the feature cache of a configuration; return a sentence about it.

    ``stream`` keeps one layer of the text encoder in memory at a time.
    """
    if not config.feature_cache:
        raise ConfigError("feature_cache is not given; expected the folder for the features")
    labels, sizes = training_data(config)
    networks = FrozenNetworks(config, stream)
    checked_data(config, labels, networks)
    cache = networks.feature_cache(labels, sizes)
    if cache.unusable():  # names damaged images before hours of work
        load_labels(config.json_path, config.image_dir, decode=True)
    cache.remove_damaged()
    made = networks.fill(cache, batch_size)
    if not made:
        return f"{cache.folder}: all {len(cache.paths)} shards exist; nothing to do"
    sentence = f"{cache.folder}: made {sum(made.values())} of {len(cache.paths)} shards"
    sentence += f" ({', '.join(f'{count} {reason}' for reason, count in made.items())})"
    if unused := cache.unused():
        size = sum(path.stat().st_size for path in unused) / 1e6
        sentence += f"; {len(unused)} shards ({size:.0f} MB) are of other data"
    return sentence


def describe(config: TrainConfig) -> str:
    """Validate the data of a configuration and return a text with one line per training size."""
    labels, sizes = training_data(config, decode=True)
    checked_data(config, labels, FrozenNetworks(config))
    sampler = BucketSampler(sizes, config.batch_size, config.seed)
    described = sum(bool(label.sharegpt4v) for label in labels)
    return f"{len(labels)} images, {described} of them with a sharegpt4v caption\n{sampler.describe()}"
