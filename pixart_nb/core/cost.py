"""Parameters and multiply-accumulates (MACs) of the networks, counted from their shapes.

A MAC is one multiplication and addition of a matrix product or a convolution. Norms, activations and other
element-wise arithmetic are not counted, nor is the column that carries an attention mask.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from mindspore import nn

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.load import init_empty
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.fast import fast_attention
from pixart_nb.core.models.attention import split_heads
from pixart_nb.core.models.embeddings import FREQUENCIES
from pixart_nb.core.models.kv_compression import DepthwiseReduction, compress_tokens
from pixart_nb.core.models.layers import LayerNorm
from pixart_nb.core.models.low_precision import for_inference
from pixart_nb.core.models.t5 import T5Config, T5Encoder
from pixart_nb.core.models.transformer import PixArt, PixArtConfig
from pixart_nb.core.models.vae import AutoencoderKL
from pixart_nb.core.models.vae_blocks import VAEConfig

#: Queries whose attention is timed by ``measure_self_attention``.
TIMED_QUERIES = 1024


@lru_cache(maxsize=256)
def parameters(config: PixArtConfig | T5Config | VAEConfig) -> int:
    """Return the number of parameters of the network of a configuration. Nothing is allocated.

    A transformer with ``copy_blocks_num`` has a ControlNet, whose parameters are counted too.
    """
    return sum(parameter.size for parameter in empty_network(config).get_parameters())


def empty_network(config: PixArtConfig | T5Config | VAEConfig, dtype: ms.Type = ms.float32) -> nn.Cell:
    """Build the network of a configuration with parameters that hold no memory."""
    build = next(build for of_class, build in _NETWORKS.items() if isinstance(config, of_class))
    in_bfloat16 = not isinstance(config, VAEConfig)
    return init_empty(lambda: for_inference(build(config), dtype) if in_bfloat16 else build(config), dtype)


def _transformer(config: PixArtConfig) -> nn.Cell:
    if not config.copy_blocks_num:
        return PixArt(config)
    from pixart_nb.core.models.controlnet import PixArtControlNet  # a run without one does not need it

    return PixArtControlNet(PixArt(config), config.copy_blocks_num)


_NETWORKS = {PixArtConfig: _transformer, T5Config: T5Encoder, VAEConfig: AutoencoderKL}


# ---- transformer


@dataclass(frozen=True)
class StepCost:
    """Cost of one forward pass over the transformer blocks, for one image.

    ``keys`` are those of a compressed layer, if there is one; ``macs`` and ``attention_macs`` (scores and weighted
    sums) are those of all blocks; ``bytes`` is the size of all keys and values of the self-attentions, ``map_bytes``
    that of the largest attention map if it were stored.
    """

    tokens: int
    keys: int
    macs: int
    attention_macs: int
    bytes: int
    map_bytes: int


def step_cost(
    config: PixArtConfig, height: int, width: int, caption_tokens: int = 300, bytes_per_value: int = 2
) -> StepCost:
    """Return the cost of one pass over the blocks for an image of height x width pixels.

    Classifier-free guidance doubles every number but ``tokens``, ``keys`` and ``map_bytes``.
    """
    unit, channels = 8 * config.patch_size, config.hidden_size
    if height < unit or width < unit or height % unit or width % unit:
        raise PixArtNBError(f"height and width are {height}x{width}; both must be positive multiples of {unit}")
    grid = (height // unit, width // unit)
    tokens = grid[0] * grid[1]
    keys = [key_count(grid, config.layer_ratio(layer)) for layer in range(config.depth)]
    blocks = [block_macs(config, grid, layer, caption_tokens) for layer in range(config.depth)]
    return StepCost(
        tokens=tokens,
        keys=min(keys),
        macs=sum(sum(parts.values()) for parts in blocks),
        attention_macs=sum(parts["self-attention"] for parts in blocks),
        bytes=2 * sum(keys) * channels * bytes_per_value,
        map_bytes=max(keys) * tokens * config.num_heads * bytes_per_value,
    )


def key_count(grid: tuple[int, int], ratio: int) -> int:
    """Return the keys of a layer that compresses a (height, width) grid of tokens by ``ratio`` in each direction."""
    if ratio > min(grid):
        raise PixArtNBError(
            f"compression ratio {ratio} leaves no key of {grid[0]}x{grid[1]} tokens; it may be 1 to {min(grid)}"
        )
    return (grid[0] // ratio) * (grid[1] // ratio)


def block_macs(config: PixArtConfig, grid: tuple[int, int], layer: int, caption_tokens: int) -> dict[str, int]:
    """Return the MACs of one block by part, for a (height, width) grid of tokens.

    The keys and values of the caption are computed once per prompt: see ``caption_macs``.
    """
    tokens, channels, ratio = grid[0] * grid[1], config.hidden_size, config.layer_ratio(layer)
    convolved = config.layer_operator(layer) == "conv"
    return {
        "projections": 4 * tokens * channels**2,
        "self-attention": 2 * tokens * key_count(grid, ratio) * channels,
        "compression": 2 * key_count(grid, ratio) * ratio**2 * channels if convolved else 0,
        "cross-attention": 2 * tokens * channels**2 + 2 * tokens * caption_tokens * channels,
        "mlp": 2 * tokens * channels * int(channels * config.mlp_ratio),
    }


def step_macs(
    config: PixArtConfig,
    height: int,
    width: int,
    caption_tokens: Sequence[int],
    identity: Sequence[int] = (),
    control: bool = True,
) -> dict[str, int]:
    """Return the MACs of one pass of the transformer for images of height x width pixels, by part.

    Args:
        caption_tokens: Number of caption tokens of each row of the batch. Cross-attention is counted as
            ``core.fast`` computes it: folded for short captions, constant for captions of one token.
        identity: Blocks whose self-attention is the identity: the second pass of perturbed-attention guidance.
        control: The ControlNet acts, if there is one (``copy_blocks_num``).
    """
    unit, channels, patch = 8 * config.patch_size, config.hidden_size, config.patch_size**2
    grid, rows = (height // unit, width // unit), len(caption_tokens)
    tokens, total = grid[0] * grid[1], Counter()
    for layer in range(config.depth):
        parts = block_macs(config, grid, layer, max(caption_tokens))
        parts |= {"self-attention": 0, "compression": 0} if layer in identity else {}
        total.update({name: rows * count for name, count in parts.items()})
    cross_attention = tokens * sum(_macs_per_query(config, count) for count in caption_tokens)
    total["cross-attention"] = config.depth * cross_attention
    total["patches"] = rows * tokens * channels * patch * (config.in_channels + config.out_channels)
    embeddings = FREQUENCIES * channels + channels**2 + 6 * channels**2
    if config.micro_condition:  # height, width and aspect ratio, each a third of the channels
        embeddings += 3 * (FREQUENCIES * (channels // 3) + (channels // 3) ** 2)
    total["timestep"] = embeddings  # shared by all rows
    for layer in range(config.copy_blocks_num if control else 0):
        parts = block_macs(config, grid, layer, 1) | {"cross-attention": 0}
        total["compression"] += rows * parts.pop("compression")
        total["controlnet"] += rows * (sum(parts.values()) + tokens * channels**2) + cross_attention
    return dict(total)


def condition_macs(config: PixArtConfig, height: int, width: int) -> int:
    """Return the MACs of the patches and the first projection of a ControlNet's condition, once for each image."""
    patch = config.patch_size**2
    tokens = (height * width) // (64 * patch)
    return tokens * config.hidden_size * (config.hidden_size + patch * config.in_channels)


def _macs_per_query(config: PixArtConfig, caption_tokens: int) -> int:
    channels, heads = config.hidden_size, config.num_heads
    if caption_tokens == 1:
        return 0
    if caption_tokens < channels // heads:
        return 2 * channels * heads * caption_tokens
    return 2 * channels**2 + 2 * caption_tokens * channels


def caption_macs(config: PixArtConfig, caption_tokens: int) -> int:
    """Return the MACs of preparing one caption for the cross-attention of every block, once per prompt."""
    channels, count = config.hidden_size, caption_tokens
    layer = 2 * count * channels**2  # keys and values
    if count == 1:
        layer += channels**2  # projection of the value
    elif count < channels // config.num_heads:
        layer += 2 * count * channels**2 + count * channels  # both folded into the projections, and the bias
    return count * (config.caption_channels * channels + channels**2) + (config.depth + config.copy_blocks_num) * layer


def with_compression(
    config: PixArtConfig, layers: Sequence[int], ratio: int, operator: str | None = "conv"
) -> PixArtConfig:
    """Return the configuration with the keys and values of ``layers`` compressed; none for ratio 1."""
    compression = {"sampling": operator, "scale_factor": ratio, "kv_compress_layer": list(layers)}
    return PixArtConfig(**config.to_dict() | {"kv_compress_config": compression if ratio > 1 and len(layers) else None})


def cost_by_size(
    config: PixArtConfig,
    choices: Mapping[str, tuple[Sequence[int], int]],
    sizes: Sequence[int],
    seconds: Mapping[tuple[int, int], float] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Return records of ``step_cost`` for square images, for each choice of layers and ratio (operator ``conv``).

    Args:
        choices: name -> (compressed layers, ratio).
        sizes: Sides of the images in pixels.
        seconds: Measured seconds by (size, ratio), copied into the records.

    Returns:
        name -> records with ``size``, ``choice``, ``share`` (of the MACs without compression), the fields of
        ``StepCost``, and ``seconds`` (None where nothing was measured).
    """
    whole = with_compression(config, (), 1)

    def record(name: str, layers: Sequence[int], ratio: int, size: int) -> dict[str, Any]:
        cost = step_cost(with_compression(config, layers, ratio), size, size)
        share = cost.macs / step_cost(whole, size, size).macs
        measured = (seconds or {}).get((size, ratio))
        return {"size": size, "choice": name, "share": share, **asdict(cost), "seconds": measured}

    return {name: [record(name, *choice, size) for size in sizes] for name, choice in choices.items()}


def measure_self_attention(
    height: int,
    width: int,
    ratio: int = 1,
    operator: str = "conv",
    hidden_size: int = 1152,
    heads: int = 16,
    repeats: int = 3,
) -> float:
    """Measure the seconds in which one layer compresses keys and values of height x width tokens and attends to them.

    Random numbers in float32, the best of ``repeats``. At most ``TIMED_QUERIES`` queries are timed and scaled to all
    of them. Projections are left out: compression does not change them.
    """
    attention, tokens = fast_attention(), height * width
    values = np.random.default_rng(0).standard_normal((1, tokens, hidden_size), dtype=np.float32)
    x, count = ms.Tensor(values), min(tokens, TIMED_QUERIES)
    convolution = (DepthwiseReduction(hidden_size, ratio), LayerNorm(hidden_size)) if operator == "conv" else ()

    def compressed() -> ms.Tensor:
        return compress_tokens(x, height, width, ratio, operator, *convolution) if ratio > 1 else x

    queries, keys = split_heads(x[:, :count], heads), split_heads(compressed(), heads)
    compression = 2 * best_seconds(compressed, repeats) if ratio > 1 else 0.0
    return compression + best_seconds(lambda: attention(queries, keys, keys), repeats) * tokens / count


def best_seconds(function: Callable[[], ms.Tensor], repeats: int = 3) -> float:
    """Return the shortest of ``repeats`` timed calls, after one call that is not counted."""
    times = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        function().asnumpy()
        times.append(time.perf_counter() - started)
    return min(times[1:])


# ---- text encoder and autoencoder


def encode_macs(config: T5Config, tokens: int) -> int:
    """Return the MACs of encoding one text of ``tokens`` tokens."""
    inner = config.num_heads * config.d_kv
    layer = 4 * tokens * config.d_model * inner + 2 * tokens**2 * inner + 3 * tokens * config.d_model * config.d_ff
    return config.num_layers * layer


def decode_macs(config: VAEConfig, height: int, width: int) -> dict[str, int]:
    """Return the MACs of decoding height x width pixels: ``coarse`` at latent resolution, ``fine`` above."""
    factor = 2 ** (len(config.block_out_channels) - 1)
    cells = (height // factor) * (width // factor)
    channels, latents = config.block_out_channels[-1], config.latent_channels
    coarse = cells * 9 * latents * channels + _middle_macs(config, cells)
    coarse += cells * latents**2 * config.use_post_quant_conv
    return {"coarse": coarse, "fine": sum(count * cells for count in _up_block_macs(config))}


def encode_image_macs(config: VAEConfig, height: int, width: int) -> int:
    """Return the MACs of encoding one image of height x width pixels."""
    widths, latents = config.block_out_channels, config.latent_channels
    pixels, before = height * width, widths[0]
    macs = pixels * 9 * config.in_channels * before
    for number, channels in enumerate(widths):
        macs += pixels * _resnet_macs(before, channels)
        macs += pixels * (config.layers_per_block - 1) * _resnet_macs(channels, channels)
        if number < len(widths) - 1:
            pixels //= 4
            macs += pixels * 9 * channels**2
        before = channels
    macs += _middle_macs(config, pixels) + pixels * 9 * before * 2 * latents
    return macs + pixels * (2 * latents) ** 2 * config.use_quant_conv


def _middle_macs(config: VAEConfig, cells: int) -> int:
    """Return the MACs of the block with the attention, at the lowest resolution."""
    channels = config.block_out_channels[-1]
    attention = 4 * cells * channels**2 + 2 * cells**2 * channels if config.mid_block_add_attention else 0
    return attention + cells * 2 * _resnet_macs(channels, channels)


def _up_block_macs(config: VAEConfig) -> Iterator[int]:
    """Yield the MACs per latent cell of the up blocks and of the last convolution."""
    widths, scale = config.block_out_channels[::-1], 1
    before = widths[0]
    for number, channels in enumerate(widths):
        yield scale * (_resnet_macs(before, channels) + config.layers_per_block * _resnet_macs(channels, channels))
        if number < len(widths) - 1:
            scale *= 4
            yield scale * 9 * channels**2
        before = channels
    yield scale * 9 * widths[-1] * config.out_channels


def _resnet_macs(before: int, channels: int) -> int:
    """Return the MACs per cell of a resnet block."""
    shortcut = before * channels if before != channels else 0
    return 9 * before * channels + 9 * channels**2 + shortcut
