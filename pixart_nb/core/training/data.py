"""The data of a training configuration: checked, counted by size, and turned into features once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pixart_nb.config import ConfigError, TrainConfig
from pixart_nb.core.checkpoints.components import LOADERS
from pixart_nb.core.data.buckets import BucketSampler, Size, training_sizes
from pixart_nb.core.data.features import FeatureCache, MadeBy, text_embedder, vae_encoder
from pixart_nb.core.data.labels import Label, load_labels
from pixart_nb.core.io import read_json
from pixart_nb.core.training.networks import Networks, places_of

#: Image pixels of a latent cell.
FACTOR = 8


def training_data(config: TrainConfig, decode: bool = False) -> tuple[list[Label], list[Size]]:
    """The checked labels of a configuration, and the size at which each picture is trained.

    Raises ``LabelError``, which lists all that is wrong with them, and ``DataError`` for sizes that cannot be.
    """
    side = image_size(config)
    labels = load_labels(config.json_path, config.image_dir, decode)
    return labels, training_sizes(labels, side, config.multi_scale, config.valid_num)


def image_size(config: TrainConfig) -> int:
    """Side in pixels of the pictures to train on: ``sample_size`` in pixels, or the model's own."""
    if config.sample_size:
        return config.sample_size * FACTOR
    place = places_of(config)["transformer"] / "config.json"
    if place.is_file() and (cells := read_json(place).get("sample_size")):
        return int(cells) * FACTOR
    raise ConfigError(
        "sample_size is not given, nor known from the model; expected image pixels / 8, 64 for 512"
    )


def write_features(config: TrainConfig, batch_size: int = 8, stream: bool = False) -> str:
    """Make what is missing or stale in the feature cache of a configuration; a sentence of what was done.

    The autoencoder is dropped before the text encoder is loaded; with ``stream`` the latter keeps one layer at a time.
    """
    if not config.feature_cache:
        raise ConfigError("feature_cache is not given; expected the folder for the features")
    labels, sizes = training_data(config)
    networks = Networks(config)
    made_by = MadeBy(
        **networks.fingerprints(),
        max_length=config.t5_max_length,
        clean_caption=config.clean_caption,
        dtype=config.feature_dtype,
    )
    cache = FeatureCache(config.feature_cache, labels, sizes, made_by)
    if not cache.unusable():
        return f"{cache.folder}: all {len(cache.shards())} shards were there; nothing to do"
    load_labels(
        config.json_path, config.image_dir, decode=True
    )  # names every damaged picture before hours of work
    made = cache.write(_encoder(networks), _embedder(networks, stream), batch_size)
    reasons = ", ".join(f"{count} {reason}" for reason, count in made.items())
    return f"{cache.folder}: made {sum(made.values())} of {len(cache.shards())} shards ({reasons})"


def describe(config: TrainConfig) -> str:
    """Check the data of a configuration whole; a line for each size that it is trained at."""
    labels, sizes = training_data(config, decode=True)
    sampler = BucketSampler(sizes, config.batch_size, config.seed)
    described = sum(bool(label.sharegpt4v) for label in labels)
    return f"{len(labels)} pictures, {described} of them with a sharegpt4v caption\n{sampler.describe()}"


def _encoder(networks: Networks) -> Callable:
    return lambda pixels: vae_encoder(networks.vae)(pixels)  # loaded when it is needed


def _embedder(networks: Networks, stream: bool) -> Callable:
    loaded: list[Callable] = []

    def embed(captions: list[str]) -> Any:
        if not loaded:
            vars(networks).pop("vae", None)  # latents are made first, so it is no longer needed
            loaded.append(_streamed(networks) if stream else networks.embed)
        return loaded[0](captions)

    return embed


def _streamed(networks: Networks) -> Callable:
    from pixart_nb.core.backend import ms
    from pixart_nb.core.checkpoints.text_encoder import T5EncoderModel

    config, places = networks.config, networks.places
    tokenizer = LOADERS["tokenizer"](places["tokenizer"], ms.float32)
    encoder = T5EncoderModel.from_pretrained(places["text_encoder"], stream=True)
    return text_embedder(tokenizer, encoder, config.t5_max_length, config.clean_caption)
