"""Configuration of a transformer: read from its tensors, from JSON files, or given by the caller; and combined."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.checkpoints.key_maps import COMPRESSED, TransformerTensors
from pixart_nb.core.checkpoints.lazy_tensor import LazyTensor
from pixart_nb.core.errors import refuse_others
from pixart_nb.core.io import CheckpointError, read_json
from pixart_nb.core.models.embeddings import sincos_positions
from pixart_nb.core.models.transformer import PixArtConfig

#: Caption tokens of the published checkpoints.
FAMILIES = {120: "alpha", 300: "sigma"}
_HINTS = {
    "model_max_length": " Alpha's checkpoints have 120 caption tokens, sigma's 300: take a configuration of the same.",
    "micro_condition": " Of the published models only alpha-1024 has micro conditions (csize_embedder, ar_embedder).",
    "kv_compress_config": " The compressed layers and their ratio are those that the weights were trained for.",
}
_BLOCK = re.compile(r"blocks\.(\d{1,4})\.")
#: Names of the published files, and the latent side (image side / 8) of their training size.
_PUBLISHED = re.compile(r"PixArt-(Sigma-)?XL-2-(?:SAM-)?(256x256|512x512|512-MS|1024-MS|2K-MS)")
_SIDES = {"256x256": 32, "512x512": 64, "512-MS": 64, "1024-MS": 128, "2K-MS": 256}
#: Channels of a head in every published model.
_HEAD_DIM = 72
#: Fields of ``PixArtConfig`` and their names in diffusers' config.json, and fields that only this kit writes there.
_DIFFUSERS = {
    "num_heads": "num_attention_heads",
    "depth": "num_layers",
    "patch_size": "patch_size",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "caption_channels": "caption_channels",
    "input_size": "sample_size",
    "pe_interpolation": "interpolation_scale",
    "micro_condition": "use_additional_conditions",
}
_OWN = ("class_name", "model_max_length", "qk_norm", "kv_compress_config")
#: diffusers' settings that this transformer has in one way only.
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
    values, notes = _values_beside(view, source, explicit_values(config))
    family = _family(shown, values, source)
    if sample_size is not None:
        positions = positions_of(sample_size, family)
        if "input_size" in values:
            merge(positions, {"input_size": values["input_size"]}, source)
        values = positions | values
    size, note = _training_size(view, source, family)
    notes += [note] * ("input_size" in size.keys() - values)
    values = size | values
    assumed = frozenset()
    if "num_heads" not in values and (any_heads or "hidden_size" not in values):
        width, assumed = shown["hidden_size"], frozenset({"num_heads"} if shown["hidden_size"] % _HEAD_DIM else ())
        if assumed and not any_heads:
            raise CheckpointError(
                f"the number of heads is unknown: hidden_size {width} is no multiple of {_HEAD_DIM}. Give num_heads in "
                "the configuration (--config of `pixart-nb convert`), or a config.json beside the checkpoint"
            )
        values["num_heads"] = 1 if assumed else width // _HEAD_DIM
    if family and "model_max_length" not in shown:
        values.setdefault("model_max_length", next(count for count, name in FAMILIES.items() if name == family))
    return Description(_config(merge(values, shown, source), source), family, assumed, notes)


def _values_beside(view: TransformerTensors, source: Path, explicit: dict) -> tuple[dict, list[str]]:
    """Add to the caller's values those of the files: of a folder or training state, or the JSON beside a file.

    Those of a folder and of a training state must agree with the caller's. A file beside may be of another checkpoint:
    the caller's values take the place of its own.
    """
    own = source / "config.json"
    if view.checkpoint.config:
        return merge(explicit, explicit_values(_config(view.checkpoint.config, source)), source), []
    if source.is_dir() and (not explicit or own.is_file()):
        return merge(explicit, explicit_values(config_from_diffusers(read_json(own), own)), own), []
    beside = (source.with_name(f"{source.name}.audit.json"), source.with_name("config.json"))
    path = next((path for path in beside if path.is_file()), None)
    if path is None:
        return explicit, []
    try:
        beside_it = explicit_values(read_config(path))
    except CheckpointError as error:
        return explicit, [f"The configuration beside the file was not used: {error}."]
    return beside_it | explicit, [f"The values that the tensors do not show are those of {path}."]


def _family(shown: Mapping, values: Mapping, source: Path) -> str:
    """Return ``alpha`` or ``sigma``, by caption tokens, micro conditions, published name or pipeline; or nothing."""
    tokens = shown.get("model_max_length") or values.get("model_max_length")
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

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in tensors:
            raise CheckpointError(f"{source} is no PixArt transformer: it has no tensor {name}")
        sizes = tuple(tensors[name].shape)
        if len(sizes) != axes or not all(sizes):
            raise CheckpointError(f"{source}: {name} has shape {sizes}; expected {axes} axes, none of them empty")
        return sizes

    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    shown = {
        "hidden_size": width,
        "in_channels": channels,
        "patch_size": patch,
        "caption_channels": shape("y_embedder.y_proj.fc1.weight", 2)[1],
        "depth": _depth(tensors, width, source),
        "mlp_ratio": shape("blocks.0.mlp.fc1.weight", 2)[0] / width,
        "pred_sigma": shape("final_layer.linear.weight", 2)[0] == 2 * channels * patch**2,
        "micro_condition": "csize_embedder.mlp.0.weight" in tensors,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
    }
    if "y_embedder.y_embedding" in tensors:
        shown["model_max_length"] = shape("y_embedder.y_embedding", 2)[0]
    ratios = {int(match[1]): shape(match[0], 4)[2] for match in map(COMPRESSED.fullmatch, tensors) if match}
    if ratios:
        layers = sorted(ratios)
        ratio = ratios[layers[0]]
        shown["kv_compress_config"] = {"sampling": "conv", "scale_factor": ratio, "kv_compress_layer": layers}
    return shown


def _depth(tensors: Mapping[str, LazyTensor], width: int, source: str | Path) -> int:
    """Return the number of blocks, which must be numbered without gaps and have the model's width."""
    blocks = {int(match[1]) for match in map(_BLOCK.match, tensors) if match}
    lost = sorted(set(range(max(blocks, default=0) + 1)) - blocks)
    if lost:
        raise CheckpointError(f"{source} has blocks up to {max(blocks, default=0)}, but not {lost[:8]}; is it whole?")
    for block in blocks:
        name = f"blocks.{block}.attn.qkv.weight"
        if name in tensors and tuple(tensors[name].shape) != (3 * width, width):
            raise CheckpointError(f"{source}: {name} has shape {tensors[name].shape}; expected {(3 * width, width)}")
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


def explicit_values(config: PixArtConfig | None) -> dict:
    """Return the fields that a configuration was given."""
    return {f.name: getattr(config, f.name) for f in fields(PixArtConfig) if config and config.is_set(f.name)}


def merge(values: Mapping, shown: Mapping, source: str | Path) -> dict:
    """Add the values that ``source`` shows to those of a configuration, which must not contradict them.

    ``class_name`` is left out of it: both classes compute the same.
    """
    for name, value in shown.items():
        if name in values and name != "class_name" and _comparable(name, values[name]) != _comparable(name, value):
            contradiction = f"{source} shows {name} = {value}, but the configuration says {values[name]}."
            raise CheckpointError(contradiction + _HINTS.get(name, ""))
    return {**shown, **values}


def _comparable(name: str, value: Any) -> Any:
    """Return a compression in one form, whatever the order of its layers; other values as they are."""
    if name != "kv_compress_config" or not value:
        return value
    return value.get("sampling"), value.get("scale_factor", 1), sorted(value.get("kv_compress_layer") or ())


def _config(values: Mapping, source: str | Path) -> PixArtConfig:
    """Return the ``PixArtConfig`` of its fields; raises ``CheckpointError`` for wrong ones."""
    try:
        return PixArtConfig.from_dict(values)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"{source}: {error}") from error


# ---- JSON


def read_config(path: str | Path) -> PixArtConfig:
    """Read ``PixArtConfig``'s fields, a diffusers ``config.json``, or an audit of ``convert``."""
    values = read_json(path)
    if "_class_name" in values:
        return config_from_diffusers(values, path)
    return _config(values["config"] if isinstance(values.get("config"), dict) else values, path)


def config_from_diffusers(values: Mapping, source: str | Path = "config.json") -> PixArtConfig:
    """Convert a diffusers ``transformer/config.json``; what is left out has diffusers' default."""
    if values.get("_class_name") not in ("PixArtTransformer2DModel", "Transformer2DModel"):
        raise CheckpointError(f"{source} is of {values.get('_class_name')!r:.60}; expected PixArtTransformer2DModel")
    for name in ("num_attention_heads", "attention_head_dim", "num_layers"):
        if type(values.get(name)) is not int or not 0 < values[name] <= 2**16:
            raise CheckpointError(f"{source}: {name} is {values.get(name)!r:.60}; expected a whole number up to 65536")
    width = values["num_attention_heads"] * values["attention_head_dim"]
    defaults = {"patch_size": 2, "in_channels": 4, "out_channels": 8, "caption_channels": 4096, "input_size": 128}
    present = {field: values[name] for field, name in _DIFFUSERS.items() if values.get(name) is not None}
    present = defaults | present | {name: values[name] for name in _OWN if values.get(name) is not None}
    try:
        refuse_others(values, _FIXED | {"cross_attention_dim": (None, width)})
        channels, size = present.pop("out_channels"), present["input_size"]
        present.setdefault("pe_interpolation", float(max(size // 64, 1)))
        present.setdefault("micro_condition", size == 128)
        if channels not in (present["in_channels"], 2 * present["in_channels"]):
            raise ValueError(f"out_channels is {channels!r:.60}; expected in_channels or twice as many")
        return PixArtConfig(hidden_size=width, pred_sigma=channels == 2 * present["in_channels"], **present)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{source} is no PixArt transformer's: {error}") from error


def diffusers_config(config: PixArtConfig) -> dict:
    """Return the ``transformer/config.json`` of a configuration; fields that diffusers lacks keep their names."""
    return {
        "_class_name": "PixArtTransformer2DModel",
        "attention_head_dim": config.hidden_size // config.num_heads,
        "cross_attention_dim": config.hidden_size,
        **{name: getattr(config, field) for field, name in _DIFFUSERS.items()},
        **{name: value for name, (value,) in _FIXED.items() if name != "attention_type"},
        **{name: getattr(config, name) for name in _OWN},
    }
