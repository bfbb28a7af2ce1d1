"""What a benchmark runs: the size of the models and of the work. The defaults are PixArt-Sigma XL/2 with T5 XXL."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from pixart_nb.config import SAMPLING_STEPS
from pixart_nb.core.errors import PixArtNBError


@dataclass(frozen=True)
class Shapes:
    """Sizes of models and work; weights are random, which changes no time.

    ``size`` is the side of the picture in pixels, ``words`` the tokens of the prompt (the empty negative prompt has
    one), ``max_length`` what the peer pads prompts to. ``depth`` counts the transformer's blocks, ``text_layers``
    those of T5: as many as fit. ``vae_widths`` are the autoencoder's channels.
    """

    size: int = 256
    steps: int = SAMPLING_STEPS
    words: int = 20
    max_length: int = 300
    hidden_size: int = 1152
    heads: int = 16
    depth: int = 28
    caption_channels: int = 4096
    text_heads: int = 64
    text_width: int = 10240
    text_layers: int = 2
    vocabulary: int = 32128
    vae_widths: tuple[int, ...] = (128, 256, 512, 512)
    ratio: int = 1

    def __post_init__(self):
        for name in ("size", "steps", "words", "depth", "text_layers", "ratio"):
            if getattr(self, name) < 1:
                raise PixArtNBError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.size % 16:
            raise PixArtNBError(f"size is {self.size}; expected a multiple of 16 pixels")
        if self.words > self.max_length:
            raise PixArtNBError(f"words is {self.words}; a prompt has at most {self.max_length} tokens")
        object.__setattr__(self, "vae_widths", tuple(self.vae_widths))

    @classmethod
    def from_dict(cls, values: dict) -> Shapes:
        """Shapes of a mapping; an unknown key lists the known ones."""
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise PixArtNBError(f"a benchmark does not know {unknown}; it knows {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict:
        """All fields."""
        return asdict(self)

    @property
    def pe_interpolation(self) -> float:
        """How far positions are stretched at this size."""
        return max(self.size / 512, 0.5)
