"""Runs that are kept whole, and compression measured along them; what a model holds before it sees a picture."""

import numpy as np
import pytest
from reference_data import diffusers
from test_transformer import small_net

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.core import PixArtConfig, cost, memory, replace_compression, trace
from pixart_nb.core.backend import ms
from pixart_nb.core.cost import cost_by_size, measure_self_attention, step_cost, with_compression
from pixart_nb.core.hooks.compression import CompressionStudy
from pixart_nb.core.hooks.weights import learned_kernels, modulation, positions
from pixart_nb.core.models.transformer import modulation_rows
from pixart_nb.core.sampling.samplers import denoise
from pixart_nb.core.sampling.trajectory import follow, guidance_directions, predictions, relative_errors

SIZE = {"height": 64, "width": 96, "num_inference_steps": 3, "max_sequence_length": 16}


@pytest.fixture(scope="module")
def pipe():
    return PixArtSigmaPipeline.from_pretrained(diffusers("sigma")[0], mindspore_dtype=ms.float32)


@pytest.fixture(scope="module")
def run(pipe):
    return follow(pipe, ["a red cup", "a fish"], generator=np.random.default_rng(5), **SIZE)


@pytest.fixture(scope="module")
def study(pipe):
    return CompressionStudy(pipe, "a red cup", 5, **SIZE)


def test_a_run_that_is_followed_is_the_run_of_the_pipeline(pipe, run):
    call = SIZE | {"output_type": "latent", "use_resolution_binning": False}
    again = pipe(["a red cup", "a fish"], generator=np.random.default_rng(5), **call)[0]
    np.testing.assert_allclose(run.latents[-1], np.asarray(again), atol=1e-5)
    assert run.latents.shape == (4, 2, 4, 8, 12)
    assert run.denoised.shape == (3, 2, 4, 8, 12)
    np.testing.assert_array_equal(run.latents[0], np.random.default_rng(5).standard_normal((2, 4, 8, 12), np.float32))


def test_predictions_along_a_run_are_those_that_made_it(pipe, run):
    noise = predictions(pipe, run)
    sigmas = pipe.plan(3).sigmas
    for step in range(3):
        clean = denoise(run.latents[step], noise[step], sigmas[step, 0])
        np.testing.assert_allclose(clean, run.denoised[step], rtol=1e-3, atol=1e-3)


def test_guidance_goes_from_the_unconditional_to_the_conditional_prediction(pipe, run):
    apart = guidance_directions(pipe, run)
    guided = predictions(pipe, run, 0.0) + 4.5 * apart
    np.testing.assert_allclose(guided, predictions(pipe, run), rtol=1e-3, atol=1e-4)
    alone = follow(pipe, "a cup", guidance_scale=1.0, generator=np.random.default_rng(5), **SIZE)
    with pytest.raises(ValueError, match="follow one with a scale above 1"):
        guidance_directions(pipe, alone)


def test_an_outcome_is_that_of_the_replaced_compression(pipe, study):
    outcome = study.outcome([2, 1], 2, "mean")
    with replace_compression(pipe, [1, 2], 2, "mean"):
        predicted = predictions(pipe, study.reference)
        drawn = follow(pipe, "a red cup", generator=np.random.default_rng(5), **SIZE)
    np.testing.assert_allclose(outcome.errors, relative_errors(predicted, study.predicted), rtol=1e-6)
    np.testing.assert_allclose(outcome.images, pipe.decode_latents(drawn.latents[-1]), atol=1e-6)
    assert outcome.error > 0
    assert outcome.image_error == pytest.approx(np.sqrt(np.mean((outcome.images - study.images) ** 2)), rel=1e-4)
    assert study.outcome([1, 2], 2, "mean") is outcome
    assert [row["layers"] for row in study.table()] == ["1, 2"]
    np.testing.assert_array_equal(predictions(pipe, study.reference), study.predicted)


def test_errors_are_finite_where_nothing_is_predicted():
    zeros = np.zeros((2, 1, 4))
    assert relative_errors(zeros, zeros).tolist() == [0, 0]
    assert relative_errors(zeros + 1, zeros).tolist() == [2, 2]


def test_no_compression_changes_nothing(study):
    outcome = study.outcome([0, 1], 1, "conv")
    assert (outcome.error, outcome.image_error) == (0, 0)
    assert outcome.cost == study.cost


def test_an_uncompressed_copy_has_no_error_and_a_compressed_one_that_of_its_outcome(pipe, study):
    from copy import copy

    from pixart_nb.pixelart.adaptation import compressed_copy

    other = copy(pipe)
    other.transformer = compressed_copy(pipe.transformer, [1, 2], 2, "conv")
    np.testing.assert_allclose(study.errors_of(other), study.outcome([1, 2], 2, "conv").errors, rtol=1e-3)
    assert study.errors_of(pipe).max() == 0
    other.transformer = compressed_copy(pipe.transformer, [], 1, "conv")
    assert study.errors_of(other).max() < 1e-6


def test_a_model_that_compresses_already_is_refused(pipe):
    from copy import copy

    from pixart_nb.pixelart.adaptation import compressed_copy

    other = copy(pipe)
    other.transformer = compressed_copy(pipe.transformer, [0], 2, "mean")
    with pytest.raises(ValueError, match=r"layers \[0\] of this model compress already"):
        CompressionStudy(other, "a cup", **SIZE)


# ---- attention


@pytest.mark.parametrize("operator", ["conv", "uniform", "mean"])
def test_compressed_attention_is_that_of_a_run_that_compresses_the_layer(pipe, study, operator):
    attention = study.compressed_attention(1, 2, [0, 17], 2, operator, heads=[1])
    with replace_compression(pipe, [1], 2, operator), trace(pipe, layers=1, announce=None) as t:
        predictions(pipe, study.reference)
    expected = t.rows("blocks.1.attn", 2, [0, 17], heads=[1])
    np.testing.assert_allclose(attention.reshape(expected.shape), expected, atol=1e-3 * expected.max())
    assert attention.shape == (1, 2, 2, 3)
    with pytest.raises(ValueError, match="ratio 5 leaves no key of 4x6 tokens"):
        study.compressed_attention(1, 2, 0, 5, operator)


def test_the_trace_of_a_study_keeps_as_many_steps_as_fit(pipe, study, monkeypatch):
    assert study.trace.steps == [0, 1, 2]
    assert study.trace.words() == ["a", "red", "cup", "</s>"]
    other = CompressionStudy(pipe, "a red cup", 5, **SIZE)
    monkeypatch.setattr(memory, "available_on_host", lambda: int(1.5 * study.trace.nbytes))
    assert other.trace.steps in ([0], [0, 2])


def test_a_cancelled_run_leaves_no_outcome_and_no_hook_between_two_calls(pipe, study):
    calls = study.run([0], 2, "uniform")
    assert next(calls) == (1, 6)
    assert pipe.transformer.hook_manager is None
    calls.close()
    assert study.computed([0], 2, "uniform") is None
    assert list(study.run([0], 2, "uniform"))[-1] == (6, 6)
    assert study.computed([0], 2, "uniform") is study.outcomes[-1]


# ---- cost


def test_the_papers_saving_at_4k_is_met():
    """34% less time in the paper, for the deep half at 4K."""
    records = cost_by_size(PixArtConfig(), {"deep": (range(14, 28), 2)}, [1024, 4096], {(4096, 2): 1.5})["deep"]
    assert records[1]["share"] == pytest.approx(0.667, abs=0.001)
    assert records[0]["share"] > 0.85
    assert (records[1]["keys"], records[1]["tokens"]) == (16384, 65536)
    assert [record["seconds"] for record in records] == [None, 1.5]


def test_compression_costs_by_the_square_of_its_ratio():
    config = PixArtConfig()
    full = step_cost(config, 2048, 1024).attention_macs
    for ratio in (2, 4):
        small = step_cost(with_compression(config, range(28), ratio, "mean"), 2048, 1024)
        assert small.attention_macs * ratio**2 == full
    with pytest.raises(ValueError, match="ratio 32 leaves no key of 16x32 tokens"):
        step_cost(with_compression(config, [0], 32), 256, 512)


def test_measured_time_counts_all_queries(monkeypatch):
    monkeypatch.setattr(cost, "best_seconds", lambda function, repeats: function() is None or 1.0)
    monkeypatch.setattr(cost, "TIMED_QUERIES", 8)
    assert measure_self_attention(4, 8, 1, hidden_size=32, heads=4) == 4.0
    assert measure_self_attention(4, 8, 2, hidden_size=32, heads=4) == 6.0


def test_time_is_measured_on_real_operators():
    assert 0 < measure_self_attention(8, 8, 2, "conv", hidden_size=32, heads=4, repeats=1) < 60


# ---- internals


def test_modulation_is_what_the_blocks_use():
    from mindspore import ops

    net = small_net()
    found = modulation(net, [999, 10])
    t = net.t_embedder(ms.Tensor(np.array([999, 10], np.float32)))
    shared = net.t_block[1](ops.silu(t)).reshape(2, 6, -1)
    for layer, block in enumerate(net.blocks):
        rows = modulation_rows(block.scale_shift_table, shared, 6)
        for number, row in enumerate(rows):
            np.testing.assert_allclose(found[:, layer, number], row.asnumpy()[:, 0], atol=1e-6)


def test_positions_are_those_of_the_network():
    net = small_net()
    expected = net.positions(8, 12).asnumpy()[0]
    np.testing.assert_allclose(positions(net.config, 64, 96).reshape(expected.shape), expected, atol=1e-6)


def test_kernels_are_found_where_there_are_some():
    assert learned_kernels(small_net()) == {}
    said = {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": [1]}
    net = small_net(kv_compress_config=said)
    kernels = learned_kernels(net)
    assert list(kernels) == ["blocks.1.attn"]
    np.testing.assert_array_equal(kernels["blocks.1.attn"], net.blocks[1].attn.sr.weight.asnumpy()[:, 0])
