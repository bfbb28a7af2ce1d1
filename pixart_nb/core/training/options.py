"""Options of a trainer, and how they follow from a training configuration."""

from __future__ import annotations

import math
import os
import sys
import warnings
from dataclasses import dataclass

from pixart_nb.config import ConfigError, TrainConfig
from pixart_nb.core import backend
from pixart_nb.core.data.buckets import BucketSampler
from pixart_nb.core.data.control import EdgeOptions
from pixart_nb.core.training.optimizers import LossScale, learning_rate, scaled_rate

#: Float32 elements per KB of optimizer state.
_ELEMENTS_PER_KB = 1024 // 4


@dataclass(frozen=True)
class TrainerOptions:
    """Options of a ``Trainer``. Steps count from 0.

    Args:
        optimizer: ``adamw``, or ``came`` with three ``betas`` and two ``eps``.
        max_grad_norm: None clips nothing. ``ema_rate``: None keeps no average.
        accumulate: batches per step.
        loss_scale: scale of the first step; with ``dynamic_loss_scale`` an overflow skips its step and reduces it.
        images: images per step, for the speed in the log.
        shard_threshold: elements below which every worker keeps the optimizer state of a parameter.
        compile: compute loss and gradients as one graph, for Ascend. Graphs of convolutions never finish on the CPU.
    """

    steps: int
    start_learning_rate: float = 2e-5
    warmup_steps: int = 0
    schedule: str = "constant"
    betas: tuple[float, ...] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    ema_rate: float | None = 0.9999
    save_every: int = 500
    log_every: int = 20
    keep: int = 2
    compile: bool = False
    optimizer: str = "adamw"
    eps: float | tuple[float, float] = 1e-8
    end_learning_rate: float = 0.0
    accumulate: int = 1
    loss_scale: float = 1.0
    dynamic_loss_scale: bool = False
    loss_scale_factor: float = 2.0
    loss_scale_window: int = 1000
    images: int = 0
    shard_threshold: int = 0

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        peak, warmup, end = self.start_learning_rate, self.warmup_steps, self.end_learning_rate
        return learning_rate(step, peak, warmup, self.steps, self.schedule, end)

    def new_loss_scale(self) -> LossScale:
        """Return the loss scale of the first step."""
        return LossScale(self.loss_scale, self.dynamic_loss_scale, self.loss_scale_factor, self.loss_scale_window)


def check_overflow_mode(config: TrainConfig) -> None:
    """Refuse float16 training on Ascend in saturation mode, in which no overflow shows in the gradients.

    Raises ``ConfigError``. Not run on Ascend.
    """
    mode = os.environ.get("MS_ASCEND_CHECK_OVERFLOW_MODE", "")
    if backend.on_ascend() and config.dtype == "fp16" and mode.upper().startswith("SATURATION"):
        raise ConfigError(
            f"MS_ASCEND_CHECK_OVERFLOW_MODE is {mode}: an overflow in float16 would become a large number instead of "
            "infinity, and the loss scale would not notice it. Set it to INFNAN_MODE, or train in bf16"
        )


def trained_edges(config: TrainConfig) -> EdgeOptions:
    """Return the options of the edges that a ControlNet is trained on."""
    return EdgeOptions(config.control_edge_sigma, config.control_edge_threshold, config.control_edge_width)


def steps_per_epoch(config: TrainConfig, sampler: BucketSampler) -> int:
    """Return the number of steps in which every image is seen about once."""
    return max(1, sampler.batches(1) // config.gradient_accumulation_steps)


def trainer_options(config: TrainConfig, sampler: BucketSampler) -> TrainerOptions:
    """Return the trainer's options of a configuration, with epochs turned into steps.

    Warns if the warm-up is not over before the training is.
    """
    accumulate, came = config.gradient_accumulation_steps, config.optim == "came"
    images, half = sampler.whole * accumulate, config.dtype == "fp16"
    epochs = math.ceil(sampler.batches(config.epochs) / accumulate)
    options = TrainerOptions(
        steps=epochs if config.steps is None else config.steps,
        start_learning_rate=scaled_rate(config.start_learning_rate, images, config.auto_lr),
        end_learning_rate=config.end_learning_rate,
        warmup_steps=config.warmup_steps,
        schedule=config.scheduler.removesuffix("_decay"),
        optimizer=config.optim,
        betas=tuple(config.came_betas if came else config.adamw_betas),
        eps=tuple(config.came_eps) if came else config.adamw_eps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm if config.clip_grad else None,
        ema_rate=config.ema_rate if config.use_ema else None,
        save_every=config.ckpt_save_steps or steps_per_epoch(config, sampler) * config.ckpt_save_interval,
        log_every=config.log_loss_interval,
        keep=config.ckpt_max_keep,
        compile=config.mode == 0,
        accumulate=accumulate,
        loss_scale=config.init_loss_scale if half else 1.0,
        dynamic_loss_scale=half and config.loss_scaler_type == "dynamic",
        loss_scale_factor=config.loss_scale_factor,
        loss_scale_window=config.scale_window,
        images=images,
        shard_threshold=sys.maxsize if config.hsdp_shard_size == 1 else config.hsdp_threshold * _ELEMENTS_PER_KB,
    )
    if options.warmup_steps > options.steps:
        warnings.warn(
            f"warmup_steps is {options.warmup_steps} and the training has {options.steps} steps: the learning rate "
            f"ends at {options.rate(options.steps - 1):.2g}, below the {options.start_learning_rate:.2g} that it warms "
            "up to",
            stacklevel=2,
        )
    return options
