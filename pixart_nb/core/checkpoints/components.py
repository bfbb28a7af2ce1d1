"""The parts of a published pipeline: where each lies in its folder, and how it is loaded and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import key_maps
from pixart_nb.core.checkpoints.configuration import diffusers_config
from pixart_nb.core.checkpoints.files import ENDINGS, WEIGHTS, read_tensors, write_safetensors
from pixart_nb.core.checkpoints.layouts import target_tensors
from pixart_nb.core.checkpoints.lazy_tensor import Stored
from pixart_nb.core.checkpoints.load import load_into, load_transformer, unfilled
from pixart_nb.core.checkpoints.text_encoder import load_t5
from pixart_nb.core.io import (
    CheckpointError,
    atomic_write,
    read_json,
    save_tensors,
    write_json,
)
from pixart_nb.core.models.t5 import T5Encoder
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig
from pixart_nb.core.sampling.scheduler import Scheduler
from pixart_nb.core.sampling.schedulers import scheduler_from_config
from pixart_nb.core.sampling.text import TextTokenizer


def load_components(source: str | Path, wanted: Sequence[str], dtype: ms.Type) -> dict[str, Any]:
    """Components of a pipeline by name, networks in ``dtype``; see ``component_places`` for what ``source`` may be."""
    places = component_places(source, wanted)
    return {name: LOADERS[name](place, dtype) for name, place in places.items()}


def component_places(source: str | Path, wanted: Sequence[str]) -> dict[str, Path]:
    """Where the wanted components of a pipeline lie.

    ``source``: a folder in the layout that diffusers publishes, or in that of mindone's example (a checkpoint beside
    the folders vae, text_encoder and tokenizer, or in a folder ``models`` with or beside them); the checkpoint in such
    a folder, if there are several; or a hub id. Mindone's layout has no scheduler: none is wanted from it.
    """
    path = Path(source)
    if path.is_file() or path.suffix in ENDINGS:
        return _places_of_mindone(path.parent, wanted, path)
    folder = path if path.is_dir() else _from_hub(str(source), wanted)
    if not (folder / "model_index.json").is_file():
        return _places_of_mindone(folder, wanted)
    missing = [name for name in wanted if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks the folders {missing}; give those components, or None where not needed"
        )
    return {name: folder / name for name in wanted}


def _places_of_mindone(
    folder: Path, wanted: Sequence[str], checkpoint: Path | None = None
) -> dict[str, Path]:
    roots = (folder, folder / "models")
    found = [checkpoint] if checkpoint else [p for root in roots for p in _checkpoints(root)]
    if "transformer" in wanted and len(found) > 1:
        raise CheckpointError(
            f"{folder} holds several checkpoints ({', '.join(p.name for p in found[:6])}); give the path of the one "
            "to load"
        )
    folders = [name for name in wanted if name != "transformer"]
    places = {name: root / name for root in reversed(roots) for name in folders if (root / name).is_dir()}
    if found:
        places["transformer"] = found[0]
    missing = [name for name in wanted if name not in (*places, "scheduler")]
    if missing:
        held = sorted(part.name for part in folder.iterdir())[:10] if folder.is_dir() else "nothing"
        raise CheckpointError(
            f"{folder} has no model_index.json, so it is no pipeline in the diffusers layout; and it lacks {missing} "
            "for mindone's layout, which is a checkpoint and the folders vae, text_encoder and tokenizer. It holds "
            f"{held}. Give those components, or None where not needed."
        )
    return {name: places[name] for name in wanted if name in places}


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix in ENDINGS and path.is_file())


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
    load_into(net, key_maps.rename_former_vae(read_tensors(folder)), folder)
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


def write_transformer(
    folder: Path,
    net: PixArt,
    dtype: type[np.floating] = np.float32,
    weights: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a transformer in the diffusers layout, without the learned empty caption, which sampling does not use.

    ``weights`` are written in place of those of ``net``, by the same names.
    """
    weights = _weights(net, dtype) if weights is None else weights
    weights = {name: value for name, value in weights.items() if name not in key_maps.OPTIONAL}
    tensors = target_tensors({name: Stored.of(value, name) for name, value in weights.items()}, "diffusers")
    with atomic_write(folder / WEIGHTS) as temporary:
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
