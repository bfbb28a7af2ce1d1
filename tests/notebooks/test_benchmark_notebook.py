"""Notebook 09 runs whole and writes the numbers of its tables and figures."""

import pytest
from notebook_contract import check_files, run_notebook, run_smoke

from benchmarks.runs import read_csv
from pixart_nb.config import read_yaml

FIGURES = ["parts.png", "shares.png", "table.png"]


@pytest.mark.notebook
def test_it_runs_whole_and_writes_the_numbers_of_its_table(project, tmp_path):
    values, folder, _ = run_smoke(project, "09_benchmark", tmp_path, "benchmark.csv")
    check_files(folder, FIGURES, ["benchmark.csv"])
    check_numbers(read_csv(folder / "benchmark.csv"), values)


@pytest.mark.notebook
def test_it_skips_the_cells_of_empty_lists_by_name(project, tmp_path):
    values = read_yaml(project / "configs/smoke/09_benchmark.yaml") | {"output_path": str(tmp_path / "out")}
    values |= {"sizes": [], "training_sizes": [], "compare_sizes": []}
    executed = run_notebook(project / "notebooks/09_benchmark.ipynb", values, tmp_path / "executed.ipynb", project)
    printed = "".join(output.get("text", "") for cell in executed.cells for output in cell.get("outputs", ()))
    assert "Skipped: the published table needs a size in sizes or training_sizes, which are both empty." in printed
    assert "Skipped: the profile and the parts need a size in compare_sizes, which is empty." in printed
    check_files(tmp_path / "out", [], ["benchmark.csv"])


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
