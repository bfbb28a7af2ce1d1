"""ControlNet files: the official form, which holds the base model too, and the adapter folders of diffusers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from pixart_nb.config import bundled_path
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import key_maps
from pixart_nb.core.checkpoints.configuration import describe
from pixart_nb.core.checkpoints.files import WEIGHTS, open_checkpoint, write_safetensors
from pixart_nb.core.checkpoints.key_maps import to_layout, to_official_names
from pixart_nb.core.checkpoints.lazy_tensor import LazyTensor, stacked
from pixart_nb.core.checkpoints.load import build_transformer, init_empty, load_into
from pixart_nb.core.data.control import EdgeOptions
from pixart_nb.core.data.images import ImageError
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import CheckpointError, atomic_write, read_json, write_json
from pixart_nb.core.models.controlnet import PixArtControlNet
from pixart_nb.core.models.low_precision import for_inference
from pixart_nb.core.models.transformer import PixArt, PixArtConfig

#: Name in config.json of the options of the edges that a ControlNet was trained on.
_EDGES = "control_edges"
_BASE = "base_model."
_CONTROL = re.compile(r"(?:.*\.)?(controlnet|controlnet_blocks)\.(\d{1,4})\.(.+)")
_COPY = re.compile(r"(?:copied_block|transformer_block)\.(.+)")


def load_controlnet(
    path: str | Path, config: PixArtConfig | None = None, dtype: ms.Type = ms.float32, base_model: PixArt | None = None
) -> PixArtControlNet:
    """Load a ControlNet-Transformer (PixArt-delta) from a checkpoint file or an adapter folder of diffusers.

    Official files hold the base model; ``base_model`` replaces it, and is required for files without one. The number of
    copied blocks is read from the names. Raises ``CheckpointError`` for missing, unexpected and misshapen tensors.
    """
    if not isinstance(config, PixArtConfig | None) or not isinstance(base_model, PixArt | None):
        raise PixArtNBError(
            f"config is a {type(config).__name__}, base_model a {type(base_model).__name__}; expected a PixArtConfig "
            "and the transformer of a pipeline, for example base_model=pipe.transformer"
        )
    path = bundled_path(path)
    checkpoint = open_checkpoint(path)
    control, copies = _control_names(path, checkpoint.tensors)
    if config is not None and config.copy_blocks_num not in (0, copies):
        raise CheckpointError(f"{path} holds {copies} copied blocks; copy_blocks_num is {config.copy_blocks_num}")
    if base_model is None:
        names = {name: name.partition(_BASE)[2] for name in checkpoint.tensors if _BASE in name and name not in control}
        if not names:
            raise CheckpointError(f"{path} holds a ControlNet without its base model; give base_model, the transformer")
        tensors = {new: replace(checkpoint.tensors[name], name=new) for name, new in names.items()}
        view = to_official_names(replace(checkpoint, tensors=tensors))
        base_model = build_transformer(view.complete | view.rest, describe(view, path, config).config, path, dtype)
    elif copies >= base_model.config.depth:
        raise CheckpointError(f"{path} copies {copies} blocks; this transformer has {base_model.config.depth}")

    def build() -> PixArtControlNet:
        net = PixArtControlNet(base_model, copies)
        for_inference(net.controlnet, dtype)
        return net

    net = init_empty(build, dtype)
    load_into(net, _control_tensors(checkpoint.tensors, control), path, prefix="controlnet.")
    net.edges = _edges_in(path)
    return net.set_train(False)


def save_controlnet(folder: Path, weights: Mapping[str, np.ndarray], edges: EdgeOptions | None = None) -> None:
    """Write the ``controlnet.`` weights of a ``PixArtControlNet`` as an adapter folder of diffusers.

    ``edges``, if it was trained on edges, are written into its config.json, where ``edge_options`` finds them.
    """
    out = {}
    for name, value in weights.items():
        _, number, leaf = name.split(".", 2)
        stem = f"controlnet_blocks.{number}"
        copied = leaf.removeprefix("copied_block.")
        if copied == leaf:
            out[f"{stem}.{leaf}"] = LazyTensor.of(value, f"{stem}.{leaf}")
            continue
        official = f"blocks.{number}.{copied}"
        for other, part in to_layout({official: LazyTensor.of(value, official)}, "diffusers").items():
            own = f"{stem}.transformer_block.{other.removeprefix(f'transformer_blocks.{number}.')}"
            out[own] = replace(part, name=own)
    with atomic_write(folder / WEIGHTS) as temporary:
        write_safetensors(temporary, out)
    copies = 1 + max(int(name.split(".")[1]) for name in weights)
    config = {"_class_name": "PixArtControlNetAdapterModel", "num_layers": copies}
    write_json(folder / "config.json", config | ({_EDGES: asdict(edges)} if edges else {}))


def edge_options(path: str | Path) -> EdgeOptions:
    """Return the options of the edges that a ControlNet was trained on; the default if its config.json has none."""
    return _edges_in(bundled_path(path)) or EdgeOptions()


def _edges_in(folder: Path) -> EdgeOptions | None:
    file = folder / "config.json"
    values = read_json(file).get(_EDGES) if file.is_file() else None
    try:
        return None if values is None else EdgeOptions(**values)
    except (TypeError, ImageError) as error:
        raise CheckpointError(f"{file}: {_EDGES} is {values}; expected sigma, threshold and width ({error})") from None


def copied_blocks(path: str | Path) -> int:
    """Return the number of blocks that a ControlNet file or folder copies."""
    return _control_names(path, open_checkpoint(Path(path).expanduser()).tensors)[1]


def _control_names(path: str | Path, names: Iterable[str]) -> tuple[dict[str, re.Match], int]:
    """Return the names of a ControlNet's tensors with their parts, and the number of copied blocks."""
    control = {name: match for name in names if (match := _CONTROL.fullmatch(name))}
    if not control:
        raise CheckpointError(f"{path} holds no ControlNet: expected tensors controlnet.0.* or controlnet_blocks.0.*")
    return control, 1 + max(int(match[2]) for match in control.values())


def holds_base_model(path: str | Path) -> bool:
    """Return True if a ControlNet file holds its base model, as the official ones do."""
    return any(_BASE in name for name in open_checkpoint(Path(path).expanduser()).tensors)


def _control_tensors(tensors: dict[str, LazyTensor], control: dict[str, re.Match]) -> dict[str, LazyTensor]:
    """Return the tensors of the copied blocks under the names of ``PixArtControlNet``."""
    out, blocks = {}, {}
    for name, match in control.items():
        copy = _COPY.fullmatch(match[3])
        if copy is None:
            out[f"controlnet.{match[2]}.{match[3]}"] = tensors[name]
        else:
            stem = "transformer_blocks" if match[1] == "controlnet_blocks" else "blocks"
            blocks[f"{stem}.{match[2]}.{copy[1]}"] = name
    groups, rest = key_maps.origins(blocks)
    for official, parts in groups.items():
        number, leaf = official.removeprefix("blocks.").split(".", 1)
        group = [tensors[blocks[part]] for part in parts]
        out[f"controlnet.{number}.copied_block.{leaf}"] = group[0] if len(group) == 1 else stacked(group)
    return out | {blocks[name]: tensors[blocks[name]] for name in rest}
