"""A checkpoint that is made to compress: the average at first, its error measured, and reduced by training."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_data import diffusers, official, relative_error
from typer.testing import CliRunner

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.cli import app
from pixart_nb.config import ConfigError
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.compress import layer_numbers, plan_compression
from pixart_nb.core.checkpoints.convert import convert
from pixart_nb.core.checkpoints.load import load_transformer
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.sampling.trajectory import errors_along, errors_on_noise, follow
from pixart_nb.core.training.compress import CompressOptions, compress

SIGMA = diffusers("sigma")[0]
TRANSFORMER = SIGMA / "transformer"


def random(*shape, seed=0):
    return ms.Tensor(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def test_the_weights_are_the_sources_and_compression_starts_as_the_average(tmp_path):
    target = tmp_path / "kv.safetensors"
    convert(plan_compression(SIGMA, target, "1", 2))
    before, after = load_transformer(TRANSFORMER), load_transformer(target)
    wrapped = {name: p.asnumpy() for name, p in before.parameters_and_names()}
    new = {name: p.asnumpy() for name, p in after.parameters_and_names() if name not in wrapped}
    for name, parameter in after.parameters_and_names():
        if name in wrapped and name != "y_embedder.y_embedding":
            assert np.array_equal(parameter.asnumpy(), wrapped[name])
    assert set(new) == {f"blocks.1.attn.{part}" for part in ("sr.weight", "sr.bias", "norm.weight", "norm.bias")}
    x, attention = random(1, 24, before.config.hidden_size), after.blocks[1].attn
    cells = x.asnumpy().reshape(2, 2, 3, 2, -1).mean((1, 3)).reshape(1, 6, -1)
    expected = (cells - cells.mean(-1, keepdims=True)) / np.sqrt(cells.var(-1, keepdims=True) + 1e-5)
    assert relative_error(attention.compress(x, 4, 6).asnumpy(), expected) < 1e-5


@pytest.mark.parametrize("target", ["kv.pth", "kv.ckpt", "kv"])
@pytest.mark.parametrize("operator", ["conv", "mean"])
def test_every_layout_is_written_and_read_again(tmp_path, target, operator):
    path = tmp_path / target
    convert(plan_compression(TRANSFORMER, path, "all", 2, operator))
    net = load_transformer(path)
    assert (net.config.kv_operator, net.config.kv_ratio) == (operator, 2)
    assert net.config.kv_layers == tuple(range(net.config.depth))


@given(st.sets(st.integers(0, 27), min_size=1))
def test_layers_are_read_as_they_are_written(layers):
    assert layer_numbers(",".join(map(str, sorted(layers))), 28) == sorted(layers)
    first, last = min(layers), max(layers)
    assert layer_numbers(f"{first}-{last}", 28) == list(range(first, last + 1))


def test_named_layers():
    assert layer_numbers("deep", 28) == list(range(14, 28))
    assert layer_numbers("all", 3) == [0, 1, 2]


@pytest.mark.parametrize("text", ["", "a", "1-", "3-1", "5,9", "-1", "1;2"])
def test_layers_that_are_none_are_refused(text):
    with pytest.raises(ValueError, match="layers are"):
        layer_numbers(text, 6)


def test_what_compresses_already_is_refused(tmp_path):
    compressed = official("sigma-ms-kvconv2")[0]
    with pytest.raises(CheckpointError, match=r"compresses layers \[.*\] by 2 already"):
        plan_compression(compressed, tmp_path / "kv.safetensors")
    with pytest.raises(ValueError, match="ratio 1 compresses nothing"):
        plan_compression(SIGMA, tmp_path / "kv.safetensors", ratio=1)
    assert list(tmp_path.iterdir()) == []


# ---- the error


def test_the_error_is_that_of_the_guided_prediction_along_the_sources_own_run():
    pipe = PixArtSigmaPipeline.from_pretrained(SIGMA, vae=None)
    run = follow(pipe, ["a cup"], num_inference_steps=3, height=64, width=64)
    other = PixArt(pipe.transformer.config)
    other.initialize(np.random.default_rng(1))
    own = pipe.transformer
    assert errors_along(pipe, run, own).max() == 0
    errors = errors_along(pipe, run, other)
    assert pipe.transformer is own
    swapped = PixArtSigmaPipeline.from_pretrained(SIGMA, vae=None, transformer=other)
    predicted = []

    def around(predict):
        def wrapped(latents, timestep):
            predicted.append(predict(run.latents[0], timestep).noise)
            return predict(latents, timestep)

        return wrapped

    call = dict(height=64, width=64, num_inference_steps=3, latents=run.latents[0])
    list(swapped.sample("a cup", wrap_predict=around, **call))
    reference = (run.latents[0] - _signal(pipe, run) * run.denoised[0]) / _noise(pipe, run)
    assert errors[0] == pytest.approx(relative_error(predicted[0], reference), rel=1e-3)


def _noise(pipe, run):
    sigma = pipe.scheduler.schedule.sigma_at(run.timesteps[:1])[0]
    return sigma / np.sqrt(sigma**2 + 1)


def _signal(pipe, run):
    sigma = pipe.scheduler.schedule.sigma_at(run.timesteps[:1])[0]
    return 1 / np.sqrt(sigma**2 + 1)


def test_an_uncompressed_copy_has_no_error_on_random_latents():
    net = load_transformer(TRANSFORMER)
    assert errors_on_noise(net, load_transformer(TRANSFORMER), 64, 96, (10, 500)).tolist() == [0, 0]


# ---- all of it


def test_a_checkpoint_alone_is_measured_on_random_latents(tmp_path):
    options = CompressOptions(TRANSFORMER, tmp_path / "kv.safetensors", layers="all", operator="mean")
    report = compress(options)
    assert report["compression"]["sampling"] == "mean"
    assert len(report["before"]) == len(report["timesteps"]) == 11
    assert min(report["before"]) > 0
    assert json.loads((tmp_path / "kv.safetensors.errors.json").read_text())["before"] == report["before"]


def test_an_adaptation_is_measured_and_is_what_the_target_holds(tmp_path, project):
    options = CompressOptions(
        SIGMA,
        tmp_path / "kv",
        layers="all",
        model=str(SIGMA),
        prompts=["a red mushroom on grass"],
        steps=2,
        height=64,
        width=64,
        adapt={
            "steps": 4,
            "start_learning_rate": 2e-3,
            "batch_size": 2,
            "json_path": str(project / "data/pixelart/labels.json"),
            "image_dir": str(project / "data/pixelart"),
        },
    )
    report = compress(options)
    assert (tmp_path / "kv" / "config.json").is_file()
    assert (tmp_path / "kv.adapt" / "start" / "config.json").is_file()
    adapted = load_transformer(tmp_path / "kv")
    started = load_transformer(tmp_path / "kv.adapt" / "start")
    moved = relative_error(adapted.blocks[0].attn.sr.weight.asnumpy(), started.blocks[0].attn.sr.weight.asnumpy())
    assert moved > 1e-3
    assert set(report) >= {"before", "after"}


def test_an_adaptation_without_a_pipeline_or_data_is_refused_before_anything_is_written(tmp_path):
    options = CompressOptions(TRANSFORMER, tmp_path / "kv", adapt={"steps": 2, "json_path": "none.json"})
    with pytest.raises(ConfigError, match="give --model"):
        compress(options)
    with pytest.raises(ConfigError, match="image_dir"):
        compress(replace(options, model=str(SIGMA)))
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_errors(tmp_path):
    words = [
        "compress",
        "--source",
        SIGMA,
        "--target",
        tmp_path / "kv.safetensors",
        "--kv_compress_layer",
        "1",
        "--model",
        SIGMA,
    ]
    words += ["--prompt", "a cup", "--sampling_steps", 2, "--image_height", 64, "--image_width", 64]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert "Relative error of the prediction" in result.output
    assert "mean" in result.output
    refused = CliRunner().invoke(app, [str(word) for word in [*words, "--kv_compress_layer", "7-9"]])
    assert refused.exit_code == 2
    assert "this model has layers 0 to" in " ".join(refused.output.split())


def test_the_target_is_beside_the_source_unless_told(tmp_path):
    shutil.copytree(TRANSFORMER, tmp_path / "net")
    words = [
        "compress",
        "--source",
        tmp_path / "net",
        "--kv_compress_layer",
        "0-1",
        "--kv_compress_scale_factor",
        2,
        "--kv_compress_sampling",
        "conv",
    ]
    result = CliRunner().invoke(app, [str(word) for word in [*words, "--image_height", 64, "--image_width", 64]])
    assert result.exit_code == 0, result.output
    assert load_transformer(tmp_path / "net-kv2.safetensors").config.kv_layers == (0, 1)


def test_help_explains_the_commands(project, monkeypatch):
    monkeypatch.chdir(project)
    from typer.main import get_command

    for name in ("plan", "compress"):
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0
        for option in get_command(app).commands[name].params:
            assert option.hidden or option.name == "help" or option.help
