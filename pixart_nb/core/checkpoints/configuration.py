"""Configuration of a transformer: read from its tensors, from JSON files, or given by the caller; and combined."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from pixart_nb.core.checkpoints.layouts import TransformerTensors
from pixart_nb.core.checkpoints.lazy_tensor import LazyTensor
from pixart_nb.core.io import CheckpointError, load_metadata, read_json
from pixart_nb.core.models.config_fields import refuse_others
from pixart_nb.core.models.embeddings import sincos_positions
from pixart_nb.core.models.transformer import PixArtConfig

#: Caption tokens of the published checkpoints.
FAMILIES = {120: "alpha", 300: "sigma"}
_HINTS = {
    "model_max_length": "Alpha's checkpoints have 120 caption tokens, sigma's 300: take a configuration of the same.",
    "micro_condition": "Of the published models only alpha-1024 has micro conditions (csize_embedder, ar_embedder).",
    "kv_compress_config": "The compressed layers and their ratio are those that the weights were trained for.",
}
_BLOCK = re.compile(r"blocks\.(\d{1,4})\.")
#: Names of the published files, and the latent side (image side / 8) of their training size.
_PUBLISHED = re.compile(r"PixArt-(Sigma-)?XL-2-(?:SAM-)?(256x256|512x512|512-MS|1024-MS|2K-MS)")
_SIDES = {"256x256": 32, "512x512": 64, "512-MS": 64, "1024-MS": 128, "2K-MS": 256}
#: Channels of a head in every published model.
_HEAD_DIM = 72
#: Settings that this transformer has in one way only.
_FIXED = {
    "norm_type": ("ada_norm_single",),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-6,),
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "attention_type": ("default",),
}


@dataclass(frozen=True)
class Description:
    """Configuration of a checkpoint, as far as it is certain.

    ``config.is_set(name)`` is True for certain values, and for those in ``assumed``, which had to have some
    value. ``family``: ``alpha``, ``sigma``, or empty. ``notes``: sentences on where the values come from.
    """

    config: PixArtConfig
    family: str
    assumed: frozenset[str]
    notes: list[str]

    def is_certain(self, name: str) -> bool:
        """Return whether a field has its value from the checkpoint or the caller, rather than a default."""
        return self.config.is_set(name) and name not in self.assumed


def describe(
    view: TransformerTensors,
    source: str | Path,
    config: PixArtConfig | None = None,
    sample_size: int | None = None,
    any_heads: bool = False,
) -> Description:
    """Combine ``config`` and ``sample_size`` of the caller, the config.json of a checkpoint, and its tensors.

    They must not contradict each other. A training size that is not given is read from ``pos_embed``, or from the
    published name of the file. ``any_heads`` accepts an unknown number of heads.

    Raises ``CheckpointError`` for a contradiction, and for tensors that are no PixArt transformer's.
    """
    source, shown = Path(source), shown_by(view.tensors, source)
    if view.checkpoint.config:
        own = config_from_fields(view.checkpoint.config, source)
        explicit, notes = merge(own, config or PixArtConfig(), source), []
    else:
        explicit, notes = _explicit_config(source, config)
    family = _family(shown, explicit, source)
    if sample_size is not None:
        positions = positions_of(sample_size, family)
        positions = {n: v for n, v in positions.items() if n != "class_name" or not explicit.is_set(n)}
        explicit = merge(PixArtConfig(**positions), explicit, "sample_size")
    size, note = _training_size(view, source, family)
    values = {name: value for name, value in size.items() if not explicit.is_set(name)}
    notes += [note] * ("input_size" in values)
    if family and "model_max_length" not in shown and not explicit.is_set("model_max_length"):
        values["model_max_length"] = next(count for count, name in FAMILIES.items() if name == family)
    assumed = frozenset()
    if any_heads and shown["hidden_size"] % _HEAD_DIM and not explicit.is_set("num_heads"):
        values["num_heads"], assumed = 1, frozenset({"num_heads"})
    complete = _with_shown(PixArtConfig(**explicit_values(explicit) | values), shown, source)
    return Description(complete, family, assumed, notes)


def _explicit_config(source: Path, config: PixArtConfig | None) -> tuple[PixArtConfig, list[str]]:
    """Return the configuration of the caller or of the files: of a folder, or the audit or config.json beside a file.

    That of a folder must agree with the caller's; a file beside a checkpoint is only read without one.
    """
    own = source / "config.json"
    if source.is_dir() and (config is None or own.is_file()):
        return merge(config_from_diffusers(read_json(own), own), config or PixArtConfig(), own), []
    if (state := _state_config(source)) is not None:
        return merge(state, config or PixArtConfig(), source), []
    beside = (source.with_name(f"{source.name}.audit.json"), source.with_name("config.json"))
    path = next((path for path in beside if path.is_file()), None)
    if config is not None or path is None:
        return config or PixArtConfig(), []
    try:
        return read_config(path), [f"The values that the tensors do not show are those of {path}."]
    except CheckpointError as error:
        return PixArtConfig(), [f"The configuration beside the file was not used: {error}."]


def _state_config(source: Path) -> PixArtConfig | None:
    """Return the configuration that a training state of ``pixart-nb train`` names in its metadata."""
    if source.suffix != ".safetensors" or not source.is_file():
        return None
    metadata = load_metadata(source)
    try:
        values = json.loads(metadata.get("identity", "{}"))["architecture"]
        return PixArtConfig.from_dict(values)
    except KeyError:
        return None
    except (TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{source}: the configuration in its metadata cannot be used: {error}") from error


def _family(shown: Mapping, explicit: PixArtConfig, source: Path) -> str:
    """Return ``alpha`` or ``sigma``, by caption tokens, micro conditions, published name or pipeline; or nothing."""
    tokens = shown.get("model_max_length") or (explicit.is_set("model_max_length") and explicit.model_max_length)
    if tokens in FAMILIES:
        return FAMILIES[tokens]
    if shown["micro_condition"]:
        return "alpha"
    published = _PUBLISHED.match(source.name)
    if published and not tokens:
        return "sigma" if published[1] else "alpha"
    index = (source if source.is_dir() else source.parent).parent / "model_index.json"
    pipeline = str(read_json(index).get("_class_name")) if index.is_file() else ""
    return {"PixArtAlphaPipeline": "alpha", "PixArtSigmaPipeline": "sigma"}.get(pipeline, "")


def _training_size(view: TransformerTensors, source: Path, family: str) -> tuple[dict, str]:
    """Return the training size that ``pos_embed`` or the published name of the file shows, and a sentence on it."""
    sentence = "The training size, latents of {}, is that of {}."
    for tensor in view.recomputed.values():
        shown = positions_shown(tensor, view.tensors["x_embedder.proj.weight"].shape[-1])
        if "pe_interpolation" in shown:
            return shown, sentence.format(shown["input_size"], "pos_embed")
    published = _PUBLISHED.match(source.name)
    if published:
        side = _SIDES[published[2]]
        return positions_of(side, family), sentence.format(side, "the published file of this name")
    return {}, ""


# ---- from tensors


def shown_by(tensors: Mapping[str, LazyTensor], source: str | Path = "checkpoint") -> dict:
    """Return the configuration values that the shapes of tensors (official names) show."""
    width, channels, patch, _ = _shape(tensors, "x_embedder.proj.weight", 4, source)
    mlp = _shape(tensors, "blocks.0.mlp.fc1.weight", 2, source)[0]
    outputs = _shape(tensors, "final_layer.linear.weight", 2, source)[0]
    shown = {
        "hidden_size": width,
        "in_channels": channels,
        "patch_size": patch,
        "caption_channels": _shape(tensors, "y_embedder.y_proj.fc1.weight", 2, source)[1],
        "depth": _depth(tensors, width, source),
        "mlp_ratio": mlp / width,
        "pred_sigma": outputs == 2 * channels * patch**2,
        "micro_condition": "csize_embedder.mlp.0.weight" in tensors,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
    }
    if "y_embedder.y_embedding" in tensors:
        shown["model_max_length"] = _shape(tensors, "y_embedder.y_embedding", 2, source)[0]
    compressed = [(_BLOCK.match(name), name) for name in tensors if name.endswith(".attn.sr.weight")]
    ratios = {int(block[1]): _shape(tensors, name, 4, source)[2] for block, name in compressed if block}
    if ratios:
        layers = sorted(ratios)
        ratio = ratios[layers[0]]
        shown["kv_compress_config"] = {"sampling": "conv", "scale_factor": ratio, "kv_compress_layer": layers}
    return shown


def _shape(tensors: Mapping[str, LazyTensor], name: str, axes: int, source: str | Path) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(f"{source} is no PixArt transformer: it has no tensor {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or not all(shape):
        raise CheckpointError(f"{source}: {name} has shape {shape}; expected {axes} axes, none of them empty")
    return shape


def _depth(tensors: Mapping[str, LazyTensor], width: int, source: str | Path) -> int:
    """Return the number of blocks, which must be numbered without gaps and have the model's width."""
    blocks = {int(match[1]) for match in map(_BLOCK.match, tensors) if match}
    lost = sorted(set(range(max(blocks) + 1)) - blocks)
    if lost:
        raise CheckpointError(f"{source} has blocks up to {max(blocks)}, but not {lost[:8]}; it is incomplete")
    for block in blocks:
        name = f"blocks.{block}.attn.qkv.weight"
        shape = tuple(tensors[name].shape) if name in tensors else (3 * width, width)
        if shape != (3 * width, width):
            raise CheckpointError(f"{source}: {name} has shape {shape}; expected {(3 * width, width)}")
    return len(blocks)


def positions_of(sample_size: int, family: str) -> dict:
    """Return class, latent side and interpolation of the positions of a published model of latent side ``sample_size``.

    The interpolation is size / 64; alpha's 256 model, unlike sigma's, has that of 512.
    """
    if not 1 <= sample_size <= 4096:
        raise CheckpointError(f"sample_size is {sample_size}; expected the latent side: 32, 64, 128 or 256")
    scale = sample_size / 64
    return {
        "class_name": "PixArt" if sample_size == 32 else "PixArtMS",
        "input_size": sample_size,
        "pe_interpolation": max(scale, 1.0) if family == "alpha" else scale,
    }


def positions_shown(pos_embed: LazyTensor, patch: int) -> dict:
    """Return ``input_size`` and ``pe_interpolation`` as far as a stored ``pos_embed`` (1, N, D) shows them."""
    _, tokens, width = pos_embed.shape if len(pos_embed.shape) == 3 else (0, 0, 0)
    side = math.isqrt(tokens)
    if not tokens or side**2 != tokens or width % 4:
        return {}
    row = np.asarray(replace(pos_embed, parts=(pos_embed.parts[0][0, :side],)))
    shown = {"input_size": side * patch}
    for scale in (0.5, 1.0, 2.0, 4.0, 8.0):
        if np.allclose(row, sincos_positions(width, 1, side, side, scale), atol=2e-2):
            shown["pe_interpolation"] = scale
    return shown


# ---- combining


def explicit_values(config: PixArtConfig) -> dict:
    """Return the fields that a configuration was given."""
    return {f.name: getattr(config, f.name) for f in fields(PixArtConfig) if config.is_set(f.name)}


def merge(first: PixArtConfig, second: PixArtConfig, source: str | Path) -> PixArtConfig:
    """Combine two configurations, which must not contradict each other; ``source`` names the first in messages."""
    for name, value in explicit_values(second).items():
        if first.is_set(name) and getattr(first, name) != value:
            raise CheckpointError(f"{source} says {name} = {getattr(first, name)}, the given configuration {value}")
    return PixArtConfig(**explicit_values(first) | explicit_values(second))


def _with_shown(config: PixArtConfig, shown: Mapping, source: str | Path) -> PixArtConfig:
    """Complete a configuration by what the tensors show; a contradiction is an error."""
    values = explicit_values(config)
    for name, value in shown.items():
        explicit = getattr(config, name)
        same = explicit == value or (name == "kv_compress_config" and _same_compression(config, value))
        if not same and config.is_set(name):
            contradiction = f"{source} shows {name} = {value}, but the configuration says {explicit}."
            raise CheckpointError(f"{contradiction} {_HINTS.get(name, '')}".rstrip())
        values[name] = explicit if same else value
    if not config.is_set("num_heads") and not config.is_set("hidden_size"):
        values["num_heads"] = _heads_of_width(shown["hidden_size"])
    try:
        return PixArtConfig(**values)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _same_compression(config: PixArtConfig, shown: Mapping) -> bool:
    explicit = (config.kv_operator, config.kv_ratio, sorted(config.kv_layers))
    return explicit == (shown["sampling"], shown["scale_factor"], shown["kv_compress_layer"])


def _heads_of_width(width: int) -> int:
    """Return the number of heads of 72 channels, as in all published models; tensors do not show it."""
    if width % _HEAD_DIM:
        raise CheckpointError(
            f"the number of heads is unknown: hidden_size {width} is no multiple of {_HEAD_DIM}. Give num_heads in the "
            "configuration (--config of `pixart-nb convert`), or a config.json beside the checkpoint"
        )
    return width // _HEAD_DIM


# ---- JSON


def read_config(path: str | Path) -> PixArtConfig:
    """Read ``PixArtConfig``'s fields, a diffusers ``config.json``, or an audit of ``convert``."""
    values = read_json(path)
    if "_class_name" in values:
        return config_from_diffusers(values, path)
    return config_from_fields(values["config"] if isinstance(values.get("config"), dict) else values, path)


def config_from_fields(values: Mapping, source: str | Path) -> PixArtConfig:
    """Return the ``PixArtConfig`` of its fields in a file; raises ``CheckpointError`` for wrong ones."""
    try:
        return PixArtConfig.from_dict(values)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def config_from_diffusers(values: Mapping, source: str | Path = "config.json") -> PixArtConfig:
    """Convert a diffusers ``transformer/config.json``."""
    if values.get("_class_name") not in ("PixArtTransformer2DModel", "Transformer2DModel"):
        raise CheckpointError(f"{source} is of {values.get('_class_name')!r:.60}; expected PixArtTransformer2DModel")
    for name in ("num_attention_heads", "attention_head_dim", "num_layers"):
        if type(values.get(name)) is not int or not 0 < values[name] <= 2**16:
            raise CheckpointError(f"{source}: {name} is {values.get(name)!r:.60}; expected a whole number up to 65536")
    try:
        refuse_others(values, _FIXED)
        return _from_diffusers(values)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{source} is no PixArt transformer's: {error}") from error


def _from_diffusers(values: Mapping) -> PixArtConfig:
    size, channels = values.get("sample_size") or 128, values.get("in_channels") or 4
    width = values["num_attention_heads"] * values["attention_head_dim"]
    micro, scale = values.get("use_additional_conditions"), values.get("interpolation_scale")
    if values.get("cross_attention_dim") not in (None, width):
        raise ValueError(f"cross_attention_dim is {values['cross_attention_dim']}; expected the width, {width}")
    own = ("class_name", "model_max_length", "qk_norm", "kv_compress_config")
    return PixArtConfig(
        hidden_size=width,
        num_heads=values["num_attention_heads"],
        depth=values["num_layers"],
        patch_size=values.get("patch_size") or 2,
        in_channels=channels,
        caption_channels=values.get("caption_channels") or 4096,
        input_size=size,
        pe_interpolation=float(scale if scale is not None else max(size // 64, 1)),
        pred_sigma=(values.get("out_channels") or 8) == 2 * channels,
        micro_condition=size == 128 if micro is None else micro,
        **{name: values[name] for name in own if values.get(name) is not None},
    )


def diffusers_config(config: PixArtConfig) -> dict:
    """Return the ``transformer/config.json`` of a configuration; fields that diffusers lacks keep their names."""
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
        **{name: value for name, (value,) in _FIXED.items() if name != "attention_type"},
        "class_name": config.class_name,
        "model_max_length": config.model_max_length,
        "qk_norm": config.qk_norm,
        "kv_compress_config": config.kv_compress_config,
    }
