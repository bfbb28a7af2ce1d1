"""Parameters and multiply-adds of the networks, part by part: exact, from the shapes alone.

A multiply-add is one product of a matrix product or convolution, and its sum. Norms, activations and other arithmetic
on elements are not counted. A column that carries an attention mask is not counted either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

from mindspore import nn

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.load import init_empty
from pixart_nb.core.cost import block_products
from pixart_nb.core.models.embeddings import FREQUENCIES
from pixart_nb.core.models.t5 import T5Config, T5Encoder
from pixart_nb.core.models.transformer import PixArt, PixArtConfig
from pixart_nb.core.models.vae import AutoencoderKL
from pixart_nb.core.models.vae_blocks import VAEConfig

_NETWORKS = {PixArtConfig: PixArt, T5Config: T5Encoder, VAEConfig: AutoencoderKL}


@lru_cache(maxsize=256)
def parameters(config: PixArtConfig | T5Config | VAEConfig) -> int:
    """Parameters of the network of a configuration. Nothing is allocated."""
    return sum(parameter.size for parameter in network(config).get_parameters())


def network(config: PixArtConfig | T5Config | VAEConfig) -> nn.Cell:
    """The network of a configuration, its parameters without memory."""
    return init_empty(lambda: _NETWORKS[type(config)](config), ms.float32)


def step_products(config: PixArtConfig, height: int, width: int, captions: Sequence[int]) -> dict[str, int]:
    """Multiply-adds of one step of sampling for pictures of height x width pixels, by part.

    ``captions``: tokens of the caption of each row. The cross-attention is counted as ``inference`` computes it: folded
    for short captions, a constant for those of one token. What is done once a prompt is in ``caption_products``.
    Padding, where captions of small pictures go together, is not counted.
    """
    unit, size, patch = 8 * config.patch_size, config.hidden_size, config.patch_size**2
    grid, rows = (height // unit, width // unit), len(captions)
    tokens, total = grid[0] * grid[1], Counter()
    for layer in range(config.depth):
        parts = block_products(config, grid, layer, 0) | {"cross-attention": 0}
        total.update({name: rows * count for name, count in parts.items()})
    total["cross-attention"] = config.depth * tokens * sum(_reading(config, count) for count in captions)
    total["patches"] = rows * tokens * size * patch * (config.in_channels + config.out_channels)
    total["timestep"] = FREQUENCIES * size + size**2 + 6 * size**2  # one for all rows
    if config.micro_condition:  # height, width and ratio, each a third of the width
        total["timestep"] += 3 * (FREQUENCIES * (size // 3) + (size // 3) ** 2)
    return dict(total)


def _reading(config: PixArtConfig, caption_tokens: int) -> int:
    """Multiply-adds of one query of a cross-attention."""
    size, heads = config.hidden_size, config.num_heads
    if caption_tokens == 1:
        return 0
    if caption_tokens < size // heads:
        return 2 * size * heads * caption_tokens
    return 2 * size**2 + 2 * caption_tokens * size


def caption_products(config: PixArtConfig, caption_tokens: int) -> int:
    """Multiply-adds of preparing one caption for the cross-attention of every block: once a prompt."""
    size, count = config.hidden_size, caption_tokens
    layer = 2 * count * size**2  # keys and values
    if count == 1:
        layer += size**2  # the value's projection
    elif count < size // config.num_heads:
        layer += 2 * count * size**2 + count * size  # both folded with the projections, and the bias
    return count * (config.caption_channels * size + size**2) + config.depth * layer


def encode_products(config: T5Config, tokens: int) -> int:
    """Multiply-adds of encoding one text of so many tokens."""
    inner = config.num_heads * config.d_kv
    layer = (
        4 * tokens * config.d_model * inner
        + 2 * tokens**2 * inner
        + 3 * tokens * config.d_model * config.d_ff
    )
    return config.num_layers * layer


def decode_products(config: VAEConfig, height: int, width: int) -> dict[str, int]:
    """Multiply-adds of decoding one picture of height x width pixels whole: at the latents' resolution, and above."""
    factor = 2 ** (len(config.block_out_channels) - 1)
    cells = (height // factor) * (width // factor)
    wide, latents = config.block_out_channels[-1], config.latent_channels
    coarse = cells * (9 * latents * wide + 2 * _resnet(wide, wide))
    coarse += cells * latents**2 * config.use_post_quant_conv
    if config.mid_block_add_attention:
        coarse += 4 * cells * wide**2 + 2 * cells**2 * wide
    return {"coarse": coarse, "fine": sum(count * cells for count in _fine(config))}


def _fine(config: VAEConfig) -> Iterator[int]:
    """Multiply-adds for each latent cell of the upward blocks, and of the last convolution."""
    widths, scale = config.block_out_channels[::-1], 1
    before = widths[0]
    for number, wide in enumerate(widths):
        yield scale * (_resnet(before, wide) + config.layers_per_block * _resnet(wide, wide))
        if number < len(widths) - 1:
            scale *= 4
            yield scale * 9 * wide**2
        before = wide
    yield scale * 9 * widths[-1] * config.out_channels


def _resnet(before: int, wide: int) -> int:
    """Multiply-adds for each cell of a resnet block."""
    return 9 * before * wide + 9 * wide**2 + (before * wide if before != wide else 0)
