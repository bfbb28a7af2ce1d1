"""The notebook on few steps runs whole, and its files and numbers are what it says."""

import json

import numpy as np
import pytest
from notebook_contract import run_notebook, widgets_without_figure
from PIL import Image

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.config import read_yaml
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
    values = read_yaml(project / "configs" / "smoke" / "11_few_steps.yaml")
    values["output_path"] = str(tmp_path / "out")
    notebook = project / "notebooks" / "11_few_steps.ipynb"
    executed = run_notebook(notebook, values, tmp_path / "executed.ipynb", project)
    assert widgets_without_figure(executed) == []
    numbers = json.loads((tmp_path / "out" / "few_steps.json").read_text())
    check_files(tmp_path / "out")
    check_models(numbers, tmp_path / "out", values)
    check_numbers(numbers, values)


def check_files(folder):
    figures = ["accuracy.png", "contact_sheet.png", "steps.png"]
    written = sorted(path.name for path in folder.iterdir())
    assert written == sorted([*figures, "dmd", "features", "few_steps.json", "lcm"])
    for name in figures:
        pixels = np.asarray(Image.open(folder / name).convert("RGB"), dtype=float)
        assert min(pixels.shape[:2]) > 80
        assert pixels.std() > 10, f"{name} shows nothing"


def check_models(numbers, folder, values):
    modules = read_lora(numbers["lcm"]["folder"]).modules
    assert all(module.down.shape[0] == values["lora_rank"] for module in modules.values())
    assert any(np.abs(module.up).max() > 0 for module in modules.values())
    assert PixArtSigmaPipeline.from_pretrained(folder / "dmd" / "pipeline").plan(1).timesteps.tolist() == [400]


def check_numbers(numbers, values):
    assert list(numbers["accuracy"]) == list(numbers["seconds_per_image"]) == METHODS
    assert numbers["count"] == values["judged"]
    counts = values["judged"] * np.array([list(shares.values()) for shares in numbers["accuracy"].values()])
    np.testing.assert_allclose(counts, counts.round(), atol=1e-6)
    assert len(numbers["lcm"]["loss"]) == values["lcm_steps"] and len(numbers["dmd"]["loss"]) == values["dmd_steps"]
    times = numbers["seconds_per_image"]
    assert times["DMD, 1 step"] < times["teacher, 8 steps"]
    assert all(seconds > 0 for seconds in numbers["seconds"].values())
