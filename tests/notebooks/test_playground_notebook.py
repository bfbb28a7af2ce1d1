"""The notebook of the playground runs whole, and its files and numbers are what it says."""

import re
from pathlib import Path

import nbformat
import pytest
from notebook_contract import check_files, run_notebook, run_smoke, undeclared_keys

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
def test_it_runs_whole_and_writes_what_it_says(project, tmp_path):
    values, folder, numbers = run_smoke(project, "02_sampling", tmp_path, "sampling.json")
    check_files(folder, FIGURES, ["sampling.json", "saved"], least=100)
    assert [str(path) for path in (folder / "saved").iterdir()] == numbers["saved"]
    check_configuration(numbers, values)
    check_numbers(numbers, values)


@pytest.mark.notebook
def test_the_playground_equals_a_call_after_it_was_used_by_hand(notebook, project, tmp_path):
    """The user has drawn at another size; the cells after the playground set the controls back."""
    used = """from dataclasses import replace

changed = {"prompt": "a red car at night", "height": 128, "width": 192, "steps": 1, "seed": 9}
playground.parameters = replace(playground.parameters, **changed)
await playground.sample()"""
    whole = nbformat.read(notebook, as_version=4)
    ids = [cell.id for cell in whole.cells]
    whole.cells = whole.cells[: ids.index("code-12") + 1]
    whole.cells.insert(ids.index("code-08") + 1, nbformat.v4.new_code_cell(used))
    nbformat.write(whole, tmp_path / "used.ipynb")
    values = read_yaml(project / "configs" / "smoke" / "02_sampling.yaml")
    values |= {"sampling_steps": 1, "output_path": str(tmp_path / "out")}
    done = run_notebook(tmp_path / "used.ipynb", values, tmp_path / "executed.ipynb", project)
    printed = "".join(output.get("text", "") for output in done.cells[-1].outputs)
    assert re.search(r"differ by at most [01]$", printed.strip())


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
