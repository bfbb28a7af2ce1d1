"""A stage of training starts from the model of the one before."""

from dataclasses import replace

import numpy as np
import pytest

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import components
from pixart_nb.core.checkpoints.load import load_transformer
from pixart_nb.core.io import CheckpointError, save_tensors
from pixart_nb.core.models.embeddings import sincos_positions
from pixart_nb.core.models.transformer import PixArt, PixArtConfig
from pixart_nb.core.training.loss import coefficients, diffusion_loss
from pixart_nb.core.training.weak_to_strong import (
    TrainingStage,
    start_from_scratch,
    start_report,
    start_stage,
    uncompressed,
)

CONFIG = PixArtConfig(hidden_size=48, num_heads=4, depth=3, caption_channels=6, input_size=8, pe_interpolation=0.5)
COMPRESSION = {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": [1, 2]}


@pytest.fixture(scope="module")
def weak(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weak") / "transformer"
    net = PixArt(CONFIG)
    rng = np.random.default_rng(0)
    net.initialize(rng, zero_cross_attention=False)
    last = net.final_layer.linear.weight
    last.set_data(ms.Tensor(rng.standard_normal(last.shape).astype(np.float32)))
    components.write_transformer(folder, net)
    return folder


def batch(height=16, width=16):
    rng = np.random.default_rng(1)
    latents, noise = rng.standard_normal((2, 2, 4, height, width), dtype=np.float32)
    timesteps = np.array([200, 700])
    captions, mask = rng.standard_normal((2, 3, 6), dtype=np.float32), np.ones((2, 3), bool)
    return [
        latents,
        noise,
        coefficients(timesteps),
        timesteps.astype(np.float32),
        captions,
        mask,
        np.ones(2, np.float32),
    ]


def predicted(net, height=16, width=16):
    latents, _, _, timesteps, captions, mask, _ = map(ms.Tensor, batch(height, width))
    return net(latents, timesteps, captions, mask.asnumpy()).asnumpy()


def test_a_larger_image_spans_the_positions_that_the_smaller_one_spanned(weak):
    start = start_stage(weak, TrainingStage(sample_size=16))
    assert (start.net.config.input_size, start.net.config.pe_interpolation) == (16, 1.0)
    positions = start.net.positions(16, 16).asnumpy()[0].reshape(8, 8, 48)
    small = sincos_positions(48, 4, 4, 4, 0.5).reshape(4, 4, 48)
    assert np.allclose(positions[::2, ::2], small, atol=1e-6)  # every second token stands where one stood
    assert np.allclose(predicted(start.net), predicted(load_transformer(weak)), atol=1e-5)


def test_a_stretch_that_is_given_is_taken(weak):
    net = start_stage(weak, TrainingStage(sample_size=16, pe_interpolation=0.5)).net
    assert net.config.pe_interpolation == 0.5
    assert not np.allclose(predicted(net), predicted(load_transformer(weak)), atol=1e-2)


def test_compression_starts_as_the_average_in_the_chosen_layers(weak):
    start = start_stage(weak, TrainingStage(compression=COMPRESSION))
    assert start.new_layers == (1, 2)
    assert start.net.blocks[0].attn.sr is None
    for layer in (1, 2):
        attention = start.net.blocks[layer].attn
        assert np.allclose(attention.sr.weight.asnumpy(), 0.25)
        assert not attention.sr.bias.asnumpy().any()
        assert (attention.norm.weight.asnumpy() == 1).all()
    with uncompressed(start.net, start.new_layers):
        assert np.allclose(predicted(start.net), predicted(load_transformer(weak)), atol=1e-5)
    assert not np.allclose(predicted(start.net), predicted(load_transformer(weak)), atol=1e-3)


def test_compression_may_start_at_random_by_seed(weak):
    stage = TrainingStage(compression=COMPRESSION, compression_init="random")
    first, again, other = (start_stage(weak, stage, seed=seed).net.blocks[1].attn.sr for seed in (0, 0, 1))
    weights = first.weight.asnumpy()
    assert np.array_equal(weights, again.weight.asnumpy())
    assert not np.array_equal(weights, other.weight.asnumpy())
    assert np.abs(weights).max() <= 0.5
    assert weights.std() == pytest.approx(0.5 / 3**0.5, rel=0.1)
    assert first.bias.asnumpy().any()


def test_layers_that_learned_to_compress_go_on(weak, tmp_path):
    net = start_stage(weak, TrainingStage(compression=COMPRESSION), seed=0).net
    net.blocks[1].attn.sr.weight.set_data(ms.Tensor(np.full((48, 1, 2, 2), 0.3, np.float32)))
    components.write_transformer(tmp_path / "next", net)
    more = start_stage(tmp_path / "next", TrainingStage(compression=COMPRESSION | {"kv_compress_layer": [0, 1, 2]}))
    assert more.new_layers == (0,)
    assert np.allclose(more.net.blocks[1].attn.sr.weight.asnumpy(), 0.3)
    assert np.allclose(more.net.blocks[0].attn.sr.weight.asnumpy(), 0.25)
    assert start_stage(tmp_path / "next", TrainingStage()).net.config.kv_layers == (1, 2)
    for changes in ({"scale_factor": 4}, {"kv_compress_layer": [1]}, {"sampling": "mean"}):
        with pytest.raises(CheckpointError, match=r"compresses layers \[1, 2\] by 2 with 'conv'.*Keep"):
            start_stage(tmp_path / "next", TrainingStage(compression=COMPRESSION | changes))


def test_layers_that_the_model_does_not_have_are_refused(weak):
    with pytest.raises(ValueError, match="layers 0 to 2"):
        start_stage(weak, TrainingStage(compression=COMPRESSION | {"kv_compress_layer": [3]}))


def test_a_checkpoint_that_does_not_say_its_size_is_of_this_stage(tmp_path):
    net = PixArt(PixArtConfig(hidden_size=72, num_heads=1, depth=1, caption_channels=6))
    save_tensors(tmp_path / "w.safetensors", {name: p.asnumpy() for name, p in net.parameters_and_names()})
    start = start_stage(tmp_path / "w.safetensors", TrainingStage(sample_size=32))
    assert (start.net.config.input_size, start.net.config.pe_interpolation) == (32, 0.5)
    assert "does not say its size" in " ".join(start.notes)
    with pytest.raises(CheckpointError, match="model_max_length"):
        start_stage(tmp_path / "w.safetensors", TrainingStage(sample_size=32), tokens=120)


def test_a_fresh_start_takes_the_architecture_alone(weak):
    stage = TrainingStage(sample_size=16, compression=COMPRESSION)
    first, again = (start_from_scratch(weak, stage, seed=3, zero_cross_attention=False).net for _ in range(2))
    assert first.config.kv_layers == (1, 2)
    assert first.config.pe_interpolation == 1.0
    for (name, a), (_, b) in zip(first.parameters_and_names(), again.parameters_and_names(), strict=True):
        assert np.array_equal(a.asnumpy(), b.asnumpy()), name
    learned = load_transformer(weak).blocks[0].mlp.fc1.weight.asnumpy()
    assert not np.allclose(first.blocks[0].mlp.fc1.weight.asnumpy(), learned)


def test_the_error_before_the_first_step_is_told_with_and_without_what_is_new(weak):
    start = start_stage(weak, TrainingStage(sample_size=16, compression=COMPRESSION))
    report = start_report(start, diffusion_loss(start.net), [[*batch(), start.net.positions(16, 16)]])
    assert list(report) == [
        "loss",
        "latent_std",
        "loss_interpolated",
        "loss_not_interpolated",
        "loss_without_compression",
        "compression_error",
    ]
    assert report["loss_interpolated"] == pytest.approx(report["loss"])
    assert report["loss_not_interpolated"] != pytest.approx(report["loss"], rel=1e-3)
    assert report["latent_std"] == pytest.approx(1.0, abs=0.1)
    before = load_transformer(weak)
    plain = diffusion_loss(before)(*map(ms.Tensor, batch()), before.positions(16, 16))[0]
    assert report["loss_without_compression"] == pytest.approx(float(plain.asnumpy()), rel=1e-4)
    with uncompressed(start.net, (1, 2)):
        exact = predicted(start.net)
    assert report["compression_error"] > 0.001
    assert np.isfinite(exact).all()


def test_the_same_model_at_its_own_size_has_nothing_to_compare(weak):
    start = start_stage(weak, TrainingStage())
    report = start_report(start, diffusion_loss(start.net), [[*batch(8, 8), start.net.positions(8, 8)]])
    assert list(report) == ["loss", "latent_std"]


def test_images_need_not_be_square(weak):
    start = start_stage(weak, TrainingStage(sample_size=16))
    report = start_report(start, diffusion_loss(start.net), [[*batch(8, 24), start.net.positions(8, 24)]])
    assert report["loss_interpolated"] == pytest.approx(report["loss"])
    assert replace(start.previous, input_size=16, pe_interpolation=1.0) == start.net.config
