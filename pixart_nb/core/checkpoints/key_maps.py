"""Names of the same tensors in the official layout, which the model uses, and in diffusers'; nothing is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pixart_nb.core.checkpoints.files import Checkpoint
from pixart_nb.core.checkpoints.lazy_tensor import LazyTensor, stacked

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

#: Names of the first layer in the official and the diffusers layout.
_FIRST = ("x_embedder.proj.weight", "pos_embed.proj.weight")
#: Prefixes of what wrapped the network when it was saved, in torch's training scripts and in mindone's.
_WRAPPER = re.compile(
    r"((module|model|network|net|backbone|_backbone|transformer|diffusion_model|ema|ema_model|_orig_mod)\.)*"
)
#: MindSpore's names of the parameters of a normalization.
_NORM = re.compile(r"(?<=norm\.)(gamma|beta)$")
_NORM_NAMES = {"gamma": "weight", "beta": "bias"}
#: Name of the convolution of a compressed layer.
COMPRESSED = re.compile(r"blocks\.(\d{1,4})\.attn\.sr\.weight")


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


# ---- checkpoints


@dataclass(frozen=True)
class TransformerTensors:
    """A checkpoint of a transformer in the official layout.

    ``tensors``: official name -> tensor. ``origins``: official name -> names in the file, several if they were
    stacked. ``recomputed``: positions. ``rest``: tensors of no part of a PixArt transformer, under the names of the
    file. ``layout``: ``official`` or ``diffusers``.
    """

    checkpoint: Checkpoint
    layout: str
    tensors: dict[str, LazyTensor]
    origins: dict[str, tuple[str, ...]]
    recomputed: dict[str, LazyTensor]
    rest: dict[str, LazyTensor]
    notes: list[str]

    @property
    def complete(self) -> dict[str, LazyTensor]:
        """The tensors, with the parts of compressed layers that mindone does not have (see ``init_compression``)."""
        return self.tensors | init_compression(self.tensors)


def to_official_names(checkpoint: Checkpoint) -> TransformerTensors:
    """Rename the tensors of a checkpoint to official names, without the prefixes of what wrapped the network."""
    stored = checkpoint.tensors
    prefixes = wrapper_prefixes(stored)
    prefix, notes = prefixes[0], list(checkpoint.notes)
    names = {_plain_name(name, prefix): name for name in stored if name.startswith(prefix)}
    if prefix:
        notes.append(f"Names begin with {prefix!r} in the file; that was taken off.")
    if prefixes[1:]:
        notes.append(f"Not read: the same network under {', '.join(map(repr, prefixes[1:]))}.")
    groups, rest = origins(names)
    sources = {name: tuple(names[part] for part in parts) for name, parts in groups.items()}
    tensors = {name: _joined(name, [stored[part] for part in parts]) for name, parts in sources.items()}
    others = [name for name in stored if not name.startswith(prefix)]
    others = [name for name in others if not any(_plain_name(name, other) in names for other in prefixes[1:])]
    return TransformerTensors(
        checkpoint,
        "diffusers" if is_diffusers(names) else "official",
        {name: tensor for name, tensor in tensors.items() if name not in RECOMPUTED},
        sources,
        {name: tensor for name, tensor in tensors.items() if name in RECOMPUTED},
        {name: stored[name] for name in [*(names[name] for name in rest), *others]},
        notes,
    )


def _joined(name: str, parts: list[LazyTensor]) -> LazyTensor:
    return replace(stacked(parts) if len(parts) > 1 else parts[0], name=name)


def wrapper_prefixes(names: Iterable[str]) -> list[str]:
    """Return the prefixes under which a file holds the transformer; an EMA of the weights first, then the shortest."""
    prefixes = {name.removesuffix(first) for name in names for first in _FIRST if name.endswith(first)}
    prefixes = {prefix for prefix in prefixes if _WRAPPER.fullmatch(prefix)}
    return sorted(prefixes, key=lambda prefix: ("ema" not in prefix, len(prefix))) or [""]


def _plain_name(name: str, prefix: str) -> str:
    return _NORM.sub(lambda match: _NORM_NAMES[match[0]], name.removeprefix(prefix))


def init_compression(
    tensors: Mapping[str, LazyTensor], layers: Iterable[int] = (), ratio: int = 1
) -> dict[str, LazyTensor]:
    """Return initial values for the missing parts of compressed layers: an average of each cell, and an identity norm.

    For the layers whose convolution exists (mindone's has no bias, and its norm no parameters), and for ``layers``.
    """
    convolutions = [match for name in tensors if (match := COMPRESSED.fullmatch(name))]
    shapes = {int(match[1]): tensors[match[0]].shape for match in convolutions}
    shapes = {layer: shape for layer, shape in shapes.items() if len(shape) == 4}
    first = tensors.get("x_embedder.proj.weight")
    if first is not None:
        shapes = dict.fromkeys(layers, (first.shape[0], 1, ratio, ratio)) | shapes
    out = {}
    for layer, shape in sorted(shapes.items()):
        parts = {"sr.weight": (shape, 1.0 / (shape[-1] * shape[-2])), "sr.bias": (shape[:1], 0.0)}
        parts |= {"norm.weight": (shape[:1], 1.0), "norm.bias": (shape[:1], 0.0)}
        for leaf, (size, value) in parts.items():
            name = f"blocks.{layer}.attn.{leaf}"
            if name not in tensors:
                tensor = LazyTensor("F32", (np.full(size, value, np.float32),), name=name)
                out[name] = tensor.astype(first.dtype) if first is not None else tensor
    return out


def to_layout(tensors: Mapping[str, LazyTensor], layout: str) -> dict[str, LazyTensor]:
    """Rename official tensors to a layout, ``official`` or ``diffusers``; stacked ones are split."""
    if layout == "official":
        return dict(tensors)
    out = {}
    for name, tensor in tensors.items():
        names = diffusers_names(name)
        parts = tensor.split(len(names)) if len(names) > 1 else (tensor,)
        out |= {other: replace(part, name=other) for other, part in zip(names, parts, strict=False)}
    return out


# ---- autoencoders

#: Attention names of latent diffusion (LDM) and of the first autoencoders of diffusers, and their present names.
_VAE_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
_VAE_ATTENTION |= {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
#: Names of LDM's autoencoder and diffusers'; ``{0}`` and ``{1}`` are numbers of blocks.
_LDM_VAE = {
    r"(\w+)\.mid\.attn_1": "{0}.mid_block.attentions.0",
    r"(\w+)\.mid\.block_1": "{0}.mid_block.resnets.0",
    r"(\w+)\.mid\.block_2": "{0}.mid_block.resnets.1",
    r"encoder\.down\.(\d+)\.block\.(\d+)": "encoder.down_blocks.{0}.resnets.{1}",
    r"encoder\.down\.(\d+)\.downsample": "encoder.down_blocks.{0}.downsamplers.0",
    r"decoder\.up\.(\d+)\.block\.(\d+)": "decoder.up_blocks.{0}.resnets.{1}",
    r"decoder\.up\.(\d+)\.upsample": "decoder.up_blocks.{0}.upsamplers.0",
    r"(\w+)\.norm_out": "{0}.conv_norm_out",
}
#: Prefixes of an autoencoder inside of the file of a whole model.
_VAE_PREFIX = re.compile(r"(first_stage_model\.|vae\.|)(?=(?:encoder|decoder)\.|(?:post_)?quant_conv\.)")


def rename_vae(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give the tensors of an autoencoder diffusers' present names; attention weights (C, C, 1, 1) become (C, C).

    Known are the names of latent diffusion (LDM), which ComfyUI has too, and former ones of diffusers. Other parts of
    an LDM file (its loss, a whole model) are left out.
    """
    levels = [int(match[1]) for name in tensors if (match := re.search(r"decoder\.up\.(\d+)\.", name))]
    renamed = {}
    for name, value in tensors.items():
        prefix = _VAE_PREFIX.match(name)
        if levels and not prefix:
            continue
        name = name.removeprefix(prefix[1]) if levels else name
        for pattern, new in _LDM_VAE.items() if levels else ():
            if match := re.match(rf"{pattern}(?=\.)", name):
                parts = match.groups()
                if pattern.startswith("decoder"):  # counted from the last
                    parts = (max(levels) - int(parts[0]), *parts[1:])
                name = new.format(*parts) + name[match.end() :]
                break
        name = name.replace(".nin_shortcut.", ".conv_shortcut.")
        if "attentions." in name:
            stem, module, leaf = name.rsplit(".", 2)
            name = f"{stem}.{_VAE_ATTENTION.get(module, module)}.{leaf}"
            value = value.reshape(value.shape[:2]) if value.ndim == 4 else value
        renamed[name] = value
    return renamed
