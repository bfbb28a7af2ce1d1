"""Reconstruction of images by an autoencoder: what a model can show at best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.data.buckets import Size
from pixart_nb.core.data.images import fit, load_image, to_signed
from pixart_nb.core.data.labels import Label
from pixart_nb.core.sampling.images import to_uint8


def reconstruction_psnr(vae: Any, labels: Sequence[Label], sizes: Sequence[Size], count: int = 8) -> float:
    """Return the mean PSNR in dB of training images after encoding and decoding them.

    A finetuned model cannot show more detail than that. About 30 dB and more look alike; below 20 dB small shapes and
    text are lost. ``count`` images, evenly spaced over the labels, are read at their training ``sizes``.
    """
    numbers = sorted({k * len(labels) // count for k in range(count)})
    values = []
    for i in numbers:
        image = fit(load_image(labels[i].file), *sizes[i])[None]
        values.append(psnr(image, reconstruct(vae, image)))
    return float(np.mean(values))


def reconstruct(vae: Any, images: np.ndarray) -> np.ndarray:
    """Encode images (N, H, W, 3) uint8, and decode the mean of their latents: the same shape and dtype."""
    decoded = vae.decode(vae.encode(ms.Tensor(to_signed(images)))[0].mode())[0]
    return to_uint8(decoded.astype(ms.float32).asnumpy().transpose(0, 2, 3, 1) / 2 + 0.5)


def psnr(image: np.ndarray, other: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of two uint8 images, or batches, of the same shape."""
    error = np.mean(np.square(image.astype(np.float64) - other.astype(np.float64)))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
