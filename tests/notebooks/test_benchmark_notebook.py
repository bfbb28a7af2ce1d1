"""Notebook 09 runs whole and writes the numbers of its tables and figures."""

import pytest
from notebook_contract import check_files, run_smoke

from benchmarks.runs import read_csv

FIGURES = ["parts.png", "shares.png", "table.png"]


@pytest.mark.notebook
def test_it_runs_whole_and_writes_the_numbers_of_its_table(project, tmp_path):
    values, folder, _ = run_smoke(project, "09_benchmark", tmp_path, "benchmark.csv")
    check_files(folder, FIGURES, ["benchmark.csv"])
    check_numbers(read_csv(folder / "benchmark.csv"), values)


def check_numbers(rows, values):
    steps = {row.size for row in rows if row.measure == "steps per second"}
    assert steps == {*values["sizes"], *values["compare_sizes"]}
    assert {row.size for row in rows if row.measure == "images per second"} == {*values["training_sizes"]}
    assert {row.benchmark for row in rows} == {"denoise", "train", *values["parts"]}
    assert all(row.value > 0 for row in rows if row.unit in ("s", "1/s", "GB") and "minus" not in row.measure)
    shares = {row.measure: row.value for row in rows if not row.unit}
    assert 0 < shares["share of matrix products"] < 1
    assert 0 < shares["rate of matrix products / rate of the machine"] < 1.5
    assert {row.system for row in rows} == {"mindspore"}
    assert all("mindspore" in row.versions for row in rows)
