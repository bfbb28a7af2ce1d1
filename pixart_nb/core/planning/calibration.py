"""How fast this machine computes, and how much is alive at once: the real networks, a few layers deep, run small.

The weights are random: neither time nor memory depends on them. Everything is measured through the same functions that
sampling uses, so that what is measured is what will run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from mindspore import nn
from tqdm import tqdm

from pixart_nb.config import GUIDANCE_SCALE
from pixart_nb.core.backend import dtype_from_name, ms, pin_threads, supported_dtype
from pixart_nb.core.cost import with_compression
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.fast.cpu import _heads
from pixart_nb.core.fast.head_rows import merge_heads
from pixart_nb.core.models.attention import SelfAttention, attention
from pixart_nb.core.models.t5 import T5Config
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.models.vae import AutoencoderKL
from pixart_nb.core.models.vae_blocks import VAEConfig
from pixart_nb.core.planning.counts import network, parameters
from pixart_nb.core.planning.memory import BYTES, Networks, Run, sample_cells
from pixart_nb.core.sampling.conditioning import Conditioning
from pixart_nb.core.sampling.guidance import classifier_free_guidance
from pixart_nb.core.subprocesses import ProcessError, apart

#: Token grids at which blocks are timed; what is larger is proportional to its tokens. In the smallest, what comes with
#: every operator weighs more than its numbers.
GRIDS = (8, 16, 32, 64)
#: Blocks of the steps that are timed; what they differ by is the time of a block.
DEPTHS = (1, 3)
#: Queries times keys, at most, with which attention is timed, and queries, where keys are fewer.
PAIRS, QUERIES = 2**25, 4096
#: Ratio of compression whose cost is timed; that of others is hardly different.
RATIO = 4
#: Keys a side to which a picture is shrunk while the rest of a block is timed: beside all keys it would be lost.
FEW_KEYS = 8
#: Latent cells a side at which the decoder's coarse part is timed: beside the first, or a smaller picture's, one of
#: the others.
CELLS = (32, 64, 128)
#: Bytes of the layers of T5 that are timed together, at least one. A small layer alone would stay in the cache.
TEXT_BYTES = 1e9
#: Seconds from which on a first run counts, as what it prepares is little beside them.
LONG = 2.0


@dataclass(frozen=True)
class Calibration:
    """Seconds of the parts of a run in one kind of number, on this machine.

    ``token``: tokens -> for each token of a row, of one block without its self-attention's products; ``pair``: keys
    -> for each query and key of one layer; ``shrinking``: for each token of a row, of one layer's compression;
    ``frame``: the same of what is around the blocks;
    ``pixel``: of the decoder's fine part, whole; ``tile_pixel``: the same in a tile; ``sample_pixel``: of measuring
    what the tiles share; ``cell``: of the decoder's coarse part, for each cell and for each pair of cells;
    ``text_layer``: tokens -> a layer of T5 for one text.
    ``first``: stage -> what its first calls take longer than later ones; ``first_block``: tokens -> each block's part
    in it.
    """

    dtype: str
    token: dict[int, float]
    frame: dict[int, float]
    pair: dict[int, float]
    shrinking: float
    pixel: float
    tile_pixel: float
    sample_pixel: float
    cell: tuple[float, float]
    text_layer: dict[int, float]
    first: dict[str, float]
    first_block: dict[int, float]
    seconds: float = field(default=0.0, compare=False)


class Timing(NamedTuple):
    """Seconds of a function: how much longer its first call took than later ones, and those."""

    first: float
    later: float


class CalibrationError(PixArtNBError):
    """The process that measured this machine did not come to its end."""


def calibrate(networks: Networks, run: Run, keys: Iterable[int] = ()) -> Calibration:
    """Measure the networks' parts in ``run.dtype``, in a process of its own (two minutes for the published ones).

    ``keys``: numbers of keys of a layer at which attention is timed, beside those of ``GRIDS``.

    Raises ``CalibrationError`` if that process ends early.
    """
    try:
        return apart("measures this machine", measure, networks, run, sorted(keys))
    except ProcessError as error:
        raise CalibrationError(f"{error} Without time (--no-timed) nothing is measured.") from error


def measure(networks: Networks, run: Run, keys: Iterable[int] = ()) -> Calibration:
    """As ``calibrate``, in this process, with a bar."""
    pin_threads()
    started = time.perf_counter()
    transformer = networks.transformer
    largest = max(1, int(run.tokens(transformer) ** 0.5))
    grids = sorted({min(grid, max(GRIDS[0], largest)) for grid in GRIDS})
    counts = sorted({*(grid * grid for grid in grids), *keys, FEW_KEYS**2})
    lengths = dict.fromkeys([run.caption_tokens, *[run.negative_tokens] * run.guided])
    parts = len(lengths) + len(grids) * len(DEPTHS) + len(counts) + 2
    with tqdm(total=parts, desc=f"measuring this machine in {run.dtype}", leave=False) as bar:

        def done(found: Any) -> Any:
            bar.update()
            return found

        texts = {count: done(_text_layer(networks.text_encoder, count, run)) for count in lengths}
        blocks = {
            grid: [done(_step_timing(transformer, depth, grid, run)) for depth in DEPTHS] for grid in grids
        }
        decoded = done(_decoder(networks.vae, run))
        pair = {count: done(_pair(transformer, count, run)) for count in counts}
        shrinking = done(_shrinking(transformer, pair, run))
    token, frame = _tokens(blocks, pair[FEW_KEYS**2] * FEW_KEYS**2, shrinking, run)
    # what each block adds to a first call, and then what comes with any
    first_block = {grid * grid: many.first / DEPTHS[1] for grid, (_, many) in blocks.items()}
    first = {
        "encode": sum(text.first for text in texts.values()),
        "denoise": max(blocks[grids[0]][0].first - DEPTHS[0] * first_block[grids[0] ** 2], 0.0),
        "decode": decoded.pop("first"),
    }
    return Calibration(
        dtype=run.dtype,
        token=token,
        frame=frame,
        pair=pair,
        shrinking=shrinking,
        text_layer={count: text.later for count, text in texts.items()},
        first=first,
        first_block=first_block,
        seconds=time.perf_counter() - started,
        **decoded,
    )


def _network(config: PixArtConfig | T5Config | VAEConfig, run: Run) -> nn.Cell:
    """A network of a configuration whose weights are zero: they compute as fast as others."""
    net = network(config)
    for parameter in net.get_parameters():
        parameter.set_dtype(_dtype(run))
        parameter.init_data()
    return net.set_train(False)


def _dtype(run: Run) -> ms.Type:
    return supported_dtype(dtype_from_name(run.dtype))


def _timing(work: Callable[[], object], least: float = 1.2) -> Timing:
    """Of a function: the mean of several runs that take ``least`` together; a short first one is not among them."""
    started = time.perf_counter()
    work()
    first = time.perf_counter() - started
    times: list[float] = [first] if first > LONG else []
    while not times or (sum(times) < least and len(times) < 30):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    later = sum(times) / len(times)
    return Timing(max(first - later, 0.0), later)


def _pair(config: PixArtConfig, keys: int, run: Run) -> float:
    """Seconds for each query and key of one layer's self-attention, all heads together."""
    queries = max(64, min(max(keys, QUERIES), PAIRS // keys))
    size = config.hidden_size // config.num_heads
    q, kv = (
        ms.Tensor(np.ones((run.rows, config.num_heads, count, size), np.float32)).astype(_dtype(run))
        for count in (queries, keys)
    )
    return _timing(lambda: attention(q, kv, kv).asnumpy()).later / (run.rows * queries * keys)


def _shrinking(config: PixArtConfig, pair: dict[int, float], run: Run) -> float:
    """Seconds for each token of a row that compressing keys and values adds to a layer, beside attention's products.

    ``pair``: what is known of these products, by keys.
    """
    side, size = GRIDS[1], config.hidden_size
    tokens = run.rows * side**2
    qkv = ms.Tensor(np.zeros((tokens, 3 * size), np.float32)).astype(_dtype(run))
    found = []
    for ratio in (1, RATIO):
        layer = SelfAttention(size, config.num_heads, operator="mean", ratio=ratio)
        keys = (side // ratio) ** 2
        whole = _timing(
            lambda layer=layer: merge_heads(
                attention(*[_heads(layer, n, [qkv], run.rows, side, side) for n in range(3)])
            ).asnumpy()
        )
        found.append(whole.later / tokens - (pair.get(keys) or _pair(config, keys, run)) * keys)
    return max(found[1] - found[0], 0.0)


def _step_timing(config: PixArtConfig, depth: int, grid: int, run: Run) -> Timing:
    """Of a step of so many blocks, whose attention has few keys."""
    blocks = replace(config, depth=depth, kv_compress_config=None)
    shrunk = with_compression(blocks, range(depth), grid // FEW_KEYS, "mean")
    return _timing(_step(shrunk, grid, run))


def _tokens(
    blocks: dict[int, list[Timing]], few: float, shrinking: float, run: Run
) -> tuple[dict[int, float], dict[int, float]]:
    """Seconds for each token of a row, from steps of ``DEPTHS`` blocks by grid.

    -> by tokens, of a block without its attention's products, and around the blocks. ``few``: of attention to few
    keys, which is what the timed blocks have; ``shrinking``: of making them few.
    """
    token, frame = {}, {}
    for grid, (shallow, deep) in blocks.items():
        tokens = run.rows * grid * grid
        block = (deep.later - shallow.later) / (DEPTHS[1] - DEPTHS[0])
        # whatever the noise, the deep one's time is all there
        block = min(max(block, 0.0), deep.later / DEPTHS[1])
        attending = few + shrinking * (grid > FEW_KEYS)
        token[grid * grid] = max(block / tokens - attending, 0.0)
        frame[grid * grid] = max(deep.later - DEPTHS[1] * block, 0.0) / tokens
    return token, frame


def _step(config: PixArtConfig, grid: int, run: Run) -> Callable[[], object]:
    """One guided step as sampling takes it, of a transformer with zero weights."""
    net, side = _network(config, run), 8 * config.patch_size * grid
    caption = np.zeros((run.batch, run.caption_tokens, config.caption_channels), np.float32)
    seen = np.ones(caption.shape[:2], bool)
    empty = (ms.Tensor(caption[:, :1]), seen[:, :1]) if run.guided else (None, None)
    condition = Conditioning(ms.Tensor(caption), seen, *empty)
    predict = classifier_free_guidance(net, condition, GUIDANCE_SCALE if run.guided else 1.0, side, side)
    latents = np.zeros((run.batch, config.in_channels, side // 8, side // 8), np.float32)
    return lambda: predict(latents, 500.0)


def _decoder(config: VAEConfig, run: Run) -> dict[str, Any]:
    """Seconds of the decoder's parts by their names in ``Calibration``, and how much longer its ``first`` call took."""
    vae = _network(config, run)
    small, middle, large = CELLS
    shortest = min(run.height, run.width) // vae.factor
    small = min(small, shortest)
    part = middle if min(shortest, run.tile // vae.factor or shortest) >= middle else small
    large = large if shortest > middle else middle
    latents = {n: np.zeros((1, config.latent_channels, n, n), np.float32) for n in (small, part, large)}
    whole = _timing(lambda: vae.decode(latents[part])[0].asnumpy())
    coarse = {n: _timing(lambda z=z: vae.decode_coarse(z)).later / n**2 for n, z in latents.items()}
    pair = max((coarse[large] - coarse[small]) / (large**2 - small**2), 0.0)
    fine = whole.later - coarse[part] * part**2
    pixels, sampled = (
        cells * vae.factor**2 for cells in (part**2, sample_cells(part, part, part, vae.factor))
    )
    return {
        "first": whole.first,
        "cell": (max(coarse[small] - pair * small**2, 0.0), pair),
        "pixel": max(fine, 0.0) / pixels,
    } | _tiles(vae, latents[part], pixels, sampled)


def _tiles(vae: AutoencoderKL, z: np.ndarray, pixels: int, sampled: int) -> dict[str, float]:
    """Seconds for each pixel of a tile, which is all of z, and for each from which the shared statistics are taken."""
    coarse = vae.decode_coarse(z)
    vae.enable_tiling(z.shape[-1] * vae.factor)
    tiles, found = vae.decode_fine(), []
    sampling = _timing(lambda: found.append(tiles.measure(coarse)))
    return {
        "tile_pixel": _timing(lambda: list(tiles.rows(coarse, found[-1]))).later / pixels,
        "sample_pixel": sampling.later / sampled,
    }


def _text_layer(config: T5Config, tokens: int, run: Run) -> Timing:
    """Of T5 for one text: its first call, whole, and then a layer. As many layers are timed as ``TEXT_BYTES`` allow."""
    one, none = (parameters(replace(config, num_layers=count)) for count in (1, 0))
    layers = int(TEXT_BYTES / (BYTES[run.dtype] * (one - none)))
    layers = max(1, min(config.num_layers, layers))
    encoder = _network(replace(config, num_layers=layers), run)
    ids = np.ones((1, tokens), np.int32)
    whole = _timing(lambda: encoder(ids, ids > 0).asnumpy())
    return Timing(whole.first, whole.later / layers)
