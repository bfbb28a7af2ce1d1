"""Names of the same tensors in the official layout, which the model uses, and in diffusers' layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

#: Official prefix -> diffusers prefixes; the tensors of several are stacked along axis 0. ``{i}``: number of a block.
MODULES: dict[str, tuple[str, ...]] = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
    "csize_embedder.mlp.0": ("adaln_single.emb.resolution_embedder.linear_1",),
    "csize_embedder.mlp.2": ("adaln_single.emb.resolution_embedder.linear_2",),
    "ar_embedder.mlp.0": ("adaln_single.emb.aspect_ratio_embedder.linear_1",),
    "ar_embedder.mlp.2": ("adaln_single.emb.aspect_ratio_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "final_layer.linear": ("proj_out",),
    "blocks.{i}.attn.qkv": tuple(f"transformer_blocks.{{i}}.attn1.to_{part}" for part in "qkv"),
    "blocks.{i}.attn.proj": ("transformer_blocks.{i}.attn1.to_out.0",),
    "blocks.{i}.attn.q_norm": ("transformer_blocks.{i}.attn1.norm_q",),
    "blocks.{i}.attn.k_norm": ("transformer_blocks.{i}.attn1.norm_k",),
    "blocks.{i}.attn.sr": ("transformer_blocks.{i}.attn1.sr",),
    "blocks.{i}.attn.norm": ("transformer_blocks.{i}.attn1.norm",),
    "blocks.{i}.cross_attn.q_linear": ("transformer_blocks.{i}.attn2.to_q",),
    "blocks.{i}.cross_attn.kv_linear": tuple(f"transformer_blocks.{{i}}.attn2.to_{part}" for part in "kv"),
    "blocks.{i}.cross_attn.proj": ("transformer_blocks.{i}.attn2.to_out.0",),
    "blocks.{i}.mlp.fc1": ("transformer_blocks.{i}.ff.net.0.proj",),
    "blocks.{i}.mlp.fc2": ("transformer_blocks.{i}.ff.net.2",),
}
#: Official name -> diffusers name of single tensors.
TENSORS = {
    "y_embedder.y_embedding": "caption_projection.y_embedding",  # as in the published folders of alpha
    "final_layer.scale_shift_table": "scale_shift_table",
    "blocks.{i}.scale_shift_table": "transformer_blocks.{i}.scale_shift_table",
}
#: In official checkpoints, but computed for every size.
RECOMPUTED = ("pos_embed",)
#: May be missing: the learned empty caption. diffusers encodes an empty prompt instead, and so does this kit.
OPTIONAL = ("y_embedder.y_embedding",)

_BLOCK = re.compile(r"(?<=blocks\.)\d+(?=\.)")
_OFFICIAL_MODULES = {name: (official, n) for official, names in MODULES.items() for n, name in enumerate(names)}
_OFFICIAL_TENSORS = {name: official for official, name in TENSORS.items()}
_OFFICIAL_TENSORS["pos_embed.pos_embed"] = "pos_embed"  # older diffusers folders have it


def general_name(name: str) -> str:
    """Replace the number of a block: ``blocks.7.x`` -> ``blocks.{i}.x``."""
    return _BLOCK.sub("{i}", name)


def _split(name: str) -> tuple[str, str, str]:
    """``blocks.7.attn.proj.weight`` -> (``blocks.{i}.attn.proj``, ``weight``, ``7``)."""
    block = _BLOCK.search(name)
    module, _, leaf = general_name(name).rpartition(".")
    return module, leaf, block[0] if block else ""


def diffusers_names(official: str) -> tuple[str, ...]:
    """Return diffusers' names of an official tensor, stacked along axis 0 if several; () if it has none."""
    module, leaf, block = _split(official)
    general = general_name(official)
    names = (TENSORS[general],) if general in TENSORS else tuple(f"{n}.{leaf}" for n in MODULES.get(module, ()))
    return tuple(name.replace("{i}", block) for name in names)


def official_name(diffusers: str) -> tuple[str, int] | None:
    """Return the official name of a diffusers tensor and its index in the stack; None if it has none."""
    module, leaf, block = _split(diffusers)
    general = general_name(diffusers)
    if general in _OFFICIAL_TENSORS:
        return _OFFICIAL_TENSORS[general].replace("{i}", block), 0
    if module not in _OFFICIAL_MODULES:
        return None
    official, index = _OFFICIAL_MODULES[module]
    return f"{official.replace('{i}', block)}.{leaf}", index


def is_diffusers(names: Iterable[str]) -> bool:
    """Return whether these are diffusers' names of a PixArt transformer."""
    return any(name.startswith(("transformer_blocks.", "adaln_single.")) for name in names)


def origins(names: Iterable[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Group names of one layout by official name; returns also the names that belong to no complete group.

    Official names stand for themselves; diffusers' names are grouped in the order in which their tensors are stacked.
    """
    names = list(names)
    if not is_diffusers(names):
        own = {name: (name,) for name in names if name in RECOMPUTED or diffusers_names(name)}
        return own, [name for name in names if name not in own]
    stacks: dict[str, dict[int, str]] = {}
    rest = []
    for name in names:
        official = official_name(name)
        if official is None:
            rest.append(name)
        else:
            stacks.setdefault(official[0], {})[official[1]] = name
    groups = {}
    for official, parts in stacks.items():
        if len(parts) == max(1, len(diffusers_names(official))):
            groups[official] = tuple(parts[index] for index in sorted(parts))
        else:
            rest += parts.values()
    return groups, rest


#: Attention names of the first Stable Diffusion autoencoders, and their present names.
FORMER_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def rename_former_vae(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give the tensors of an old autoencoder their present names; attention weights (C, C, 1, 1) become (C, C)."""
    renamed = {}
    for name, value in tensors.items():
        if "attentions." in name:
            prefix, module, leaf = name.rsplit(".", 2)
            name = f"{prefix}.{FORMER_VAE.get(module, module)}.{leaf}"
            value = value.reshape(value.shape[:2]) if value.ndim == 4 else value
        renamed[name] = value
    return renamed
