"""What a transformer is made of: read from its tensors, from a diffusers ``config.json``, or given; put together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from pixart_nb.core.checkpoints.layouts import Transformer
from pixart_nb.core.checkpoints.lazy_tensor import Stored
from pixart_nb.core.io import CheckpointError, read_json
from pixart_nb.core.models.embeddings import sincos_positions
from pixart_nb.core.models.transformer import PixArtConfig

#: Caption tokens of the published checkpoints.
FAMILIES = {120: "alpha", 300: "sigma"}
#: What to do about the contradictions that people meet.
_HINTS = {
    "model_max_length": "Alpha's checkpoints have 120 caption tokens, sigma's 300: take a configuration of the same.",
    "micro_condition": "Of the published models only alpha-1024 has micro conditions (csize_embedder, ar_embedder).",
    "kv_compress_config": "Which layers are compressed, and how much, is what the weights were trained for.",
}
_BLOCK = re.compile(r"blocks\.(\d{1,4})\.")
#: Names of the published files, and the latent side (picture side / 8) that they were trained at.
_PUBLISHED = re.compile(r"PixArt-(Sigma-)?XL-2-(?:SAM-)?(256x256|512x512|512-MS|1024-MS|2K-MS)")
_SIDES = {"256x256": 32, "512x512": 64, "512-MS": 64, "1024-MS": 128, "2K-MS": 256}
#: Channels of a head in every published model.
_HEAD = 72


@dataclass(frozen=True)
class Description:
    """What is known of a transformer.

    ``config`` says (``config.is_set``) what is known, but for ``assumed``, fields that had to have some value.
    ``family``: ``alpha``, ``sigma``, or empty if not known. ``notes``: sentences on where the values come from.
    """

    config: PixArtConfig
    family: str
    assumed: frozenset[str]
    notes: list[str]

    def knows(self, name: str) -> bool:
        """Whether the value of a field is known, rather than a default."""
        return self.config.is_set(name) and name not in self.assumed


def describe(
    view: Transformer,
    source: str | Path,
    given: PixArtConfig | None = None,
    sample_size: int | None = None,
    any_heads: bool = False,
) -> Description:
    """Put together what is known of a checkpoint: ``given`` and ``sample_size``, the config.json with it, its tensors.

    What the tensors show must not contradict what is said. Sizes that nobody says are taken from ``pos_embed``, or
    from the published name of the file. ``any_heads`` allows for a number of heads that is not known.

    Raises ``CheckpointError`` for a contradiction, and for tensors that are no PixArt transformer's.
    """
    source, shown = Path(source), shown_by(view.tensors, source)
    said, notes = _said(source, given)
    family = _family(shown, said, source)
    if sample_size is not None:
        positions = positions_of(sample_size, family)
        positions = {n: v for n, v in positions.items() if n != "class_name" or not said.is_set(n)}
        said = merge(PixArtConfig(**positions), said, "sample_size")
    size, note = _size_shown(view, source, family)
    found = {name: value for name, value in size.items() if not said.is_set(name)}
    if family and "model_max_length" not in shown and not said.is_set("model_max_length"):
        found["model_max_length"] = next(count for count, name in FAMILIES.items() if name == family)
    assumed = frozenset()
    if any_heads and shown["hidden_size"] % _HEAD and not said.is_set("num_heads"):
        found["num_heads"], assumed = 1, frozenset({"num_heads"})
    config = reconcile(PixArtConfig(**_said_by(said) | found), shown, source)
    return Description(config, family, assumed, notes + [note] * ("input_size" in found))


def _said(source: Path, given: PixArtConfig | None) -> tuple[PixArtConfig, list[str]]:
    """The configuration as the caller says it, or the files: a folder's own, else the audit or config.json beside.

    A folder's own must agree with the one that is given; what lies beside a file is only read if none is given.
    """
    own = source / "config.json"
    if source.is_dir() and (given is None or own.is_file()):
        return merge(config_from_diffusers(read_json(own), own), given or PixArtConfig(), own), []
    beside = (source.with_name(f"{source.name}.audit.json"), source.with_name("config.json"))
    path = next((path for path in beside if path.is_file()), None)
    if given is not None or path is None:
        return given or PixArtConfig(), []
    try:
        return read_config(path), [f"What the tensors do not show is taken from {path}."]
    except CheckpointError as error:
        return PixArtConfig(), [f"The configuration beside the file was not used: {error}."]


def _family(shown: Mapping, said: PixArtConfig, source: Path) -> str:
    """``alpha`` or ``sigma``, or empty: by caption tokens, micro conditions, published name or the pipeline around."""
    tokens = shown.get("model_max_length") or (said.is_set("model_max_length") and said.model_max_length)
    if tokens in FAMILIES:
        return FAMILIES[tokens]
    if shown["micro_condition"]:
        return "alpha"
    index = (source if source.is_dir() else source.parent).parent / "model_index.json"
    kind = str(read_json(index).get("_class_name")) if index.is_file() else ""
    name = _PUBLISHED.match(source.name)
    if name and not tokens:
        return "sigma" if name[1] else "alpha"
    return {"PixArtAlphaPipeline": "alpha", "PixArtSigmaPipeline": "sigma"}.get(kind, "")


def _size_shown(view: Transformer, source: Path, family: str) -> tuple[dict, str]:
    """The training size, if ``pos_embed`` or the published name of the file tells it, and a sentence on that."""
    sentence = "The training size, latents of {}, is the one that {}."
    for stored in view.recomputed.values():
        shown = positions_shown(stored, view.tensors["x_embedder.proj.weight"].shape[-1])
        if "pe_interpolation" in shown:
            return shown, sentence.format(shown["input_size"], "pos_embed shows")
    name = _PUBLISHED.match(source.name)
    if name:
        side = _SIDES[name[2]]
        return positions_of(side, family), sentence.format(side, "the file's name says")
    return {}, ""


def shown_by(tensors: Mapping[str, Stored], source: str | Path = "checkpoint") -> dict:
    """Configuration values that the tensors (official names; only shapes are looked at) themselves show."""
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
        shown["kv_compress_config"] = {
            "sampling": "conv",
            "scale_factor": ratios[layers[0]],
            "kv_compress_layer": layers,
        }
    return shown


def _shape(tensors: Mapping[str, Stored], name: str, axes: int, source: str | Path) -> tuple[int, ...]:
    if name not in tensors:
        raise CheckpointError(f"{source} is no PixArt transformer: it has no tensor {name}")
    shape = tuple(tensors[name].shape)
    if len(shape) != axes or not all(shape):
        raise CheckpointError(f"{source}: {name} has shape {shape}; expected {axes} axes, none of them empty")
    return shape


def _depth(tensors: Mapping[str, Stored], width: int, source: str | Path) -> int:
    """Number of blocks, which must be numbered without gaps; each has a projection of the model's width."""
    blocks = {int(found[1]) for found in map(_BLOCK.match, tensors) if found}
    lost = sorted(set(range(max(blocks) + 1)) - blocks)
    if lost:
        raise CheckpointError(
            f"{source} has blocks up to {max(blocks)}, but not {lost[:8]}; it is incomplete"
        )
    for block in blocks:
        name = f"blocks.{block}.attn.qkv.weight"
        if name in tensors and tuple(tensors[name].shape) != (3 * width, width):
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensors[name].shape)}; expected {(3 * width, width)}"
            )
    return len(blocks)


def positions_of(sample_size: int, family: str) -> dict:
    """What the published models of a latent side (image side / 8) have: class, side, stretching of the positions.

    Positions are stretched by size / 64; alpha's 256 model, unlike sigma's, has those of 512.
    """
    if sample_size < 1:
        raise CheckpointError(f"sample_size is {sample_size}; expected the latent side: 32, 64, 128 or 256")
    stretch = sample_size / 64
    return {
        "class_name": "PixArt" if sample_size == 32 else "PixArtMS",
        "input_size": sample_size,
        "pe_interpolation": max(stretch, 1.0) if family == "alpha" else stretch,
    }


def positions_shown(pos_embed: Stored, patch: int) -> dict:
    """``input_size`` and ``pe_interpolation`` as a stored ``pos_embed`` (1, N, D) shows them, where it does."""
    _, tokens, width = pos_embed.shape if len(pos_embed.shape) == 3 else (0, 0, 0)
    side = math.isqrt(tokens)
    if not tokens or side**2 != tokens or width % 4:
        return {}
    row = np.asarray(replace(pos_embed, parts=(pos_embed.parts[0][0, :side],)))
    shown = {"input_size": side * patch}
    for stretch in (0.5, 1.0, 2.0, 4.0, 8.0):
        if np.allclose(row, sincos_positions(width, 1, side, side, stretch), atol=2e-2):
            shown["pe_interpolation"] = stretch
    return shown


def read_config(path: str | Path) -> PixArtConfig:
    """A configuration from JSON: ``PixArtConfig``'s fields, a diffusers ``config.json``, or an audit of ``convert``."""
    values = read_json(path)
    if "_class_name" in values:
        return config_from_diffusers(values, path)
    try:
        return PixArtConfig.from_dict(values["config"] if isinstance(values.get("config"), dict) else values)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def merge(written: PixArtConfig, given: PixArtConfig, source: str | Path) -> PixArtConfig:
    """The configuration of a folder, completed by the one that the caller gives; what both say must be the same."""
    for name, value in _said_by(given).items():
        if written.is_set(name) and getattr(written, name) != value:
            raise CheckpointError(
                f"{source} says {name} = {getattr(written, name)}, the configuration given says {value}"
            )
    return PixArtConfig(**_said_by(written) | _said_by(given))


def reconcile(config: PixArtConfig, shown: Mapping, source: str | Path) -> PixArtConfig:
    """The configuration completed by what a checkpoint shows; a value said and shown differently is an error."""
    values = _said_by(config)
    for name, value in shown.items():
        said = getattr(config, name)
        same = said == value or (name == "kv_compress_config" and _same_compression(config, value))
        if not same and config.is_set(name):
            contradiction = f"{source} shows {name} = {value}, but the configuration says {said}."
            raise CheckpointError(f"{contradiction} {_HINTS.get(name, '')}".rstrip())
        values[name] = said if same else value
    if not config.is_set("num_heads") and not config.is_set("hidden_size"):
        values["num_heads"] = heads_of_width(shown["hidden_size"])
    return PixArtConfig(**values)


def _said_by(config: PixArtConfig) -> dict:
    """The fields that a configuration says."""
    return {f.name: getattr(config, f.name) for f in fields(PixArtConfig) if config.is_set(f.name)}


def _same_compression(config: PixArtConfig, shown: Mapping) -> bool:
    said = (config.kv_operator, config.kv_ratio, sorted(config.kv_layers))
    return said == (shown["sampling"], shown["scale_factor"], shown["kv_compress_layer"])


def heads_of_width(width: int) -> int:
    """Number of heads of the published models' size, 72; tensors do not show it, so another size must be said."""
    if width % _HEAD:
        raise CheckpointError(
            f"the number of heads cannot be told: hidden_size {width} is no multiple of {_HEAD}. Give num_heads in the "
            "configuration (--config of `pixart-nb convert`), or a config.json beside the checkpoint"
        )
    return width // _HEAD


def config_from_diffusers(values: Mapping, source: str | Path = "config.json") -> PixArtConfig:
    """``PixArtConfig`` of a diffusers ``transformer/config.json``."""
    if values.get("_class_name") not in ("PixArtTransformer2DModel", "Transformer2DModel"):
        raise CheckpointError(
            f"{source} is of {values.get('_class_name')!r}; expected PixArtTransformer2DModel"
        )
    try:
        return _from_diffusers(values)
    except KeyError as error:
        raise CheckpointError(f"{source} has no {error.args[0]}; expected a PixArt transformer's") from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{source} is no PixArt transformer's: {error}") from error


def _from_diffusers(values: Mapping) -> PixArtConfig:
    size, channels = values.get("sample_size", 128), values.get("in_channels", 4)
    micro, scale = values.get("use_additional_conditions"), values.get("interpolation_scale")
    own = {
        name: values[name]
        for name in ("class_name", "model_max_length", "qk_norm", "kv_compress_config")
        if values.get(name) is not None
    }
    return PixArtConfig(
        hidden_size=values["num_attention_heads"] * values["attention_head_dim"],
        num_heads=values["num_attention_heads"],
        depth=values["num_layers"],
        patch_size=values.get("patch_size", 2),
        in_channels=channels,
        caption_channels=values.get("caption_channels", 4096),
        input_size=size,
        pe_interpolation=float(scale if scale is not None else max(size // 64, 1)),
        pred_sigma=values.get("out_channels", 8) == 2 * channels,
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
