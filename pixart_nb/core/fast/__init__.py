"""Inference paths behind one entry for each task: the numbers of ``models/`` with fewer operations.

``denoiser`` runs the transformer and ``fast_group_norms`` the norms of the VAE. ``cpu.py`` is the path of the CPU. A
path for another device is a file beside it, with a class like ``CPUDenoiser``, that ``denoiser`` returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.fast.cpu import CPUDenoiser
from pixart_nb.core.fast.cpu_operators import ImageStatistics
from pixart_nb.core.models.layers import GroupNorm, norm_statistics
from pixart_nb.core.models.operators import check_finite
from pixart_nb.core.models.transformer import PixArt, trim_caption

#: ``denoise(latents (B, C, H, W), timestep) -> (B, out_channels, H, W)``, one timestep for the whole batch.
Denoiser = Callable[[ms.Tensor, float], ms.Tensor]


def denoiser(net: PixArt, caption: ms.Tensor, mask: np.ndarray | ms.Tensor | None) -> Denoiser:
    """Return the denoising step of one run: caption (B, T, C), mask (B, T) bool with True = token, or None.

    What depends on the captions alone is computed once, so make a new one after a change of weights. While the
    transformer is traced or changed (``core.hooks``), every attention goes through its hook point; what the hooks
    leave as it is keeps its numbers, bit for bit.
    """
    return (ModelDenoiser if backend.on_ascend() else CPUDenoiser)(net, caption, mask)


def fast_group_norms(norms: Sequence[GroupNorm]) -> AbstractContextManager[None]:
    """Compute group norms without a gradient inside the block, as fast as the device can."""
    if backend.on_ascend():
        return nullcontext()
    return norm_statistics(norms, [ImageStatistics()] * len(norms))


class ModelDenoiser:
    """Denoising steps by ``PixArt.denoise``, for a device without a path of its own. **Not run on Ascend.**"""

    def __init__(self, net: PixArt, caption: ms.Tensor, mask: np.ndarray | ms.Tensor | None):
        if mask is not None:
            caption, mask = trim_caption(caption, mask)
        self.net, self.mask, self.keys_values = net, mask, net.caption_keys_values(caption)

    def __call__(self, latents: ms.Tensor, timestep: float) -> ms.Tensor:
        """latents (B, C, H, W) -> (B, out_channels, H, W)."""
        net, (batch, _, height, width) = self.net, latents.shape
        timesteps = ms.Tensor(np.full(batch, timestep, np.float32))
        positions, micro = net.positions(height, width), net.micro_conditions(latents)
        out = net.denoise(latents, timesteps, self.keys_values, self.mask, positions, micro)
        check_finite(out, f"the transformer at timestep {timestep:g}")
        return out
