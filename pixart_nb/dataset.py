"""The data of a training configuration: its labels and sizes, and the cache of its features."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pixart_nb.config import ConfigError
from pixart_nb.core.checkpoints.components import LOADERS, component_places
from pixart_nb.core.checkpoints.store import read_json
from pixart_nb.core.data.buckets import BucketSampler, Size, training_sizes
from pixart_nb.core.data.features import FeatureCache, MadeBy, fingerprint, text_embedder, vae_encoder
from pixart_nb.core.data.labels import Label, load_labels
from pixart_nb.train_config import TrainConfig

ENCODERS = ("vae", "text_encoder", "tokenizer")
#: Image pixels of a latent cell.
FACTOR = 8


def training_data(config: TrainConfig, decode: bool = False) -> tuple[list[Label], list[Size]]:
    """The checked labels of a configuration, and the size at which each picture is trained.

    Raises ``LabelError``, which lists all that is wrong with them, and ``DataError`` for sizes that cannot be.
    """
    labels = load_labels(config.json_path, config.image_dir, decode)
    return labels, training_sizes(labels, image_size(config), config.multi_scale, config.valid_num)


def image_size(config: TrainConfig) -> int:
    """Side in pixels of the pictures to train on: ``sample_size`` in pixels, or the model's own."""
    if config.sample_size:
        return config.sample_size * FACTOR
    if config.model and not config.checkpoint:
        folder = component_places(config.model, ["transformer"])["transformer"]
        if (folder / "config.json").is_file() and (
            cells := read_json(folder / "config.json").get("sample_size")
        ):
            return int(cells) * FACTOR
    raise ConfigError(
        "sample_size is not given, nor known from the model; expected image pixels / 8, 64 for 512"
    )


def encoder_places(config: TrainConfig) -> dict[str, Path]:
    """Where the autoencoder, the text encoder and the tokenizer of a configuration lie."""
    roots = {name: getattr(config, f"{name}_root") for name in ENCODERS}
    missing = [name for name, root in roots.items() if not root]
    found = component_places(config.model, missing) if missing else {}
    return {name: Path(root) for name, root in roots.items() if root} | found


def feature_cache(config: TrainConfig, labels: list[Label], sizes: list[Size]) -> FeatureCache:
    """The feature cache of a configuration, for these labels and sizes; it may not have been written yet."""
    if not config.feature_cache:
        raise ConfigError("feature_cache is not given; expected the folder of the features")
    places = encoder_places(config)
    made_by = MadeBy(
        fingerprint(places["vae"]),
        fingerprint(places["text_encoder"], places["tokenizer"]),
        config.t5_max_length,
        config.clean_caption,
        config.feature_dtype,
    )
    return FeatureCache(config.feature_cache, labels, sizes, made_by)


def write_features(config: TrainConfig, batch_size: int = 8, stream: bool = False) -> str:
    """Make what is missing or stale in the feature cache of a configuration; a sentence of what was done.

    The networks compute in float32. The autoencoder is dropped before the text encoder is loaded; with ``stream`` the
    latter keeps one layer at a time.
    """
    labels, sizes = training_data(config)
    cache = feature_cache(config, labels, sizes)
    if not cache.unusable():
        return f"{cache.folder}: all {len(cache.shards())} shards were there; nothing to do"
    load_labels(
        config.json_path, config.image_dir, decode=True
    )  # names every damaged picture before hours of work
    places, loaded = encoder_places(config), {}

    def encode(pixels: Any) -> Any:
        return _once(loaded, "vae", lambda: vae_encoder(_load("vae", places)))(pixels)

    def embed(captions: list[str]) -> Any:
        loaded.pop("vae", None)
        return _once(loaded, "text", lambda: _embedder(config, places, stream))(captions)

    made = cache.write(encode, embed, batch_size)
    reasons = ", ".join(f"{count} {reason}" for reason, count in made.items())
    return f"{cache.folder}: made {sum(made.values())} of {len(cache.shards())} shards ({reasons})"


def describe(config: TrainConfig) -> str:
    """Check the data of a configuration whole; a line for each size that it is trained at."""
    labels, sizes = training_data(config, decode=True)
    sampler = BucketSampler(sizes, config.batch_size, config.seed)
    described = sum(bool(label.sharegpt4v) for label in labels)
    return f"{len(labels)} pictures, {described} of them with a sharegpt4v caption\n{sampler.describe()}"


def _load(name: str, places: dict[str, Path]) -> Any:
    from pixart_nb.core.backend import ms

    return LOADERS[name](places[name], ms.float32)


def _embedder(config: TrainConfig, places: dict[str, Path], stream: bool) -> Callable:
    from pixart_nb.core.checkpoints.text_encoder import T5EncoderModel

    encoder = T5EncoderModel.from_pretrained(places["text_encoder"], stream=stream)
    return text_embedder(_load("tokenizer", places), encoder, config.t5_max_length, config.clean_caption)


def _once(made: dict[str, Callable], name: str, make: Callable[[], Callable]) -> Callable:
    if name not in made:
        made[name] = make()
    return made[name]
