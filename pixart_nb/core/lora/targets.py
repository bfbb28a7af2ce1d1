"""Layers of a transformer that LoRA can adapt, by all their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pixart_nb.core.checkpoints.key_maps import diffusers_names, general_name
from pixart_nb.core.errors import PixArtNBError, did_you_mean
from pixart_nb.core.models.embeddings import PatchProjection
from pixart_nb.core.models.layers import Linear
from pixart_nb.core.models.transformer import PixArt


@dataclass(frozen=True)
class Target:
    """Outputs ``start`` to ``stop`` of the layer that the network calls ``layer``."""

    layer: str
    start: int
    stop: int


class LayerTargets:
    """Layers of a transformer that can be adapted, and the names of their modules."""

    def __init__(self, net: PixArt):
        types = (Linear, PatchProjection)
        self.cells = {name: cell for name, cell in net.cells_and_names() if isinstance(cell, types)}
        self.diffusers: dict[str, Target] = {}
        self.official: dict[str, Target] = {}
        for layer, cell in self.cells.items():
            rows = cell.weight.shape[0]
            names = [name.removesuffix(".weight") for name in diffusers_names(f"{layer}.weight")]
            self.official[layer] = Target(layer, 0, rows)
            size = rows // max(1, len(names))
            self.diffusers |= {n: Target(layer, k * size, (k + 1) * size) for k, n in enumerate(names)}
        dotted = self.official | self.diffusers
        self.targets = {name.replace(".", "_"): target for name, target in dotted.items()} | dotted

    def named(self, names: Iterable[str]) -> dict[str, Target]:
        """Return the modules whose names end with ``names``; raises ``PixArtNBError`` for a name without any."""
        chosen: dict[str, Target] = {}
        for name in names:
            matches = [t for n, t in self.diffusers.items() if f".{n}".endswith(f".{name}")]
            matches = matches or [t for n, t in self.official.items() if f".{n}".endswith(f".{name}")]
            if not matches:
                ends = [general_name(n).rpartition("{i}.")[2] for n in (*self.diffusers, *self.official)]
                ends = [*dict.fromkeys(ends)]
                hint = did_you_mean(name, ends)
                raise PixArtNBError(f"no layer's name ends with {name!r}{hint}; the ends are: {', '.join(ends)}")
            chosen |= {self.canonical(target): target for target in matches}
        self.check_overlap(chosen)
        return chosen

    def canonical(self, target: Target) -> str:
        """Return the name of a module: diffusers' name, or the official one of a layer that diffusers splits."""
        return next((name for name, other in self.diffusers.items() if other == target), target.layer)

    def check_overlap(self, modules: Mapping[str, Target]) -> None:
        """Refuse modules of which one is a part of another."""
        by_layer: dict[str, list[tuple[Target, str]]] = {}
        for name, target in modules.items():
            for other, other_name in by_layer.setdefault(target.layer, []):
                if target.start < other.stop and other.start < target.stop:
                    raise PixArtNBError(
                        f"{other_name} and {name} are both to be adapted, but one is a part of the other"
                    )
            by_layer[target.layer].append((target, name))
