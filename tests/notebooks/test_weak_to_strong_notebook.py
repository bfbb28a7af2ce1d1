"""The notebook from weak to strong runs whole, and its files and numbers are what it says."""

import numpy as np
import pytest
from notebook_contract import check_files, run_smoke

from pixart_nb.core.checkpoints.load import load_transformer

FIGURES = [
    "compressed.png",
    "compressed_images.png",
    "larger.png",
    "larger_images.png",
    "largest_images.png",
    "positions.png",
    "stages.png",
    "taught.png",
]
RUNS = ["positions-interpolated", "from-scratch", "compressed-average", "compressed-random", "largest"]
FOLDERS = [*RUNS, "features-larger", "features-largest", "images-larger", "images-largest"]


@pytest.mark.notebook
def test_it_runs_whole_and_writes_what_it_says(project, tmp_path):
    values, folder, numbers = run_smoke(project, "07_weak_to_strong", tmp_path, "weak_to_strong.json")
    check_files(folder, FIGURES, [*FOLDERS, "weak_to_strong.json"])
    check_stages(folder)
    check_numbers(numbers, values)


def check_stages(folder):
    """Every stage left a model of its size, with the compression that it was given."""
    configs = [load_transformer(folder / run / "pipeline" / "transformer").config for run in RUNS]
    assert [config.input_size for config in configs] == [48, 48, 48, 48, 64]
    assert [config.pe_interpolation for config in configs] == [1.5, 1.5, 1.5, 1.5, 2.0]
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
