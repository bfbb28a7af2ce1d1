"""The notebook on finetuning runs whole, from published files to a pipeline; its files and numbers are what it says."""

import numpy as np
import pytest
import yaml
from notebook_contract import check_files, run_smoke

from pixart_nb.config import check_config
from pixart_nb.core.checkpoints.load import load_transformer
from pixart_nb.core.data.labels import load_labels

FIGURES = ["after.png", "before.png", "curves.png", "data.png", "sizes.png", "used.png", "validation.png"]
FOLDERS = ["data", "data_from_parts", "features", "raw", "run"]


@pytest.mark.notebook
def test_it_runs_whole_and_writes_what_it_says(project, tmp_path):
    values, folder, numbers = run_smoke(project, "05_finetune_pixelart", tmp_path, "finetune.json")
    check_files(folder, FIGURES, [*FOLDERS, "finetune.json", "finetune.yaml"])
    check_data(folder / "data", values)
    check_training(folder / "run", project, values)
    check_numbers(numbers, values)
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
        assert all({"object", "colour", "setting", "all"} <= set(part) for part in shares.values())
    assert numbers["training"]["steps"] == values["steps"]
    assert list(numbers["held_out_loss"]) == ["0", "2", "3"]
    assert len(set(numbers["held_out_loss"].values())) == 3
    assert all(0 < loss < 2 for loss in numbers["held_out_loss"].values())
    assert all(seconds > 0 for seconds in numbers["seconds"].values())
