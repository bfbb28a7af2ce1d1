"""Data of a training configuration: validated, counted by size, and turned into features."""

from __future__ import annotations

from pixart_nb.config import ConfigError, TrainConfig
from pixart_nb.core.data.buckets import BucketSampler, Size, training_sizes
from pixart_nb.core.data.labels import Label, load_labels
from pixart_nb.core.io import read_json
from pixart_nb.core.training.networks import FrozenNetworks, component_paths

#: Image pixels per latent.
FACTOR = 8


def training_data(config: TrainConfig, decode: bool = False) -> tuple[list[Label], list[Size]]:
    """Return the labels of a configuration and the training size of each image.

    Raises ``LabelError`` with all problems of the labels, and ``DataError`` for sizes that are not possible.
    """
    labels = load_labels(config.json_path, config.image_dir, decode)
    return labels, training_sizes(labels, image_size(config), config.multi_scale, config.valid_num)


def image_size(config: TrainConfig) -> int:
    """Return the side in pixels of the images to train on: ``sample_size`` in pixels, or the model's."""
    if config.sample_size:
        return config.sample_size * FACTOR
    path = component_paths(config)["transformer"] / "config.json"
    if path.is_file() and (side := read_json(path).get("sample_size")):
        return int(side) * FACTOR
    raise ConfigError("sample_size is not given and the model does not say it; expected image pixels / 8, 64 for 512")


def write_features(config: TrainConfig, batch_size: int = 8, stream: bool = False) -> str:
    """Compute what is missing in the feature cache of a configuration; return a sentence about it.

    ``stream`` keeps one layer of the text encoder in memory at a time.
    """
    if not config.feature_cache:
        raise ConfigError("feature_cache is not given; expected the folder for the features")
    labels, sizes = training_data(config)
    networks = FrozenNetworks(config)
    cache = networks.feature_cache(labels, sizes)
    if cache.unusable():  # names damaged images before hours of work
        load_labels(config.json_path, config.image_dir, decode=True)
    made = networks.fill(cache, batch_size, stream)
    if not made:
        return f"{cache.folder}: all {len(cache.shards())} shards exist; nothing to do"
    reasons = ", ".join(f"{count} {reason}" for reason, count in made.items())
    unused = cache.unused()
    other = f"; {len(unused)} shards ({sum(p.stat().st_size for p in unused) / 1e6:.0f} MB) are of other data" * bool(
        unused
    )
    return f"{cache.folder}: made {sum(made.values())} of {len(cache.shards())} shards ({reasons}){other}"


def describe(config: TrainConfig) -> str:
    """Validate the data of a configuration and return a text with one line per training size."""
    labels, sizes = training_data(config, decode=True)
    sampler = BucketSampler(sizes, config.batch_size, config.seed)
    described = sum(bool(label.sharegpt4v) for label in labels)
    return f"{len(labels)} images, {described} of them with a sharegpt4v caption\n{sampler.describe()}"
