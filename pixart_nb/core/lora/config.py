"""What a LoRA adapts and how, under the names that PEFT gives it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.lora.files import pattern_value

#: The projections of both attentions: what diffusers' scripts adapt unless told.
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
#: How lora_A starts. ``kaiming``: uniform, within 1 / sqrt(in), PEFT's own start; ``gaussian``: normal, 1 / r.
STARTS = ("kaiming", "gaussian")


@dataclass(frozen=True)
class LoraConfig:
    """What is adapted and how, under PEFT's names.

    ``target_modules``: ends of diffusers' names of layers (``to_q``, ``attn2.to_k``, ``ff.net.2``) or, where none fits,
    of the official ones (``attn.qkv``, ``cross_attn.kv_linear``). The change is ``lora_alpha / r`` times lora_B lora_A,
    with ``use_rslora`` over sqrt(r); an alpha of None is the rank. ``rank_pattern`` and ``alpha_pattern`` give some
    modules their own, by regular expressions for the ends of their names.
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
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise PixArtNBError(f"a LoRA's rank is {rank!r}; expected a whole number of at least 1")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
                raise PixArtNBError(f"a LoRA's alpha is {alpha!r}; expected a number above 0")
        if not 0 <= self.lora_dropout < 1:
            raise PixArtNBError(f"lora_dropout is {self.lora_dropout}; expected 0 <= lora_dropout < 1")
        if self.init_lora_weights not in STARTS:
            raise PixArtNBError(
                f"init_lora_weights is {self.init_lora_weights!r}; expected one of {', '.join(STARTS)}"
            )

    def rank(self, module: str) -> int:
        """The rank of a module."""
        return pattern_value(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What lora_B lora_A is multiplied by in a module."""
        rank = self.rank(module)
        alpha = pattern_value(self.alpha_pattern, module, self.lora_alpha)
        return float(rank if alpha is None else alpha) / (math.sqrt(rank) if self.use_rslora else rank)


def _texts(targets: str | Sequence[str]) -> tuple[str, ...]:
    texts = (targets,) if isinstance(targets, str) else tuple(targets)
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise PixArtNBError(f"target_modules is {targets!r}; expected names of layers, such as {ATTENTION}")
    return texts
