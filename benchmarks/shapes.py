"""Sizes of the models and of the work of a benchmark. The defaults are PixArt-Sigma XL/2 with T5 XXL."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from pixart_nb.config import SAMPLING_STEPS
from pixart_nb.core.errors import PixArtNBError


@dataclass(frozen=True)
class Shapes:
    """Sizes of the models and of the work. Weights are random, which does not change the time.

    Attributes:
        size: Side of the image in pixels.
        steps: Denoising steps that run.
        caption_tokens: Tokens of the prompt; the empty negative prompt has one.
        max_length: Tokens that diffusers pads prompts to.
        depth: Blocks of the transformer.
        text_layers: Layers of T5; XXL has 24, of 0.8 GB each in float32.
        vae_widths: Channels of the autoencoder.
        ratio: KV compression of every block.
        dtype: ``fp32`` or ``bf16``, of transformer and T5.
        batch_size: Images of a training step.
        small: A transformer as small as those that come with the kit, instead of the sizes above.
        compiled: Networks of diffusers are compiled by ``torch.compile``.
        trimmed: diffusers encodes prompts without padding, which its pipeline does not.
        recompute: A training step computes its activations again in the backward pass (gradient checkpointing).
    """

    size: int = 256
    steps: int = SAMPLING_STEPS
    caption_tokens: int = 20
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
    dtype: str = "fp32"
    batch_size: int = 1
    small: bool = False
    compiled: bool = False
    trimmed: bool = False
    recompute: bool = False

    def __post_init__(self):
        if self.small:
            for name, value in {"hidden_size": 192, "heads": 6, "depth": 6, "caption_channels": 128}.items():
                object.__setattr__(self, name, value)
        for name in ("size", "steps", "caption_tokens", "depth", "text_layers", "ratio", "batch_size"):
            if getattr(self, name) < 1:
                raise PixArtNBError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.dtype not in ("fp32", "bf16"):
            raise PixArtNBError(f"dtype is {self.dtype}; expected fp32 or bf16")
        if self.size % 16:
            raise PixArtNBError(f"size is {self.size}; expected a multiple of 16 pixels")
        if self.caption_tokens > self.max_length:
            raise PixArtNBError(
                f"caption_tokens is {self.caption_tokens}; a prompt has at most {self.max_length} tokens"
            )
        object.__setattr__(self, "vae_widths", tuple(self.vae_widths))

    @classmethod
    def from_dict(cls, values: dict) -> Shapes:
        """Create shapes from a mapping; an unknown key is refused with the valid ones."""
        names = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise PixArtNBError(f"unknown shapes {unknown}; valid are {', '.join(names)}")
        return cls(**values)

    def to_dict(self) -> dict:
        """Return all fields."""
        return asdict(self)

    @property
    def pe_interpolation(self) -> float:
        """Position scale of a model of this size."""
        return max(self.size / 512, 0.5)
