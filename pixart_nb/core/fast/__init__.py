"""Inference paths behind one entry for each task: the numbers of ``models/`` with fewer operations.

``denoiser`` runs the transformer, by ``cpu.py`` or ``ascend.py``, and ``fast_group_norms`` the norms of the VAE.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.fast.ascend import AscendDenoiser
from pixart_nb.core.fast.cpu import CPUDenoiser
from pixart_nb.core.fast.cpu_operators import ImageStatistics
from pixart_nb.core.models.layers import GroupNorm, norm_statistics
from pixart_nb.core.models.transformer import PixArt

#: ``denoise(latents (B, C, H, W), timestep) -> (B, out_channels, H, W)``, one timestep for the whole batch.
Denoiser = Callable[[ms.Tensor, float], ms.Tensor]


def denoiser(net: PixArt, caption: ms.Tensor, mask: np.ndarray | ms.Tensor | None) -> Denoiser:
    """Return the denoising step of one run: caption (B, T, C), mask (B, T) bool with True = token, or None.

    What depends on the captions alone is computed once, so make a new one after a change of weights. While the
    transformer is traced or changed (``core.hooks``), every attention goes through its hook point; what the hooks
    leave as it is keeps its numbers, bit for bit.
    """
    return (AscendDenoiser if backend.on_ascend() else CPUDenoiser)(net, caption, mask)


def fast_group_norms(norms: Sequence[GroupNorm]) -> AbstractContextManager[None]:
    """Compute group norms without a gradient inside the block, as fast as the device can."""
    if backend.on_ascend():
        return nullcontext()
    return norm_statistics(norms, [ImageStatistics()] * len(norms))
