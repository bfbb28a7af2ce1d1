"""How fast this machine computes, and how much is alive at once: the real networks, a few layers deep, run small.

The weights are random: neither time nor memory depends on them. Everything is measured through the same functions that
sampling uses, so that what is measured is what will run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from mindspore import nn

from pixart_nb.core.backend import dtype_from_name, ms, settle_threads, supported_dtype
from pixart_nb.core.memory import release
from pixart_nb.core.models.attention import SelfAttention, attention
from pixart_nb.core.models.cost import with_compression
from pixart_nb.core.models.inference import self_attention
from pixart_nb.core.models.t5 import T5Config
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.models.vae_blocks import VAEConfig
from pixart_nb.core.planning.counts import network
from pixart_nb.core.planning.memory import Networks, Run
from pixart_nb.core.sampling.conditioning import Conditioning
from pixart_nb.core.sampling.guidance import guided_prediction

#: Token grids at which blocks are timed; what is larger is proportional to its tokens.
GRIDS = (16, 32, 64)
#: Queries times keys, at most, with which attention is timed, and queries, where keys are fewer.
PAIRS, QUERIES = 2**25, 4096
#: Ratio of compression whose cost is timed; that of others is hardly different.
RATIO = 4
#: Keys a side to which a picture is shrunk while the rest of a block is timed: beside all keys it would be lost.
FEW_KEYS = 8
#: Latent cells a side at which the decoder's coarse part is timed, the fine part at one of them.
CELLS = (32, 64)
#: Seconds from which on a first run counts, as what it prepares is little beside them.
LONG = 2.0


@dataclass(frozen=True)
class Calibration:
    """Seconds of the parts of a run in one kind of number, on this machine.

    ``token``: tokens -> for each token of a row, of one block without its self-attention's products; ``pair``: keys
    -> for each query and key of one layer; ``shrinking``: for each token of a row, of one layer's compression;
    ``frame``: for each token of a row, of what is around the blocks;
    ``pixel``: of the decoder's fine part; ``cell``: of its coarse part, for each cell and for each pair of cells;
    ``text_layer``: a layer of T5 for one prompt.
    """

    dtype: str
    token: dict[int, float]
    frame: float
    pair: dict[int, float]
    shrinking: float
    pixel: float
    cell: tuple[float, float]
    text_layer: float
    seconds: float = field(default=0.0, compare=False)


def calibrate(networks: Networks, run: Run, keys: Iterable[int] = ()) -> Calibration:
    """Measure the networks' parts in ``run.dtype`` (half a minute for the published ones).

    ``keys``: numbers of keys of a layer at which attention is timed, beside those of ``GRIDS``.
    """
    settle_threads()
    started = time.perf_counter()
    largest = max(1, int(run.tokens(networks.transformer) ** 0.5))
    grids = sorted({min(grid, max(GRIDS[0], largest)) for grid in GRIDS})
    counts = {*(grid * grid for grid in grids), *keys, FEW_KEYS**2}
    pair = {count: _pair(networks.transformer, count, run) for count in sorted(counts)}
    shrinking = _shrinking(networks.transformer, run)
    few = pair[FEW_KEYS**2] * FEW_KEYS**2 + shrinking
    token, frame = {}, 0.0
    for grid in grids:
        token[grid * grid], frame = _token(networks.transformer, grid, few, run)
    cell, pixel = _decoder(networks.vae, run)
    layer = _text_layer(networks.text_encoder, run)
    found = Calibration(run.dtype, token, frame, pair, shrinking, pixel, cell, layer)
    release()
    return replace(found, seconds=time.perf_counter() - started)


def _network(config: PixArtConfig | T5Config | VAEConfig, run: Run) -> nn.Cell:
    """A network of a configuration whose weights are zero: they compute as fast as others."""
    net = network(config)
    for parameter in net.get_parameters():
        parameter.set_dtype(_dtype(run))
        parameter.init_data()
    return net.set_train(False)


def _dtype(run: Run) -> ms.Type:
    return supported_dtype(dtype_from_name(run.dtype))


def _seconds(work: Callable[[], object], least: float = 0.2) -> float:
    """Seconds of a function: its best run of several that take ``least`` together; a short first one does not count."""
    started = time.perf_counter()
    work()
    first = time.perf_counter() - started
    times: list[float] = [first] if first > LONG else []
    while not times or (sum(times) < least and len(times) < 10):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def _pair(config: PixArtConfig, keys: int, run: Run) -> float:
    """Seconds for each query and key of one layer's self-attention, all heads together."""
    queries = max(64, min(max(keys, QUERIES), PAIRS // keys))
    size = config.hidden_size // config.num_heads
    q, kv = (
        ms.Tensor(np.ones((run.rows, config.num_heads, count, size), np.float32)).astype(_dtype(run))
        for count in (queries, keys)
    )
    return _seconds(lambda: attention(q, kv, kv).asnumpy()) / (run.rows * queries * keys)


def _shrinking(config: PixArtConfig, run: Run) -> float:
    """Seconds for each token of a row that compressing keys and values adds to a layer, beside attention's products."""
    side, size = GRIDS[1], config.hidden_size
    tokens = run.rows * side**2
    qkv = ms.Tensor(np.zeros((tokens, 3 * size), np.float32)).astype(_dtype(run))
    found = []
    for ratio in (1, RATIO):
        layer = SelfAttention(size, config.num_heads, operator="mean", ratio=ratio)
        keys = (side // ratio) ** 2
        whole = _seconds(lambda layer=layer: self_attention(layer, [qkv], run.rows, side, side).asnumpy())
        found.append(whole / tokens - _pair(config, keys, run) * keys)
    return max(found[1] - found[0], 0.0)


def _token(config: PixArtConfig, grid: int, few: float, run: Run) -> tuple[float, float]:
    """Seconds for each token of a row: of a block without its attention's products, and around the blocks.

    ``few``: of attention to few keys, which is what the timed blocks have.
    """
    times = []
    for depth in (1, 2):
        blocks = replace(config, depth=depth, kv_compress_config=None)
        shrunk = with_compression(blocks, range(depth), grid // FEW_KEYS, "mean")
        times.append(_seconds(_step(shrunk, grid, run)))
    one, two = times
    tokens = run.rows * grid * grid
    block = max(two - one, 0.0)
    return max(block / tokens - few, 0.0), max(one - block, 0.0) / tokens


def _step(config: PixArtConfig, grid: int, run: Run) -> Callable[[], object]:
    """One guided step as sampling takes it, of a transformer with zero weights."""
    net, side = _network(config, run), 8 * config.patch_size * grid
    caption = np.zeros((run.batch, run.caption_tokens, config.caption_channels), np.float32)
    seen = np.ones(caption.shape[:2], bool)
    empty = (ms.Tensor(caption[:, :1]), seen[:, :1]) if run.guided else (None, None)
    condition = Conditioning(ms.Tensor(caption), seen, *empty)
    predict = guided_prediction(net, condition, 4.5 if run.guided else 1.0, side, side)
    latents = np.zeros((run.batch, config.in_channels, side // 8, side // 8), np.float32)
    return lambda: predict(latents, 500.0)


def _decoder(config: VAEConfig, run: Run) -> tuple[tuple[float, float], float]:
    """Seconds of the coarse part for each cell, and for each pair of cells; of the fine part for each pixel."""
    vae = _network(config, run)
    small, large = (np.zeros((1, config.latent_channels, n, n), np.float32) for n in CELLS)
    first, second = (_seconds(lambda z=z: vae.decode_coarse(z)) for z in (small, large))
    few, many = (n * n for n in CELLS)
    pair = max((second / many - first / few) / (many - few), 0.0)
    side = min(run.height, run.width, run.tile or run.height) // vae.factor
    part = large if side >= CELLS[1] else small
    coarse = ms.Tensor(vae.decode_coarse(part))
    fine = _seconds(lambda: vae.decode_fine().function(coarse).asnumpy())
    return (max(first / few - pair * few, 0.0), pair), fine / (part[0, 0].size * vae.factor**2)


def _text_layer(config: T5Config, run: Run) -> float:
    """Seconds of one layer of T5 for one prompt."""
    encoder = _network(replace(config, num_layers=1), run)
    ids = np.ones((1, run.caption_tokens), np.int32)
    return _seconds(lambda: encoder(ids, ids > 0).asnumpy())
