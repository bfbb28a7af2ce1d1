"""AutoencoderKL: the autoencoder of Stable Diffusion and SDXL, whose latents PixArt works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from mindspore import mint, nn, ops

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.fast.normalization import own_statistics
from pixart_nb.core.models.layers import Conv2d, GroupNorm
from pixart_nb.core.models.tiling import TileMap
from pixart_nb.core.models.vae_blocks import Decoder, Encoder, VAEConfig

#: Latent cells a side up to which the coarse stage, with its attention, is computed whole even when tiling.
COARSE_TILE = 128
#: How much more a cell takes there than a pixel of the fine parts: more channels, and more of them alive at once.
COARSE_CHANNELS = 4


class DiagonalGaussian:
    """What the encoder says of the latents: ``mean`` and ``logvar``, each (N, C, h, w)."""

    def __init__(self, moments: ms.Tensor):
        self.mean, logvar = mint.chunk(moments, 2, 1)
        self.logvar = mint.clamp(logvar, -30.0, 20.0)

    def sample(self, rng: np.random.Generator) -> ms.Tensor:
        """Latents drawn with ``rng``."""
        noise = ms.Tensor(rng.standard_normal(self.mean.shape, dtype=np.float32)).astype(self.mean.dtype)
        return self.mean + ops.exp(0.5 * self.logvar) * noise

    def mode(self) -> ms.Tensor:
        """The most likely latents: the mean."""
        return self.mean


@dataclass(frozen=True)
class Stage:
    """A part of the autoencoder that can be computed in tiles; ``cell`` holds its norms."""

    function: Callable[[ms.Tensor], ms.Tensor]
    cell: nn.Cell
    grow: int = 1
    shrink: int = 1


class AutoencoderKL(nn.Cell):
    """The autoencoder. ``encode(x)[0]`` is a ``DiagonalGaussian``, ``decode(z)[0]`` pictures, as in diffusers."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        latents = config.latent_channels
        self.quant_conv = Conv2d(2 * latents, 2 * latents, 1) if config.use_quant_conv else None
        self.post_quant_conv = Conv2d(latents, latents, 1) if config.use_post_quant_conv else None
        self.use_slicing = self.use_tiling = False
        self.tile_sample_min_size, self.tile_overlap_factor = min(config.sample_size, 512), 0.25

    def enable_slicing(self) -> None:
        """Encode and decode one picture after another: memory of one, the same numbers."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode a batch at once again."""
        self.use_slicing = False

    def enable_tiling(
        self, tile_sample_min_size: int | None = None, tile_overlap_factor: float = 0.25
    ) -> None:
        """Encode and decode what is larger than a tile (``tile_sample_min_size`` image pixels a side) in tiles.

        Neighbours overlap by ``tile_overlap_factor`` of a tile and are blended there; all use the same statistics in
        their norms. Memory is that of a few tiles and of the picture. The numbers come close to the whole's, but are
        not equal: the statistics are measured on a sample of the tiles.
        """
        size = tile_sample_min_size or self.tile_sample_min_size
        if size < 2 * self.factor or size % self.factor or not 0 <= tile_overlap_factor < 1:
            raise PixArtNBError(
                f"tiles of {size} pixels with overlap {tile_overlap_factor}; expected a multiple of {self.factor} "
                "and an overlap from 0 to below 1"
            )
        self.use_tiling, self.tile_sample_min_size, self.tile_overlap_factor = True, size, tile_overlap_factor

    def disable_tiling(self) -> None:
        """Encode and decode pictures of every size whole again."""
        self.use_tiling = False

    @property
    def factor(self) -> int:
        """Image pixels per latent cell in each direction."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def dtype(self) -> ms.Type:
        """Dtype of the weights."""
        return self.decoder.conv_out.weight.dtype

    def moments(self, x: ms.Tensor) -> ms.Tensor:
        """Mean and log-variance stacked: (N, 3, H, W) -> (N, 2 C, H/8, W/8). A tensor function, to be compiled."""
        return self._encode_coarse(self.encoder.fine(x))

    def reconstruct(self, z: ms.Tensor) -> ms.Tensor:
        """Latents (N, C, h, w) -> pictures (N, 3, 8h, 8w). A tensor function, to be compiled."""
        return self.decoder.fine(self._decode_coarse(z))

    def _encode_coarse(self, x: ms.Tensor) -> ms.Tensor:
        out = self.encoder.coarse(x)
        return out if self.quant_conv is None else self.quant_conv(out)

    def _decode_coarse(self, z: ms.Tensor) -> ms.Tensor:
        return self.decoder.coarse(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def encode(self, x: ms.Tensor) -> tuple[DiagonalGaussian]:
        """Pictures (N, 3, H, W) in -1..1 -> ``(DiagonalGaussian,)``; both sides must be multiples of the factor."""
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise PixArtNBError(
                f"pictures have shape {tuple(x.shape)}; expected (N, {self.config.in_channels}, H, W)"
            )
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise PixArtNBError(
                f"pictures are {x.shape[2]}x{x.shape[3]}; both sides must be multiples of {self.factor}; crop it."
            )
        fine = Stage(self.encoder.fine, self.encoder, shrink=self.factor)
        return (DiagonalGaussian(self._in_parts(x, fine, Stage(self._encode_coarse, self.encoder))),)

    def decode(self, z: ms.Tensor | np.ndarray, return_dict: bool = False) -> tuple[ms.Tensor]:
        """Latents (N, C, h, w), divided by ``config.scaling_factor`` -> ``(pictures,)``, (N, 3, 8h, 8w).

        ``return_dict`` is there for calls written for diffusers; the answer is a tuple either way.
        """
        z = z if isinstance(z, ms.Tensor) else ms.Tensor(z)
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise PixArtNBError(
                f"latents have shape {tuple(z.shape)}; expected (N, {self.config.latent_channels}, h, w)"
            )
        fine = Stage(self.decoder.fine, self.decoder, grow=self.factor)
        return (self._in_parts(z, Stage(self._decode_coarse, self.decoder), fine),)

    def _in_parts(self, x: ms.Tensor, *stages: Stage) -> ms.Tensor:
        """One stage after the other, by slices and tiles as they are enabled."""
        if (self.use_slicing or self.use_tiling) and x.shape[0] > 1:
            return mint.cat([self._in_parts(row, *stages) for row in mint.split(x, 1)])
        x = x.astype(self.dtype)
        for stage in stages:
            tiles = self._tiles(stage)
            whole = not self.use_tiling or max(x.shape[2:]) // stage.shrink <= tiles.tile
            if whole:
                with own_statistics(tiles.norms):
                    x = stage.function(x)
            else:
                x = ms.Tensor(tiles(_array(x))).astype(self.dtype)
        return x

    def _tiles(self, stage: Stage) -> TileMap:
        backend.settle_threads()
        fine = stage.grow * stage.shrink > 1
        tile = self.tile_sample_min_size // self.factor if fine else COARSE_TILE
        norms = [cell for _, cell in stage.cell.cells_and_names() if isinstance(cell, GroupNorm)]
        overlap = int(tile * self.tile_overlap_factor)

        def function(piece: ms.Tensor) -> ms.Tensor:
            return stage.function(piece.astype(self.dtype))

        channels = 1 if fine else COARSE_CHANNELS
        return TileMap(function, norms, tile, overlap, stage.grow, stage.shrink, channels)

    def decode_coarse(self, z: np.ndarray) -> np.ndarray:
        """The first part of ``decode``, at the resolution of the latents: z (1, C, h, w) -> (1, C', h, w) float32."""
        return _array(self._in_parts(ms.Tensor(z), Stage(self._decode_coarse, self.decoder)))

    def decode_fine(self) -> TileMap:
        """The second part of ``decode``, of what ``decode_coarse`` gives, to be taken row of tiles by row of tiles."""
        return self._tiles(Stage(self.decoder.fine, self.decoder, grow=self.factor))

    def construct(self, x: ms.Tensor, noise: ms.Tensor) -> tuple[ms.Tensor, ms.Tensor]:
        """One training pass: pictures and unit noise of the latents' shape -> reconstruction and moments."""
        moments = self.moments(x)
        mean, logvar = mint.chunk(moments, 2, 1)
        z = mean + ops.exp(0.5 * mint.clamp(logvar, -30.0, 20.0)) * noise
        return self.reconstruct(z), moments

    def initialise(self, rng: np.random.Generator) -> None:
        """Draw fresh weights so that the net starts as average pooling and nearest upsampling of random colours.

        Residual branches end in zeros, downsampling is the mean of 2 x 2, the other convolutions of the main path see
        one pixel. The blocks of a pixel-art picture are then sharp from the first step.
        """
        for name, weight in self.parameters_and_names():
            weight.set_data(ms.Tensor(_initial_value(rng, name, tuple(weight.shape))))


def _initial_value(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    value = np.zeros(shape, np.float32)
    if len(shape) == 1:
        return value + float("norm" in name and name.endswith("weight"))
    if "conv2" in name or "to_out" in name:
        return value
    if "samplers" in name:
        rows = slice(0, 2) if "downsamplers" in name else slice(1, 2)
        value[:, :, rows, rows] = (
            np.eye(shape[0], dtype=np.float32)[..., None, None] / (rows.stop - rows.start) ** 2
        )
        return value
    if "conv1" in name or shape[2:] in ((), (1, 1)):
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    value[:, :, 1, 1] = rng.standard_normal(shape[:2]) / np.sqrt(shape[1])
    return value


def _array(x: ms.Tensor) -> np.ndarray:
    return x.astype(ms.float32).asnumpy()


#: Names that Stable Diffusion's first autoencoders use in the attention of the middle block.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def modernise_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors of an older autoencoder under today's names; attention weights (C, C, 1, 1) lose their last axes."""
    out = {}
    for name, value in tensors.items():
        if "attentions." in name:
            prefix, part, leaf = name.rsplit(".", 2)
            name = f"{prefix}.{OLD_NAMES.get(part, part)}.{leaf}"
            value = value.reshape(value.shape[:2]) if value.ndim == 4 else value
        out[name] = value
    return out
