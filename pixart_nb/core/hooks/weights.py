"""Quantities of a transformer that do not depend on an image: positions, modulation, learned kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pixart_nb.core.backend import ms, to_numpy
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.hooks.hook_points import transformer_of
from pixart_nb.core.models.embeddings import sincos_positions
from pixart_nb.core.models.operators import silu
from pixart_nb.core.models.transformer import PixArtConfig


def positions(config: PixArtConfig, height: int, width: int) -> np.ndarray:
    """Return the positional embedding of an image of height x width pixels: (h, w, D) float32."""
    unit = 8 * config.patch_size
    grid, base = (height // unit, width // unit), config.input_size // config.patch_size
    embedding = sincos_positions(config.hidden_size, *grid, base, config.pe_interpolation)
    return embedding.reshape(*grid, config.hidden_size)


def modulation(model: Any, timesteps: Sequence[float]) -> np.ndarray:
    """Return the adaLN-single modulation of each block at each timestep, (T, layers, 6, D) float32.

    The six are shift, scale and gate of self-attention, then of the MLP. A block multiplies by 1 + scale.
    """
    net = transformer_of(model)
    if net.config.micro_condition:
        raise PixArtNBError("the modulation of a model with micro conditions depends on the image's size too")
    t = net.t_embedder(ms.Tensor(np.asarray(timesteps, np.float32)))
    shared = to_numpy(net.t_block[1](silu(t)).reshape(len(timesteps), 1, 6, -1))
    tables = np.stack([to_numpy(block.scale_shift_table) for block in net.blocks])
    return shared + tables[None]


def learned_kernels(model: Any) -> dict[str, np.ndarray]:
    """Return the kernels of the layers that compress by ``conv``: ``blocks.14.attn`` -> (D, R, R) float32."""
    net = transformer_of(model)
    kernels = {}
    for number, block in enumerate(net.blocks):
        if block.attn.sr is not None:
            kernels[f"blocks.{number}.attn"] = to_numpy(block.attn.sr.weight)[:, 0].copy()
    return kernels
