"""A stopped training resumes to the same numbers."""

import os
import signal

import numpy as np
import pytest
from line_training import TRUE, batch, losses, trainer

from pixart_nb.core.backend import ms
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.models.layers import Linear
from pixart_nb.core.training.divergence import DivergenceError
from pixart_nb.core.training.trainer import Trainer, TrainerOptions


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
    resumed, expected = parts.state(), whole.state()
    assert all(np.array_equal(resumed[name], expected[name]) for name in expected)


def test_steps_that_are_done_again_stand_once_in_the_log(tmp_path):
    run = trainer(tmp_path)
    run.run(until=25)
    run.checkpoints()[-1].unlink()  # as if the process had been killed before it wrote the state of step 25
    assert len(losses(tmp_path)) == 25
    trainer(tmp_path).run()
    whole = trainer(tmp_path / "whole")
    whole.run()
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_the_newest_checkpoints_are_kept(tmp_path):
    run = trainer(tmp_path, keep=2)
    run.run()
    assert [path.name for path in run.checkpoints()] == ["step-00000030.safetensors", "step-00000040.safetensors"]


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


def test_an_interrupt_of_a_notebook_cell_saves_and_the_same_object_resumes(tmp_path):
    def interrupted(step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(step)

    run = trainer(tmp_path, interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 8"):
        list(run.steps())
    assert [path.name for path in run.checkpoints()] == ["step-00000008.safetensors"]
    assert [row["step"] for row in run.steps()] == list(range(9, 41))
    whole = trainer(tmp_path / "whole")
    whole.run()
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_interrupts_reach_other_cells_while_steps_are_held(tmp_path):
    run = trainer(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored in the background
    try:
        rows = run.steps()
        next(rows)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert next(rows)["step"] == 2
    rows.close()
    assert trainer(tmp_path).step == 2


def test_averages_are_lent_to_the_network_and_taken_back(tmp_path):
    run = trainer(tmp_path)
    run.run(until=9)
    own = {name: p.asnumpy().copy() for name, p in run.parameters.items()}
    with run.ema_scope():
        for name, average in run.weights().items():
            assert np.array_equal(run.parameters[name].asnumpy(), average)
            assert not np.array_equal(average, own[name])
    assert all(np.array_equal(p.asnumpy(), own[name]) for name, p in run.parameters.items())


def test_a_loss_that_is_no_number_stops_before_the_update(tmp_path):
    def poisoned(step):
        x, y = batch(step)
        return x, y * (np.nan if step == 12 else 1)

    run = trainer(tmp_path, poisoned)
    with pytest.raises(
        DivergenceError, match=r"step 12, batch 12: loss nan.*y of the batch .*rows \[0, 1.*step-00000010"
    ):
        run.run()
    assert np.isfinite(run.parameters["map.weight"].asnumpy()).all()
    assert trainer(tmp_path).step == 10


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    trainer(tmp_path).run(until=3)
    other = Linear(4, 2)
    with pytest.raises(CheckpointError, match="of another model"):
        Trainer(lambda x: (x, x), dict(other.parameters_and_names()), batch, TrainerOptions(steps=5), tmp_path)


def test_steps_are_yielded_one_by_one_and_saved_when_nobody_asks_for_more(tmp_path):
    run = trainer(tmp_path, images=16, steps=30)
    for row in run.steps():
        assert list(row)[:5] == ["step", "loss", "grad_norm", "learning_rate", "twice"]
        assert row["twice"] == pytest.approx(2 * row["loss"], rel=1e-5)
        assert row["images_per_second"] > 0
        if row["step"] == 7:
            assert 0 < row["seconds_left"] == pytest.approx(23 * 16 / row["images_per_second"])
            break
    assert trainer(tmp_path, steps=30).step == 7


def test_a_batch_in_parts_is_the_whole_batch(tmp_path):
    def parts(number):
        return tuple(np.split(part, 2)[number % 2] for part in batch(number // 2))

    whole, halves = trainer(tmp_path / "whole"), trainer(tmp_path / "halves", parts, accumulate=2)
    whole.run()
    halves.run()
    assert np.allclose(losses(tmp_path / "halves"), losses(tmp_path / "whole"), rtol=1e-4)
    for name, parameter in whole.parameters.items():
        assert np.allclose(halves.parameters[name].asnumpy(), parameter.asnumpy(), atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_half_precision_is_updated_through_copies_that_keep_small_steps(tmp_path, compiled):
    run = trainer(
        tmp_path,
        dtype=ms.float16,
        loss_scale=1024.0,
        compile=compiled,
        start_learning_rate=1e-5,
        steps=20,
        weight_decay=0.0,
    )
    before = run.masters["map.bias"].asnumpy().copy()
    run.run()
    assert run.parameters["map.bias"].dtype == ms.float16
    moved = np.abs(run.masters["map.bias"].asnumpy() - before)
    assert (moved > 1e-4).all()  # twenty steps of 1e-5, each too small for half precision at 0.5
    assert np.array_equal(run.parameters["map.bias"].asnumpy(), run.masters["map.bias"].asnumpy().astype(np.float16))
    assert run.state()["model/map.bias"].dtype == np.float32


def test_an_overflow_costs_a_step_and_halves_the_loss_scale(tmp_path):
    def loud(step):
        x, y = batch(step)
        return x, y * np.float32(1000 if step == 5 else 1)

    options = dict(dtype=ms.float16, loss_scale=2048.0, dynamic_loss_scale=True, loss_scale_window=4)
    run = trainer(tmp_path / "whole", loud, **options)
    before = None
    for row in run.steps(until=9):
        if row["step"] == 5:
            assert row["loss_scale"] == 4096  # it has doubled after four updates
            before = run.masters["map.weight"].asnumpy().copy()
        if row["step"] == 6:
            assert not np.isfinite(row["grad_norm"])
            assert np.array_equal(run.masters["map.weight"].asnumpy(), before)
            assert (run.scale.value, run.scale.good, run.optimizer.updates) == (2048.0, 0, 5)
    again = trainer(tmp_path / "whole", loud, **options)
    assert (again.scale.value, again.scale.good, again.optimizer.updates) == (2048.0, 3, 8)
    again.run()
    straight = trainer(tmp_path / "straight", loud, **options)
    straight.run()
    assert losses(tmp_path / "whole") == losses(tmp_path / "straight")


def test_a_layer_that_overflows_is_named(tmp_path):
    run = trainer(tmp_path, more={"describe": "batch {} of the test".format})
    run.run(until=5)
    huge = np.full((2, 3), 3e38, np.float32)
    ms.ops.assign(run.parameters["map.weight"], ms.Tensor(huge))
    with pytest.raises(DivergenceError, match=r"batch 5 of the test.*layer map \(Linear\), in rows"):
        run.run()
    assert np.array_equal(run.parameters["map.weight"].asnumpy(), huge)


@pytest.mark.parametrize("optimizer", ["adamw", "came"])
def test_either_optimizer_resumes_bit_for_bit(tmp_path, optimizer):
    came = {"betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16)} if optimizer == "came" else {}
    options = dict(optimizer=optimizer, start_learning_rate=0.01, **came)
    whole = trainer(tmp_path / "whole", **options)
    whole.run()
    trainer(tmp_path / "parts", **options).run(until=17)
    parts = trainer(tmp_path / "parts", **options)
    parts.run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert all(np.array_equal(parts.state()[name], value) for name, value in whole.state().items())
    other = {"adamw": "came", "came": "adamw"}[optimizer]
    swapped = {"betas": (0.9, 0.99)} if other == "adamw" else {"betas": (0.9, 0.99, 0.999), "eps": (1e-30, 1e-16)}
    with pytest.raises(CheckpointError, match="another optimizer"):
        trainer(tmp_path / "parts", **options | {"optimizer": other, "eps": 1e-8} | swapped)


def test_a_run_without_an_average_keeps_none(tmp_path):
    run = trainer(tmp_path, ema_rate=None)
    run.run(until=3)
    assert not [name for name in run.state() if name.startswith("ema/")]
    assert trainer(tmp_path, ema_rate=None).step == 3


def test_another_configuration_is_refused_with_what_differs(tmp_path):
    identity = {"seed": 0, "json_path": "a.json", "sizes": (1, 2)}
    trainer(tmp_path, more={"identity": identity}).run(until=3)
    assert trainer(tmp_path, more={"identity": identity}).step == 3
    with pytest.raises(CheckpointError, match=r"batch_size: not set there, 8 here; seed: 0 there, 1 here\. Use"):
        trainer(tmp_path, more={"identity": identity | {"seed": 1, "batch_size": 8}})
