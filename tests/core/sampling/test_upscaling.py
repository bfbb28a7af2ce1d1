"""A picture that grows: sizes and ratios as asked, each from the one before, with the pipeline left as it was."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from reference_data import diffusers
from small_networks import SMALL
from typer.testing import CliRunner

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.cli import app
from pixart_nb.config import check_config
from pixart_nb.core.backend import ms
from pixart_nb.core.models.attention import SelfAttention
from pixart_nb.core.models.kv_compression import compress_tokens
from pixart_nb.core.models.transformer import PixArt, PixArtConfig, compression_kept
from pixart_nb.core.run_plan import RunSettings, plan_upscaling
from pixart_nb.core.sampling.stages import run_stages
from pixart_nb.core.sampling.upscaling import (
    UpscaleSize,
    compress_keys,
    default_factors,
    default_strengths,
    load_compressed,
    upscale_latents,
    upscale_sizes,
    upscaled_images,
)

FOLDER = diffusers("sigma")[0]


@pytest.fixture(scope="module")
def pipe():
    return PixArtSigmaPipeline.from_pretrained(FOLDER)


def test_sizes_grow_and_so_does_the_ratio():
    found = upscale_sizes(PixArtConfig(), 4096, 2048, (16, 4, 1), (0.5, 0.25), keys=8)
    assert found == [UpscaleSize(256, 128), UpscaleSize(1024, 512, 0.5, 4), UpscaleSize(4096, 2048, 0.25, 16)]
    assert upscale_sizes(PixArtConfig(), 4096, 4096, [1], [], keys=1000) == [UpscaleSize(4096, 4096)]


def test_a_query_has_as_many_keys_as_in_training_unless_asked_otherwise():
    assert [size.ratio for size in upscale_sizes(PixArtConfig(input_size=32), 1024, 1024)] == [1, 2, 4]
    assert [size.ratio for size in upscale_sizes(PixArtConfig(input_size=128), 1024, 2048)] == [1]
    compressed = PixArtConfig(
        input_size=128, kv_compress_config={"sampling": "conv", "scale_factor": 2, "kv_compress_layer": [14]}
    )
    assert [size.ratio for size in upscale_sizes(compressed, 4096, 4096, [4, 1], [0.4])] == [1, 4]


@pytest.mark.parametrize(
    ("factors", "strengths", "said"),
    [
        ((1, 2), (0.5,), r"factors are \[1, 2\]; expected them to fall"),
        ((2, 1), (0.5, 0.3), "2 strengths for 2 sizes"),
        ((2, 1), (1.5,), r"strength is 1\.5"),
        ((3, 1), (0.5,), "256x256 divided by 3 is no multiple of 16 pixels"),
    ],
)
def test_sizes_that_cannot_be_are_refused(factors, strengths, said):
    with pytest.raises(ValueError, match=said):
        upscale_sizes(PixArtConfig(), 256, 256, factors, strengths, keys=8)


def test_each_size_begins_with_the_one_before_and_the_pipeline_stays_as_it_was(pipe):
    before = [(block.attn.ratio, block.attn.operator) for block in pipe.transformer.blocks]
    sizes = [UpscaleSize(32, 48), UpscaleSize(64, 96, 0.5, 2)]
    small, big = upscale_latents(pipe, ["a cup", "a hat"], sizes, counts=(2, 1), steps=4, seed=5)
    assert small.shape == (2, 4, 4, 6) and big.shape == (1, 4, 8, 12)
    assert [(block.attn.ratio, block.attn.operator) for block in pipe.transformer.blocks] == before
    (plain,) = upscale_latents(pipe, ["a cup"], [UpscaleSize(64, 96, 1.0, 2)], steps=4, seed=5)
    assert not np.array_equal(plain, big)


def test_a_ratio_of_one_changes_nothing_and_another_one_does(pipe):
    call = dict(height=64, width=96, num_inference_steps=2, output_type="latent")
    expected = pipe("a cup", generator=np.random.default_rng([0, 0]), **call)[0]
    found = {
        ratio: next(upscale_latents(pipe, ["a cup"], [UpscaleSize(64, 96, 1.0, ratio)], steps=2)) for ratio in (1, 2)
    }
    again = pipe("a cup", generator=np.random.default_rng([0, 0]), **call)[0]
    assert np.array_equal(expected, again)
    assert np.array_equal(found[1], expected)
    assert not np.array_equal(found[2], expected)


def test_operators_that_learn_are_refused(pipe):
    with pytest.raises(ValueError, match="expected mean, ave or uniform"):
        compress_keys(pipe.transformer, 2, "conv")


def test_what_has_learned_to_compress_averages_what_it_learned():
    rng = np.random.default_rng(0)
    attention = SelfAttention(8, 2, operator="conv", ratio=2)
    for parameter in (attention.sr.weight, attention.sr.bias):
        parameter.set_data(ms.Tensor(rng.standard_normal(parameter.shape).astype(np.float32)))
    x = ms.Tensor(rng.standard_normal((1, 64, 8)).astype(np.float32))
    wide = compress_tokens(x, 8, 8, 4, "conv", attention.sr.enlarged(2), lambda tokens: tokens)
    once = compress_tokens(x, 8, 8, 2, "conv", attention.sr, lambda tokens: tokens)
    np.testing.assert_allclose(wide.asnumpy(), compress_tokens(once, 4, 4, 2, "mean").asnumpy(), atol=1e-6)


def test_a_model_that_compresses_is_compressed_further_layer_by_layer():
    config = dict(hidden_size=48, num_heads=2, depth=2, caption_channels=12, input_size=8)
    config |= {"kv_compress_config": {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": [1]}}
    net = PixArt(PixArtConfig(**config))
    first, second = (block.attn for block in net.blocks)
    learned, names = second.sr, [parameter.name for parameter in net.get_parameters()]
    with compression_kept(net):
        compress_keys(net, 1)
        assert [(layer.ratio, layer.operator) for layer in (first, second)] == [(1, None), (2, "conv")]
        compress_keys(net, 3)
        assert [(layer.ratio, layer.operator) for layer in (first, second)] == [(3, "mean"), (6, "conv")]
        assert second.sr.weight.shape == (48, 1, 6, 6)
        assert [parameter.name for parameter in net.get_parameters()] == names
    assert (first.ratio, second.ratio) == (1, 2) and second.sr is learned
    assert [parameter.name for parameter in net.get_parameters()] == names and len(set(names)) == len(names)
    networks = replace(SMALL, transformer=PixArtConfig(**config))
    sizes = [UpscaleSize(64, 64), UpscaleSize(192, 192, 0.5, 3)]
    small, big = (plan.step_macs for plan in plan_upscaling(networks, RunSettings(192, 192, steps=6), sizes))
    rows, keys = 2 * 2 * 48, 16 + 4  # without and with compression, on a grid of 4 x 4; 9 times as many tokens
    assert small["self-attention"] == rows * 16 * keys and big["self-attention"] == rows * 144 * keys
    assert big["compression"] == 9 * small["compression"] > 0


def test_every_size_is_planned_with_its_steps_and_its_keys():
    sizes = [UpscaleSize(64, 64), UpscaleSize(128, 128, 0.5, 2)]
    small, big = plan_upscaling(SMALL, RunSettings(128, 128, steps=6), sizes)
    assert (small.run.steps, big.run.steps, big.run.sequential) == (6, 3, True)
    assert big.networks.transformer.layer_ratio(0) == 2
    assert big.step_macs["self-attention"] == 3 * 2 * 2 * 64 * 16 * 48
    assert big.peak > small.peak


def test_the_usual_sizes_begin_near_the_models_own():
    config = PixArtConfig(input_size=16)
    assert default_factors(config, 4096, 4096) == [32, 16, 8, 4, 2, 1]
    assert default_factors(config, 1024, 512) == [4, 2, 1]
    assert default_factors(config, 272, 272) == [1]  # half of it is no multiple of 16
    assert default_factors(config, 720, 1200) == [5, 3, 1]  # 144 x 240, 240 x 400
    assert default_factors(PixArtConfig(input_size=32), 720, 720) == [3, 1]
    assert default_strengths(1) == []
    assert len(default_strengths(9)) == 8


def test_the_command_grows_a_picture_and_refuses_what_does_not_fit(tmp_path):
    words = ["upscale", "--model", FOLDER, "--image-height", 128, "--image-width", 64, "--sampling-steps", 2]
    words += ["--prompt", "a cup", "--factors", 2, "--factors", 1, "--keys", 2, "-o", tmp_path / "out"]
    words = [str(word) if word != "-o" else "--output-path" for word in words]
    result = CliRunner().invoke(app, [*words, "--memory-limit", "0.01"])
    assert result.exit_code == 2 and "The least that it can take" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "out" / "image.png").size == (64, 128)
    assert (tmp_path / "out" / "zoom.html").stat().st_size > 1000
    assert "64 x 32" in result.output and "128 x 64" in result.output


def test_an_image_that_cannot_begin_near_the_models_own_size_is_named(tmp_path):
    words = ["upscale", "--model", FOLDER, "--image-height", 272, "--image-width", 272, "--sampling-steps", 1]
    result = CliRunner().invoke(app, [str(word) for word in [*words, "--prompt", "a cup", "-o", tmp_path / "out"]])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert (
        "Upscaling begins at 272x272. Multiples of 128 as height and width begin near that size. The checkpoint was"
        in said
    )


def test_the_command_draws_the_given_size_and_not_the_nearest_published_one(tmp_path, project):
    model = project / "data/tiny-sigma-1k"  # of a size with published ratios
    words = ["upscale", "--model", model, "--image-height", 64, "--image-width", 64]
    words += ["--sampling-steps", 1, "--prompt", "a red cup", "--factors", 1, "--output-path", tmp_path / "out"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "out" / "image.png").size == (64, 64)


def test_stages_draw_what_growing_draws(tmp_path, pipe):
    config = check_config(
        {
            "model": str(FOLDER),
            "image_height": 64,
            "image_width": 96,
            "prompt": ["a cup"],
            "sampling_steps": 4,
            "stages_path": str(tmp_path),
            "use_resolution_binning": False,
        }
    )
    sizes = [UpscaleSize(32, 48), UpscaleSize(64, 96, 0.5, 2)]
    pictures = upscaled_images(config, sizes)
    for size, picture in zip(sizes, pictures, strict=True):
        list(run_stages([picture], lambda names, size=size: load_compressed(config, size, names)))
    expected = list(upscale_latents(pipe, ["a cup"], sizes, steps=4))[-1]
    assert np.array_equal(pictures[-1].files.load("latents")["latents"], expected)
    assert pictures[-1].pixels().shape == (64, 96, 3)
