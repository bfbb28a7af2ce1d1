"""Checkpoint in, network out: whatever the layout, matched by exact name and shape, and nothing left unsaid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
from mindspore import nn
from mindspore.nn.utils import no_init_parameters

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import key_maps
from pixart_nb.core.checkpoints.store import CheckpointError, load_tensors, read_json
from pixart_nb.core.checkpoints.torch_reader import read_torch, state_dict
from pixart_nb.core.models.quantized import Int8Linear
from pixart_nb.core.models.transformer import PixArt, PixArtConfig

_PREFER = ("diffusion_pytorch_model", "model")


Keep = Callable[[str], bool]


def read_tensors(path: str | Path, keep: Keep = lambda name: True) -> dict[str, np.ndarray]:
    """Tensors of a checkpoint file (``.pth``, ``.bin``, ``.ckpt``, ``.safetensors``) or of a component's folder.

    Those whose names ``keep`` accepts: all unless told. A folder is read as diffusers publishes it: one safetensors or
    ``.bin`` file, or shards with their index.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, keep)
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; expected a checkpoint file or a folder in the diffusers layout"
        )
    if path.suffix == ".safetensors":
        return load_tensors(path, keep)
    if path.suffix in (".pth", ".pt", ".bin"):
        return {name: value for name, value in state_dict(read_torch(path)).items() if keep(name)}
    if path.suffix == ".ckpt":
        return {name: value for name, value in _read_mindspore(path).items() if keep(name)}
    raise CheckpointError(
        f"{path}: unknown ending {path.suffix!r}; expected .pth, .bin, .ckpt or .safetensors"
    )


def _read_folder(folder: Path, keep: Keep) -> dict[str, np.ndarray]:
    for ending in ("safetensors", "bin"):
        for index in sorted(folder.glob(f"*.{ending}.index.json")):
            return _read_shards(folder, index, keep)
        for stem in _PREFER:
            for name in (f"{stem}.{ending}", f"pytorch_{stem}.{ending}"):
                if (folder / name).is_file():
                    return read_tensors(folder / name, keep)
    raise CheckpointError(
        f"{folder} holds no weights: expected diffusion_pytorch_model.safetensors, model.safetensors, their .bin "
        f"forms or an index of shards; it holds {sorted(p.name for p in folder.iterdir())[:10]}"
    )


def _read_shards(folder: Path, index: Path, keep: Keep) -> dict[str, np.ndarray]:
    places = read_json(index).get("weight_map", {})
    shards = sorted(set(places.values()))
    outside = [name for name in shards if Path(name).name != name]
    if not shards or outside:
        raise CheckpointError(f"{index} names {outside or 'no files'}; expected file names inside {folder}")
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {missing}, which {index.name} names. Download the missing shards."
        )
    wanted = sorted({shard for name, shard in places.items() if keep(name)})
    return {key: value for name in wanted for key, value in read_tensors(folder / name, keep).items()}


def _read_mindspore(path: Path) -> dict[str, np.ndarray]:
    try:
        content = ms.load_checkpoint(str(path))
    except (ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path} is truncated or no MindSpore checkpoint: {error}") from error
    return {name: parameter.asnumpy() for name, parameter in content.items()}


def unfilled(build: Callable[[], nn.Cell], dtype: ms.Type) -> nn.Cell:
    """A network whose parameters have their dtype but no memory yet, to be loaded: no second set of weights."""
    with no_init_parameters():
        net = build()
    for parameter in net.get_parameters():
        if parameter.has_init:
            parameter.set_dtype(backend.supported_dtype(dtype))
    return net


def load_into(
    net: nn.Cell,
    tensors: Mapping[str, np.ndarray],
    source: str | Path,
    optional: tuple[str, ...] = (),
    part: str = "",
) -> None:
    """Load every parameter of ``net`` whose name begins with ``part`` by exact name and shape.

    On a misfit it raises and changes nothing. Names in ``optional`` may be missing. What the net has no place for is
    an error too. Weights take the parameter's dtype; those of ``Int8Linear`` are quantized.
    """
    quantized = {
        f"{name}.weight": cell for name, cell in net.cells_and_names() if isinstance(cell, Int8Linear)
    }
    scales = {name.removesuffix("weight") + "scale" for name in quantized}
    parameters = {
        name: p for name, p in net.parameters_and_names() if name.startswith(part) and name not in scales
    }
    missing = sorted(set(parameters) - set(tensors) - set(optional))
    unexpected = sorted(set(tensors) - set(parameters))
    wrong = [
        f"{name}: checkpoint {tensors[name].shape}, model {tuple(p.shape)}"
        for name, p in parameters.items()
        if name in tensors and tensors[name].shape != tuple(p.shape)
    ]
    if missing or unexpected or wrong:
        raise CheckpointError(_misfit(source, missing, unexpected, wrong))
    for name, parameter in parameters.items():
        if name in quantized:
            quantized[name].take(tensors[name])
        elif name in tensors:
            parameter.set_data(ms.Tensor(np.asarray(tensors[name])).astype(parameter.dtype))
        elif parameter.has_init:
            parameter.init_data()


def _misfit(source, missing: list[str], unexpected: list[str], wrong: list[str]) -> str:
    parts = [
        f"{len(names)} {what} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    return f"{source} does not fit the model: {'; '.join(parts)}. Check that the configuration is this checkpoint's."


def load_transformer(
    path: str | Path, config: PixArtConfig | None = None, dtype: ms.Type = ms.float32
) -> PixArt:
    """The transformer of an official ``.pth``, a ``.ckpt``, a ``.safetensors`` or a diffusers transformer folder.

    What the checkpoint itself shows (width, depth, caption size, tokens, micro conditions, compressed layers) is read
    from it where ``config`` is silent; a contradiction is a ``CheckpointError``.
    """
    tensors = read_tensors(path)
    folder_config = Path(path) / "config.json" if Path(path).is_dir() else None
    if key_maps.is_diffusers(tensors):
        tensors = key_maps.to_official(tensors)
    for name in key_maps.RECOMPUTED:
        tensors.pop(name, None)
    base = config or PixArtConfig()
    if folder_config:
        base = merge(config_from_diffusers(read_json(folder_config)), base, folder_config)
    complete = reconcile(base, shown_by(tensors, path), path)
    net = unfilled(lambda: PixArt(complete), dtype)
    load_into(net, tensors, path, optional=key_maps.OFFICIAL_ONLY)
    return net.set_train(False)


def shown_by(tensors: Mapping[str, np.ndarray], source: str | Path = "checkpoint") -> dict:
    """Configuration values that the tensors (official names) themselves show."""
    try:
        width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        captions = tensors["y_embedder.y_proj.fc1.weight"].shape[1]
        mlp = tensors["blocks.0.mlp.fc1.weight"].shape[0]
        outputs = tensors["final_layer.linear.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(
            f"{source} is no PixArt transformer: it has no tensor {error.args[0]}"
        ) from error
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    shown = dict(
        hidden_size=width, in_channels=channels, patch_size=patch, caption_channels=captions, depth=depth
    )
    shown |= dict(mlp_ratio=mlp / width, pred_sigma=outputs == 2 * channels * patch**2)
    shown |= dict(
        micro_condition="csize_embedder.mlp.0.weight" in tensors,
        qk_norm="blocks.0.attn.q_norm.weight" in tensors,
    )
    if "y_embedder.y_embedding" in tensors:
        shown["model_max_length"] = tensors["y_embedder.y_embedding"].shape[0]
    reduced = {
        int(name.split(".")[1]): t.shape[2] for name, t in tensors.items() if name.endswith("attn.sr.weight")
    }
    if reduced:
        layers = sorted(reduced)
        shown["kv_compress_config"] = dict(
            sampling="conv", scale_factor=reduced[layers[0]], kv_compress_layer=layers
        )
    return shown


def merge(written: PixArtConfig, given: PixArtConfig, source: str | Path) -> PixArtConfig:
    """The configuration of a folder, completed by the one that the caller gives; what both say must be the same."""
    said = {f.name: getattr(given, f.name) for f in fields(PixArtConfig) if given.says(f.name)}
    for name, value in said.items():
        if written.says(name) and getattr(written, name) != value:
            raise CheckpointError(
                f"{source} says {name} = {getattr(written, name)}, the configuration given says {value}"
            )
    kept = {f.name: getattr(written, f.name) for f in fields(PixArtConfig) if written.says(f.name)}
    return PixArtConfig(**kept | said)


def reconcile(config: PixArtConfig, shown: Mapping, source: str | Path) -> PixArtConfig:
    """The configuration completed by what a checkpoint shows; a value said and shown differently is an error."""
    changes = {}
    for name, value in shown.items():
        said = getattr(config, name)
        if said == value or (name == "kv_compress_config" and _same_compression(said, value)):
            continue
        if config.says(name):
            raise CheckpointError(f"{source} shows {name} = {value}, but the configuration says {said}")
        changes[name] = value
    if "hidden_size" in changes and not config.says("num_heads"):
        changes["num_heads"] = heads_of_width(changes["hidden_size"])
    return replace(config, **changes)


def _same_compression(said: Mapping | None, shown: Mapping) -> bool:
    return said is not None and {**said, "kv_compress_layer": sorted(said["kv_compress_layer"])} == dict(
        shown
    )


def heads_of_width(width: int) -> int:
    """Number of heads of PixArt's own size, 72; a checkpoint does not show it, so another size must be said."""
    if width % 72:
        raise CheckpointError(
            f"hidden_size {width} is no multiple of 72, so num_heads must be given in the configuration"
        )
    return width // 72


def config_from_diffusers(values: Mapping) -> PixArtConfig:
    """``PixArtConfig`` of a diffusers ``transformer/config.json``."""
    if values.get("_class_name") not in ("PixArtTransformer2DModel", "Transformer2DModel"):
        raise CheckpointError(
            f"config.json is of {values.get('_class_name')!r}; expected PixArtTransformer2DModel"
        )
    size, patch = values.get("sample_size", 128), values.get("patch_size", 2)
    micro, scale = values.get("use_additional_conditions"), values.get("interpolation_scale")
    own = {
        name: values[name]
        for name in ("class_name", "model_max_length", "qk_norm", "kv_compress_config")
        if name in values
    }
    return PixArtConfig(
        hidden_size=values["num_attention_heads"] * values["attention_head_dim"],
        num_heads=values["num_attention_heads"],
        depth=values["num_layers"],
        patch_size=patch,
        in_channels=values.get("in_channels", 4),
        caption_channels=values.get("caption_channels", 4096),
        input_size=size,
        pe_interpolation=float(scale if scale is not None else max(size // 64, 1)),
        pred_sigma=values.get("out_channels", 8) == 2 * values.get("in_channels", 4),
        micro_condition=size == 128 if micro is None else micro,
        **own,
    )


def diffusers_config(config: PixArtConfig) -> dict:
    """The ``transformer/config.json`` of a configuration; what diffusers has no field for is added under our names."""
    return {
        "_class_name": "PixArtTransformer2DModel",
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size // config.num_heads,
        "cross_attention_dim": config.hidden_size,
        "num_layers": config.depth,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "caption_channels": config.caption_channels,
        "sample_size": config.input_size,
        "interpolation_scale": config.pe_interpolation,
        "use_additional_conditions": config.micro_condition,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "class_name": config.class_name,
        "model_max_length": config.model_max_length,
        "qk_norm": config.qk_norm,
        "kv_compress_config": config.kv_compress_config,
    }
