"""Training an adapter: only the adapter moves, dropout is drawn by step, and an interrupted run goes on."""

import numpy as np
import pytest
from lora_models import run, same_weights, transformer, weights

from pixart_nb.core.backend import ms
from pixart_nb.core.lora import Adapters, LoraConfig
from pixart_nb.core.lora.layers import PHASES, LoraDropout
from pixart_nb.core.training.loss import NAMES, coefficients, diffusion_loss
from pixart_nb.core.training.trainer import Trainer, TrainerOptions

CAPTION = 24


def batch(step):
    rng = np.random.default_rng((3, step))
    timesteps = rng.integers(0, 1000, 2)
    start, noise = rng.standard_normal((2, 2, 4, 8, 12), dtype=np.float32)
    embeddings = rng.standard_normal((2, 5, CAPTION), dtype=np.float32)
    mask = np.arange(5) < np.array([[3], [5]])
    return start, noise, coefficients(timesteps), timesteps.astype(np.float32), embeddings, mask


def train(net, config, folder, batches=batch, until=None, **values):
    """An adapter trained as ``pixart-nb train`` does it, and its trainer."""
    adapter = Adapters.of(net).add("style", config, seed=1)
    loss = diffusion_loss(net, net.positions(8, 12))
    given = {"steps": 4, "start_learning_rate": 1e-2, "ema_rate": None, "save_every": 2, "log_every": 1}
    options = TrainerOptions(**given | values)
    net.set_train(True)
    dropping = adapter.with_dropout(batches, 1)
    trainer = Trainer(loss, adapter.parameters(), dropping, options, folder, NAMES, network=net)
    trainer.run(until)
    net.set_train(False)
    return adapter


def moved_alone(adapter, net, before, config):
    """True if each parameter of the adapter has been trained, and no other."""
    fresh = Adapters(transformer()).add("style", config, seed=1).parameters()
    moved = [not np.array_equal(p.asnumpy(), fresh[name].asnumpy()) for name, p in adapter.parameters().items()]
    return all(moved) and same_weights(net, before) and Adapters.of(net).active == ["style"]


def test_only_the_adapter_is_trained_and_an_interrupted_training_goes_on_to_the_same_one(tmp_path):
    config, nets = LoraConfig(lora_dropout=0.3), [transformer(), transformer()]
    before, drawn = weights(nets[0]), run(nets[0])
    whole = train(nets[0], config, tmp_path / "whole")
    assert moved_alone(whole, nets[0], before, config)
    assert not np.array_equal(run(nets[0]), drawn)
    train(nets[1], config, tmp_path / "parts", until=3)
    parts = train(transformer(), config, tmp_path / "parts")
    for name, parameter in whole.parameters().items():
        assert np.array_equal(parameter.asnumpy(), parts.parameters()[name].asnumpy()), name


@pytest.mark.slow
def test_a_compiled_step_trains_as_an_eager_one_with_dropout_and_dora(tmp_path):
    config, nets = LoraConfig(lora_dropout=0.3, use_dora=True), [transformer(), transformer()]
    before = weights(nets[0])
    eager, compiled = (train(net, config, tmp_path / str(k), compile=bool(k), steps=2) for k, net in enumerate(nets))
    assert moved_alone(compiled, nets[1], before, config)
    for name, parameter in eager.parameters().items():
        other = compiled.parameters()[name].asnumpy()
        np.testing.assert_allclose(parameter.asnumpy(), other, atol=1e-4, err_msg=name)


def test_dropout_is_drawn_by_the_step_and_only_in_training():
    net = transformer()
    adapter = Adapters.of(net).add("x", LoraConfig(lora_dropout=0.5, init_lora_weights="gaussian"))
    for parameter in adapter.parameters().values():
        parameter.set_data(ms.Tensor(np.full(parameter.shape, 0.1, np.float32)))
    batches = adapter.with_dropout(lambda step: (step,), 7)
    still = run(net)
    net.set_train(True)
    outputs = []
    for step in (0, 1, 0):
        assert batches(step) == (step,)
        outputs.append(run(net))
    assert np.array_equal(outputs[0], outputs[2])
    assert not np.array_equal(outputs[0], outputs[1]) and not np.array_equal(outputs[0], still)
    net.set_train(False)
    assert np.array_equal(run(net), still)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_keeps_the_mean_and_its_numbers_are_independent(share):
    rng = np.random.default_rng(0)
    phases = [ms.Parameter(ms.Tensor(np.zeros(PHASES, np.float32)), name="rows")]
    dropout = LoraDropout(48, share, phases[0], "columns")
    masks = []
    for _ in range(40):
        for parameter in (phases[0], dropout.columns):
            parameter.set_data(ms.Tensor(rng.random(parameter.shape, np.float32)))
        out = dropout(ms.Tensor(np.ones((2, 30, 48), np.float32))).asnumpy()
        assert set(np.unique(out)) <= {0.0, np.float32(1 / (1 - share))}
        masks.append(out.reshape(60, 48) > 0)
    kept = np.array(masks, np.float64)
    assert kept.mean() == pytest.approx(1 - share, abs=0.01)
    centred = kept - (1 - share)
    features = centred[:, :, ::2] * centred[:, :, 1::2]  # of a token
    tokens = centred[:, ::2] * centred[:, 1::2]  # the same feature of two tokens
    assert abs(features.mean()) < 0.02 and abs(tokens.mean()) < 0.02


def test_more_rows_than_phases_are_dropped_too():
    dropout = LoraDropout(2, 0.5, ms.Parameter(ms.Tensor(np.linspace(0, 1, PHASES, dtype=np.float32))), "columns")
    out = dropout(ms.Tensor(np.ones((PHASES + 10, 2), np.float32))).asnumpy()
    assert np.array_equal(out[PHASES:], out[:10])
    assert out.mean() == pytest.approx(1, abs=0.01)


def test_an_adapter_without_dropout_leaves_the_batches_alone():
    adapter = Adapters.of(transformer()).add("x", LoraConfig())
    assert adapter.with_dropout(batch, 0) is batch


def test_half_the_alpha_is_half_the_change():
    outputs = []
    for alpha in (None, 2.0):
        net = transformer()
        adapter = Adapters.of(net).add("x", LoraConfig(r=4, lora_alpha=alpha))
        for parameter in adapter.parameters().values():
            parameter.set_data(ms.Tensor(np.full(parameter.shape, 0.01, np.float32)))
        weight = net.blocks[0].attn.qkv.weight.asnumpy()
        outputs.append(adapter.change("blocks.0.attn.qkv", weight))
    np.testing.assert_allclose(outputs[1], outputs[0] / 2)
    assert np.abs(outputs[0]).max() > 0
