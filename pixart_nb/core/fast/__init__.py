"""Fast paths behind one entry for each task: the numbers of ``models/`` with fewer operations.

``denoiser`` runs the transformer, by ``cpu.py`` or ``ascend.py``, ``fast_group_norms`` the norms of the VAE, and
``decode_fine`` the second part of its decoder for large images.
``cpu_training.use_fast_blocks`` is the entry for a training, and ``recompute.recompute_activations`` for gradient
checkpointing in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.fast.cpu import CPUDenoiser
from pixart_nb.core.fast.cpu_operators import ImageStatistics, attention_without_gradient
from pixart_nb.core.models.attention import attention
from pixart_nb.core.models.layers import GroupNorm, norm_statistics

if TYPE_CHECKING:
    from pixart_nb.core.models.controlnet import Controlled
    from pixart_nb.core.models.transformer import PixArt
    from pixart_nb.core.models.vae_blocks import Decoder, VAEConfig

#: Pixels from which on the CPU decodes an image by rows, and the fewest channels of a decoder for which that is fast.
LARGE_IMAGE, FEWEST_CHANNELS = 2**18, 64
#: ``denoise(latents (B, C, H, W), timestep) -> (B, out_channels, H, W)``, one timestep for the whole batch.
Denoiser = Callable[[Any, float], Any]


def denoiser(
    net: PixArt | Controlled,
    caption: ms.Tensor,
    mask: np.ndarray | ms.Tensor | None,
    prepare: Callable[[Any], ms.Tensor] = lambda latents: latents,
    finish: Callable[[ms.Tensor, float], Any] = lambda out, timestep: out,
) -> Denoiser:
    """Return the denoising step of one run: caption (B, T, C), mask (B, T) bool with True = token, or None.

    ``prepare`` makes the batch of the latents that a step is given, and ``finish`` the result of its output: guidance.
    What depends on the captions alone is computed once, so make a new one after a change of weights. While the
    transformer is traced or changed (``core.hooks``), every attention goes through its hook point; what the hooks
    leave as it is keeps its numbers, bit for bit.
    """
    if not backend.on_ascend():
        return CPUDenoiser(net, caption, mask, prepare, finish)
    from pixart_nb.core.fast.ascend import AscendDenoiser

    denoise = AscendDenoiser(net, caption, mask)
    return lambda latents, timestep: finish(denoise(prepare(latents), timestep), timestep)


def fast_attention() -> Callable[..., ms.Tensor]:
    """Return ``models.attention.attention`` as this device computes it without a gradient."""
    return attention if backend.on_ascend() else attention_without_gradient


def decodes_by_rows(config: VAEConfig, height: int, width: int) -> bool:
    """Return True if a whole image of these pixels is decoded by ``decode_fine``."""
    large = height * width >= LARGE_IMAGE and min(config.block_out_channels) >= FEWEST_CHANNELS
    return large and not backend.on_ascend()


def decode_fine(decoder: Decoder, x: ms.Tensor, in_bfloat16: bool = False) -> ms.Tensor:
    """Compute ``decoder.fine`` on a CPU, with rounding of its own, in less memory: (N, C, h, w) -> (N, C', H, W)."""
    from pixart_nb.core.fast import cpu_decoder  # only large images need it

    return cpu_decoder.decode_fine(decoder, x, in_bfloat16)


def fast_group_norms(norms: Sequence[GroupNorm]) -> AbstractContextManager[None]:
    """Compute group norms without a gradient inside the block, as fast as the device can."""
    if backend.on_ascend():
        return nullcontext()
    return norm_statistics(norms, [ImageStatistics()] * len(norms))
