"""How a trainer trains."""

from __future__ import annotations

from dataclasses import dataclass

from pixart_nb.core.training.loss_scale import LossScale


@dataclass(frozen=True)
class TrainerOptions:
    """How to train. Steps count from 0; ``save_every`` and ``log_every`` count steps.

    ``optimizer``: adamw or came (then ``betas`` are three and ``eps`` two numbers). ``max_grad_norm``: None clips
    nothing. ``ema_rate``: None keeps no average. ``accumulate``: batches of one step. ``loss_scale``: of the first
    step; with ``dynamic_loss_scale`` it follows the overflows, which skip their step. ``pictures``: of one step, for
    the speed in the log. ``shard_threshold``: a parameter of fewer numbers has its moments kept by
    every worker, not by one. ``compile``: the gradients as one graph. Off for convolutions on the CPU, whose graphs
    were seen never to end.
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
    compile: bool = True
    optimizer: str = "adamw"
    eps: float | tuple[float, float] = 1e-8
    end_learning_rate: float = 0.0
    accumulate: int = 1
    loss_scale: float = 1.0
    dynamic_loss_scale: bool = False
    loss_scale_factor: float = 2.0
    loss_scale_window: int = 1000
    pictures: int = 0
    shard_threshold: int = 0

    def new_loss_scale(self) -> LossScale:
        """The loss scale of the first step."""
        return LossScale(
            self.loss_scale, self.dynamic_loss_scale, self.loss_scale_factor, self.loss_scale_window
        )
