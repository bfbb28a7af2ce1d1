"""A transformer's tensors under official names, whichever layout its file has. Names and places; nothing is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pixart_nb.core.checkpoints import key_maps
from pixart_nb.core.checkpoints.files import Opened
from pixart_nb.core.checkpoints.lazy_tensor import Stored, stacked

#: By these the first layer is known, in the official layout and in diffusers'.
_FIRST = ("x_embedder.proj.weight", "pos_embed.proj.weight")
#: What wrapped the network when it was saved, in torch's training scripts and in mindone's.
_WRAPPER = re.compile(
    r"((module|model|network|net|backbone|_backbone|transformer|diffusion_model|ema|ema_model|_orig_mod)\.)*"
)
#: MindSpore's names of a normalisation's parameters.
_NORM = re.compile(r"(norm)\.(gamma|beta)$")
_NORM_NAMES = {"gamma": "weight", "beta": "bias"}
_COMPRESSED = re.compile(r"blocks\.(\d{1,4})\.attn\.sr\.weight")


@dataclass(frozen=True)
class Transformer:
    """A checkpoint seen in the official layout.

    ``tensors``: official name -> tensor. ``origins``: official name -> the names in the file, several where they were
    stacked. ``recomputed``: positions and the like. ``rest``: what belongs to no part of a PixArt transformer, under
    the names of the file. ``layout``: ``official`` or ``diffusers``.
    """

    opened: Opened
    layout: str
    tensors: dict[str, Stored]
    origins: dict[str, tuple[str, ...]]
    recomputed: dict[str, Stored]
    rest: dict[str, Stored]
    notes: list[str]

    @property
    def complete(self) -> dict[str, Stored]:
        """The tensors, with the parts of compressed layers that mindone does not have (see ``started_compression``)."""
        return self.tensors | started_compression(self.tensors)


def official_view(opened: Opened) -> Transformer:
    """The tensors of a checkpoint under official names, without the prefixes of what wrapped the network."""
    prefixes = wrappers_of(opened.tensors)
    prefix, notes = prefixes[0], list(opened.notes)
    plain = {_plain_name(name, prefix): name for name in opened.tensors if name.startswith(prefix)}
    if prefix:
        notes.append(f"Names begin with {prefix!r} in the file; that was taken off.")
    if prefixes[1:]:
        notes.append(f"Not read: the same network under {', '.join(map(repr, prefixes[1:]))}.")
    layout = "diffusers" if key_maps.is_diffusers(plain) else "official"
    whole, rest = _official(plain) if layout == "official" else key_maps.origins(plain)
    tensors = {
        name: _joined(name, [opened.tensors[plain[part]] for part in parts]) for name, parts in whole.items()
    }
    strangers = [name for name in opened.tensors if not name.startswith(prefix)]
    strangers = [
        name for name in strangers if not any(_plain_name(name, other) in plain for other in prefixes[1:])
    ]
    return Transformer(
        opened,
        layout,
        {name: tensor for name, tensor in tensors.items() if name not in key_maps.RECOMPUTED},
        {name: tuple(plain[part] for part in parts) for name, parts in whole.items()},
        {name: tensor for name, tensor in tensors.items() if name in key_maps.RECOMPUTED},
        {source: opened.tensors[source] for source in [*(plain[name] for name in rest), *strangers]},
        notes,
    )


def _joined(name: str, parts: list[Stored]) -> Stored:
    return replace(stacked(parts) if len(parts) > 1 else parts[0], name=name)


def wrappers_of(names: Iterable[str]) -> list[str]:
    """The prefixes under which a file holds the transformer; an average of the weights first, then the shortest."""
    found = {name.removesuffix(first) for name in names for first in _FIRST if name.endswith(first)}
    known = [prefix for prefix in found if _WRAPPER.fullmatch(prefix)]
    return sorted(known, key=lambda prefix: ("ema" not in prefix, len(prefix))) or [""]


def _plain_name(name: str, prefix: str) -> str:
    return _NORM.sub(lambda found: f"{found[1]}.{_NORM_NAMES[found[2]]}", name.removeprefix(prefix))


def _official(names: Iterable[str]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Official names that stand for themselves, and names that are no official ones."""
    known, rest = {}, []
    for name in names:
        own = name in key_maps.RECOMPUTED or key_maps.diffusers_names(name)
        if own:
            known[name] = (name,)
        else:
            rest.append(name)
    return known, rest


def started_compression(
    tensors: Mapping[str, Stored], layers: Iterable[int] = (), ratio: int = 1
) -> dict[str, Stored]:
    """The parts that compressed layers lack, as they start: the average of each cell, and a norm that changes nothing.

    For the layers whose convolution is there (mindone's has no bias, and its norm no parameters), and for ``layers``.
    """
    found = [_COMPRESSED.fullmatch(name) for name in tensors]
    shapes = {int(match[1]): tensors[match[0]].shape for match in found if match}
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
                start = Stored("F32", (np.full(size, value, np.float32),), name=name)
                out[name] = start.read_as(first.dtype) if first is not None else start
    return out


def target_tensors(tensors: Mapping[str, Stored], layout: str) -> dict[str, Stored]:
    """Official tensors under the names of a layout, ``official`` or ``diffusers``."""
    if layout == "official":
        return dict(tensors)
    out = {}
    for name, tensor in tensors.items():
        names = key_maps.diffusers_names(name) or ()
        parts = tensor.split(len(names)) if len(names) > 1 else (tensor,)
        out |= {other: replace(part, name=other) for other, part in zip(names, parts, strict=False)}
    return out
