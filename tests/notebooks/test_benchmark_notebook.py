"""Notebook 09 runs whole and writes the numbers of its tables and figures."""

import numpy as np
import pytest
from notebook_contract import run_notebook, widgets_without_figure
from PIL import Image

from benchmarks.runs import read_csv
from pixart_nb.config import read_yaml

FIGURES = ["parts.png", "shares.png", "table.png"]


@pytest.mark.notebook
def test_it_runs_whole_and_writes_the_numbers_of_its_table(project, tmp_path):
    smoke = read_yaml(project / "configs" / "smoke" / "09_benchmark.yaml")
    values = smoke | {"output_path": str(tmp_path / "out")}
    notebook = project / "notebooks" / "09_benchmark.ipynb"
    executed = run_notebook(notebook, values, tmp_path / "executed.ipynb", project)
    assert widgets_without_figure(executed) == []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["benchmark.csv", *FIGURES]
    for name in FIGURES:
        pixels = np.asarray(Image.open(tmp_path / "out" / name).convert("RGB"), dtype=float)
        assert min(pixels.shape[:2]) > 80
        assert pixels.std() > 10, f"{name} is empty"
    check_numbers(read_csv(tmp_path / "out" / "benchmark.csv"), values)


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
