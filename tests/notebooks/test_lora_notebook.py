"""The notebook on LoRA runs whole, and its files and numbers are what it says."""

import numpy as np
import pytest
from notebook_contract import check_files, run_smoke

from pixart_nb.core.lora.files import read_lora

FIGURES = ["after.png", "before.png", "compared.png", "curves.png", "strength.png", "taught.png"]
FOLDERS = ["adapter", "diffusers", "features", "full", "images", "peft"]


@pytest.mark.notebook
def test_it_runs_whole_and_writes_what_it_says(project, tmp_path):
    values, folder, numbers = run_smoke(project, "08_lora", tmp_path, "lora.json")
    check_files(folder, FIGURES, [*FOLDERS, "lora.json"])
    check_adapters(folder)
    check_numbers(numbers, values)


def check_adapters(folder):
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
