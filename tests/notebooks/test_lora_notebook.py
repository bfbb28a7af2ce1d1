"""The notebook on LoRA runs whole, and its files and numbers are what it says."""

import json

import numpy as np
import pytest
from notebook_contract import run_notebook, widgets_without_figure
from PIL import Image

from pixart_nb.config import read_yaml
from pixart_nb.core.lora.files import read_lora

FIGURES = ["after.png", "before.png", "compared.png", "curves.png", "strength.png", "taught.png"]
FOLDERS = ["adapter", "diffusers", "features", "full", "images", "peft"]


@pytest.mark.notebook
def test_it_runs_whole_and_writes_what_it_says(project, tmp_path):
    values = read_yaml(project / "configs" / "smoke" / "08_lora.yaml")
    values["output_path"] = str(tmp_path / "out")
    notebook = project / "notebooks" / "08_lora.ipynb"
    executed = run_notebook(notebook, values, tmp_path / "executed.ipynb", project)
    assert widgets_without_figure(executed) == []
    check_files(tmp_path / "out")
    check_numbers(json.loads((tmp_path / "out" / "lora.json").read_text()), values)


def check_files(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FIGURES, *FOLDERS, "lora.json"])
    for name in FIGURES:
        pixels = np.asarray(Image.open(folder / name).convert("RGB"), dtype=float)
        assert min(pixels.shape[:2]) > 80
        assert pixels.std() > 10, f"{name} shows nothing"
    first, second = (read_lora(folder / layout).modules for layout in ("diffusers", "peft"))
    assert first.keys() == second.keys() and all(m.magnitude is not None for m in first.values())
    assert all(np.array_equal(first[name].up, second[name].up) for name in first)
    assert (folder / "full" / "pipeline" / "model_index.json").is_file()


def check_numbers(numbers, values):
    assert list(numbers["shares"]) == ["before", "LoRA", "all weights"]
    assert all(set(s) == {"object", "colour", "setting", "all", "known"} for s in numbers["shares"].values())
    share = numbers["parameters"]["LoRA"] / numbers["parameters"]["all weights"]
    assert numbers["sizes"]["yours"] == numbers["parameters"]["LoRA"] and 0 < share < 0.05
    assert numbers["training"]["steps"] == values["steps"] and numbers["training"]["lora_rank"] == 0
    assert all(np.isfinite(curve).all() for curve in numbers["loss"].values())
    assert 0 <= numbers["fused_difference"] < 0.02
    assert all(seconds > 0 for seconds in numbers["seconds"].values())
