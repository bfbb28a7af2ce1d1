"""The parts of a published pipeline: where each lies in its folder, and how it is loaded and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import key_maps
from pixart_nb.core.checkpoints.configuration import diffusers_config
from pixart_nb.core.checkpoints.files import WEIGHTS, read_tensors, write_safetensors
from pixart_nb.core.checkpoints.layouts import target_tensors
from pixart_nb.core.checkpoints.load import load_into, load_transformer, unfilled
from pixart_nb.core.checkpoints.store import (
    CheckpointError,
    read_json,
    save_tensors,
    write_json,
    written_beside,
)
from pixart_nb.core.checkpoints.stored import Stored
from pixart_nb.core.checkpoints.text_encoder import load_t5
from pixart_nb.core.models.t5 import T5Encoder
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig, modernise_names
from pixart_nb.core.sampling.scheduler import Scheduler
from pixart_nb.core.sampling.schedulers import scheduler_from_config
from pixart_nb.core.sampling.text import TextTokenizer


def pipeline_folder(folder_or_hub_id: str | Path, wanted: Sequence[str]) -> Path:
    """The local folder of a pipeline: as given, or fetched from the hub; the wanted components must be in it."""
    folder = Path(folder_or_hub_id)
    if not folder.is_dir():
        folder = _from_hub(str(folder_or_hub_id), wanted)
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{folder} has no model_index.json, so it is no pipeline in the diffusers layout; it holds "
            f"{sorted(part.name for part in folder.iterdir())[:10]}"
        )
    missing = [name for name in wanted if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks the folders {missing}; give those components, or None where not needed"
        )
    return folder


def _from_hub(hub_id: str, wanted: Sequence[str]) -> Path:
    advice = f"Bring its folder (model_index.json and {', '.join(wanted)}) and give the path."
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/")):
        raise CheckpointError(f"{hub_id} is no folder, nor an id of the form owner/name. {advice}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = ["model_index.json", *(f"{name}/*" for name in wanted)]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"{hub_id!r} could not be fetched from the hub ({type(error).__name__}). {advice}"
        ) from error


def load_component(name: str, folder: Path, dtype: ms.Type):
    """One component of a pipeline folder, in ``dtype`` where it is a network."""
    return LOADERS[name](folder / name, dtype)


def _load_transformer(folder: Path, dtype: ms.Type) -> PixArt:
    return load_transformer(folder, dtype=dtype)


def _load_vae(folder: Path, dtype: ms.Type) -> AutoencoderKL:
    config = VAEConfig.from_dict(read_json(folder / "config.json"))
    net = unfilled(lambda: AutoencoderKL(config), dtype)
    load_into(net, modernise_names(read_tensors(folder)), folder)
    return net.set_train(False)


def _load_scheduler(folder: Path, dtype: ms.Type) -> Scheduler:
    values = read_json(folder / "scheduler_config.json")
    try:
        return scheduler_from_config(values)
    except ValueError as error:
        raise CheckpointError(f"{folder / 'scheduler_config.json'}: {error}") from error


#: Component -> function of its own folder and the dtype.
LOADERS = {
    "transformer": _load_transformer,
    "text_encoder": load_t5,
    "vae": _load_vae,
    "scheduler": _load_scheduler,
    "tokenizer": lambda folder, dtype: TextTokenizer(folder),
}

# ---- writing


def _weights(net, dtype: type[np.floating]) -> dict[str, np.ndarray]:
    return {name: p.asnumpy().astype(dtype) for name, p in net.parameters_and_names()}


def write_transformer(folder: Path, net: PixArt, dtype: type[np.floating] = np.float32) -> None:
    """Write a transformer in the diffusers layout, without the learned empty caption, which sampling does not use."""
    weights = {name: value for name, value in _weights(net, dtype).items() if name not in key_maps.OPTIONAL}
    tensors = target_tensors({name: Stored.of(value, name) for name, value in weights.items()}, "diffusers")
    with written_beside(folder / WEIGHTS) as temporary:
        write_safetensors(temporary, tensors)
    write_json(folder / "config.json", diffusers_config(net.config))


def write_vae(folder: Path, net: AutoencoderKL, dtype: type[np.floating] = np.float32) -> None:
    """Write an autoencoder in the diffusers layout."""
    save_tensors(folder / "diffusion_pytorch_model.safetensors", _weights(net, dtype), {"format": "pt"})
    config = asdict(net.config)
    blocks = len(net.config.block_out_channels)
    extra = {
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
    }
    write_json(folder / "config.json", {"_class_name": "AutoencoderKL", "act_fn": "silu", **config, **extra})


def write_text_encoder(folder: Path, net: T5Encoder, dtype: type[np.floating] = np.float32) -> None:
    """Write a T5 encoder in the layout of transformers."""
    save_tensors(folder / "model.safetensors", _weights(net, dtype), {"format": "pt"})
    extra = {"architectures": ["T5EncoderModel"], "model_type": "t5", "is_encoder_decoder": False}
    extra |= {"dense_act_fn": "gelu_new", "is_gated_act": True, "eos_token_id": 1, "pad_token_id": 0}
    write_json(folder / "config.json", {**extra, **asdict(net.config)})


def write_index(folder: Path, scheduler: Scheduler) -> None:
    """Write ``model_index.json`` and the scheduler's configuration of a sigma pipeline."""
    parts = {
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(folder / "model_index.json", {"_class_name": "PixArtSigmaPipeline", **parts})
    write_json(folder / "scheduler" / "scheduler_config.json", dict(scheduler.config))
