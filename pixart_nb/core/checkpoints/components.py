"""Components of a pipeline, loaded from and written to the folders of the diffusers layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import key_maps
from pixart_nb.core.checkpoints.configuration import diffusers_config
from pixart_nb.core.checkpoints.files import WEIGHTS, read_tensors, write_safetensors
from pixart_nb.core.checkpoints.layouts import to_layout
from pixart_nb.core.checkpoints.lazy_tensor import LazyTensor
from pixart_nb.core.checkpoints.load import init_empty, load_into, load_transformer
from pixart_nb.core.checkpoints.pipeline_folder import component_paths
from pixart_nb.core.checkpoints.text_encoder import load_t5
from pixart_nb.core.io import CheckpointError, atomic_write, read_json, save_tensors, write_json
from pixart_nb.core.models.t5 import T5Encoder
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig
from pixart_nb.core.sampling.scheduler import Scheduler
from pixart_nb.core.sampling.schedulers import scheduler_from_config
from pixart_nb.core.sampling.text import TextTokenizer


def load_components(
    source: str | Path, names: Sequence[str], dtype: ms.Type, revision: str | None = None, **options
) -> dict[str, Any]:
    """Load components of a pipeline, networks in ``dtype``.

    ``source`` and ``revision`` as in ``component_paths``; ``options``: ``variant`` and ``use_safetensors`` of
    ``open_checkpoint``.
    """
    paths = component_paths(source, names, revision)
    return {name: LOADERS[name](path, dtype, **options) for name, path in paths.items()}


def _load_transformer(path: Path, dtype: ms.Type, **options) -> PixArt:
    return load_transformer(path, dtype=dtype, **options)


def _load_vae(folder: Path, dtype: ms.Type, **options) -> AutoencoderKL:
    path = folder / "config.json"
    config = VAEConfig.from_dict(read_json(path), path)
    net = init_empty(lambda: AutoencoderKL(config), config.compute_dtype(dtype))
    load_into(net, key_maps.rename_former_vae(read_tensors(folder, **options)), folder)
    return net.set_train(False)


def _load_scheduler(folder: Path, dtype: ms.Type, **options) -> Scheduler:
    values = read_json(folder / "scheduler_config.json")
    try:
        return scheduler_from_config(values)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise CheckpointError(f"{folder / 'scheduler_config.json'}: {error}") from error


#: Component -> function of its own folder and the dtype.
LOADERS = {
    "transformer": _load_transformer,
    "text_encoder": load_t5,
    "vae": _load_vae,
    "scheduler": _load_scheduler,
    "tokenizer": lambda folder, dtype, **options: TextTokenizer(folder),
}

# ---- writing


def _weights(net, dtype: type[np.floating]) -> dict[str, np.ndarray]:
    return {name: p.asnumpy().astype(dtype) for name, p in net.parameters_and_names()}


def write_transformer(
    folder: Path, net: PixArt, dtype: type[np.floating] = np.float32, weights: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write a transformer in the diffusers layout, without the learned empty caption, which sampling does not use.

    ``weights`` are written in place of those of ``net``, by the same names.
    """
    weights = _weights(net, dtype) if weights is None else weights
    weights = {name: value for name, value in weights.items() if name not in key_maps.OPTIONAL}
    tensors = to_layout({name: LazyTensor.of(value, name) for name, value in weights.items()}, "diffusers")
    with atomic_write(folder / WEIGHTS) as temporary:
        write_safetensors(temporary, tensors)
    write_json(folder / "config.json", diffusers_config(net.config))


def write_vae(folder: Path, net: AutoencoderKL, dtype: type[np.floating] = np.float32) -> None:
    """Write an autoencoder in the diffusers layout."""
    save_tensors(folder / WEIGHTS, _weights(net, dtype), {"format": "pt"})
    config = asdict(net.config)
    blocks = len(net.config.block_out_channels)
    extra = {"down_block_types": ["DownEncoderBlock2D"] * blocks, "up_block_types": ["UpDecoderBlock2D"] * blocks}
    write_json(folder / "config.json", {"_class_name": "AutoencoderKL", "act_fn": "silu", **config, **extra})


def write_text_encoder(folder: Path, net: T5Encoder, dtype: type[np.floating] = np.float32) -> None:
    """Write a T5 encoder in the layout of transformers."""
    save_tensors(folder / "model.safetensors", _weights(net, dtype), {"format": "pt"})
    extra = {"architectures": ["T5EncoderModel"], "model_type": "t5", "is_encoder_decoder": False}
    extra |= {"dense_act_fn": "gelu_new", "is_gated_act": True, "eos_token_id": 1, "pad_token_id": 0}
    write_json(folder / "config.json", {**extra, **asdict(net.config)})


#: Component -> function that writes it into its own folder, in a NumPy dtype.
WRITERS = {"transformer": write_transformer, "vae": write_vae, "text_encoder": write_text_encoder}


def write_index(folder: Path, scheduler: Scheduler, class_name: str = "PixArtSigmaPipeline") -> None:
    """Write ``model_index.json`` and the scheduler's configuration of a pipeline."""
    parts = {
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", {"_class_name": class_name, **parts})
    write_json(folder / "scheduler" / "scheduler_config.json", dict(scheduler.config))
