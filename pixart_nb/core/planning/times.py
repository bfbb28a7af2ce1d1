"""What a run takes in time: the parts that a calibration measured, as often as the run has them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pixart_nb.core.cost import keys_of
from pixart_nb.core.models.tiling import tile_starts
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.models.vae import COARSE_CHANNELS, COARSE_TILE
from pixart_nb.core.planning.calibration import Calibration
from pixart_nb.core.planning.memory import STAGES, Networks, Run, sample_cells


def stage_seconds(
    networks: Networks, run: Run, calibration: Calibration, fresh: bool
) -> dict[str, tuple[float, float]]:
    """Of each stage: all, and how much of it the first call takes beyond what others take."""
    depth, tokens = networks.transformer.depth, run.tokens(networks.transformer)
    first = calibration.first if fresh else dict.fromkeys(STAGES, 0.0)
    first = first | {"denoise": first["denoise"] + depth * _between(calibration.first_block, tokens)}
    texts = sum(_between(calibration.text_layer, count) for count in run.texts())
    later = {
        "encode": networks.text_encoder.num_layers * texts,
        "denoise": run.steps * _step_seconds(networks.transformer, run, calibration),
        "decode": run.batch * _decode_seconds(networks, run, calibration),
    }
    return {name: (first[name] + later[name], first[name]) for name in STAGES}


def _step_seconds(config: PixArtConfig, run: Run, calibration: Calibration) -> float:
    tokens, unit = run.tokens(config), 8 * config.patch_size
    grid = (run.height // unit, run.width // unit)
    token = _between(calibration.frame, tokens)
    for layer in range(config.depth):
        keys = keys_of(grid, config.layer_ratio(layer))
        token += _between(calibration.token, tokens) + _between(calibration.pair, keys) * keys
        token += calibration.shrinking if config.layer_ratio(layer) > 1 else 0.0
    return run.rows * tokens * token


def _between(known: Mapping[int, float], count: int) -> float:
    """The value at ``count``, between the two measured ones around it; beyond them the nearest."""
    places = sorted(known)
    return float(np.interp(np.log(count), np.log(places), [known[place] for place in places]))


def _decode_seconds(networks: Networks, run: Run, calibration: Calibration) -> float:
    factor = 2 ** (len(networks.vae.block_out_channels) - 1)
    height, width = run.height // factor, run.width // factor
    coarse, fine = [height * width], height * width * factor**2 * calibration.pixel
    if run.tile and max(height, width) > COARSE_TILE:
        cells = _cells(COARSE_TILE, height, width)
        windows = sample_cells(height, width, COARSE_TILE, 1, COARSE_CHANNELS) // cells
        coarse = [cells] * (_tiles(COARSE_TILE, height, width) + windows)
    tile = run.tile // factor
    if run.tile and max(height, width) > tile:
        tiles = _cells(tile, height, width) * _tiles(tile, height, width)
        sampled = sample_cells(height, width, tile, factor)
        fine = factor**2 * (tiles * calibration.tile_pixel + sampled * calibration.sample_pixel)
    alone, pairs = calibration.cell
    return sum(cells * (alone + pairs * cells) for cells in coarse) + fine


def _tiles(tile: int, height: int, width: int) -> int:
    return len(tile_starts(height, tile, tile // 4)) * len(tile_starts(width, tile, tile // 4))


def _cells(tile: int, height: int, width: int) -> int:
    return min(tile, height) * min(tile, width)
