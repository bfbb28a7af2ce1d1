"""Memory of a run by stage: weights from the shapes, activations from what a token, a cell or a pixel takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pixart_nb.config import SAMPLING_STEPS
from pixart_nb.core import backend
from pixart_nb.core.fast.cpu import transposed_elements
from pixart_nb.core.memory import in_use
from pixart_nb.core.models.attention import chunk_shape
from pixart_nb.core.models.t5 import T5Config
from pixart_nb.core.models.tiling import sample_windows, tile_starts
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.models.vae import COARSE_CHANNELS, COARSE_TILE
from pixart_nb.core.models.vae_blocks import VAEConfig
from pixart_nb.core.planning.counts import parameters

#: Bytes of a weight.
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
STAGES = ("encode", "denoise", "decode")


@dataclass(frozen=True)
class Networks:
    """The networks of a pipeline."""

    transformer: PixArtConfig
    text_encoder: T5Config
    vae: VAEConfig


@dataclass(frozen=True)
class Run:
    """What is drawn, and how. Height and width are those that the model works at, in pixels.

    ``tile``: pixels a side of the tiles to decode by, 0 for none. ``t5_load``: whole, stream or int8. ``staged``: one
    network at a time. ``caption_tokens`` and ``negative_tokens``: of the prompt, and of the negative one, which has one
    when it is empty.
    """

    height: int
    width: int
    batch: int = 1
    steps: int = SAMPLING_STEPS
    guided: bool = True
    dtype: str = "fp32"
    t5_load: str = "whole"
    tile: int = 0
    staged: bool = False
    caption_tokens: int = 30
    negative_tokens: int = 1

    @property
    def rows(self) -> int:
        """Pictures that go through the transformer together: with guidance, two for each that is drawn."""
        return self.batch * (2 if self.guided else 1)

    @property
    def captions(self) -> list[int]:
        """Tokens of the caption of each of these rows."""
        return [self.negative_tokens] * (self.rows - self.batch) + [self.caption_tokens] * self.batch

    def texts(self) -> list[int]:
        """Tokens of the texts that are encoded: a prompt for each picture and, guided, one negative prompt."""
        return [self.caption_tokens] * self.batch + [self.negative_tokens] * self.guided

    def tokens(self, config: PixArtConfig) -> int:
        """Tokens of one picture."""
        return (self.height // (8 * config.patch_size)) * (self.width // (8 * config.patch_size))


@dataclass(frozen=True)
class Live:
    """Numbers that are alive at the worst moment, measured; see ``calibration``.

    ``token``: for each token of a row and each channel of the transformer. ``pixel`` and ``cell``: in the fine and the
    coarse part of the decoder, for each pixel and latent cell, and each channel there. ``process``: bytes of Python
    and MindSpore, before any network; ``idle``: of them what is held before anything is computed. ``scores``: for each
    score of attention that is computed at a time.
    """

    token: float = 9.5
    pixel: float = 6.5
    cell: float = 8.0
    process: float = 0.22e9
    idle: float = 0.165e9
    scores: float = 2.0


LIVE = Live()


def live_here() -> Live:
    """``LIVE`` with what this process holds already: a notebook more than Python and MindSpore alone."""
    return replace(LIVE, process=LIVE.process + max(in_use() - LIVE.idle, 0.0))


def weights(networks: Networks, run: Run) -> dict[str, float]:
    """Bytes of the weights by stage, as long as the stage lasts."""
    size = BYTES[run.dtype]
    return {
        "encode": _text_encoder_bytes(networks.text_encoder, run),
        "denoise": size * (parameters(networks.transformer) + _turned(networks.transformer, run)),
        "decode": size * parameters(networks.vae),
    }


def _turned(config: PixArtConfig, run: Run) -> int:
    """Numbers in the weights that a run of few rows keeps a second time."""
    if run.dtype != "fp32":
        return 0
    return transposed_elements(config, run.rows * run.tokens(config))


def _text_encoder_bytes(config: T5Config, run: Run) -> float:
    size = BYTES[run.dtype]
    whole = parameters(config)
    layers = whole - parameters(replace(config, num_layers=0))
    if run.t5_load == "stream":  # a layer, and the half of one that is read
        return size * 1.5 * layers / config.num_layers
    if run.t5_load == "int8":
        return size * (whole - layers) + layers
    return size * whole


def activations(networks: Networks, run: Run, live: Live = LIVE) -> dict[str, float]:
    """Bytes of what is computed, by stage, at the worst moment."""
    config, size = networks.transformer, BYTES[run.dtype]
    text, tokens = networks.text_encoder, run.rows * run.tokens(config)
    rows = run.batch * run.caption_tokens * (4 * text.d_model + 6 * text.d_ff)
    return {
        "encode": 4.0 * (rows + _widened(text, run)),
        "denoise": size * live.token * tokens * config.hidden_size + live.scores * _scores_bytes(config, run),
        "decode": _decoder_bytes(networks.vae, run, live),
    }


def _convolved_bytes(run: Run) -> int:
    """Bytes of a number in the decoder: the CPU convolves and normalises half precision as float32."""
    return BYTES[run.dtype] if backend.on_ascend() else 4


def _widened(config: T5Config, run: Run) -> int:
    """Numbers of T5's largest weight, which becomes float32 for its product where it is kept in less."""
    return config.d_model * config.d_ff if run.dtype != "fp32" or run.t5_load == "int8" else 0


def _scores_bytes(config: PixArtConfig, run: Run) -> float:
    """Of the scores of self-attention that exist at a time."""
    keys = max(run.tokens(config) // config.layer_ratio(layer) ** 2 for layer in range(config.depth))
    heads, queries = chunk_shape(run.rows * config.num_heads, run.tokens(config), max(1, keys))
    return 4.0 * heads * queries * keys


def _decoder_bytes(config: VAEConfig, run: Run, live: Live) -> float:
    """The worse of both parts: whole, or by tiles, of which the statistics need several at once."""
    factor, size = 2 ** (len(config.block_out_channels) - 1), _convolved_bytes(run)
    height, width = run.height // factor, run.width // factor
    batch = 1 if run.tile else run.batch
    coarse_cells = batch * height * width
    fine_pixels = coarse_cells * factor**2
    kept = 4.0 * coarse_cells * config.block_out_channels[-1]  # the coarse part's result
    picture = 4.0 * run.batch * run.height * run.width * config.out_channels
    tile = run.tile // factor
    if run.tile and max(height, width) > tile:
        fine_pixels = _at_once(height, width, tile, factor)
        if max(height, width) > COARSE_TILE:
            coarse_cells = _at_once(height, width, COARSE_TILE, 1, COARSE_CHANNELS)
    wide = max(config.block_out_channels[:2])  # at the full resolution, before the last block narrows them
    fine = size * live.pixel * fine_pixels * wide
    coarse = size * live.cell * coarse_cells * config.block_out_channels[-1]
    return max(coarse, fine + picture) + kept


def _at_once(height: int, width: int, tile: int, fine: int, channels: int = 1) -> int:
    """Cells of the finer side that are worked on together: a tile, or the windows that statistics are measured from."""
    return fine**2 * max(
        sample_cells(height, width, tile, fine, channels), min(tile, height) * min(tile, width)
    )


def sample_cells(height: int, width: int, tile: int, fine: int, channels: int = 1) -> int:
    """Cells of the coarser side in all the windows that statistics of tiles are measured from."""
    side, count = sample_windows(tile, fine, channels)
    windows = len(tile_starts(height, side, side // 4)) * len(tile_starts(width, side, side // 4))
    return min(side, height) * min(side, width) * min(windows, count)
