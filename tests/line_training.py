"""A training of a moment: a line, found from points that lie on it."""

import csv

import numpy as np
from mindspore import nn

from pixart_nb.core.backend import ms
from pixart_nb.core.models.layers import Linear
from pixart_nb.core.training.trainer import Trainer, TrainerOptions


class Line(nn.Cell):
    """y = w x + b, to be found from data."""

    def __init__(self):
        super().__init__()
        self.map = Linear(3, 2)


TRUE = np.random.default_rng(9).standard_normal((2, 3)).astype(np.float32)


def batch(step):
    x = np.random.default_rng((1, step)).standard_normal((16, 3)).astype(np.float32)
    return x, x @ TRUE.T + 0.5


def trainer(folder, batches=batch, dtype=ms.float32, more=None, **options):
    net = Line()
    for parameter in net.get_parameters():
        parameter.set_dtype(dtype)

    def loss(x, y):
        error = ((net.map(x.astype(dtype)).astype(ms.float32) - y) ** 2).mean()
        return error, error * 2

    options = dict(steps=40, start_learning_rate=0.1, ema_rate=0.9, save_every=10, log_every=1) | options
    parameters = dict(net.parameters_and_names())
    extra = {"network": net} | (more or {})
    return Trainer(loss, parameters, batches, TrainerOptions(**options), folder, ("twice",), **extra)


def losses(folder):
    with (folder / "curve.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]
