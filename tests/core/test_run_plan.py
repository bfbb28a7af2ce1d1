"""Memory and estimated time of a run, planned before it starts and held against measurements."""

import json
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
from reference_data import diffusers
from small_networks import PUBLISHED, SMALL
from typer.testing import CliRunner

from pixart_nb.cli import app
from pixart_nb.config import check_config, load_config
from pixart_nb.core import memory
from pixart_nb.core.cost import parameters
from pixart_nb.core.memory import SubprocessError, run_in_subprocess
from pixart_nb.core.models.low_precision import inference_dtype_name, unsupported
from pixart_nb.core.models.t5 import T5Config
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.models.vae_blocks import VAEConfig
from pixart_nb.core.run_plan import (
    PROCESS,
    STAGES,
    DoesNotFitError,
    Networks,
    RunSettings,
    Speed,
    check_fits,
    measure_speed,
    overview,
    plan_run,
    size_warnings,
    smaller_runs,
    weight_bytes,
)
from pixart_nb.core.sampling.planning import check_run, measured_rows, networks_of, run_settings

# ---- memory


def test_weights_follow_the_dtype_and_the_way_of_loading():
    run = RunSettings(1024, 1024)
    whole, half, streamed, eight, four = (
        weight_bytes(PUBLISHED, replace(run, **change))
        for change in ({}, {"dtype": "fp16"}, {"t5_load": "stream"}, {"t5_load": "int8"}, {"t5_load": "4bit"})
    )
    assert whole["encode"] == 4 * parameters(T5Config())
    assert half == whole | {name: whole[name] / 2 for name in ("encode", "denoise")}  # the VAE is upcast
    assert streamed["encode"] < whole["encode"] / 15
    assert whole["encode"] / 4.5 < eight["encode"] < whole["encode"] / 3.5
    assert whole["encode"] / 7.2 < four["encode"] < whole["encode"] / 5.5


def test_sequential_stages_need_the_memory_of_the_largest_one_and_otherwise_all_weights_stay():
    sequential, together = (
        plan_run(PUBLISHED, RunSettings(1024, 1024, sequential=value, tile=512)) for value in (True, False)
    )
    encode, denoise, decode = sequential.stages
    most = decode.activations
    assert most > denoise.activations > encode.activations
    held = [sequential.process + s.weights + s.activations for s in sequential.stages]
    assert sequential.held() == held
    assert sequential.held(kept=most) == [sequential.process + s.weights + most for s in sequential.stages]
    assert sequential.peak == max(held)
    weights = sum(stage.weights for stage in together.stages)
    assert together.peak == together.process + weights + max(s.activations for s in together.stages)


def test_a_later_run_keeps_the_activation_memory_of_an_earlier_one():
    plans = [plan_run(SMALL, RunSettings(side, side, sequential=True)) for side in (512, 64)]
    measured = {stage: {"seconds": 1.0, "load_seconds": 0.5, "peak_bytes": 1e9} for stage in STAGES}
    rows = measured_rows(plans, [measured, measured])
    largest = max(stage.activations for stage in plans[0].stages)
    assert largest > max(stage.activations for stage in plans[1].stages)
    for row, stage in zip(rows[3:], plans[1].stages, strict=True):
        assert row["planned GB"] == pytest.approx((plans[1].process + stage.weights + largest) / 1e9)
    assert [row["size"] for row in rows[::3]] == ["512 x 512", "64 x 64"]


@pytest.mark.parametrize("version", [2, 1])
def test_other_processes_of_a_container_reduce_the_available_memory(tmp_path, monkeypatch, version):
    _, limit, usage = memory._CGROUPS[2 - version]
    counter = "inactive_file" if version == 2 else "total_inactive_file"
    own = tmp_path / "own"
    own.write_text("0::/\n" if version == 2 else "3:cpu:/elsewhere\n4:memory:/\n")
    monkeypatch.setattr(memory, "_CGROUPS", [(str(tmp_path), limit, usage)])
    monkeypatch.setattr(memory, "_OWN_CGROUPS", str(own))

    def write(folder, most, used, cached):
        folder.mkdir(exist_ok=True, parents=True)
        (folder / limit).write_text(f"{most}\n")
        (folder / usage).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"cache 1\n{counter} {cached}\n")

    write(tmp_path, 4_000_000_000, 3_500_000_000, 200_000_000)
    assert memory.available() == 700_000_000
    write(tmp_path / "job" / "step", 1_000_000_000, 900_000_000, 0)
    assert memory.available() == 700_000_000  # another job's
    own.write_text("0::/job/step\n" if version == 2 else "4:hugetlb,memory:/job/step\n")
    assert memory.available() == 100_000_000
    write(tmp_path, "max", 3_500_000_000, 0)
    write(tmp_path / "job" / "step", "max", 900_000_000, 0)
    assert memory.available() > 1e9


def test_on_ascend_the_memory_of_the_device_counts(monkeypatch):
    monkeypatch.setattr("pixart_nb.core.backend.free_device_memory", lambda: 123)
    assert memory.available() == 123


# ---- fitting


def test_a_run_that_does_not_fit_names_the_fewest_options_that_make_it_fit():
    plan = plan_run(PUBLISHED, RunSettings(2048, 2048, batch=4))
    check_fits(plan, plan.peak)
    with pytest.raises(DoesNotFitError) as refused:
        check_fits(plan, 24e9)
    options = str(refused.value).partition("With ")[2].partition(" it needs")[0]
    assert options.startswith("--")
    fitting = dict(smaller_runs(plan))
    names = next(names for names in fitting if " ".join(names) == options)
    assert fitting[names].peak <= 24e9
    assert all(smaller.peak > 24e9 for fewer, smaller in fitting.items() if len(fewer) < len(names))


def test_a_run_with_a_controlnet_is_not_told_to_use_stages_which_it_cannot():
    networks = replace(PUBLISHED, transformer=replace(PUBLISHED.transformer, copy_blocks_num=13))
    plan = plan_run(networks, RunSettings(1024, 1024, images=1))
    assert plan.stages[1].weights > plan_run(PUBLISHED, plan.run).stages[1].weights
    assert not any("--stages_path FOLDER" in options for options, _ in smaller_runs(plan))


def test_a_limit_that_cannot_be_met_names_the_least_memory():
    plan = plan_run(PUBLISHED, RunSettings(4096, 4096, sequential=True, tile=512))
    least = min(smaller.peak for _, smaller in smaller_runs(plan))
    with pytest.raises(DoesNotFitError, match=rf"The least that it can take is {least / 1e9:.1f} GB"):
        check_fits(plan, 1e9)


def test_sampling_refuses_what_does_not_fit_before_anything_is_loaded(tmp_path):
    words = ["sample", "--model", diffusers("sigma")[0], "--prompt", "a cup", "--memory-limit", "0.05"]
    result = CliRunner().invoke(app, [str(w) for w in [*words, "-o", tmp_path / "out"]])
    assert result.exit_code != 0
    assert "The least that it can take is" in " ".join((result.output + str(result.exception)).split())
    assert not list(tmp_path.glob("out/*.png"))


# ---- warnings, time, overview


def test_a_checkpoint_at_another_size_than_its_own_is_warned_of():
    config = PixArtConfig(input_size=128, pe_interpolation=2.0)
    assert size_warnings(config, RunSettings(1024, 1024)) == []
    assert size_warnings(config, RunSettings(512, 2048)) == []  # the same area
    (sentence,) = size_warnings(config, RunSettings(4096, 4096))
    assert "trained at 1024x1024 and is used at 4096x4096" in sentence
    assert "sample_size 512, pe_interpolation 8" in sentence
    (sentence,) = size_warnings(PixArtConfig(input_size=64, pe_interpolation=2.0), RunSettings(512, 512))
    assert "pe_interpolation is 2 for latents of 64" in sentence
    other = PixArtConfig(hidden_size=192, num_heads=6, input_size=64, pe_interpolation=2.0)
    assert size_warnings(other, RunSettings(512, 512)) == []  # a model of another kind has a scale of its own
    assert size_warnings(other, RunSettings(1024, 1024), [512, 1024]) == []  # its card names both sizes
    (sentence,) = size_warnings(other, RunSettings(256, 256), [512, 1024])
    assert "trained at 512x512" in sentence and "sample_size 32, pe_interpolation 1)" in sentence


@pytest.mark.parametrize(
    ("side", "patch", "expected"),
    [
        (248, 2, "sample_size 32, pe_interpolation 0.5)"),
        (440, 2, "sample_size 56, pe_interpolation 0.875)"),
        (248, 1, "sample_size 32, pe_interpolation 0.5)"),
        (288, 8, "sample_size 40, pe_interpolation 0.625)"),
    ],
)
def test_a_recommended_training_size_has_an_even_number_of_latent_cells_in_whole_patches(side, patch, expected):
    config = PixArtConfig(input_size=128, patch_size=patch, pe_interpolation=2.0)
    (sentence,) = [s for s in size_warnings(config, RunSettings(side, side)) if "sample_size" in s]
    assert expected in sentence


@pytest.mark.parametrize(
    ("model", "side", "binning", "expected"),
    [
        ("tiny-sigma", 256, True, ""),
        ("tiny-sigma", 512, True, "Images of 512x512 are generated at 256x256, .* and resized"),
        ("tiny-sigma", 512, False, "was trained at 256x256 .* used at 512x512: expect repeated"),
        ("tiny-sigma-1k", 512, True, "Images of 512x512 are generated at 1024x1024"),
        ("tiny-sigma-1k", 512, False, ""),
    ],
)
def test_a_size_that_the_model_does_not_draw_is_named_before_sampling(project, model, side, binning, expected):
    values = {"model": str(project / "data" / model), "prompt": ["a cup"], "use_resolution_binning": binning}
    config = check_config(values | {"image_height": side, "image_width": side})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_run(config)
    sentences = [str(entry.message) for entry in caught]
    assert len(sentences) == bool(expected) and all(re.search(expected, sentence) for sentence in sentences)


def test_time_is_estimated_from_one_step_and_one_tile():
    run = RunSettings(128, 128, steps=3)
    plan = plan_run(SMALL, run, Speed("fp32", 1e-9, 1e-6))
    encode, denoise, decode = plan.stages
    assert encode.seconds is None
    assert denoise.seconds == pytest.approx(3e-9 * sum(plan.step_macs.values()))
    assert plan.seconds_per_step == denoise.seconds / 3
    assert decode.seconds == pytest.approx(128**2 * 1e-6)
    tiled = plan_run(SMALL, replace(run, tile=64), Speed("fp32", 1e-9, 1e-6)).stages[2]
    assert tiled.seconds == pytest.approx(9 * 64**2 * 1e-6)  # 3 x 3 overlapping tiles
    with pytest.raises(ValueError, match="measured in fp32, the run is in fp16"):
        plan_run(SMALL, replace(run, dtype="fp16"), Speed("fp32", 1e-9, 1e-6))


def test_the_speed_of_a_step_and_of_a_tile_is_measured():
    speed = measure_speed(SMALL, RunSettings(256, 384, caption_tokens=5))
    assert 1e-13 < speed.seconds_per_mac < 1e-6
    assert 1e-9 < speed.seconds_per_pixel < 1e-3


def test_a_subprocess_that_ends_early_is_reported():
    with pytest.raises(SubprocessError, match="measures the speed ended with exit code 1"):
        run_in_subprocess("measures the speed", measure_speed, SMALL, RunSettings(64, 64, dtype="fp8"))


def test_the_overview_has_every_combination_and_compression_saves_macs():
    rows = overview(SMALL, RunSettings(64, 64), (64, 128), (1, 2), {"fp32": None, "fp16": None})
    assert len(rows) == 8
    by = {(row["size"], row["ratio"], row["dtype"]): row for row in rows}
    assert by[128, 2, "fp32"]["tera MACs per step"] < by[128, 1, "fp32"]["tera MACs per step"]
    assert by[128, 1, "fp16"]["denoise GB"] < by[128, 1, "fp32"]["denoise GB"]
    assert all("estimated seconds per step" not in row for row in rows)  # no speed was measured
    speeds = {"fp32": Speed("fp32", 1e-10, 1e-7), "fp16": None}
    rows = overview(SMALL, RunSettings(64, 64), (64,), (1,), speeds)
    assert [row["estimated seconds per step"] is None for row in rows] == [False, True]


# ---- the command


def test_the_command_plans_published_checkpoints_that_do_not_exist_here(project, monkeypatch, tmp_path):
    monkeypatch.chdir(project)
    words = ["plan", "-c", "configs/inference/pixart-sigma-4K-MS-KV-Compress.yaml", "--dtype", "fp32"]
    words += ["--no-timed", "--memory-limit", "12", "-o", tmp_path / "plan.json"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert "4096x4096" in output
    assert "does not exist: planned for PixArt-Sigma XL/2" in output
    assert "This run needs" in output
    numbers = json.loads((tmp_path / "plan.json").read_text())
    assert numbers["plan"]["parameters"]["transformer"] == 612_084_896 + 14 * 1152 * (4 + 3)
    dtypes = {inference_dtype_name(name) for name in ("fp32", "fp16")}  # one on a processor without bfloat16
    assert len(numbers["overview"]) == 15 * len(dtypes)


def test_the_plan_of_a_configuration_has_its_sizes_and_batch(project, monkeypatch):
    monkeypatch.chdir(project)
    config = load_config("configs/inference/tiny.yaml")
    networks, notes = networks_of(config)
    run = run_settings(config, networks)
    assert notes == []
    assert (run.height, run.width, run.batch, run.rows, run.sequential) == (256, 256, 8, 16, False)
    stages = run_settings(config.model_copy(update={"stages_path": "state"}), networks)
    assert (stages.batch, stages.tile, stages.sequential) == (1, 512, True)
    perturbed = run_settings(config.model_copy(update={"pag_scale": 3.0}), networks)
    assert (run.perturbed, perturbed.perturbed) == ((), (1,))


def test_the_command_plans_a_controlnet(project, monkeypatch, tmp_path):
    monkeypatch.chdir(project)
    words = ["plan", "-c", "configs/inference/pixart-sigma-1024-MS.yaml", "--no-timed", "-o", tmp_path / "plan.json"]
    words += ["--controlnet", "missing.pth", "--control_image", "edges.png", "--control_guidance_end", "0.5"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert "missing.pth does not exist: planned for a ControlNet of 13 copied blocks" in output
    assert "controlnet:" in output
    plan = json.loads((tmp_path / "plan.json").read_text())["plan"]
    assert plan["run"]["controlled_steps"] == plan["run"]["steps"] // 2
    assert plan["parameters"]["controlnet"] == 294_917_760  # 13 blocks and 14 projections
    assert plan["macs_per_step"]["controlnet"] > 0


needs_products = pytest.mark.skipif(bool(unsupported()), reason=f"needs bfloat16 products: {unsupported()}")
MEASURE = """
import json, sys
import numpy as np
from pixart_nb.core.backend import dtype_from_name, ms
from pixart_nb.core.cost import empty_network
from pixart_nb.core.fast import denoiser
from pixart_nb.core.memory import PeakMemory
from pixart_nb.core.models.controlnet import Controlled
from pixart_nb.core.models.t5 import T5Config
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.models.vae_blocks import VAEConfig
part, tile, dtype, copies = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
side = 48 if tile else 96

def network(config):
    net = empty_network(config, dtype_from_name(dtype))
    for parameter in net.get_parameters():  # memory of zeros counts only once it is written
        parameter.set_data(ms.Tensor(np.full(parameter.shape, 0.01, np.float16)).astype(parameter.dtype))
    return net.set_train(False)

with PeakMemory() as memory:
    if part == "encode":
        ids = np.ones((1, 20), np.int32)
        network(T5Config(vocab_size=64, num_layers=1))(ids, ids > 0).asnumpy()
    elif part == "denoise":
        net = network(
            PixArtConfig(hidden_size=384, num_heads=6, depth=3, caption_channels=64, copy_blocks_num=copies)
        )
        latents = ms.Tensor(np.zeros((2, 4, 96, 96), np.float32))
        if copies:
            net = Controlled(net, latents[:1], np.ones(1), np.ones(1))
        step = denoiser(net, ms.Tensor(np.zeros((2, 20, 64), np.float32)), np.ones((2, 20), bool))
        step(latents, 5.0).asnumpy()
    else:
        widths = (64, 64, 128, 128) if part == "decode by rows" else (32, 64, 128, 128)
        net = network(VAEConfig(block_out_channels=widths, norm_num_groups=8))
        if tile:
            net.enable_tiling(tile)
        if part.startswith("decode"):
            net.decode(np.zeros((1, 4, side, side), np.float32))
        else:
            net.encode(ms.Tensor(np.zeros((1, 3, 8 * side, 8 * side), np.float32)))
print(json.dumps([memory.before, memory.peak]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "tile", "dtype", "copies"),
    [
        ("denoise", 0, "fp32", 0),
        pytest.param("denoise", 0, "bf16", 0, marks=needs_products),
        ("denoise", 0, "fp32", 2),
        pytest.param("denoise", 0, "bf16", 2, marks=needs_products),
        ("decode", 0, "fp32", 0),
        ("decode by rows", 0, "fp32", 0),
        ("decode", 256, "fp32", 0),
        ("encode an image", 0, "fp32", 0),
        ("encode an image", 256, "fp32", 0),
        pytest.param("encode", 0, "bf16", 0, marks=needs_products),
    ],
)
def test_memory_is_within_a_quarter_of_the_plan(part, tile, dtype, copies):
    call = [sys.executable, "-c", MEASURE, part, str(tile), dtype, str(copies)]
    output = subprocess.run(call, capture_output=True, text=True, check=True).stdout
    before, peak = json.loads(output)
    networks = Networks(
        PixArtConfig(hidden_size=384, num_heads=6, depth=3, caption_channels=64, copy_blocks_num=copies),
        T5Config(vocab_size=64, num_layers=1),
        VAEConfig(block_out_channels=(64 if "rows" in part else 32, 64, 128, 128), norm_num_groups=8),
    )
    images, side = int(part == "encode an image"), 384 if tile else 768
    plan = plan_run(networks, RunSettings(side, side, tile=tile, caption_tokens=20, dtype=dtype, images=images))
    stage = next(stage for stage in plan.stages if stage.name == part.split()[0])
    weights = plan.stages[2].weights if images else stage.weights
    assert peak == pytest.approx(plan.process + weights + stage.activations, rel=0.25)
    assert before < PROCESS
