"""Benchmarks measure each system in a process of its own and write the numbers down."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from mindspore import ops
from typer.testing import CliRunner

from benchmarks import runs
from benchmarks.mindspore_work import WORK, Encode, write_text_encoder
from benchmarks.profile import timed_products
from benchmarks.shapes import Shapes
from benchmarks.worker import Worker
from pixart_nb.cli import app
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.load import StreamedT5Encoder, load_t5
from pixart_nb.core.models import low_precision
from pixart_nb.core.onednn import linear, rounded_bits
from pixart_nb.viz.measurements import benchmark_figure, share_figure, share_table, speed_table

SMALL = Shapes(
    size=32, steps=3, caption_tokens=5, max_length=12, hidden_size=48, heads=2, depth=2, caption_channels=32,
    text_heads=2, text_width=48, text_layers=2, vocabulary=100, vae_widths=(16, 16, 32, 32),
)  # fmt: skip
ROW = runs.Row("denoise", 256, "mindspore", "20 steps", 2.0, "s", "pixart-nb 1, mindspore 2.8.0")


def value(rows, measure, system="mindspore"):
    (number,) = [row.value for row in rows if (row.measure, row.system) == (measure, system)]
    return number


def test_denoising_reports_steps_first_step_and_share_of_matrix_products():
    rows = runs.run("denoise", SMALL, 2)
    assert value(rows, "steps per second") == pytest.approx(1 / value(rows, "step"))
    assert value(rows, "20 steps") > 17 * value(rows, "step")
    assert 0 < value(rows, "share of matrix products") < 1
    shares = [value(rows, f"share of {part}") for part in ("matrix products", "everything else")]
    assert sum(shares) == pytest.approx(1)
    assert value(rows, "peak memory") > 0.1
    assert all("mindspore" in row.versions for row in rows)


@pytest.mark.parametrize("name", sorted(WORK))
def test_every_benchmark_can_run_twice(name):
    work = WORK[name](SMALL)
    for _ in range(2):
        assert isinstance(work(), dict)


def test_a_training_step_lowers_the_loss():
    work = WORK["train"](SMALL)
    losses = [work()["loss"] for _ in range(4)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_training_holds_one_system_in_memory_at_a_time(monkeypatch):
    history, alive = [], set()

    class Twin(Worker):  # this kit under both names, since diffusers is not installed everywhere
        def __init__(self, system, work, shapes):
            super().__init__("mindspore", work, shapes)
            self.system = system
            alive.add(system)
            history.append(sorted(alive))

        def __exit__(self, *error):
            super().__exit__(*error)
            alive.remove(self.system)

    monkeypatch.setattr(runs, "Worker", Twin)
    rows = runs.run("train", SMALL, 2, ["diffusers"])
    assert history == [["mindspore"], ["diffusers"]] * 2
    assert value(rows, "seconds", "diffusers / mindspore") == value(rows, "seconds", "diffusers") / value(
        rows, "seconds"
    )
    assert value(rows, "images per second", "diffusers") == 1 / value(rows, "seconds", "diffusers")


def test_diffusers_encodes_prompts_with_padding_and_without(monkeypatch):
    seen = {}
    monkeypatch.setattr(runs, "compare_systems", lambda work, runners, *_, **options: seen.update(runners) or [])
    runs.run("encode", SMALL, 1, ["diffusers", "compiled"], ["fp32", "bf16"])
    assert [name for name, shapes in seen.items() if shapes.trimmed] == ["trimmed fp32", "trimmed bf16"]
    assert {name.split()[0] for name in seen} == {"mindspore", "diffusers", "compiled", "trimmed"}
    (axes,) = benchmark_figure([replace(ROW, system=name) for name in seen]).axes
    assert len(axes.patches) == len(seen) == 8


def test_streamed_text_encoder_gives_the_embeddings_of_the_whole_one(tmp_path):
    write_text_encoder(SMALL, tmp_path)
    embeddings = []
    for encoder in (load_t5(tmp_path, ms.float32), StreamedT5Encoder(tmp_path, ms.float32)):
        work = Encode(SMALL, encoder)
        work()
        embeddings.append(work.embeds[0])
    assert np.array_equal(*embeddings)


def test_the_ratio_divides_the_seconds_of_diffusers_by_ours():
    (ratio,) = runs.speedup([ROW, replace(ROW, system="diffusers", value=3.0)], "20 steps")
    assert (ratio.system, ratio.value, ratio.unit) == ("diffusers / mindspore", 1.5, "x")
    assert runs.speedup([ROW], "20 steps") == []


def test_every_two_systems_of_a_run_are_compared():
    rows = [replace(ROW, system=name, value=time) for name, time in runs_of(["fp32"]).items()]
    assert {row.system: row.value for row in runs.speedup(rows, "20 steps")} == {
        "diffusers / mindspore": 2.0, "compiled / mindspore": 3.0, "compiled / diffusers": 1.5,
    }  # fmt: skip
    rows = [replace(ROW, system=name, value=time) for name, time in runs_of(["fp32", "bf16"]).items()]
    ratios = {row.system for row in runs.speedup(rows, "20 steps")}
    assert {"mindspore bf16 / mindspore fp32", "compiled bf16 / mindspore bf16"} < ratios
    assert "diffusers bf16 / mindspore fp32" not in ratios
    (axes,) = benchmark_figure(rows).axes
    assert len(axes.patches) == 6


def runs_of(dtypes):
    """The systems of a run with all peers, and seconds for them."""
    runners = runs.systems(SMALL, ["diffusers", "compiled"], dtypes)
    assert [shapes.compiled for shapes in runners.values()] == [False, False, True] * len(dtypes)
    return {name: float(number + 1) for number, name in enumerate(runners)}


def test_rows_come_back_from_their_file(tmp_path):
    path = runs.write_csv(tmp_path / "new" / "denoise.csv", [ROW])
    assert runs.read_csv(path) == [ROW]
    assert runs.processor() in path.read_text()


def test_matrix_products_are_counted_and_timed():
    a, b = (ms.Tensor(np.ones(shape, np.float32)) for shape in ((3, 4, 5), (3, 6, 5)))
    with timed_products() as timed:
        ops.BatchMatMul(transpose_b=True)(a, b)
        ops.MatMul(transpose_a=True)(a[0], a[1])
    assert timed["BatchMatMul"][1] == 2 * 3 * 4 * 6 * 5
    assert timed["MatMul"][1] == 2 * 5 * 4 * 5
    assert all(seconds > 0 for seconds, _ in timed.values())
    before = dict(timed)
    ops.MatMul(transpose_a=True)(a[0], a[1])
    assert dict(timed) == before


@pytest.mark.parametrize("rows", [8, 2000])
def test_products_of_onednn_are_counted_by_the_thread(rows):
    x, weight = np.ones((rows, 64), np.float32), np.ones((48, 64), np.float32)
    with timed_products() as timed:
        linear(x, weight)
        if not low_precision.unsupported():
            linear(x, rounded_bits(weight))
    assert sum(seconds for seconds, _ in timed.values()) > 0
    forms = 1 if low_precision.unsupported() else 2
    assert sum(operations for _, operations in timed.values()) == forms * 2 * rows * 48 * 64


def test_a_worker_that_ends_early_is_reported():
    with pytest.raises(RuntimeError, match="ended with exit code 1"):
        Worker("mindspore", "no such work", SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["denoise", "--size", "100"], "multiple of 16"), (["encode", "--caption_tokens", "301"], "at most 300 tokens")],
)
def test_impossible_shapes_are_refused_before_anything_runs(options, message, tmp_path):
    result = CliRunner().invoke(app, ["bench", *options, "-o", str(tmp_path / "out")])
    assert result.exit_code != 0
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_a_missing_diffusers_is_named(monkeypatch):
    monkeypatch.setattr("pixart_nb.cli.bench.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["bench", "decode", "--peer"])
    assert result.exit_code != 0
    assert "[reference]" in result.output


def test_a_missing_compiler_is_named_and_a_part_without_bfloat16(monkeypatch):
    monkeypatch.setattr("pixart_nb.cli.bench.find_spec", lambda name: True)
    monkeypatch.setattr("pixart_nb.cli.bench.which", lambda name: None)
    monkeypatch.setattr(low_precision, "unsupported", lambda: "no products")
    for words, message in (
        (["denoise", "--compiled"], "install g++, or set CXX"),
        (["decode", "--dtype", "fp32", "bf16"], "decode is measured in fp32"),
        (["denoise", "--dtype", "bf16"], "bf16 would be computed in float32: no products"),
        (["decode", "--recompute"], "--recompute is measured by train"),
    ):
        result = CliRunner().invoke(app, ["bench", *words])
        assert result.exit_code != 0
        assert message in " ".join(result.output.split())


@pytest.mark.slow
def test_memory_of_a_trace_is_bounded_and_changes_no_bit(project):
    options = ["trace", "--side", "256", "--width", "144", "--steps", "2"]
    command = [sys.executable, "benchmarks/memory.py", *options]
    run = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "the latents are equal, bit for bit" in run.stdout


def test_the_figure_has_a_bar_for_each_system_and_names_the_ratio():
    rows = [ROW, replace(ROW, system="diffusers", value=3.0), replace(ROW, benchmark="decode", measure="seconds")]
    (axes,) = benchmark_figure(rows).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["20 steps, 256 px", "decode, 256 px"]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([2 / 3, 1.0, 1.0])
    assert "1.50 x as fast" in [text.get_text() for text in axes.texts]
    with pytest.raises(ValueError, match="run a benchmark first"):
        benchmark_figure([])


def test_the_table_has_a_line_for_each_size():
    step = replace(ROW, measure="steps per second", value=0.25, unit="1/s")
    image = replace(step, benchmark="train", measure="images per second", value=0.1)
    table = speed_table([replace(step, size=512), step, image])
    assert table.columns[:3] == ["size", "steps/s", "training images/s"]
    assert table.cells() == [["256", "0.25", "0.1", "18.04", "88.1"], ["512", "0.25", "", "15.95", "33.5"]]
    assert speed_table([replace(step, size=32)]).cells() == [["32", "0.25", "", "", ""]]


def test_the_shares_of_the_time_sum_to_one():
    share = replace(ROW, measure="share of matrix products", value=0.8, unit="")
    rows = [
        share,
        replace(share, measure="rate of matrix products / rate of the machine", value=0.75),
        replace(share, measure="rate of the machine", value=190.0, unit="GFLOP/s"),
        replace(share, measure="step", value=2.0, unit="s"),
    ]
    (axes,) = share_figure(rows).axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.6, 0.2, 0.2])
    assert share_table(rows).cells() == [["denoise", "256", "0.8", "0.75", "190"]]
    with pytest.raises(ValueError, match="run the benchmark 'denoise' first"):
        share_figure([replace(share, unit="s")])
