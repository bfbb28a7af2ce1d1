"""Layers of AutoencoderKL, with the parameter names of published checkpoints, and its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mindspore import nn, ops

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError, bounded, check_fields, named_source, refuse_others
from pixart_nb.core.models import ascend_operators
from pixart_nb.core.models.attention import attention
from pixart_nb.core.models.layers import Conv2d, GroupNorm, Linear
from pixart_nb.core.models.operators import silu, transpose

#: Values that diffusers' AutoencoderKL takes for keys that a config.json leaves out.
DIFFUSERS_DEFAULTS = {"block_out_channels": (64,), "layers_per_block": 1, "sample_size": 32, "scaling_factor": 0.18215}
#: Keys that change the result, and the values of them that are implemented here.
IMPLEMENTED = {
    "_class_name": ("AutoencoderKL",),
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
}


@dataclass(frozen=True)
class VAEConfig:
    """Fields of diffusers' ``vae/config.json``; the defaults are SDXL's.

    With ``force_upcast`` the autoencoder computes in float32 where half precision is asked for (``compute_dtype``).
    Without, on a CPU, the convolutions of large decoded images multiply bfloat16, and the rest is float32.
    """

    in_channels: int = bounded(3, 1, 1024)
    out_channels: int = bounded(3, 1, 1024)
    latent_channels: int = bounded(4, 1, 1024)
    block_out_channels: tuple[int, ...] = bounded((128, 256, 512, 512), 1, 2**16)
    layers_per_block: int = bounded(2, 1, 64)
    norm_num_groups: int = bounded(32, 1, 2**16)
    sample_size: int = bounded(1024, 1, 2**16)
    scaling_factor: float = bounded(0.13025, 1e-6, 1e6)
    shift_factor: float | None = bounded(None, -1e6, 1e6)
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    force_upcast: bool = True

    def __post_init__(self):
        check_fields(self)
        widths, groups = self.block_out_channels, self.norm_num_groups
        if len(widths) > 16 or any(width % groups for width in widths):
            raise PixArtNBError(
                f"block_out_channels are {widths[:17]}; expected at most 16 multiples of norm_num_groups, {groups}"
            )

    @classmethod
    def from_dict(cls, values: Mapping, source: str | Path = "vae/config.json") -> VAEConfig:
        """Make a configuration from a published mapping, with diffusers' defaults for the keys that it leaves out.

        Keys that change the result are honoured or refused with a ``PixArtNBError`` that names ``source``.
        """
        values = DIFFUSERS_DEFAULTS | {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        size = values["sample_size"]
        if isinstance(size, tuple) and size and all(isinstance(side, int) for side in size):
            values["sample_size"] = max(size)
        block_types = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
        with named_source(source):
            refuse_others(values, IMPLEMENTED)
            config = cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})
            blocks = len(config.block_out_channels)
            refuse_others(values, {key: ((name,) * blocks,) for key, name in block_types.items()})
        return config

    def compute_dtype(self, dtype: ms.Type) -> ms.Type:
        """Return the dtype to compute in where ``dtype`` is asked for."""
        return ms.float32 if self.force_upcast else dtype

    def to_model(self, latents: Any) -> Any:
        """Scale latents of the encoder, an array or tensor, to those that the transformer works on."""
        return (latents if self.shift_factor is None else latents - self.shift_factor) * self.scaling_factor

    def from_model(self, latents: Any) -> Any:
        """Scale latents of the transformer, an array or tensor, to those that the decoder takes."""
        latents = latents / self.scaling_factor
        return latents if self.shift_factor is None else latents + self.shift_factor


class ResnetBlock(nn.Cell):
    """Norm, SiLU, convolution, twice, added to the input: (N, in, H, W) -> (N, out, H, W)."""

    def __init__(self, channels: int, out: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(groups, channels), Conv2d(channels, out, 3, padding=1)
        self.norm2, self.conv2 = GroupNorm(groups, out), Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = Conv2d(channels, out, 1) if channels != out else None

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        hidden = self.conv1(silu(self.norm1(x)))
        hidden = self.conv2(silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class SpatialAttention(nn.Cell):
    """Self-attention over positions with one head: (N, C, H, W) -> the same shape."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels)
        self.to_q, self.to_k, self.to_v = (Linear(channels, channels) for _ in range(3))
        self.to_out = nn.CellList([Linear(channels, channels)])

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        n, c, height, width = x.shape
        tokens = transpose(self.group_norm(x).reshape(n, c, height * width), 0, 2, 1)
        q, k, v = (part(tokens).reshape(n, 1, height * width, c) for part in (self.to_q, self.to_k, self.to_v))
        out = self.to_out[0](attention(q, k, v).reshape(n, height * width, c))
        return x + transpose(out, 0, 2, 1).reshape(n, c, height, width)


class Downsample(nn.Cell):
    """Convolution of stride 2 after padding right and below by one: (N, C, H, W) -> (N, C, H/2, W/2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        return self.conv((ascend_operators.pad if backend.on_ascend() else ops.pad)(x, (0, 1, 0, 1)))


class Upsample(nn.Cell):
    """Nearest upsampling, then a convolution: (N, C, H, W) -> (N, C, 2H, 2W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        n, c, height, width = x.shape
        wide = ops.tile(x.reshape(n * c, height, width, 1), (1, 1, 1, 2))
        doubled = ops.tile(wide.reshape(n * c, height, 1, 2 * width), (1, 1, 2, 1))
        return self.conv(doubled.reshape(n, c, 2 * height, 2 * width))


class MidBlock(nn.Cell):
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, channels: int, groups: int, with_attention: bool):
        super().__init__()
        self.resnets = nn.CellList([ResnetBlock(channels, channels, groups) for _ in range(2)])
        self.attentions = nn.CellList([SpatialAttention(channels, groups)] if with_attention else [])

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        x = self.resnets[0](x)
        for layer in self.attentions:
            x = layer(x)
        return self.resnets[1](x)


class ResnetStage(nn.Cell):
    """Resnets of one resolution, then a downsampling or an upsampling, or neither."""

    def __init__(self, channels: int, out: int, layers: int, groups: int, resampling: str):
        super().__init__()
        inputs = [channels] + [out] * (layers - 1)
        self.resnets = nn.CellList([ResnetBlock(size, out, groups) for size in inputs])
        self.downsamplers = nn.CellList([Downsample(out)] if resampling == "down" else [])
        self.upsamplers = nn.CellList([Upsample(out)] if resampling == "up" else [])

    def construct(self, x: ms.Tensor) -> ms.Tensor:
        for layer in self.resnets:
            x = layer(x)
        for layer in self.downsamplers:
            x = layer(x)
        for layer in self.upsamplers:
            x = layer(x)
        return x


def _stages(widths: tuple[int, ...], layers: int, groups: int, resampling: str) -> nn.CellList:
    """Return a stage for each width; all but the last have the ``resampling``, down or up."""
    last, pairs = len(widths) - 1, zip((widths[0], *widths[:-1]), widths, strict=True)
    return nn.CellList(
        [ResnetStage(a, b, layers, groups, resampling if i < last else "") for i, (a, b) in enumerate(pairs)]
    )


class Encoder(nn.Cell):
    """Images (N, 3, H, W) in -1..1 -> (N, 2 latent_channels, H/8, W/8)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = _stages(widths, config.layers_per_block, groups, "down")
        self.mid_block = MidBlock(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def fine(self, x: ms.Tensor) -> ms.Tensor:
        """Go from images to the lowest resolution. But for the norms, a cell depends on its neighbourhood only."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return x

    def coarse(self, x: ms.Tensor) -> ms.Tensor:
        """Finish at the lowest resolution, where every cell attends to every other."""
        return self.conv_out(silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Cell):
    """Latents (N, latent_channels, h, w) -> images (N, 3, 8h, 8w), about -1..1."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = _stages(widths, config.layers_per_block + 1, groups, "up")
        self.conv_norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def coarse(self, z: ms.Tensor) -> ms.Tensor:
        """Start at the resolution of the latents, where every cell attends to every other."""
        return self.mid_block(self.conv_in(z))

    def fine(self, x: ms.Tensor) -> ms.Tensor:
        """Go up to images. But for the norms, a pixel depends on its neighbourhood only."""
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(silu(self.conv_norm_out(x)))
