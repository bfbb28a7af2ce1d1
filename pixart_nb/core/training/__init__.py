"""Training: loss, optimizers, trainer, checkpoints, data parallelism, and the commands built on them."""
