"""The notebook from weak to strong runs whole, and its files and numbers are what it says."""

import json

import numpy as np
import pytest
from notebook_contract import run_notebook, widgets_without_figure
from PIL import Image

from pixart_nb.config import read_yaml
from pixart_nb.core.checkpoints.load import load_transformer

FIGURES = [
    "compressed.png",
    "compressed_images.png",
    "larger.png",
    "larger_images.png",
    "largest_images.png",
    "positions.png",
    "taught.png",
]
RUNS = ["positions-interpolated", "from-scratch", "compressed-average", "compressed-random", "largest"]
FOLDERS = [*RUNS, "features-larger", "features-largest", "images-larger", "images-largest"]


@pytest.mark.notebook
def test_it_runs_whole_and_writes_what_it_says(project, tmp_path):
    values = read_yaml(project / "configs" / "smoke" / "07_weak_to_strong.yaml")
    values["output_path"] = str(tmp_path / "out")
    notebook = project / "notebooks" / "07_weak_to_strong.ipynb"
    executed = run_notebook(notebook, values, tmp_path / "executed.ipynb", project)
    assert widgets_without_figure(executed) == []
    check_files(tmp_path / "out")
    check_stages(tmp_path / "out")
    check_numbers(json.loads((tmp_path / "out" / "weak_to_strong.json").read_text()), values)


def check_files(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FIGURES, *FOLDERS, "weak_to_strong.json"])
    for name in FIGURES:
        pixels = np.asarray(Image.open(folder / name).convert("RGB"), dtype=float)
        assert min(pixels.shape[:2]) > 80
        assert pixels.std() > 10, f"{name} shows nothing"


def check_stages(folder):
    """Every stage left a model of its size, with the compression that it was given."""
    configs = [load_transformer(folder / run / "pipeline" / "transformer").config for run in RUNS]
    assert [config.input_size for config in configs] == [32, 32, 32, 32, 64]
    assert [config.pe_interpolation for config in configs] == [2.0, 2.0, 2.0, 2.0, 4.0]
    assert [tuple(config.kv_layers) for config in configs] == [(), (), (4, 5), (4, 5), (4, 5)]


def check_numbers(numbers, values):
    assert list(numbers["scores"]) == list(numbers["losses"]) == list(numbers["reports"])
    assert len(numbers["scores"]) == 5 and set(numbers["untrained"]) == {"interpolated", "not interpolated"}
    assert all(np.isfinite(run).all() for run in numbers["losses"].values())
    scores = [score for run in numbers["scores"].values() for score in run.values()]
    assert all(0 <= score[part] <= 1 for score in scores for part in ("object", "colour", "setting", "all"))
    reports = list(numbers["reports"].values())
    assert reports[0]["loss"] < reports[0]["loss_not_interpolated"] < reports[1]["loss"]
    assert reports[2]["loss_without_compression"] == pytest.approx(reports[3]["loss_without_compression"])
    assert reports[2]["compression_error"] < reports[3]["compression_error"]
    assert {row["paper"] for row in numbers["paper"]} == {100, 1000, 0.018}
    assert numbers["training"]["steps"] == values["largest_steps"]
    assert numbers["cpu_minutes"] > 0 and all(seconds > 0 for seconds in numbers["seconds"].values())
