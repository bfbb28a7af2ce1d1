"""The notebook on finetuning runs whole, from published files to a pipeline; its files and numbers are what it says."""

import json

import numpy as np
import pytest
import yaml
from notebook_contract import run_notebook, widgets_without_figure
from PIL import Image

from pixart_nb.config import check_config, read_yaml
from pixart_nb.core.checkpoints.load import load_transformer
from pixart_nb.core.data.labels import load_labels

FIGURES = ["after.png", "before.png", "curves.png", "data.png", "sizes.png", "used.png", "validation.png"]
FOLDERS = ["data", "data_from_parts", "features", "raw", "run"]


@pytest.mark.notebook
def test_it_runs_whole_and_writes_what_it_says(project, tmp_path):
    values = read_yaml(project / "configs" / "smoke" / "05_finetune_pixelart.yaml")
    values["output_path"] = str(tmp_path / "out")
    notebook = project / "notebooks" / "05_finetune_pixelart.ipynb"
    executed = run_notebook(notebook, values, tmp_path / "executed.ipynb", project)
    assert widgets_without_figure(executed) == []
    check_files(tmp_path / "out")
    check_data(tmp_path / "out" / "data", values)
    check_training(tmp_path / "out" / "run", project, values)
    check_numbers(json.loads((tmp_path / "out" / "finetune.json").read_text()), values)


def check_files(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*FIGURES, *FOLDERS, "finetune.json", "finetune.yaml"]
    )
    for name in FIGURES:
        pixels = np.asarray(Image.open(folder / name).convert("RGB"), dtype=float)
        assert min(pixels.shape[:2]) > 80
        assert pixels.std() > 10, f"{name} shows nothing"
    assert check_config(yaml.safe_load((folder / "finetune.yaml").read_text()), "train").use_ema


def check_data(folder, values):
    labels, kept = (load_labels(folder / f"{name}.json", folder) for name in ("labels", "labels_test"))
    assert len(labels) == values["scene_count"] - values["test_count"] and len(kept) == values["test_count"]
    assert not {label.prompt for label in labels} & {label.prompt for label in kept}


def check_training(folder, project, values):
    looks = [path.name for path in sorted((folder / "samples").iterdir())]
    assert looks == ["step-00000000", "step-00000002", "step-00000003"]
    assert len(list((folder / "samples" / looks[-1]).iterdir())) == 6
    net, first = (load_transformer(place / "transformer") for place in (folder / "pipeline", project / values["model"]))
    moved = net.final_layer.linear.weight.asnumpy() - first.final_layer.linear.weight.asnumpy()
    assert 0 < np.abs(moved).max() < 0.01


def check_numbers(numbers, values):
    assert set(numbers["shares"]) == {"before", "after"}
    for shares in numbers["shares"].values():
        assert set(shares) == {"new", "known"}
        assert all(set(part) == {"object", "colour", "setting", "all"} for part in shares.values())
    assert numbers["training"]["steps"] == values["steps"]
    assert list(numbers["held_out_loss"]) == ["0", "2", "3"]
    assert len(set(numbers["held_out_loss"].values())) == 3
    assert all(0 < loss < 2 for loss in numbers["held_out_loss"].values())
    assert all(seconds > 0 for seconds in numbers["seconds"].values())
