"""What a run takes, told before it is begun: counted exactly, and held against what really happens."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from counted_products import counted
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_data import diffusers
from typer.testing import CliRunner

from pixart_nb.cli import app
from pixart_nb.config import load_config
from pixart_nb.core.backend import ms
from pixart_nb.core.cost import step_cost
from pixart_nb.core.models.t5 import T5Config
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.models.vae_blocks import VAEConfig
from pixart_nb.core.planning import report as command
from pixart_nb.core.planning.calibration import (
    Calibration,
    CalibrationError,
    Timing,
    _step,
    _tokens,
    calibrate,
)
from pixart_nb.core.planning.counts import (
    caption_products,
    decode_products,
    encode_products,
    network,
    parameters,
    step_products,
)
from pixart_nb.core.planning.memory import STAGES, Networks, Run, weights
from pixart_nb.core.planning.plan import (
    DoesNotFitError,
    check_fits,
    overview,
    plan,
    smaller_runs,
    warnings_of,
)
from pixart_nb.core.sampling.conditioning import Conditioning
from pixart_nb.core.sampling.guidance import classifier_free_guidance

TINY_T5 = T5Config(vocab_size=30, d_model=24, d_kv=8, d_ff=40, num_heads=2, num_layers=3)
PUBLISHED = Networks(PixArtConfig(input_size=128, pe_interpolation=2.0), T5Config(), VAEConfig())
SMALL = Networks(
    PixArtConfig(hidden_size=48, num_heads=4, depth=3, caption_channels=24, input_size=16),
    TINY_T5,
    VAEConfig(block_out_channels=(8, 16, 16), norm_num_groups=4, layers_per_block=1),
)


def filled(config):
    net = network(config)
    for parameter in net.get_parameters():
        parameter.init_data()
    return net.set_train(False)


def random(*shape):
    return ms.Tensor(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


# ---- counts


def test_parameters_are_those_of_the_published_networks():
    assert parameters(PixArtConfig()) == 612_084_896  # with the empty caption of 300 tokens
    assert parameters(T5Config()) == 4_762_310_656
    assert parameters(VAEConfig()) == 83_653_863


@settings(max_examples=12)
@given(
    height=st.integers(2, 7),
    width=st.integers(2, 7),
    caption=st.integers(1, 16),
    empty=st.booleans(),
    layers=st.sets(st.integers(0, 2)),
    operator=st.sampled_from(["conv", "mean", "ave"]),
    micro=st.booleans(),
)
def test_multiply_adds_of_a_guided_step_are_those_that_happen(
    height, width, caption, empty, layers, operator, micro
):
    negative = (
        1 if empty else caption
    )  # of the same length: short pictures' captions are padded to one length
    compression = {"sampling": operator, "scale_factor": 2, "kv_compress_layer": sorted(layers)}
    config = replace(
        SMALL.transformer, micro_condition=micro, kv_compress_config=compression if layers else None
    )
    texts = [  # two: what is the same is computed once
        (sign * random(1, count, 24), np.ones((1, count), bool))
        for count, sign in ((caption, 1), (negative, -1))
    ]
    latents = np.zeros((1, 4, 2 * height, 2 * width), np.float32)
    with counted() as first:  # the first step prepares the captions
        predict = classifier_free_guidance(
            filled(config), Conditioning(*texts[0], *texts[1]), 4.5, 16 * height, 16 * width
        )
        predict(latents, 5.0)
    with counted() as found:
        predict(latents, 5.0)
    planned = step_products(config, 16 * height, 16 * width, [negative, caption])
    assert sum(found) == sum(planned.values()) - planned["compression"]  # which is arithmetic on elements
    once = sum(first) - sum(found)
    assert once == caption_products(config, caption) + caption_products(config, negative)


def test_the_blocks_of_a_step_are_counted_as_the_cost_of_compression_is():
    known = step_cost(SMALL.transformer, 96, 64, 30)
    planned = step_products(SMALL.transformer, 96, 64, [30])
    blocks = {name: count for name, count in planned.items() if name not in ("patches", "timestep")}
    assert sum(blocks.values()) == known.multiply_adds


@settings(max_examples=6)
@given(tokens=st.integers(1, 12))
def test_multiply_adds_of_the_text_encoder_are_those_that_happen(tokens):
    net = filled(TINY_T5)
    with counted() as found:
        net(np.ones((1, tokens)), np.ones((1, tokens)))
    mask = TINY_T5.num_layers * TINY_T5.num_heads * tokens**2  # a column that is not counted
    assert sum(found) == encode_products(TINY_T5, tokens) + mask


@settings(max_examples=6)
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    widths=st.sampled_from([(8, 16, 16), (4, 8, 8, 8)]),
    layers=st.integers(1, 2),
    attention=st.booleans(),
)
def test_multiply_adds_of_the_decoder_are_those_that_happen(height, width, widths, layers, attention):
    config = VAEConfig(
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=4,
        mid_block_add_attention=attention,
        use_post_quant_conv=attention,
    )
    net, factor = filled(config), 2 ** (len(widths) - 1)
    with counted() as found:
        net.decode(random(1, 4, height, width))
    assert sum(found) == sum(decode_products(config, factor * height, factor * width).values())


# ---- memory


def test_weights_follow_the_kind_of_number_and_the_way_of_loading():
    run = Run(1024, 1024)
    whole, half, streamed, eight = (
        weights(PUBLISHED, replace(run, **change))
        for change in ({}, {"dtype": "fp16"}, {"t5_load": "stream"}, {"t5_load": "int8"})
    )
    assert whole["encode"] == 4 * parameters(T5Config())
    assert half == {name: value / 2 for name, value in whole.items()}
    assert streamed["encode"] < whole["encode"] / 15
    assert whole["encode"] / 4.5 < eight["encode"] < whole["encode"] / 3.5


def test_stages_take_the_memory_of_the_worst_one_and_otherwise_all_weights_stay():
    staged, together = (plan(PUBLISHED, Run(1024, 1024, staged=value, tile=512)) for value in (True, False))
    weights_of_all = sum(stage.weights for stage in together.stages)
    encode, denoise, decode = staged.stages
    most = decode.activations
    assert most > denoise.activations > encode.activations
    assert staged.held() == [staged.process + s.weights + s.activations for s in staged.stages]
    assert staged.held(kept=most) == [staged.process + s.weights + most for s in staged.stages]
    assert staged.peak == max(staged.held())
    assert together.peak == together.process + weights_of_all + max(s.activations for s in together.stages)


# ---- fitting


def test_a_run_that_does_not_fit_names_the_fewest_options_that_make_it_fit():
    run = Run(2048, 2048, batch=4)
    planned = plan(PUBLISHED, run)
    check_fits(planned, planned.peak)
    with pytest.raises(DoesNotFitError) as refused:
        check_fits(planned, 24e9)
    said = str(refused.value)
    options = said.partition("With ")[2].partition(" it takes")[0]
    assert options.startswith("--")
    fitting = dict(smaller_runs(planned))
    names = next(names for names in fitting if " ".join(names) == options)
    assert fitting[names].peak <= 24e9
    assert all(found.peak > 24e9 for fewer, found in fitting.items() if len(fewer) < len(names))


def test_a_limit_that_cannot_be_met_is_told_the_least_that_can():
    planned = plan(PUBLISHED, Run(4096, 4096, staged=True, tile=512))
    least = min(found.peak for _, found in smaller_runs(planned))
    with pytest.raises(DoesNotFitError, match=rf"The least that it can take is {least / 1e9:.1f} GB"):
        check_fits(planned, 1e9)


def test_sampling_refuses_what_does_not_fit_before_anything_is_loaded(tmp_path):
    words = ["sample", "--model", diffusers("sigma")[0], "--prompt", "a cup", "--memory-limit", "0.05"]
    result = CliRunner().invoke(app, [str(w) for w in [*words, "-o", tmp_path / "out"]])
    assert result.exit_code == 2
    assert "The least that it can take is" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


# ---- warnings


def test_a_checkpoint_at_another_size_than_its_own_is_warned_of():
    config = PixArtConfig(input_size=128, pe_interpolation=2.0)
    assert warnings_of(config, Run(1024, 1024)) == []
    assert warnings_of(config, Run(512, 2048)) == []  # the same area
    (said,) = warnings_of(config, Run(4096, 4096))
    assert "trained at 1024x1024 (pe_interpolation 2)" in said
    assert "sample_size 512, pe_interpolation 8" in said
    (said,) = warnings_of(PixArtConfig(input_size=64, pe_interpolation=2.0), Run(512, 512))
    assert "pe_interpolation is 2 for latents of 64" in said


# ---- time


def test_time_is_the_sum_of_calibrated_parts():
    known = Calibration(
        "fp32",
        {64: 1e-6},
        frame={64: 1e-7},
        pair={16: 1e-9, 64: 2e-9},
        shrinking=2e-7,
        pixel=1e-6,
        tile_pixel=2e-6,
        sample_pixel=3e-6,
        cell=(1e-5, 0.0),
        text_layer={1: 0.01, 20: 0.04},
        first={"encode": 0.1, "denoise": 0.2, "decode": 0.3},
        first_block={64: 0.5},
    )
    run = Run(128, 128, steps=3, caption_tokens=20)
    compressed = replace(
        SMALL.transformer,
        kv_compress_config={"sampling": "mean", "scale_factor": 2, "kv_compress_layer": [1, 2]},
    )
    found = plan(replace(SMALL, transformer=compressed), run, known)
    layers = 3 * 1e-6 + 64 * 2e-9 + 2 * (16 * 1e-9 + 2e-7)
    assert found.seconds_per_step == pytest.approx(2 * 64 * (1e-7 + layers))
    times = {stage.name: stage.seconds for stage in found.stages}
    assert times["encode"] == pytest.approx(0.1 + 3 * (0.01 + 0.04))
    assert times["denoise"] == pytest.approx(0.2 + 3 * 0.5 + 3 * found.seconds_per_step)
    assert times["decode"] == pytest.approx(0.3 + 128**2 * 1e-6 + 32**2 * 1e-5)
    assert found.seconds == pytest.approx(sum(times.values()))
    later = plan(replace(SMALL, transformer=compressed), run, known, fresh=False)
    gained = [a.seconds - b.seconds for a, b in zip(found.stages, later.stages, strict=True)]
    assert gained == pytest.approx([0.1, 0.2, 0.3])  # a new transformer's blocks are prepared again
    (*_, decode) = plan(SMALL, replace(run, tile=64), known).stages
    # 3 x 3 tiles, and as many windows for their statistics
    assert decode.seconds == pytest.approx(0.3 + 9 * 64**2 * (2e-6 + 3e-6) + 32**2 * 1e-5)
    with pytest.raises(ValueError, match="calibration in fp32 for a run in fp16"):
        plan(SMALL, replace(run, dtype="fp16"), known)


SQUARE = Run(256, 256, steps=2, caption_tokens=5)


@pytest.fixture(scope="module")
def measured():
    return calibrate(SMALL, SQUARE, keys=[64])


def test_a_calibration_measures_every_part(measured):
    assert set(measured.token) == set(measured.frame) == set(measured.first_block) == {64, 256}
    assert set(measured.pair) == {64, 256}
    assert set(measured.text_layer) == {1, 5}
    timed = [measured.pixel, measured.tile_pixel, measured.sample_pixel, measured.seconds]
    assert min([*timed, *measured.pair.values(), *measured.text_layer.values()]) > 0
    assert measured.first["encode"] > 0
    for tokens in (64, 256):  # differences of what was timed; one alone may be lost in the noise
        assert measured.token[tokens] + measured.frame[tokens] > 0
    assert min([*measured.token.values(), *measured.frame.values()]) >= 0
    assert min([measured.shrinking, *measured.cell, *measured.first_block.values()]) >= 0


@pytest.mark.parametrize(("shallow", "deep", "expected"), [(1.0, 2.0, 2.0), (1.0, 4.0, 4.0), (3.0, 1.0, 1.3)])
def test_noise_between_two_depths_loses_no_time(shallow, deep, expected):
    """Attention to few keys takes a tenth of a second here, also where the blocks seem to take none."""
    tokens = SQUARE.rows * 64
    timed = {8: [Timing(0.0, shallow), Timing(0.0, deep)]}
    token, frame = _tokens(timed, 0.1 / tokens, 0.0, SQUARE)
    assert min(token[64], frame[64]) >= 0
    assert tokens * (frame[64] + 3 * (token[64] + 0.1 / tokens)) == pytest.approx(expected)


def test_a_planned_step_is_of_the_order_of_a_real_one(measured):
    step, times = _step(SMALL.transformer, 16, SQUARE), []
    for _ in range(8):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    planned = plan(SMALL, SQUARE, measured).seconds_per_step
    assert np.median(times) / 10 < planned < 10 * np.median(times)  # other tests compute beside it


def test_a_calibration_that_ends_early_is_told():
    with pytest.raises(CalibrationError, match=r"ended with code 1.*--no-timed"):
        calibrate(SMALL, Run(64, 64, dtype="fp8"))


def test_a_later_stage_is_planned_to_keep_what_an_earlier_one_computed_in():
    plans = [plan(SMALL, Run(side, side, staged=True)) for side in (512, 64)]
    took = {stage: {"seconds": 1.0, "load_seconds": 0.5, "peak_bytes": 1e9} for stage in STAGES}
    rows = command.compared_rows(plans, [took, took])
    largest = max(stage.activations for stage in plans[0].stages)
    assert largest > max(stage.activations for stage in plans[1].stages)
    for row, stage in zip(rows[3:], plans[1].stages, strict=True):
        assert row["planned GB"] == pytest.approx((plans[1].process + stage.weights + largest) / 1e9)
    assert rows[0]["planned GB"] < rows[1]["planned GB"]
    assert [(row["size"], row["stage"]) for row in rows[::3]] == [
        ("512 x 512", "encode"),
        ("64 x 64", "encode"),
    ]


def test_the_overview_has_every_combination_and_compression_saves_products():
    rows = overview(SMALL, Run(64, 64), (64, 128), (1, 2), {"fp32": None, "fp16": None})
    assert len(rows) == 8
    by = {(row["size"], row["ratio"], row["numbers"]): row for row in rows}
    name = "tera multiply-adds a step"
    assert by[128, 2, "fp32"][name] < by[128, 1, "fp32"][name]
    assert by[128, 1, "fp16"]["denoise GB"] < by[128, 1, "fp32"]["denoise GB"]


# ---- the command


def test_the_command_plans_published_checkpoints_that_are_not_here(project, monkeypatch, tmp_path):
    monkeypatch.chdir(project)
    words = ["plan", "-c", "configs/inference/pixart-sigma-4K-MS-KV-Compress.yaml", "--dtype", "fp32"]
    words += ["--no-timed", "--memory-limit", "12", "-o", tmp_path / "plan.json"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "4096x4096" in said
    assert "is not here: planned for PixArt-Sigma XL/2" in said
    assert "This run takes" in said
    numbers = json.loads((tmp_path / "plan.json").read_text())
    assert numbers["plan"]["parameters"]["transformer"] == 612_084_896 + 14 * 1152 * (4 + 3)
    assert len(numbers["overview"]) == 30


def test_a_check_that_is_repeated_gives_medians(project, monkeypatch):
    monkeypatch.chdir(project)
    drawn = [
        {stage: {"seconds": s, "load_seconds": 1.0, "peak_bytes": 10 * s} for stage in STAGES}
        for s in (5, 2, 9)
    ]
    known = Calibration(
        "fp32",
        {64: 1e-6},
        {64: 0.0},
        {64: 1e-9},
        0.0,
        1e-6,
        1e-6,
        1e-6,
        (0.0, 0.0),
        {1: 0.1},
        dict.fromkeys(STAGES, 0.0),
        {64: 0.0},
    )
    speeds = iter([known, replace(known, text_layer={1: 0.3}), replace(known, text_layer={1: 0.2})])
    monkeypatch.setattr("pixart_nb.core.planning.calibration.calibrate", lambda *given: next(speeds))
    monkeypatch.setattr("pixart_nb.core.subprocesses.apart", lambda what, function, config: drawn.pop(0))
    rows = command.checked(load_config("configs/inference/tiny.yaml"), repeats=3)
    assert [row["measured s"] for row in rows] == [5, 5, 5]
    assert rows[0]["planned s"] == pytest.approx(2 * 2 * 0.2)  # two texts, two layers
    assert rows[0]["measured GB"] == 50 / 1e9  # of the first: the others' are the same


def test_the_plan_of_a_configuration_is_of_what_it_would_draw(project, monkeypatch):
    monkeypatch.chdir(project)
    config = load_config("configs/inference/tiny.yaml")
    networks, notes = command.networks_of(config)
    run = command.run_of(config, networks)
    assert notes == []
    assert (run.height, run.width, run.batch, run.rows, run.staged) == (128, 128, 8, 16, False)
    staged = command.run_of(config.model_copy(update={"stages_path": "state"}), networks)
    assert (staged.batch, staged.tile, staged.staged) == (1, 512, True)


MEASURE = """
import json, sys
from dataclasses import replace
from pixart_nb.core.memory import PeakMemory
from pixart_nb.core.models.t5 import T5Config
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.models.vae_blocks import VAEConfig
from pixart_nb.core.sampling.conditioning import Conditioning
from pixart_nb.core.sampling.guidance import classifier_free_guidance
from pixart_nb.core.planning.calibration import _network, _step, _text_layer
from pixart_nb.core.planning.memory import Networks, Run
import numpy as np
part = sys.argv[1]
run = Run(768, 768, tile=int(sys.argv[2]), caption_tokens=20, dtype=sys.argv[3])
config = PixArtConfig(hidden_size=384, num_heads=6, depth=2, caption_channels=64)
vae = VAEConfig(block_out_channels=(32, 64, 128, 128), norm_num_groups=8)
with PeakMemory() as memory:
    if part == "encode":
        _text_layer(T5Config(vocab_size=64, num_layers=1), 20, run)
    elif part == "denoise":
        _step(config, 48, run)()
    else:
        net = _network(vae, run)
        if run.tile:
            net.enable_tiling(run.tile)
        net.decode(np.zeros((1, 4, 96, 96), np.float32))
print(json.dumps([memory.before, memory.peak]))
"""


@pytest.mark.parametrize(
    ("part", "tile", "dtype"),
    [
        ("denoise", 0, "fp32"),
        ("denoise", 0, "fp16"),
        ("decode", 0, "fp32"),
        ("decode", 0, "fp16"),
        ("decode", 256, "fp32"),
        ("encode", 0, "fp16"),
    ],
)
def test_memory_is_within_a_quarter_of_what_was_planned(part, tile, dtype):
    """Of a small model in a process of its own."""
    call = [sys.executable, "-c", MEASURE, part, str(tile), dtype]
    before, peak = json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
    networks = Networks(
        PixArtConfig(hidden_size=384, num_heads=6, depth=2, caption_channels=64),
        T5Config(vocab_size=64, num_layers=1),
        VAEConfig(block_out_channels=(32, 64, 128, 128), norm_num_groups=8),
    )
    planned = plan(networks, Run(768, 768, tile=tile, caption_tokens=20, dtype=dtype))
    stage = next(stage for stage in planned.stages if stage.name == part)
    assert peak == pytest.approx(planned.process + stage.weights + stage.activations, rel=0.25)
    assert before < planned.process
