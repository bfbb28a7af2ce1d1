"""What a step of the transformer costs: keys, multiply-adds, bytes. Counted from the shapes; time is measured."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.attention import attention, split_heads
from pixart_nb.core.models.kv_compression import DepthwiseReduction, compress_tokens
from pixart_nb.core.models.layers import LayerNorm
from pixart_nb.core.models.transformer import PixArtConfig

#: Queries whose attention is timed; the time of all is that times their number.
TIMED_QUERIES = 1024


@dataclass(frozen=True)
class Cost:
    """Of one forward pass over the blocks, for one picture.

    ``tokens`` of the picture; ``keys`` of a compressed layer (or of any, without compression); ``multiply_adds`` of all
    blocks and ``attention_multiply_adds`` of their self-attention (scores and weighted sums) alone; ``bytes`` of
    all self-attentions' keys and values; ``map_bytes`` that the largest attention map would take if it were kept.
    """

    tokens: int
    keys: int
    multiply_adds: int
    attention_multiply_adds: int
    bytes: int
    map_bytes: int

    def to_dict(self) -> dict[str, int]:
        """All fields."""
        return asdict(self)


def step_cost(
    config: PixArtConfig, height: int, width: int, caption_tokens: int = 300, bytes_per_number: int = 2
) -> Cost:
    """Cost of one pass over ``config.depth`` blocks for a picture of height x width image pixels.

    Matrix products and the compression are counted, norms and activations are not. Guidance doubles everything.
    """
    unit, size = 8 * config.patch_size, config.hidden_size
    if height < unit or width < unit or height % unit or width % unit:
        raise PixArtNBError(
            f"height and width are {height}x{width}; both must be positive multiples of {unit}"
        )
    grid = (height // unit, width // unit)
    tokens = grid[0] * grid[1]
    keys = [keys_of(grid, config.layer_ratio(layer)) for layer in range(config.depth)]
    products = [block_products(config, grid, layer, caption_tokens) for layer in range(config.depth)]
    return Cost(
        tokens=tokens,
        keys=min(keys),
        multiply_adds=sum(sum(parts.values()) for parts in products),
        attention_multiply_adds=sum(parts["self-attention"] for parts in products),
        bytes=2 * sum(keys) * size * bytes_per_number,
        map_bytes=max(keys) * tokens * config.num_heads * bytes_per_number,
    )


def keys_of(grid: tuple[int, int], ratio: int) -> int:
    """Keys of a layer that compresses a grid of tokens by ``ratio``; ValueError if none would be left."""
    if ratio > min(grid):
        raise PixArtNBError(
            f"compression ratio {ratio} leaves no key of {grid[0]}x{grid[1]} tokens; it may be 1 to {min(grid)}"
        )
    return (grid[0] // ratio) * (grid[1] // ratio)


def block_products(
    config: PixArtConfig, grid: tuple[int, int], layer: int, caption_tokens: int
) -> dict[str, int]:
    """Multiply-adds of one block, by part, for a grid of tokens (height, width).

    The caption's keys and values are computed once a prompt, not once a step: see ``planning.counts``.
    """
    tokens, size, ratio = grid[0] * grid[1], config.hidden_size, config.layer_ratio(layer)
    return {
        "projections": 4 * tokens * size**2,
        "self-attention": 2 * tokens * keys_of(grid, ratio) * size,
        "compression": _compression_products(config, grid, ratio),
        "cross-attention": 2 * tokens * size**2 + 2 * tokens * caption_tokens * size,
        "mlp": 2 * tokens * size * int(size * config.mlp_ratio),
    }


def _compression_products(config: PixArtConfig, grid: tuple[int, int], ratio: int) -> int:
    """Keys and values through a depthwise convolution; picking and averaging multiply nothing."""
    if ratio == 1 or config.kv_operator != "conv":
        return 0
    return 2 * keys_of(grid, ratio) * ratio**2 * config.hidden_size


def with_compression(
    config: PixArtConfig, layers: Any, ratio: int, operator: str | None = "conv"
) -> PixArtConfig:
    """The configuration with these layers compressed; none for ratio 1."""
    values = config.to_dict()
    values["kv_compress_config"] = (
        {"sampling": operator, "scale_factor": ratio, "kv_compress_layer": list(layers)}
        if ratio > 1 and len(layers)
        else None
    )
    return PixArtConfig(**values)


def cost_by_size(
    config: PixArtConfig,
    choices: Mapping[str, tuple[Sequence[int], int]],
    sizes: Sequence[int],
    seconds: Mapping[tuple[int, int], float] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Records of ``step_cost`` for square pictures of ``sizes`` pixels, for each choice of layers and ratio (``conv``).

    A record has ``size``, ``choice``, ``share`` (of the multiply-adds without compression), the fields of ``Cost``, and
    ``seconds``: what was measured for (size, ratio), None elsewhere.
    """
    whole = {size: step_cost(with_compression(config, (), 1), size, size).multiply_adds for size in sizes}
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (layers, ratio) in choices.items():
        compressed = with_compression(config, layers, ratio)
        costs = {size: step_cost(compressed, size, size) for size in sizes}
        found[name] = [
            {"size": size, "choice": name, "share": cost.multiply_adds / whole[size]}
            | cost.to_dict()
            | {"seconds": (seconds or {}).get((size, ratio))}
            for size, cost in costs.items()
        ]
    return found


def measure_self_attention(
    height: int,
    width: int,
    ratio: int = 1,
    operator: str = "conv",
    hidden_size: int = 1152,
    heads: int = 16,
    repeats: int = 3,
    seed: int = 0,
) -> float:
    """Seconds that one layer takes to compress keys and values of height x width *tokens* and to attend to them.

    On random numbers, float32, the best of ``repeats``. The attention of at most ``TIMED_QUERIES`` queries is timed and
    multiplied up to all of them, to which it is proportional; projections, which compression does not change, are
    left out.
    """
    rng = np.random.default_rng(seed)
    tokens = height * width
    x = ms.Tensor(rng.standard_normal((1, tokens, hidden_size), dtype=np.float32))
    count = min(tokens, TIMED_QUERIES)
    queries = split_heads(x[:, :count], heads)
    reduction = DepthwiseReduction(hidden_size, ratio) if operator == "conv" else None
    norm = LayerNorm(hidden_size) if operator == "conv" else None

    def small() -> ms.Tensor:
        return x if ratio == 1 else compress_tokens(x, height, width, ratio, operator, reduction, norm)

    shrinking = 0.0 if ratio == 1 else 2 * _best(small, repeats)
    keys = split_heads(small(), heads)
    return shrinking + _best(lambda: attention(queries, keys, keys), repeats) * tokens / count


def _best(work: Any, repeats: int) -> float:
    work().asnumpy()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work().asnumpy()
        times.append(time.perf_counter() - started)
    return min(times)
