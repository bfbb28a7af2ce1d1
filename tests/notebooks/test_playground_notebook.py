"""The notebook of the playground runs whole, and its files and numbers are what it says."""

import json
from pathlib import Path

import nbformat
import numpy as np
import pytest
from notebook_contract import run_notebook, undeclared_keys, widgets_without_figure
from PIL import Image

from pixart_nb.config import InferenceConfig, check_config, read_yaml
from pixart_nb.core.sampling.images import read_parameters

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "inference"
FIGURES = ["guidance.png", "history.png", "negative_prompt.png", "right_images.png", "schedulers.png", "sizes.png"]


@pytest.fixture
def notebook(project):
    return project / "notebooks" / "02_sampling.ipynb"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_it_takes_the_configuration_of_every_checkpoint(notebook, path):
    assert undeclared_keys(nbformat.read(notebook, as_version=4), read_yaml(path)) == []


@pytest.mark.notebook
def test_it_runs_whole_and_writes_what_it_says(project, notebook, tmp_path):
    values = read_yaml(project / "configs" / "smoke" / "02_sampling.yaml")
    values["output_path"] = str(tmp_path / "out")
    executed = run_notebook(notebook, values, tmp_path / "executed.ipynb", project)
    assert widgets_without_figure(executed) == []
    numbers = json.loads((tmp_path / "out" / "sampling.json").read_text())
    check_files(tmp_path / "out", numbers)
    check_configuration(numbers, values)
    check_numbers(numbers, values)


def check_files(folder, numbers):
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FIGURES, "sampling.json", "saved"])
    for name in FIGURES:
        pixels = np.asarray(Image.open(folder / name).convert("RGB"), dtype=float)
        assert min(pixels.shape[:2]) > 100
        assert pixels.std() > 10, f"{name} shows nothing"
    assert [str(path) for path in (folder / "saved").iterdir()] == numbers["saved"]


def check_configuration(numbers, values):
    assert {key: numbers["config"][key] for key in values if key in InferenceConfig.model_fields} == {
        key: value for key, value in values.items() if key in InferenceConfig.model_fields
    }
    saved = check_config(read_parameters(numbers["saved"][0]))
    assert saved.model_dump() == numbers["config"] | {"prompt": values["prompt"][:1], "seed": values["seed"] + 1}


def check_numbers(numbers, values):
    drawn = values["seeds"]
    assert list(numbers["right"]) == values["judged_schedulers"] and numbers["judged"] == values["judged"]
    assert all(list(shares) == [str(k) for k in values["judged_steps"]] for shares in numbers["right"].values())
    assert max(numbers["right"][values["sampling_method"]].values()) > 0.5
    disagreement = list(numbers["disagreement"].values())
    assert disagreement[0] > disagreement[-1] > 0
    guidance = numbers["guidance"]
    assert list(guidance) == ["1", "2", "4.5", "7"]
    assert min(row["variety"] for row in guidance.values()) > 0
    assert guidance["4.5"]["colour"] >= guidance["1"]["colour"]
    assert len(numbers["sizes"]) == len(values["sizes"])
    before, after = numbers["negative_prompt"]["before"], numbers["negative_prompt"]["after"]
    assert sum(before.values()) == sum(after.values()) == drawn
    avoided = numbers["negative_prompt"]["avoided"]
    assert before[avoided] == max(before.values()) > after.get(avoided, 0)
    assert set(numbers["seconds"]) == {
        "load",
        "playground",
        "schedulers",
        "right images",
        "guidance",
        "sizes",
        "negative prompt",
    }
    assert all(value > 0 for value in numbers["seconds"].values())
