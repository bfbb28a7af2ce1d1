"""Memory of a run by stage: bytes of the weights and of the activations, computed from the shapes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pixart_nb.config import SAMPLING_STEPS
from pixart_nb.core import backend
from pixart_nb.core.cost import parameters
from pixart_nb.core.fast.cpu import transposed_elements
from pixart_nb.core.memory import in_use
from pixart_nb.core.models.attention import chunk_shape
from pixart_nb.core.models.t5 import T5Config
from pixart_nb.core.models.tiling import sample_windows, tile_starts
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.models.vae import COARSE_CHANNELS, COARSE_TILE
from pixart_nb.core.models.vae_blocks import VAEConfig

#: Bytes of a value.
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Networks:
    """Configurations of the three networks of a pipeline."""

    transformer: PixArtConfig
    text_encoder: T5Config
    vae: VAEConfig


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run that decide its memory and time.

    Attributes:
        height, width: Size in pixels that the model draws at.
        batch: Images that are drawn at once.
        steps: Denoising steps.
        guided: Classifier-free guidance is on.
        dtype: ``fp32``, ``fp16`` or ``bf16``.
        t5_load: ``whole``, ``stream`` (one layer at a time) or ``int8``.
        tile: Side of the tiles to decode by, in pixels; 0 decodes the whole image.
        sequential: One network is in memory at a time (resumable stages).
        caption_tokens, negative_tokens: Tokens of the prompt and of the negative prompt (1 if it is empty).
    """

    height: int
    width: int
    batch: int = 1
    steps: int = SAMPLING_STEPS
    guided: bool = True
    dtype: str = "fp32"
    t5_load: str = "whole"
    tile: int = 0
    sequential: bool = False
    caption_tokens: int = 30
    negative_tokens: int = 1

    @property
    def rows(self) -> int:
        """Rows of the transformer's batch: two per image with guidance."""
        return self.batch * (2 if self.guided else 1)

    @property
    def row_captions(self) -> list[int]:
        """Caption tokens of each row."""
        return [self.negative_tokens] * (self.rows - self.batch) + [self.caption_tokens] * self.batch

    @property
    def texts(self) -> list[int]:
        """Tokens of each text that is encoded: a prompt per image and one negative prompt."""
        return [self.caption_tokens] * self.batch + [self.negative_tokens] * self.guided

    def grid(self, config: PixArtConfig) -> tuple[int, int]:
        """Tokens of one image, (height, width)."""
        unit = 8 * config.patch_size
        return self.height // unit, self.width // unit

    def tokens(self, config: PixArtConfig) -> int:
        """Tokens of one image."""
        return int(np.prod(self.grid(config)))


@dataclass(frozen=True)
class ActivationMemory:
    """Values that are alive at the worst moment, measured on the real networks.

    Attributes:
        token: Per token of a row and channel of the transformer.
        pixel: In the fine part of the decoder, per pixel and channel.
        cell: In the coarse part of the decoder, per latent cell and channel.
        process: Bytes of Python and MindSpore before any network.
        idle: Bytes of ``process`` that are held before anything is computed.
        scores: Per attention score that is computed at a time.
    """

    token: float = 9.5
    pixel: float = 6.5
    cell: float = 8.0
    process: float = 0.22e9
    idle: float = 0.165e9
    scores: float = 2.0

    @classmethod
    def of_this_process(cls) -> ActivationMemory:
        """Return the defaults plus what this process holds already: a notebook holds more than Python alone."""
        default = cls()
        return replace(default, process=default.process + max(in_use() - default.idle, 0.0))


DEFAULT_MEMORY = ActivationMemory()


def weight_bytes(networks: Networks, run: RunSettings) -> dict[str, float]:
    """Return the bytes of the weights of each stage."""
    size, config = BYTES[run.dtype], networks.transformer
    transposed = 0
    if run.dtype == "fp32":  # weights that the CPU path keeps a second time for few tokens
        transposed = transposed_elements(config, run.rows * run.tokens(config))
    return {
        "encode": _text_encoder_bytes(networks.text_encoder, run),
        "denoise": size * (parameters(config) + transposed),
        "decode": (4 if networks.vae.force_upcast else size) * parameters(networks.vae),
    }


def _text_encoder_bytes(config: T5Config, run: RunSettings) -> float:
    size = BYTES[run.dtype]
    whole = parameters(config)
    layers = whole - parameters(replace(config, num_layers=0))
    if run.t5_load == "stream":  # one layer, and half of the one that is being read
        return size * 1.5 * layers / config.num_layers
    if run.t5_load == "int8":
        return size * (whole - layers) + layers
    return size * whole


def activation_bytes(
    networks: Networks, run: RunSettings, memory: ActivationMemory = DEFAULT_MEMORY
) -> dict[str, float]:
    """Return the bytes of the activations of each stage at its worst moment."""
    config, text = networks.transformer, networks.text_encoder
    tokens = run.rows * run.tokens(config)
    # the largest weight of T5 is upcast for its product
    upcast = text.d_model * text.d_ff if run.dtype != "fp32" or run.t5_load == "int8" else 0
    values = run.batch * run.caption_tokens * (4 * text.d_model + 6 * text.d_ff)
    keys = max(run.tokens(config) // config.layer_ratio(layer) ** 2 for layer in range(config.depth))
    heads, queries = chunk_shape(run.rows * config.num_heads, run.tokens(config), max(1, keys))
    scores = 4.0 * heads * queries * keys
    return {
        "encode": 4.0 * (values + upcast),
        "denoise": BYTES[run.dtype] * memory.token * tokens * config.hidden_size + memory.scores * scores,
        "decode": _decoder_bytes(networks.vae, run, memory),
    }


def _decoder_bytes(config: VAEConfig, run: RunSettings, memory: ActivationMemory) -> float:
    """Return the bytes of the worse part of the decoder, whole or by tiles, whose statistics need several at once."""
    factor = 2 ** (len(config.block_out_channels) - 1)
    half = backend.on_ascend() and not config.force_upcast  # the CPU convolves half precision in fp32
    size = BYTES[run.dtype] if half else 4
    height, width = run.height // factor, run.width // factor
    cells = (1 if run.tile else run.batch) * height * width
    pixels = cells * factor**2
    coarse_output = 4.0 * cells * config.block_out_channels[-1]
    image = 4.0 * run.batch * run.height * run.width * config.out_channels
    tile = run.tile // factor
    if run.tile and max(height, width) > tile:
        pixels = _cells_at_once(height, width, tile, factor)
        if max(height, width) > COARSE_TILE:
            cells = _cells_at_once(height, width, COARSE_TILE, 1, COARSE_CHANNELS)
    fine = size * memory.pixel * pixels * max(config.block_out_channels[:2])
    coarse = size * memory.cell * cells * config.block_out_channels[-1]
    return max(coarse, fine + image) + coarse_output


def _cells_at_once(height: int, width: int, tile: int, fine: int, channels: int = 1) -> int:
    """Return the cells of the finer side that are computed together: a tile, or the windows of shared statistics."""
    side, count = sample_windows(tile, fine, channels)
    windows = len(tile_starts(height, side, side // 4)) * len(tile_starts(width, side, side // 4))
    sampled = min(side, height) * min(side, width) * min(windows, count)
    return fine**2 * max(sampled, min(tile, height) * min(tile, width))
