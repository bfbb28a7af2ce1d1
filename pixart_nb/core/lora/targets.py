"""The layers of a transformer that LoRA can adapt, by all the names that they have."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pixart_nb.core.checkpoints.key_maps import diffusers_names
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.embeddings import PatchProjection
from pixart_nb.core.models.layers import Linear
from pixart_nb.core.models.transformer import PixArt


@dataclass(frozen=True)
class Place:
    """Where a module lies: outputs ``start`` to ``stop`` of the layer that the network knows as ``layer``."""

    layer: str
    start: int
    stop: int


class Layers:
    """The layers of a transformer that can be adapted, and the names that their modules have."""

    def __init__(self, net: PixArt):
        kinds = (Linear, PatchProjection)
        self.cells = {name: cell for name, cell in net.cells_and_names() if isinstance(cell, kinds)}
        self.diffusers: dict[str, Place] = {}
        self.official: dict[str, Place] = {}
        for layer, cell in self.cells.items():
            rows = cell.weight.shape[0]
            names = [name.removesuffix(".weight") for name in diffusers_names(f"{layer}.weight") or ()]
            self.official[layer] = Place(layer, 0, rows)
            size = rows // max(1, len(names))
            self.diffusers |= {n: Place(layer, k * size, (k + 1) * size) for k, n in enumerate(names)}
        both = self.official | self.diffusers
        self.places = {name.replace(".", "_"): place for name, place in both.items()} | both

    def named(self, targets: Iterable[str]) -> dict[str, Place]:
        """Module -> place of everything that the targets name; one that names nothing is an error."""
        chosen: dict[str, Place] = {}
        for target in targets:
            found = {n: p for n, p in self.diffusers.items() if _ends_with(n, target)}
            found = found or {n: p for n, p in self.official.items() if _ends_with(n, target)}
            if not found:
                raise PixArtNBError(self._unknown(target))
            chosen |= {self.canonical(place): place for place in found.values()}
        self.check_overlap(chosen)
        return chosen

    def canonical(self, place: Place) -> str:
        """The name of a module: diffusers' where it has one, the official one of a layer that is several of those."""
        return next((name for name, other in self.diffusers.items() if other == place), place.layer)

    def check_overlap(self, modules: Mapping[str, Place]) -> None:
        """Refuse modules of which one is a part of another."""
        taken: dict[str, list[tuple[Place, str]]] = {}
        for name, place in modules.items():
            for other, named in taken.setdefault(place.layer, []):
                if place.start < other.stop and other.start < place.stop:
                    raise PixArtNBError(
                        f"{named} and {name} are both to be adapted, but one is a part of the other"
                    )
            taken[place.layer].append((place, name))

    def _unknown(self, target: str) -> str:
        ends = [*dict.fromkeys(_end(name) for name in (*self.diffusers, *self.official))]
        nearest = difflib.get_close_matches(target, ends, n=1, cutoff=0.6)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        return f"no layer's name ends with {target!r}.{hint} Known ends: {', '.join(ends)}"


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _end(name: str) -> str:
    """What a name ends with whatever the block: ``transformer_blocks.3.attn1.to_q`` -> ``attn1.to_q``."""
    return re.sub(r"^.*blocks\.\d+\.", "", name)
