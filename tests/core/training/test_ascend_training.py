"""Training on Ascend, as far as a CPU can prove it: graphs, accumulation, averages and updates on the device."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
from line_training import batch, trainer

from benchmarks.ascend_stand_ins import ascend as ascend_stand_ins
from pixart_nb.config import ConfigError
from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.data.reader import FeatureBatch
from pixart_nb.core.models.transformer import PixArt, PixArtConfig
from pixart_nb.core.training import distributed
from pixart_nb.core.training.batches import LENGTH_STEP, DiffusionBatches, Noise, caption_multiple
from pixart_nb.core.training.distributed import Workers
from pixart_nb.core.training.loss import NAMES, diffusion_loss
from pixart_nb.core.training.optimizers import CAME, EMA, AdamW
from pixart_nb.core.training.options import check_overflow_mode
from pixart_nb.core.training.run import Training
from pixart_nb.core.training.trainer import Trainer, TrainerOptions

NET = PixArtConfig(hidden_size=32, num_heads=2, depth=1, caption_channels=6, input_size=8)
EMPTY = np.zeros((2, 6), np.float32)


@pytest.fixture
def ascend(monkeypatch):
    """The choices of an Ascend device; nothing is computed there."""
    monkeypatch.setattr(backend, "on_ascend", lambda: True)


def no_read(monkeypatch):
    """Fail where a tensor is read from the device."""

    def read(tensor):
        raise AssertionError("a tensor was read from the device")

    monkeypatch.setattr(ms.Tensor, "asnumpy", read)


class Sizes:
    """Batches whose captions have other lengths every time, and whose images have one of some sizes."""

    def __init__(self, *sizes):
        self.sizes = sizes

    def batch(self, step):
        rng = np.random.default_rng(step)
        mean, std = rng.random((2, 2, 4, *self.sizes[step % len(self.sizes)]), dtype=np.float32)
        mask = np.arange(60) < np.array([[1 + step % 59], [2 + 7 * step % 58]])
        mask = mask[:, : mask.sum(1).max()]
        return FeatureBatch(mean, std, np.ones((*mask.shape, 6), np.float32), mask, np.arange(2))


@pytest.mark.parametrize("sizes", [[(8, 8)], [(8, 8), (6, 10), (10, 6)]], ids=["one size", "three sizes"])
def test_one_graph_is_compiled_for_each_size_whatever_the_lengths_of_the_captions(tmp_path, monkeypatch, sizes):
    graphs = set()

    def jit(function, **options):
        def compiled(*tensors):
            graphs.add(tuple((tensor.shape, tensor.dtype) for tensor in tensors))
            zeros = [ms.ops.zeros_like(parameter) for parameter in parameters.values()]
            return tuple(ms.Tensor(1.0, ms.float32) for _ in range(3)), zeros

        return compiled

    with monkeypatch.context() as device:
        device.setattr(backend, "on_ascend", lambda: True)
        multiple = caption_multiple(0, 60)
    monkeypatch.setattr(ms, "jit", jit)
    net = PixArt(NET)
    parameters = dict(net.final_layer.parameters_and_names())
    batches = DiffusionBatches(Sizes(*sizes), Noise(0), net, 1.0, EMPTY, length_multiple=multiple)
    Trainer(diffusion_loss(net), parameters, batches, TrainerOptions(steps=30, compile=True), tmp_path, NAMES).run()
    assert len(graphs) == len(sizes)
    assert {batches(number)[4].shape[1] for number in range(30)} == {60}


def test_on_a_cpu_captions_keep_their_lengths_and_graphs_have_few():
    assert caption_multiple(1, 300) == 1
    assert caption_multiple(0, 300) == LENGTH_STEP


def test_half_precision_gradients_are_added_up_in_float32(tmp_path):
    """2048 + 1 is 2048 in float16."""

    def loss(x, y):
        error = (weight.astype(ms.float32) * x).sum()
        return error, error

    weight = ms.Parameter(ms.Tensor(np.zeros(4, np.float16)), name="w")
    options = TrainerOptions(steps=1, accumulate=2, max_grad_norm=None, ema_rate=None)

    def parts(number):
        return np.full(4, (2048, 1)[number], np.float32), np.zeros(1, np.float32)

    run = Trainer(loss, {"w": weight}, parts, options, tmp_path, ("twice",), dtype=ms.float16)
    (row,) = run.steps()
    assert row["grad_norm"] == pytest.approx(2049 / 2 * 2)  # the mean of two batches, over four numbers


@pytest.mark.parametrize("optimizer", [AdamW, CAME])
def test_an_update_and_the_averages_read_nothing_from_the_device(monkeypatch, optimizer):
    rng = np.random.default_rng(0)
    shapes = {"matrix": (6, 10), "vector": (7,), "kernel": (5, 2, 2, 3)}
    weights = {n: ms.Parameter(ms.Tensor(rng.random(s, dtype=np.float32)), name=n) for n, s in shapes.items()}
    gradients = {n: ms.Tensor(rng.random(s, dtype=np.float32)) for n, s in shapes.items()}
    update, average = optimizer(weights), EMA(weights, 0.9)
    no_read(monkeypatch)
    update.update(gradients, 1e-3)
    average.update()


def test_adamw_on_ascend_is_the_fused_operator_with_the_same_steps():
    """The stand-in has the contract of MindSpore's ``AdamW`` operator, whose step counts from 0, in float64."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal((5, 7)).astype(np.float32)
    weights = [ms.Parameter(ms.Tensor(start.copy()), name="w") for _ in range(2)]
    steps = [AdamW({"w": weight}, (0.9, 0.95), 1e-8, 0.1) for weight in weights]
    for _ in range(10):
        gradient = {"w": ms.Tensor(rng.standard_normal((5, 7)).astype(np.float32))}
        steps[0].update(gradient, 1e-2)
        with ascend_stand_ins():
            steps[1].update(gradient, 1e-2)
    assert np.abs(weights[0].asnumpy() - weights[1].asnumpy()).max() < 2e-6


def test_came_and_the_averages_on_ascend_are_those_of_the_cpu():
    rng = np.random.default_rng(1)
    shapes = {"matrix": (6, 10), "matrix 2": (6, 10), "vector": (7,), "vector 2": (7,)}
    starts = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    sides = [{n: ms.Parameter(ms.Tensor(a.copy()), name=n) for n, a in starts.items()} for _ in range(2)]
    updates, averages = [CAME(weights, weight_decay=0.1) for weights in sides], [EMA(w, 0.9) for w in sides]
    for _ in range(5):
        gradients = {n: ms.Tensor(rng.standard_normal(s).astype(np.float32)) for n, s in shapes.items()}
        for side, device in enumerate((nullcontext(), ascend_stand_ins())):
            with device:
                updates[side].update(gradients, 1e-2)
                averages[side].update()
    for name in shapes:
        assert np.array_equal(sides[0][name].asnumpy(), sides[1][name].asnumpy())
        assert np.array_equal(*(average.averages[name].asnumpy() for average in averages))


@pytest.mark.parametrize(("mode", "dtype"), [("SATURATION_MODE", "bf16"), ("INFNAN_MODE", "fp16"), ("", "fp16")])
def test_an_overflow_that_shows_is_accepted(monkeypatch, ascend, mode, dtype):
    monkeypatch.setenv("MS_ASCEND_CHECK_OVERFLOW_MODE", mode)
    check_overflow_mode(SimpleNamespace(dtype=dtype))


def test_a_training_in_float16_in_saturation_mode_is_refused_before_anything_is_loaded(monkeypatch, ascend):
    monkeypatch.setenv("MS_ASCEND_CHECK_OVERFLOW_MODE", "SATURATION_MODE")
    with pytest.raises(ConfigError, match="Set it to INFNAN_MODE, or train in bf16"):
        Training(SimpleNamespace(dtype="fp16", use_parallel=False, output_path="unused"))


def test_a_step_of_two_workers_takes_at_most_eight_collectives(tmp_path, monkeypatch):
    calls = []

    class AllReduce:
        def __call__(self, tensor):
            calls.append(tensor.size)
            return tensor * 1.0

    monkeypatch.setattr(distributed.ops, "AllReduce", AllReduce)
    run = trainer(tmp_path, batch, more={"workers": Workers(0, 2)}, steps=2, save_every=100)
    calls.clear()
    next(run.steps())
    assert 3 <= len(calls) <= 8
