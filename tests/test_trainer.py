"""Training goes on from where it stopped, to the same numbers."""

import csv
import os
import signal

import numpy as np
import pytest
from mindspore import nn

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.store import CheckpointError
from pixart_nb.core.models.layers import Linear
from pixart_nb.core.training.optim import EMA, clip_by_norm, global_norm, learning_rate
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


def trainer(folder, batches=batch, **options):
    net = Line()

    def loss(x, y):
        error = ((net.map(x) - y) ** 2).mean()
        return error, error * 2

    options = dict(steps=40, start_learning_rate=0.1, ema_rate=0.9, save_every=10, log_every=1) | options
    return Trainer(
        loss, dict(net.parameters_and_names()), batches, TrainerOptions(**options), folder, names=("twice",)
    )


def losses(folder):
    with (folder / "curve.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_training_finds_the_line(tmp_path):
    run = trainer(tmp_path, steps=150)
    run.run()
    assert losses(tmp_path)[-1] < 1e-3 < losses(tmp_path)[0]
    assert np.allclose(run.parameters["map.weight"].asnumpy(), TRUE, atol=0.05)
    assert np.allclose(run.parameters["map.bias"].asnumpy(), 0.5, atol=0.05)


def test_a_resumed_run_has_the_same_losses_and_weights_bit_for_bit(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.run()
    trainer(tmp_path / "parts").run(until=13)
    trainer(tmp_path / "parts").run(until=27)
    parts = trainer(tmp_path / "parts")
    assert parts.step == 27
    parts.run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    ours, theirs = parts.state(), whole.state()
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_steps_that_are_done_again_stand_once_in_the_log(tmp_path):
    run = trainer(tmp_path)
    run.run(until=20)
    for _ in range(5):  # five steps more, then the process is gone without having saved
        run._log(run._one_step())
    assert len(losses(tmp_path)) == 25
    trainer(tmp_path).run()
    whole = trainer(tmp_path / "whole")
    whole.run()
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_the_newest_checkpoints_are_kept(tmp_path):
    run = trainer(tmp_path, keep=2)
    run.run()
    assert [path.name for path in run.checkpoints()] == [
        "step-00000030.safetensors",
        "step-00000040.safetensors",
    ]


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    run = trainer(tmp_path)
    run.run()
    newest = run.checkpoints()[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    assert trainer(tmp_path).step == 30


def test_a_signal_saves_before_it_stops(tmp_path):
    def interrupted(step):
        if step == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(step)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 18"):
        trainer(tmp_path, interrupted).run()
    assert signal.getsignal(signal.SIGTERM) is before
    assert trainer(tmp_path).step == 18


def test_a_loss_that_is_no_number_stops_before_the_update(tmp_path):
    def poisoned(step):
        x, y = batch(step)
        return x, y * (np.nan if step == 12 else 1)

    run = trainer(tmp_path, poisoned)
    with pytest.raises(FloatingPointError, match=r"step 12: loss nan.*not updated"):
        run.run()
    assert np.isfinite(run.parameters["map.weight"].asnumpy()).all()
    assert trainer(tmp_path).step == 10


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trainer(tmp_path).run(until=3)
    other = Linear(4, 2)
    with pytest.raises(CheckpointError, match="of another model"):
        Trainer(
            lambda x: (x, x), dict(other.parameters_and_names()), batch, TrainerOptions(steps=5), tmp_path
        )


def test_clipping_bounds_the_norm_and_keeps_the_direction():
    gradients = [ms.Tensor(np.array([3.0, 0.0], np.float32)), ms.Tensor(np.array([[4.0]], np.float32))]
    norm = global_norm(gradients)
    assert float(norm.asnumpy()) == pytest.approx(5.0)
    clipped = clip_by_norm(gradients, norm, 1.0)
    assert float(global_norm(clipped).asnumpy()) == pytest.approx(1.0, abs=1e-5)
    assert clipped[0].asnumpy() == pytest.approx([0.6, 0.0], abs=1e-5)
    untouched = clip_by_norm(gradients, norm, 10.0)
    assert np.array_equal(untouched[1].asnumpy(), [[4.0]])


def test_the_average_follows_the_weights_and_owns_its_memory():
    weight = ms.Parameter(ms.Tensor(np.zeros(2, np.float32)))
    ema = EMA([weight], rate=0.5)
    weight.set_data(ms.Tensor(np.ones(2, np.float32)))
    assert np.array_equal(ema.averages[0], [0, 0])
    for _ in range(3):
        ema.update()
    first, second, third = 2 / 11, 3 / 12, 4 / 13  # the rate rises with the number of updates
    assert np.allclose(ema.averages[0], 1 - first * second * third, atol=1e-6)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [learning_rate(step, 1.0, 10, 110, "cosine") for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[-1] < 1e-3
    assert learning_rate(99, 1.0, 0, 100, "constant") == 1.0
    with pytest.raises(ValueError, match="'constant' or 'cosine'"):
        learning_rate(5, 1.0, 0, 10, "linear")
