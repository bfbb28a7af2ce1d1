"""The notebook on few steps runs whole, and its files and numbers are what it says."""

import numpy as np
import pytest
from notebook_contract import check_files, run_smoke

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.core.lora.files import read_lora

METHODS = [
    "teacher, 8 steps",
    "teacher, 2 steps",
    "teacher, 1 step",
    "LCM-LoRA, 2 steps",
    "LCM-LoRA, 1 step",
    "LCM untrained, 2 steps",
    "DMD, 1 step",
    "DMD untrained, 1 step",
]


@pytest.mark.notebook
def test_it_runs_whole_and_writes_what_it_says(project, tmp_path):
    values, folder, numbers = run_smoke(project, "11_few_steps", tmp_path, "few_steps.json")
    figures = ["accuracy.png", "contact_sheet.png", "steps.png"]
    check_files(folder, figures, ["dmd", "features", "few_steps.json", "lcm"])
    check_models(numbers, folder, values)
    check_numbers(numbers, values)


def check_models(numbers, folder, values):
    modules = read_lora(numbers["lcm"]["folder"]).modules
    assert all(module.down.shape[0] == values["lora_rank"] for module in modules.values())
    assert any(np.abs(module.up).max() > 0 for module in modules.values())
    assert PixArtSigmaPipeline.from_pretrained(folder / "dmd" / "pipeline").plan(1).timesteps.tolist() == [400]


def check_numbers(numbers, values):
    assert list(numbers["accuracy"]) == list(numbers["seconds_per_image"]) == METHODS
    assert numbers["count"] == values["judged"]
    parts = ("object", "colour", "setting", "all")  # in every scene
    counts = values["judged"] * np.array([[row[part] for part in parts] for row in numbers["accuracy"].values()])
    np.testing.assert_allclose(counts, counts.round(), atol=1e-6)
    assert len(numbers["lcm"]["loss"]) == values["lcm_steps"] and len(numbers["dmd"]["loss"]) == values["dmd_steps"]
    times = numbers["seconds_per_image"]
    assert times["DMD, 1 step"] < times["teacher, 8 steps"]
    assert all(seconds > 0 for seconds in numbers["seconds"].values())
