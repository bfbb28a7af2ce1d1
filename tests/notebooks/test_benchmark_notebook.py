"""The notebook on speed runs whole, and its numbers and figures are what it says."""

import numpy as np
import pytest
from notebook_contract import run_notebook, widgets_without_figure
from PIL import Image

from pixart_nb.config import read_yaml
from pixart_nb.core.benchmark.runs import read_csv

FIGURES = ["parts.png", "shares.png", "table.png"]


@pytest.mark.notebook
def test_it_runs_whole_and_writes_the_numbers_of_its_table(project, tmp_path):
    given = read_yaml(project / "configs" / "smoke" / "09_benchmark.yaml")
    values = given | {"output_path": str(tmp_path / "out")}
    notebook = project / "notebooks" / "09_benchmark.ipynb"
    executed = run_notebook(notebook, values, tmp_path / "executed.ipynb", project)
    assert widgets_without_figure(executed) == []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["benchmark.csv", *FIGURES]
    for name in FIGURES:
        pixels = np.asarray(Image.open(tmp_path / "out" / name).convert("RGB"), dtype=float)
        assert min(pixels.shape[:2]) > 80
        assert pixels.std() > 10, f"{name} shows nothing"
    check_numbers(read_csv(tmp_path / "out" / "benchmark.csv"), values)


def check_numbers(rows, values):
    steps = {row.size for row in rows if row.measure == "steps a second"}
    assert steps == {*values["sizes"], *values["compare_sizes"]}
    assert {row.size for row in rows if row.measure == "images a second"} == {*values["training_sizes"]}
    assert {row.benchmark for row in rows} == {"denoise", "train", *values["parts"]}
    assert all(row.value > 0 for row in rows if row.unit in ("s", "1/s", "GB") and "over" not in row.measure)
    shares = {row.measure: row.value for row in rows if not row.unit}
    assert 0 < shares["share of matrix products"] < 1
    assert 0 < shares["matrix products, of the machine's rate"] < 1.5
    assert {row.system for row in rows} == {"ours"}
    assert all("mindspore" in row.versions for row in rows)
