"""AutoencoderKL: the autoencoder of Stable Diffusion and SDXL, whose latents PixArt works on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from mindspore import mint, nn, ops

from pixart_nb.core import backend
from pixart_nb.core.backend import as_tensor, ms, to_numpy
from pixart_nb.core.errors import PixArtNBError, check_number
from pixart_nb.core.fast import decode_fine, decodes_by_rows, fast_group_norms
from pixart_nb.core.models.layers import Conv2d, GroupNorm
from pixart_nb.core.models.operators import check_finite
from pixart_nb.core.models.tiling import TileMap
from pixart_nb.core.models.vae_blocks import Decoder, Encoder, VAEConfig

#: Largest side, in latent cells, of the coarse stage (with the attention) that is computed whole in tiled mode.
COARSE_TILE = 128
#: Memory of a cell there relative to that of a pixel of the fine stage.
COARSE_CHANNELS = 4


class DiagonalGaussian:
    """Distribution of the latents: ``mean`` and ``logvar``, each (N, C, h, w)."""

    def __init__(self, moments: ms.Tensor):
        self.mean, logvar = mint.chunk(moments, 2, 1)
        self.logvar = mint.clamp(logvar, -30.0, 20.0)

    def sample(self, generator: np.random.Generator | None = None) -> ms.Tensor:
        """Draw latents with ``generator``, by default a new one."""
        rng = np.random.default_rng() if generator is None else generator
        noise = ms.Tensor(rng.standard_normal(self.mean.shape, dtype=np.float32)).astype(self.mean.dtype)
        return self.mean + ops.exp(0.5 * self.logvar) * noise

    def mode(self) -> ms.Tensor:
        """Return the most likely latents: the mean."""
        return self.mean


class EncoderOutput(NamedTuple):
    """Result of ``encode``: the tuple ``(latent_dist,)``."""

    latent_dist: DiagonalGaussian


class DecoderOutput(NamedTuple):
    """Result of ``decode``: the tuple ``(sample,)``, images (N, 3, 8h, 8w)."""

    sample: ms.Tensor


class AutoencoderKL(nn.Cell):
    """The autoencoder. ``encode(x)[0]`` is a ``DiagonalGaussian``, ``decode(z)[0]`` images, as in diffusers."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        latents = config.latent_channels
        self.quant_conv = Conv2d(2 * latents, 2 * latents, 1) if config.use_quant_conv else None
        self.post_quant_conv = Conv2d(latents, latents, 1) if config.use_post_quant_conv else None
        self.use_slicing = self.use_tiling = False
        self.multiplies_bfloat16 = False  # of large images on the CPU, where half precision is asked for
        self.tile_sample_min_size, self.tile_overlap_factor = min(config.sample_size, 512), 0.25

    def enable_slicing(self) -> None:
        """Encode and decode the images of a batch one by one: the memory of one, the same numbers."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode a batch at once."""
        self.use_slicing = False

    def enable_tiling(
        self, tile_sample_min_size: int | None = None, tile_overlap_factor: float = 0.25, use_tiling: bool = True
    ) -> None:
        """Encode and decode images larger than a tile (``tile_sample_min_size`` pixels a side) in tiles.

        Neighbours overlap by ``tile_overlap_factor`` of a tile and are blended there; all use the same statistics in
        their norms. This takes the memory of a few tiles and of the image. The result is close to the untiled one, but
        not equal: the statistics are measured on a sample of the image. False for ``use_tiling``, which diffusers has
        as the first argument, disables it.
        """
        if isinstance(tile_sample_min_size, bool):
            tile_sample_min_size, use_tiling = None, tile_sample_min_size
        if not use_tiling:
            return self.disable_tiling()
        size = tile_sample_min_size or self.tile_sample_min_size
        check_number("tile_sample_min_size", size, 1, whole=True)
        check_number("tile_overlap_factor", tile_overlap_factor)
        if size < 2 * self.factor or size % self.factor or not 0 <= tile_overlap_factor < 1:
            raise PixArtNBError(
                f"tiles of {size} pixels with overlap {tile_overlap_factor}; expected a multiple of {self.factor} "
                "and an overlap from 0 to below 1"
            )
        self.use_tiling, self.tile_sample_min_size, self.tile_overlap_factor = True, size, tile_overlap_factor

    def disable_tiling(self) -> None:
        """Encode and decode images of every size whole."""
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
        """Return mean and log-variance stacked: (N, 3, H, W) -> (N, 2 C, H/8, W/8). Can be compiled."""
        return self._encode_coarse(self.encoder.fine(x))

    def reconstruct(self, z: ms.Tensor) -> ms.Tensor:
        """Return the images (N, 3, 8h, 8w) of latents (N, C, h, w). Can be compiled."""
        return self.decoder.fine(self._decode_coarse(z))

    def _encode_coarse(self, x: ms.Tensor) -> ms.Tensor:
        out = self.encoder.coarse(x)
        return out if self.quant_conv is None else self.quant_conv(out)

    def _decode_coarse(self, z: ms.Tensor) -> ms.Tensor:
        return self.decoder.coarse(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def encode(self, x: ms.Tensor, return_dict: bool = True) -> EncoderOutput:
        """Images (N, 3, H, W) in -1..1 -> ``(latent_dist,)``; both sides must be multiples of ``factor``."""
        x = as_tensor(x)
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise PixArtNBError(f"images have shape {tuple(x.shape)}; expected (N, {self.config.in_channels}, H, W)")
        if x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise PixArtNBError(
                f"images are {x.shape[2]}x{x.shape[3]}; both sides must be multiples of {self.factor}. Crop them."
            )
        fine = self._stage(self.encoder.fine, self.encoder, downscale=self.factor)
        moments = self._run(x, fine, self._stage(self._encode_coarse, self.encoder))
        check_finite(moments, "the VAE's encoder")
        return EncoderOutput(DiagonalGaussian(moments))

    def decode(self, z: ms.Tensor | np.ndarray, return_dict: bool = False, generator: object = None) -> DecoderOutput:
        """Latents (N, C, h, w), divided by ``config.scaling_factor`` -> ``(sample,)``, (N, 3, 8h, 8w).

        ``return_dict`` and ``generator`` are accepted for calls written for diffusers; neither changes the result.
        """
        z = as_tensor(z)
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise PixArtNBError(
                f"latents have shape {tuple(z.shape)}; expected (N, {self.config.latent_channels}, h, w)"
            )
        images = self._run(z, self._stage(self._decode_coarse, self.decoder), self.decode_fine())
        check_finite(images, "the VAE's decoder")
        return DecoderOutput(images)

    def _run(self, x: ms.Tensor, *stages: TileMap) -> ms.Tensor:
        """Run the stages one after another, in slices and tiles as enabled."""
        if (self.use_slicing or self.use_tiling) and x.shape[0] > 1:
            return mint.cat([self._run(row, *stages) for row in mint.split(x, 1)])
        backend.pin_threads()
        x = x.astype(self.dtype)
        for stage in stages:
            if self.use_tiling and max(x.shape[2:]) // stage.downscale > stage.tile:
                x = ms.Tensor(stage(to_numpy(x))).astype(self.dtype)
            else:
                x = self._whole(stage, x)
        return x

    def _whole(self, stage: TileMap, x: ms.Tensor) -> ms.Tensor:
        """Run a stage without tiles."""
        height, width = (side * stage.upscale for side in x.shape[2:])
        if stage.upscale > 1 and x.dtype == ms.float32 and decodes_by_rows(self.config, height, width):
            return decode_fine(self.decoder, x, self.multiplies_bfloat16)
        with fast_group_norms(stage.norms):
            return stage.function(x)

    def _stage(self, function: Callable, cell: nn.Cell, upscale: int = 1, downscale: int = 1) -> TileMap:
        """Return a part of the autoencoder that can be computed in tiles; ``cell`` holds its norms."""
        fine = upscale * downscale > 1
        tile = self.tile_sample_min_size // self.factor if fine else COARSE_TILE
        norms = [norm for _, norm in cell.cells_and_names() if isinstance(norm, GroupNorm)]
        overlap, channels = int(tile * self.tile_overlap_factor), 1 if fine else COARSE_CHANNELS

        def compute(x: ms.Tensor) -> ms.Tensor:
            return function(x.astype(self.dtype))

        return TileMap(compute, norms, tile, overlap, upscale, downscale, channels)

    def decode_coarse(self, z: np.ndarray) -> np.ndarray:
        """Run the first part of ``decode``, at the resolution of the latents: (1, C, h, w) -> (1, C', h, w) float32."""
        return to_numpy(self._run(ms.Tensor(z), self._stage(self._decode_coarse, self.decoder)))

    def decode_fine(self) -> TileMap:
        """Return the second part of ``decode``, from the result of ``decode_coarse``, to be run by rows of tiles."""
        return self._stage(self.decoder.fine, self.decoder, upscale=self.factor)

    def construct(self, x: ms.Tensor, noise: ms.Tensor) -> tuple[ms.Tensor, ms.Tensor]:
        """Run a training pass: images and unit noise of the latents' shape -> reconstruction and moments."""
        moments = self.moments(x)
        mean, logvar = mint.chunk(moments, 2, 1)
        z = mean + ops.exp(0.5 * mint.clamp(logvar, -30.0, 20.0)) * noise
        return self.reconstruct(z), moments

    def initialize(self, rng: np.random.Generator) -> None:
        """Draw new weights: the net starts as average pooling and nearest upsampling of random colors.

        Residual branches end in zeros, downsampling is the mean of 2 x 2, the other convolutions of the main path see
        one pixel. The blocks of a pixel-art image are then sharp from the first step.
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
        value[:, :, rows, rows] = np.eye(shape[0], dtype=np.float32)[..., None, None] / (rows.stop - rows.start) ** 2
        return value
    if "conv1" in name or shape[2:] in ((), (1, 1)):
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    value[:, :, 1, 1] = rng.standard_normal(shape[:2]) / np.sqrt(shape[1])
    return value
