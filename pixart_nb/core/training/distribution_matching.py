"""Distribution matching distillation to one step (Yin et al. 2024, arXiv 2311.18828), as in the official Sigma code.

The regression loss of the paper, which needs pairs of noise and images and the weights of LPIPS, is left out, as the
official code can do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from mindspore import mint, ops

from pixart_nb.config import TrainConfig
from pixart_nb.core.backend import ms
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.sampling.schedulers import DMDScheduler
from pixart_nb.core.training.consistency import guidance_scales, guided_noise, noise_of
from pixart_nb.core.training.loss import START_FROM_NOISE, add_noise, clean_latents, coefficients, column
from pixart_nb.core.training.objectives import Objective, copy_of

#: Timestep that the generator is called at, with noise of unit variance.
START = 400
#: Timesteps at which the distributions are compared: the share 0.02 to 0.98 of all (section 3.2).
LOWEST, HIGHEST = 20, 980
_FAKE = "fake."


class DistributionObjective(Objective):
    """Distribution matching of a generator, beside which a network learns the score of what the generator draws.

    Both start as the teacher and have one optimizer and one learning rate. The images of the data set are not used,
    only their captions and sizes.
    """

    names = ("matching", "fake")

    def __init__(self, config: TrainConfig, net: PixArt):
        super().__init__(config, net)
        self.scheduler = DMDScheduler()
        self.teacher, self.fake = copy_of(net, "teacher"), copy_of(net, "fake")
        self.frozen = (self.teacher,)

    def loss(self, empty: np.ndarray) -> Callable:
        return distribution_loss(self.net, self.teacher, self.fake, empty)

    def parameters(self) -> dict[str, ms.Parameter]:
        own = super().parameters()
        fake = {f"{_FAKE}{name}": p for name, p in self.fake.parameters_and_names() if name in own}
        for parameter in fake.values():
            parameter.requires_grad = True
        return own | fake

    def extras(self, number: int, first_row: int, timesteps: np.ndarray, shape: tuple[int, ...]) -> tuple:
        """Return guidance scales (N,), and the noise, timesteps and coefficients of the two comparisons."""
        rows = range(first_row, first_row + len(timesteps))
        generators = [np.random.default_rng((self.config.seed, 10, number, row)) for row in rows]
        times = np.stack([rng.integers(LOWEST, HIGHEST, 2) for rng in generators])
        noise = np.stack([rng.standard_normal((2, *shape[1:]), dtype=np.float32) for rng in generators])
        parts = [(noise[:, i], times[:, i].astype(np.float32), coefficients(times[:, i])) for i in (0, 1)]
        return guidance_scales(self.config, number, rows), *parts[0], *parts[1]

    def write(self, folder: Path, weights: Mapping[str, np.ndarray]) -> None:
        super().write(folder, {name: value for name, value in weights.items() if not name.startswith(_FAKE)})


def distribution_loss(net: PixArt, teacher: PixArt, fake: PixArt, empty: np.ndarray) -> Callable:
    """Return the loss of distribution matching, for ``Trainer``: that of the generator plus that of ``fake``.

    The gradient of the generator is the difference of the scores of ``fake`` and of the teacher with guidance at its
    noisy outputs (equation 7, with the weight of equation 8). ``fake`` is trained by the squared error of the noise on
    the same outputs.

    Returns:
        ``loss(latents, noise, table, timesteps, embeddings, mask, weights, positions, guidance, noise, timesteps,
        table, noise, timesteps, table, micro)`` -> ``(loss, matching, fake)``, with the extras of
        ``DistributionObjective``. The first noise is what the generator starts from.
    """
    empty = ms.Tensor(np.asarray(empty, np.float32)[None])
    start = ms.Tensor(coefficients(np.array([START])))

    def loss(
        latents, noise, table, timesteps, embeddings, mask, weights, positions, guidance,
        noise_m, times_m, table_m, noise_f, times_f, table_f, micro=None,
    ):  # fmt: skip
        caption = embeddings, mask, positions, micro
        first = mint.tile(start, (noise.shape[0], 1))
        drawn = clean_latents(noise, noise_of(net, noise, 0 * timesteps + START, *caption), first)
        fixed = ops.stop_gradient(drawn)

        x = add_noise(fixed, noise_m, table_m)
        real = guided_noise(teacher, x, times_m, caption, empty, guidance.reshape(-1, 1, 1, 1))
        difference = (real - noise_of(fake, x, times_m, *caption)) * column(table_m, START_FROM_NOISE)
        distance = ops.abs(fixed - clean_latents(x, real, table_m)).mean((1, 2, 3)) + 1e-5
        towards = ops.stop_gradient(fixed - difference / distance.reshape(-1, 1, 1, 1))
        matching = ((drawn - towards) * (drawn - towards)).mean()

        error = noise_f - noise_of(fake, add_noise(fixed, noise_f, table_f), times_f, *caption)
        fake_loss = (error * error).mean()
        return matching + fake_loss, matching, fake_loss

    return loss
