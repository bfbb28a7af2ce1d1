"""Benchmarks measure what they say, each system in a process of its own, and write it down."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import ops
from typer.testing import CliRunner

from pixart_nb.cli import app
from pixart_nb.core.backend import ms
from pixart_nb.core.benchmark import planned, runs
from pixart_nb.core.benchmark.ours import WORK
from pixart_nb.core.benchmark.profile import timed_products
from pixart_nb.core.benchmark.shapes import Shapes
from pixart_nb.core.benchmark.worker import Worker
from pixart_nb.core.planning.calibration import calibrate
from pixart_nb.viz.benchmark import benchmark_figure, share_figure, share_table, speed_table

SMALL = Shapes(
    size=32, steps=3, words=5, max_length=12, hidden_size=48, heads=2, depth=2, caption_channels=32, text_heads=2,
    text_width=48, text_layers=2, vocabulary=100, vae_widths=(16, 16, 32, 32),
)  # fmt: skip


#: Of every number that is planned and measured.
SYSTEMS = ("plan", "ours", "ratio")


def value(rows, measure, system="ours"):
    (found,) = [row.value for row in rows if (row.measure, row.system) == (measure, system)]
    return found


def test_denoising_tells_steps_first_step_and_share_of_matrix_products():
    rows = runs.denoise(SMALL, 2, False)
    assert value(rows, "steps a second") == pytest.approx(1 / value(rows, "step"))
    assert value(rows, "20 steps") > 17 * value(rows, "step")
    assert 0 < value(rows, "share of matrix products") < 1
    assert value(rows, "everything else") == pytest.approx(1 - value(rows, "share of matrix products"))
    assert value(rows, "peak memory") > 0.1
    assert all("mindspore" in row.versions for row in rows)


def test_every_stage_is_planned_and_run_in_turns(monkeypatch):
    turns = []

    class Watched(Worker):
        def run(self):
            turns.append(self.work)
            return super().run()

    def known(networks, run, keys):
        turns.append("calibrate")
        return calibrate(networks, run, keys)

    monkeypatch.setattr(planned, "Worker", Watched)
    monkeypatch.setattr(planned, "calibrate", known)
    monkeypatch.setattr(planned, "LEAST", 0.0)
    rows = planned.compared(replace(SMALL, size=64), 2)
    stages = list(planned.OF)
    assert turns == stages + 2 * ["calibrate", *stages]
    for name in planned.OF.values():
        seconds = [value(rows, name, system) for system in SYSTEMS]
        assert min(seconds) > 0
        assert seconds[2] == seconds[1] / seconds[0]
    memory = [row for row in rows if row.measure == "peak memory"]
    assert [(row.benchmark, row.system) for row in memory] == [(s, y) for s in stages for y in SYSTEMS]
    said, found, ratios = (np.array([row.value for row in memory[n::3]]) for n in range(3))
    np.testing.assert_allclose(ratios, found / said)
    assert min(found) > 0.05  # Python and MindSpore alone


def test_a_short_stage_is_run_until_its_time_can_be_told():
    answers = iter([{"seconds": 0.5}, {"seconds": 0.6}, {"seconds": 0.4}, {"seconds": 9.0}])
    assert planned._taken(SimpleNamespace(run=lambda: next(answers))) == pytest.approx(0.5)
    steps = {"seconds": 9.0, "steps": [4.0, 1.5, 2.5]}  # the first prepares
    assert planned._taken(SimpleNamespace(run=lambda: steps)) == 2.0


@pytest.mark.parametrize("name", sorted(WORK))
def test_every_kind_of_work_can_be_done_again(name):
    work = WORK[name](SMALL)
    for _ in range(2):
        assert isinstance(work(), dict)


def test_a_training_step_lowers_the_loss():
    work = WORK["train"](SMALL)
    losses = [work()["loss"] for _ in range(4)]
    assert losses[-1] < losses[0]


def test_training_is_compared_with_one_system_in_memory_at_a_time(monkeypatch):
    seen, alive = [], set()

    class Twin(Worker):  # this kit under both names: the peer is not installed everywhere
        def __init__(self, system, work, shapes):
            super().__init__("ours", work, shapes)
            self.system = system
            alive.add(system)
            seen.append(sorted(alive))

        def __exit__(self, *error):
            super().__exit__(*error)
            alive.remove(self.system)

    monkeypatch.setattr(runs, "Worker", Twin)
    monkeypatch.setattr(runs, "_systems", lambda peer: ("ours", "peer"))
    rows = runs.train(SMALL, 2, True)
    assert seen == [["ours"], ["peer"]] * 2
    assert value(rows, "seconds", "ratio") == value(rows, "seconds", "peer") / value(rows, "seconds")
    assert value(rows, "images a second", "peer") == 1 / value(rows, "seconds", "peer")


def test_streamed_text_gives_the_embeddings_of_the_layers_in_memory(tmp_path):
    from pixart_nb.core.benchmark.ours import Encode, write_text_encoder
    from pixart_nb.core.checkpoints.text_encoder import StreamedT5Encoder, load_t5

    write_text_encoder(SMALL, tmp_path)
    encoders = [load_t5(tmp_path, ms.float32), StreamedT5Encoder(tmp_path, ms.float32)]
    found = []
    for encoder in encoders:
        work = Encode(SMALL, encoder)
        work()
        found.append(work.embeds[0])
    assert np.array_equal(*found)


def test_ratios_are_of_the_peers_seconds_to_ours():
    ours = runs.Row("decode", 512, "ours", "seconds", 2.0, "s", "a")
    rows = [ours, replace(ours, system="peer", value=3.0)]
    (ratio,) = runs._ratio(rows, "seconds")
    assert (ratio.system, ratio.value, ratio.unit) == ("ratio", 1.5, "x")
    assert runs._ratio([ours], "seconds") == []


def test_rows_come_back_from_their_file(tmp_path):
    rows = [runs.Row("decode", 512, "ours", "seconds", 2.5, "s", "pixart-nb 1, mindspore 2.8.0")]
    path = runs.write_csv(tmp_path / "new" / "decode.csv", rows)
    assert runs.read_csv(path) == rows
    assert "cores" in path.read_text()


def test_products_are_counted_and_timed():
    a, b = (ms.Tensor(np.ones(shape, np.float32)) for shape in ((3, 4, 5), (3, 6, 5)))
    with timed_products() as found:
        ops.BatchMatMul(transpose_b=True)(a, b)
        ops.MatMul(transpose_a=True)(a[0], a[1])
    assert found["BatchMatMul"][1] == 2 * 3 * 4 * 6 * 5
    assert found["MatMul"][1] == 2 * 5 * 4 * 5
    assert all(seconds > 0 for seconds, _ in found.values())
    before = dict(found)
    ops.MatMul(transpose_a=True)(a[0], a[1])
    assert dict(found) == before


def test_a_process_that_ends_is_reported():
    with pytest.raises(RuntimeError, match="ended with code 1"):
        Worker("ours", "no such work", SMALL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["denoise", "--size", "100"], "multiple of 16"),
        (["encode", "--words", "301"], "at most 300 tokens"),
    ],
)
def test_work_that_cannot_be_is_refused_before_it_starts(options, message, tmp_path):
    result = CliRunner().invoke(app, ["bench", *options, "--output-path", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("pixart_nb.cli.bench.find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["bench", "decode", "--peer"])
    assert result.exit_code == 2
    assert "[reference]" in result.output


def test_the_help_names_the_extra_that_the_peer_needs():
    result = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"})
    assert "'.[reference]'" in result.output


def test_the_figure_has_a_bar_for_each_system_and_says_the_ratio():
    ours = runs.Row("denoise", 256, "ours", "20 steps", 2.0, "s", "a")
    rows = [
        ours,
        replace(ours, system="peer", value=3.0),
        replace(ours, benchmark="decode", measure="seconds"),
    ]
    (place,) = benchmark_figure(rows).axes
    assert [text.get_text() for text in place.get_yticklabels()] == ["20 steps, 256", "decode, 256"]
    assert [bar.get_width() for bar in place.patches] == [2.0, 2.0, 3.0]
    assert "1.50x as fast" in [text.get_text() for text in place.texts]
    with pytest.raises(ValueError, match="run a benchmark first"):
        benchmark_figure([])


def test_the_table_has_a_line_for_each_size():
    step = runs.Row("denoise", 256, "ours", "steps a second", 0.25, "1/s", "a")
    image = replace(step, benchmark="train", measure="images a second", value=0.1)
    table = speed_table([replace(step, size=512), step, image])
    assert table.columns[:3] == ["size", "steps/s", "training images/s"]
    assert table.cells() == [["256", "0.25", "0.1", "18.04", "88.1"], ["512", "0.25", "", "15.95", "33.5"]]
    assert speed_table([replace(step, size=32)]).cells() == [["32", "0.25", "", "", ""]]


def test_shares_are_three_parts_of_the_whole_time():
    share = runs.Row("denoise", 256, "ours", "share of matrix products", 0.8, "", "a")
    rows = [
        share,
        replace(share, measure="matrix products, of the machine's rate", value=0.75),
        replace(share, measure="rate of the machine", value=190.0, unit="GFLOP/s"),
        replace(share, measure="step", value=2.0, unit="s"),
    ]
    (place,) = share_figure(rows).axes
    assert [bar.get_width() for bar in place.patches] == pytest.approx([0.6, 0.2, 0.2])
    assert share_table(rows).cells() == [["denoise", "256", "0.8", "0.75", "190"]]
    with pytest.raises(ValueError, match="run the benchmark of denoising first"):
        share_figure([replace(share, unit="s")])
