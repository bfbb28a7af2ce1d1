"""Configuration of a LoRA, under the names of PEFT, and the patterns of module names in it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from pixart_nb.core.errors import PixArtNBError

#: Projections of both attentions: the default targets of diffusers' scripts.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
#: Initial lora_A. ``kaiming``: uniform within 1 / sqrt(in), PEFT's default; ``gaussian``: normal, 1 / r.
STARTS = ("kaiming", "gaussian")
#: Wildcards of a pattern: the characters that they accept, and the fewest of them.
_WILDCARDS = {".*": (None, 0), ".+": (None, 1), **dict.fromkeys((r"\d+", "[0-9]+"), ("0123456789", 1))}
_TOKEN = re.compile(r"\.\*|\.\+|\\d\+|\[0-9\]\+|\\[^\w\s]|[\w./-]")


def pattern_value(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return the value of the first pattern that matches a module's name or its end, as in PEFT.

    Patterns are names, in which special characters may be escaped and ``.*``, ``.+``, ``\\d+``, ``|``, ``^`` and ``$``
    are understood. They are matched in linear time: a file cannot hang the reader. Raises ``PixArtNBError`` for other
    regular expressions.
    """
    for pattern, value in patterns.items():
        if _matches(pattern, name):
            return value
    return default


def _matches(pattern: str, name: str) -> bool:
    ends = [name, *(name[index + 1 :] for index, letter in enumerate(name) if letter == ".")]
    for option in pattern.strip("()").split("|"):
        tokens = pattern_tokens(option)
        if any(_accepts(tokens, end) for end in (ends[:1] if option.startswith("^") else ends)):
            return True
    return False


@lru_cache(maxsize=4096)
def pattern_tokens(pattern: str) -> tuple[tuple[str | None, int], ...]:
    """Return (accepted characters, None for any; fewest) of each part of a pattern; raises ``PixArtNBError``."""
    text = pattern.removeprefix("^").removesuffix("$")
    parts = _TOKEN.findall(text)
    if "".join(parts) != text or len(text) > 1000:
        raise PixArtNBError(
            f"{pattern!r:.80} is not understood as a pattern of module names; expected names such as attn1.to_q, with "
            r"the wildcards .*, .+ and \d+ at most"
        )
    return tuple(_WILDCARDS.get(part, (part[-1], -1)) for part in parts)


def _accepts(tokens: Sequence[tuple[str | None, int]], text: str) -> bool:
    """Return whether tokens match a whole text, by following all possibilities at once (Thompson 1968)."""
    states = _skip_optional(tokens, {0})
    for letter in text:
        following = set()
        for state in states:
            if state == len(tokens):
                continue
            letters, least = tokens[state]
            if letters is None or letter in letters:
                following.add(state + 1)
                if least >= 0:
                    following.add(state)
        states = _skip_optional(tokens, following)
    return len(tokens) in states


def _skip_optional(tokens: Sequence[tuple[str | None, int]], states: set[int]) -> set[int]:
    for state in sorted(states):
        while state < len(tokens) and tokens[state][1] == 0:
            state += 1
            states.add(state)
    return states


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
        object.__setattr__(self, "target_modules", _texts(self.target_modules))
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
            pattern_value({pattern: None}, "", None)

    def rank(self, module: str) -> int:
        """Return the rank of a module."""
        return pattern_value(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """Return the factor of lora_B lora_A in a module."""
        rank = self.rank(module)
        alpha = pattern_value(self.alpha_pattern, module, self.lora_alpha)
        return float(rank if alpha is None else alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _texts(targets: str | Sequence[str]) -> tuple[str, ...]:
    texts = (targets,) if isinstance(targets, str) else tuple(targets)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise PixArtNBError(f"target_modules is {targets!r}; expected names of layers, such as {ATTENTION}")
    return texts
