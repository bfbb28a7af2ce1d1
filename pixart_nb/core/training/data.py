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


def write_features(config: TrainConfig, batch_size: int = 8, stream: bool = False) -> str:
    """Compute what is missing in the feature cache of a configuration; return a sentence about it.

    ``stream`` keeps one layer of the text encoder in memory at a time.
    """
    if not config.feature_cache:
        raise ConfigError("feature_cache is not given; expected the folder for the features")
    labels, sizes = training_data(config)
    networks = FrozenNetworks(config, stream)
    if networks.control:
        networks.control.check(labels)
    cache = networks.feature_cache(labels, sizes)
    if cache.unusable():  # names damaged images before hours of work
        load_labels(config.json_path, config.image_dir, decode=True)
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
    sampler = BucketSampler(sizes, config.batch_size, config.seed)
    described = sum(bool(label.sharegpt4v) for label in labels)
    return f"{len(labels)} images, {described} of them with a sharegpt4v caption\n{sampler.describe()}"
