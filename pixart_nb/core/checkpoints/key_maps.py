"""Names of the same tensors in the official layout, which the model uses, and in diffusers'. Tables, no weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rule:
    """One official module prefix and the diffusers prefixes that hold it; several are stacked along axis 0."""

    official: str
    diffusers: tuple[str, ...]


def _rules(*pairs: tuple[str, str | tuple[str, ...]]) -> tuple[Rule, ...]:
    return tuple(Rule(a, (b,) if isinstance(b, str) else b) for a, b in pairs)


#: ``{i}`` stands for a block number. The longest prefixes that fit win, so order does not matter.
RULES = _rules(
    ("x_embedder.proj", "pos_embed.proj"),
    ("t_embedder.mlp.0", "adaln_single.emb.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "adaln_single.emb.timestep_embedder.linear_2"),
    ("csize_embedder.mlp.0", "adaln_single.emb.resolution_embedder.linear_1"),
    ("csize_embedder.mlp.2", "adaln_single.emb.resolution_embedder.linear_2"),
    ("ar_embedder.mlp.0", "adaln_single.emb.aspect_ratio_embedder.linear_1"),
    ("ar_embedder.mlp.2", "adaln_single.emb.aspect_ratio_embedder.linear_2"),
    ("t_block.1", "adaln_single.linear"),
    ("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    ("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    ("final_layer.linear", "proj_out"),
    ("blocks.{i}.attn.qkv", tuple(f"transformer_blocks.{{i}}.attn1.to_{part}" for part in "qkv")),
    ("blocks.{i}.attn.proj", "transformer_blocks.{i}.attn1.to_out.0"),
    ("blocks.{i}.attn.q_norm", "transformer_blocks.{i}.attn1.norm_q"),
    ("blocks.{i}.attn.k_norm", "transformer_blocks.{i}.attn1.norm_k"),
    ("blocks.{i}.attn.sr", "transformer_blocks.{i}.attn1.sr"),
    ("blocks.{i}.attn.norm", "transformer_blocks.{i}.attn1.norm"),
    ("blocks.{i}.cross_attn.q_linear", "transformer_blocks.{i}.attn2.to_q"),
    ("blocks.{i}.cross_attn.kv_linear", tuple(f"transformer_blocks.{{i}}.attn2.to_{part}" for part in "kv")),
    ("blocks.{i}.cross_attn.proj", "transformer_blocks.{i}.attn2.to_out.0"),
    ("blocks.{i}.mlp.fc1", "transformer_blocks.{i}.ff.net.0.proj"),
    ("blocks.{i}.mlp.fc2", "transformer_blocks.{i}.ff.net.2"),
)
#: Single tensors.
TABLES = {
    "y_embedder.y_embedding": "caption_projection.y_embedding",  # as in the published folders of alpha
    "final_layer.scale_shift_table": "scale_shift_table",
    "blocks.{i}.scale_shift_table": "transformer_blocks.{i}.scale_shift_table",
}
#: In official checkpoints but not weights: recomputed for every size.
RECOMPUTED = ("pos_embed",)
#: May be missing: the learned empty caption. Diffusers encodes an empty prompt instead, and so does this kit.
OPTIONAL = ("y_embedder.y_embedding",)
#: Names in diffusers folders that diffusers itself no longer writes, and what they are called here.
FORMER = {"pos_embed.pos_embed": "pos_embed"}

_BLOCK = re.compile(r"(?<=blocks\.)\d+(?=\.)")
_TO_DIFFUSERS = {rule.official: rule.diffusers for rule in RULES}
_TO_OFFICIAL = {name: (rule.official, place) for rule in RULES for place, name in enumerate(rule.diffusers)}


def _general(name: str) -> tuple[str, str]:
    """``blocks.7.x`` -> (``blocks.{i}.x``, ``7``)."""
    found = _BLOCK.search(name)
    return (_BLOCK.sub("{i}", name), found.group()) if found else (name, "")


def diffusers_names(official: str) -> tuple[str, ...] | None:
    """Diffusers' names of an official tensor, stacked along axis 0 where several; None if it has none."""
    general, number = _general(official)
    if general in TABLES:
        return (TABLES[general].replace("{i}", number),)
    prefix, _, leaf = general.rpartition(".")
    prefixes = _TO_DIFFUSERS.get(prefix)
    return prefixes and tuple(f"{name.replace('{i}', number)}.{leaf}" for name in prefixes)


def official_name(diffusers: str) -> tuple[str, int] | None:
    """Official name of a diffusers tensor and its place in the stack; None if it has none."""
    if diffusers in FORMER:
        return FORMER[diffusers], 0
    general, number = _general(diffusers)
    for official, other in TABLES.items():
        if other == general:
            return official.replace("{i}", number), 0
    prefix, _, leaf = general.rpartition(".")
    found = _TO_OFFICIAL.get(prefix)
    return found and (f"{found[0].replace('{i}', number)}.{leaf}", found[1])


def is_diffusers(names: Iterable[str]) -> bool:
    """Whether these are diffusers' names of a PixArt transformer."""
    return any(name.startswith(("transformer_blocks.", "adaln_single.")) for name in names)


def origins(names: Iterable[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Official name -> the diffusers names whose tensors are stacked to it; and names that belong to no such stack.

    A stack of which a part is missing is no stack: its parts are among the latter.
    """
    stacks: dict[str, dict[int, str]] = {}
    rest = []
    for name in names:
        found = official_name(name)
        if found is None:
            rest.append(name)
        else:
            stacks.setdefault(found[0], {})[found[1]] = name
    whole = {}
    for official, parts in stacks.items():
        if len(parts) == len(diffusers_names(official) or [official]):
            whole[official] = tuple(parts[place] for place in sorted(parts))
        else:
            rest += parts.values()
    return whole, rest


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
