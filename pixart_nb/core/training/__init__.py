"""From pictures and captions to weights: losses, optimizers, the trainer."""
