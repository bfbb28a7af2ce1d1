"""Tensors of a transformer under official names, from files of any layout; nothing is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pixart_nb.core.checkpoints import key_maps
from pixart_nb.core.checkpoints.files import Checkpoint
from pixart_nb.core.checkpoints.lazy_tensor import LazyTensor, stacked

#: Names of the first layer in the official and the diffusers layout.
_FIRST = ("x_embedder.proj.weight", "pos_embed.proj.weight")
#: Prefixes of what wrapped the network when it was saved, in torch's training scripts and in mindone's.
_WRAPPER = re.compile(
    r"((module|model|network|net|backbone|_backbone|transformer|diffusion_model|ema|ema_model|_orig_mod)\.)*"
)
#: MindSpore's names of the parameters of a normalization.
_NORM = re.compile(r"(?<=norm\.)(gamma|beta)$")
_NORM_NAMES = {"gamma": "weight", "beta": "bias"}
_COMPRESSED = re.compile(r"blocks\.(\d{1,4})\.attn\.sr\.weight")


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
    groups, rest = key_maps.origins(names)
    sources = {name: tuple(names[part] for part in parts) for name, parts in groups.items()}
    tensors = {name: _joined(name, [stored[part] for part in parts]) for name, parts in sources.items()}
    others = [name for name in stored if not name.startswith(prefix)]
    others = [name for name in others if not any(_plain_name(name, other) in names for other in prefixes[1:])]
    return TransformerTensors(
        checkpoint,
        "diffusers" if key_maps.is_diffusers(names) else "official",
        {name: tensor for name, tensor in tensors.items() if name not in key_maps.RECOMPUTED},
        sources,
        {name: tensor for name, tensor in tensors.items() if name in key_maps.RECOMPUTED},
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
    convolutions = [match for name in tensors if (match := _COMPRESSED.fullmatch(name))]
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
        names = key_maps.diffusers_names(name)
        parts = tensor.split(len(names)) if len(names) > 1 else (tensor,)
        out |= {other: replace(part, name=other) for other, part in zip(names, parts, strict=False)}
    return out
