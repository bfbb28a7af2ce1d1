"""What a diffusion training minimises, and how its timesteps are weighed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.sampling.noise_schedule import LINEAR, NoiseSchedule
from pixart_nb.core.training.loss import add_noise, loss_terms

#: Names of the numbers that ``diffusion_loss`` gives beside the loss.
NAMES = ("mse", "vb")
#: Place of the positions among what ``diffusion_loss`` takes.
POSITIONS = 7


def diffusion_loss(net: PixArt) -> Callable:
    """The loss of the batches of ``DiffusionBatches``: (loss, mse, vb), means over the batch."""

    def loss(latents, noise, table, timesteps, embeddings, mask, weights, positions, micro=None):
        x_t = add_noise(latents, noise, table)
        output = net.forward(x_t, timesteps, embeddings, mask, positions, micro)
        mse, vb = loss_terms(output, latents, x_t, noise, table)
        return (weights * mse + vb).mean(), mse.mean(), vb.mean()

    return loss


def min_snr_weights(gamma: float, schedule: NoiseSchedule = LINEAR) -> Callable[[np.ndarray], np.ndarray]:
    """Timesteps (N,) -> weights of the squared error of the noise: min(SNR, gamma) / SNR.

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy" (arXiv 2303.09556), section 3.4.
    Signal to noise: alpha_bar / (1 - alpha_bar). The bound of the variance is not weighed.
    """
    if gamma <= 0:
        raise PixArtNBError(f"snr_gamma is {gamma}; expected a number above 0 (5 in the paper)")
    ratio = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    table = np.minimum(ratio, gamma) / ratio
    return lambda timesteps: table[np.asarray(timesteps, np.int64)]
