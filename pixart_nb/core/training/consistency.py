"""Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378), as the official PixArt-alpha code does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from mindspore import ops

from pixart_nb.config import TrainConfig
from pixart_nb.core.backend import ms
from pixart_nb.core.models.transformer import PixArt, repeat_batch
from pixart_nb.core.sampling.noise_schedule import TIMESTEPS
from pixart_nb.core.sampling.samplers import boundary_scalings
from pixart_nb.core.sampling.schedulers import LCMScheduler
from pixart_nb.core.training.loss import add_noise, clean_latents, coefficients, column
from pixart_nb.core.training.objectives import Objective, copy_of

#: Columns of the steps of ``consistency_loss``.
END, SKIP, OUT, END_SKIP, END_OUT, GUIDANCE = range(6)


class ConsistencyObjective(Objective):
    """Consistency distillation of the transformer, whose start is the teacher, or of a LoRA beside it.

    The target is the moving average of the weights; without one, and for a LoRA, the trained network itself.
    """

    names = ("mse",)

    def __init__(self, config: TrainConfig, net: PixArt):
        super().__init__(config, net)
        self.spacing = TIMESTEPS // config.num_ddim_timesteps
        self.scheduler = LCMScheduler(original_inference_steps=config.num_ddim_timesteps)
        self.teacher = copy_of(net, "teacher", shared=config.lora_rank > 0)
        self.frozen = (self.teacher,)
        self.target = copy_of(net, "target") if config.use_ema and not config.lora_rank else None
        if self.target:
            self.averages = dict(self.target.parameters_and_names())

    def loss(self, empty: np.ndarray) -> Callable:
        huber = self.config.huber_c if self.config.loss_type == "huber" else 0.0
        return consistency_loss(self.net, self.teacher, self.target or self.net, empty, huber)

    def extras(self, number: int, first_row: int, timesteps: np.ndarray, shape: tuple[int, ...]) -> tuple:
        """Return the steps of a batch and the coefficients of their ends."""
        rows = range(first_row, first_row + len(timesteps))
        return solver_steps(timesteps, self.spacing, guidance_scales(self.config, number, rows))


def guidance_scales(config: TrainConfig, number: int, rows: Sequence[int]) -> np.ndarray:
    """Return the teacher's guidance for rows of the whole batch ``number``, (N,) float32 from w_min to w_max."""
    shares = np.array([np.random.default_rng((config.seed, 9, number, row)).random() for row in rows])
    return (config.w_min + (config.w_max - config.w_min) * shares).astype(np.float32)


def noise_of(net: PixArt, x, timesteps, embeddings, mask, positions, micro) -> ms.Tensor:
    """Return the noise (N, C, H, W) float32 that a transformer predicts, without its variance."""
    output = net.forward(x, timesteps, embeddings, mask, positions, micro)
    return output[:, : x.shape[1]].astype(ms.float32)


def guided_noise(net: PixArt, x, timesteps, caption: tuple, empty: ms.Tensor, scale: ms.Tensor) -> ms.Tensor:
    """Return noise + scale (noise - noise of the empty caption); ``caption``: embeddings, mask, positions, micro."""
    _, _, positions, micro = caption
    noise = noise_of(net, x, timesteps, *caption)
    return noise + scale * (
        noise - noise_of(net, x, timesteps, repeat_batch(empty, x.shape[0]), None, positions, micro)
    )


def solver_steps(timesteps: np.ndarray, spacing: int, guidance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps of the skipping solver from ``timesteps`` (N,), ``spacing`` timesteps long, down to 0.

    (N, 6) float32, columns as named above, and the coefficients (N, 9) at the ends of the steps.
    """
    ends = np.maximum(timesteps - spacing, 0).astype(np.int64)
    scalings = (*boundary_scalings(timesteps), *boundary_scalings(ends))
    return np.stack([ends, *scalings, guidance], 1).astype(np.float32), coefficients(ends)


def consistency_loss(net: PixArt, teacher: PixArt, target: PixArt, empty: np.ndarray, huber: float = 0.0) -> Callable:
    """Return the loss of consistency distillation (algorithm 1), for ``Trainer``.

    The teacher takes one DDIM step with guidance, ``noise + w (noise - noise of the empty caption)``. The network at
    its start has to give what ``target`` gives at its end. No gradient goes through teacher and target.

    Args:
        net, teacher, target: transformers; ``target`` may be ``net``.
        empty: embedding (tokens, C) of the empty caption.
        huber: constant of the pseudo-Huber distance; 0 is the squared distance.

    Returns:
        ``loss(latents, noise, table, timesteps, embeddings, mask, weights, positions, steps, end_table, micro)`` ->
        ``(loss, mse)``; ``steps`` and ``end_table`` are those of ``solver_steps``.
    """
    empty = ms.Tensor(np.asarray(empty, np.float32)[None])

    def loss(
        latents, noise, table, timesteps, embeddings, mask, weights, positions, steps, end_table, micro=None
    ):  # fmt: skip
        x = add_noise(latents, noise, table)
        caption = embeddings, mask, positions, micro
        guided = guided_noise(teacher, x, timesteps, caption, empty, column(steps, GUIDANCE))
        end = ops.stop_gradient(add_noise(clean_latents(x, guided, table), guided, end_table))
        denoised = clean_latents(end, noise_of(target, end, steps[:, END], *caption), end_table)
        expected = ops.stop_gradient(column(steps, END_SKIP) * end + column(steps, END_OUT) * denoised)
        predicted = noise_of(net, x, timesteps, *caption)
        result = column(steps, SKIP) * x + column(steps, OUT) * clean_latents(x, predicted, table)
        square = (result - expected) * (result - expected)
        distance = ops.sqrt(square + huber**2) - huber if huber else square
        return distance.mean(), square.mean()

    return loss
