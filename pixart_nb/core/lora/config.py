"""Targets, rank and scale of a LoRA, under the names of PEFT, and the layers of a transformer that have these names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from pixart_nb.core.checkpoints.key_maps import diffusers_names, general_name
from pixart_nb.core.errors import PixArtNBError, did_you_mean
from pixart_nb.core.models.embeddings import PatchProjection
from pixart_nb.core.models.layers import Linear
from pixart_nb.core.models.transformer import PixArt

#: Projections of both attentions: the default targets of diffusers' scripts.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
#: Initial lora_A. ``kaiming``: uniform within 1 / sqrt(in), PEFT's default; ``gaussian``: normal, 1 / r.
STARTS = ("kaiming", "gaussian")
_TOKEN = re.compile(r"\.\*|\.\+|\\d\+|\[0-9\]\+|\\[^\w\s]|[\w./-]")
#: Wildcards of a pattern as (accepted characters, None for any; repeated).
_DIGITS = ("0123456789", False), ("0123456789", True)
_WILDCARDS = {".*": ((None, True),), ".+": ((None, False), (None, True)), r"\d+": _DIGITS, "[0-9]+": _DIGITS}


@dataclass(frozen=True)
class LoraConfig:
    """Targets, rank and scale of a LoRA, under PEFT's names.

    ``target_modules``: ends of diffusers' names of layers (``to_q``, ``attn2.to_k``, ``ff.net.2``) or, if none matches,
    of official names (``attn.qkv``, ``cross_attn.kv_linear``). The update is ``lora_alpha / r`` times lora_B lora_A,
    with ``use_rslora`` over sqrt(r); an alpha of None is the rank. ``rank_pattern`` and ``alpha_pattern``: values of
    some modules, by patterns (see ``pattern_value``).
    """

    r: int = 4
    lora_alpha: float | None = None
    target_modules: tuple[str, ...] = ATTENTION
    lora_dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_lora_weights: str = "kaiming"

    def __post_init__(self):
        targets = (self.target_modules,) if isinstance(self.target_modules, str) else tuple(self.target_modules)
        if not targets or not all(isinstance(target, str) and target for target in targets):
            raise PixArtNBError(f"target_modules is {targets!r}; expected names of layers, such as {ATTENTION}")
        object.__setattr__(self, "target_modules", targets)
        for rank in (self.r, *self.rank_pattern.values()):
            if type(rank) is not int or rank < 1:
                raise PixArtNBError(f"a LoRA's rank is {rank!r}; expected an integer of at least 1")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
                raise PixArtNBError(f"a LoRA's alpha is {alpha!r}; expected a number above 0")
        if not 0 <= self.lora_dropout < 1:
            raise PixArtNBError(f"lora_dropout is {self.lora_dropout}; expected 0 <= lora_dropout < 1")
        if self.init_lora_weights not in STARTS:
            raise PixArtNBError(f"init_lora_weights is {self.init_lora_weights!r}; expected one of {', '.join(STARTS)}")
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            check_pattern(pattern)

    def rank(self, module: str) -> int:
        """Return the rank of a module."""
        return pattern_value(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """Return the factor of lora_B lora_A in a module."""
        rank = self.rank(module)
        alpha = pattern_value(self.alpha_pattern, module, self.lora_alpha)
        return float(rank if alpha is None else alpha) / (math.sqrt(rank) if self.use_rslora else rank)


# ---- patterns


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches a module's name or its end, as in PEFT.

    Patterns are names, in which special characters may be escaped and ``.*``, ``.+``, ``\\d+``, ``|``, ``^`` and ``$``
    are understood. They are matched in linear time: a file cannot hang the reader. Raises ``PixArtNBError`` for other
    regular expressions.
    """
    return next((value for pattern, value in patterns.items() if _matches(pattern, name)), default)


def check_pattern(pattern: str) -> str:
    """Return a pattern that ``pattern_value`` understands; raises ``PixArtNBError`` for others."""
    for option in pattern.strip("()").split("|"):
        _tokens(option)
    return pattern


def _matches(pattern: str, name: str) -> bool:
    """Return whether a pattern matches, by following all positions in the name that it can reach (Thompson 1968)."""
    ends = {index + 1 for index, letter in enumerate(name) if letter == "."}
    for option in pattern.strip("()").split("|"):
        positions = {0} if option.startswith("^") else {0, *ends}
        for letters, repeated in _tokens(option):
            following = _after(positions, letters, name)
            while repeated and following:
                positions |= following
                following = _after(following, letters, name) - positions
            positions = positions if repeated else following
        if len(name) in positions:
            return True
    return False


def _after(positions: set[int], letters: str | None, name: str) -> set[int]:
    return {p + 1 for p in positions if p < len(name) and (letters is None or name[p] in letters)}


@lru_cache(maxsize=4096)
def _tokens(option: str) -> tuple[tuple[str | None, bool], ...]:
    """Return (accepted characters, None for any; repeated) of each part of a pattern."""
    text = option.removeprefix("^").removesuffix("$")
    parts = _TOKEN.findall(text)
    if "".join(parts) != text or len(text) > 1000:
        raise PixArtNBError(
            f"{option!r:.80} is not understood as a pattern of module names; expected names such as attn1.to_q, with "
            r"the wildcards .*, .+ and \d+ at most"
        )
    return tuple(token for part in parts for token in _WILDCARDS.get(part, ((part[-1], False),)))


# ---- layers


class Target(NamedTuple):
    """Outputs ``start`` to ``stop`` of the layer that the network calls ``layer``."""

    layer: str
    start: int
    stop: int


class LayerTargets:
    """Layers of a transformer that can be adapted, and the names of their modules."""

    def __init__(self, net: PixArt):
        types = (Linear, PatchProjection)
        self.cells = {name: cell for name, cell in net.cells_and_names() if isinstance(cell, types)}
        self.official = {layer: Target(layer, 0, cell.weight.shape[0]) for layer, cell in self.cells.items()}
        self.diffusers: dict[str, Target] = {}
        for layer, whole in self.official.items():
            names = [name.removesuffix(".weight") for name in diffusers_names(f"{layer}.weight")]
            size = whole.stop // max(1, len(names))
            self.diffusers |= {n: Target(layer, k * size, (k + 1) * size) for k, n in enumerate(names)}
        dotted = self.official | self.diffusers
        self.targets = {name.replace(".", "_"): target for name, target in dotted.items()} | dotted

    def named(self, names: Iterable[str]) -> dict[str, Target]:
        """Return the modules whose names end with ``names``; raises ``PixArtNBError`` for a name without any."""
        chosen: dict[str, Target] = {}
        for name in names:
            options = ([t for n, t in side.items() if f".{n}".endswith(f".{name}")] for side in self._sides())
            matches = next(filter(None, options), [])
            if not matches:
                ends = [general_name(n).rpartition("{i}.")[2] for side in self._sides() for n in side]
                ends = [*dict.fromkeys(ends)]
                hint = did_you_mean(name, ends)
                raise PixArtNBError(f"no layer's name ends with {name!r}{hint}; the ends are: {', '.join(ends)}")
            chosen |= {self.canonical(target): target for target in matches}
        check_overlap(chosen)
        return chosen

    def _sides(self) -> tuple[dict[str, Target], ...]:
        return self.diffusers, self.official

    def canonical(self, target: Target) -> str:
        """Return the name of a module: diffusers' name, or the official one of a layer that diffusers splits."""
        return next((name for name, other in self.diffusers.items() if other == target), target.layer)


def check_overlap(modules: Mapping[str, Target]) -> None:
    """Refuse modules of which one is a part of another."""
    last, last_name = Target("", 0, 0), ""
    for name, target in sorted(modules.items(), key=lambda item: item[1]):
        if target.layer == last.layer and target.start < last.stop:
            raise PixArtNBError(f"{last_name} and {name} are both to be adapted, but one is a part of the other")
        last, last_name = target, name
