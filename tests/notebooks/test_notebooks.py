"""Notebooks keep their contract, and run whole with their smoke configuration."""

import ast
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebook_contract import (
    check_files,
    declared_parameters,
    run_notebook,
    run_smoke,
    undeclared_keys,
    violations,
    widgets_without_figure,
)

from pixart_nb.config import ConfigError, check_config, notebook_config, read_yaml

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def names(paths):
    return [path.stem for path in paths]


def sound_notebook():
    """The smallest notebook that keeps every rule."""
    cells = [
        new_markdown_cell("# Title\n\nGoal: to be the smallest notebook. Cost: none at all, it runs in no time."),
        new_code_cell("count = 3  # how many", metadata={"tags": ["parameters"]}),
        new_code_cell("from pixart_nb.config import check_parameters\n\ncheck_parameters(globals())"),
        new_code_cell("import sys\n\nsys.version"),
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def test_there_are_notebooks_to_check():
    assert "00_quickstart" in names(NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_notebook_keeps_the_contract(path):
    assert violations(read(path), path.stat().st_size) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_notebook_imports_names_that_exist(path):
    for cell in read(path).cells:
        for node in ast.walk(ast.parse(cell.source)) if cell.cell_type == "code" else ():
            if isinstance(node, ast.ImportFrom) and node.module.startswith("pixart_nb"):
                module = import_module(node.module)
                missing = [a.name for a in node.names if not (hasattr(module, a.name) or find_spec_in(module, a.name))]
                assert missing == [], f"{node.module} has no {missing}"


def find_spec_in(package, name):
    return find_spec(f"{package.__name__}.{name}") if hasattr(package, "__path__") else None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_notebook_has_a_smoke_configuration_of_declared_keys(path):
    values = read_yaml(ROOT / "configs" / "smoke" / f"{path.stem}.yaml")
    assert undeclared_keys(read(path), values) == []


def test_smoke_configurations_are_those_of_notebooks():
    assert names(sorted((ROOT / "configs" / "smoke").glob("*.yaml"))) == names(NOTEBOOKS)


SAMPLING_NOTEBOOKS = [
    "00_quickstart",
    "02_sampling",
    "03_attention_maps",
    "04_token_compression",
    "05_finetune_pixelart",
    "06_sampling_4k",
    "07_weak_to_strong",
    "08_lora",
    "10_control_and_editing",
    "11_few_steps",
]


@pytest.mark.parametrize("name", SAMPLING_NOTEBOOKS)
def test_sampling_notebooks_declare_every_key_of_the_inference_configurations(name):
    notebook = read(ROOT / "notebooks" / f"{name}.ipynb")
    for path in sorted((ROOT / "configs" / "inference").glob("*.yaml")):
        assert undeclared_keys(notebook, read_yaml(path)) == [], path


def test_a_sound_notebook_has_no_violations():
    assert violations(sound_notebook()) == []


@pytest.mark.parametrize(
    ("position", "source", "complaint"),
    [
        (0, "Goal and cost, but no title, in many words that say nothing about anything at all", "not a title"),
        (0, "# Title\n\nGoal: many words that say nothing about anything at all, one after the other", "cost"),
        (1, "count = 3", "no comment"),
        (1, "count = 3  # how many\nprint(count)  # shown", "does more than assign"),
        (1, "count = 3  # n = how many", "papermill cannot read"),
        (1, "count: int | None = 3  # how many", "papermill cannot read"),
        (1, "first = second = 3  # how many", "does more than assign"),
        (2, "from pixart_nb.config import check_parameters", "does not check them"),
        (3, "def version():\n    return 1", "defines version"),
        (3, "class version:\n    size = 1", "defines version"),
        (3, "\n".join(["version"] * 26), "26 lines"),
        (3, "print(1)", "does not show the versions"),
    ],
)
def test_a_broken_rule_is_named(position, source, complaint):
    notebook = sound_notebook()
    notebook.cells[position].source = source
    assert any(complaint in found for found in violations(notebook))


def test_code_before_the_parameters_is_found():
    notebook = sound_notebook()
    notebook.cells.insert(1, new_code_cell("1 + 1"))
    assert "there is code before the parameters" in violations(notebook)


def test_missing_parameters_are_found():
    notebook = sound_notebook()
    notebook.cells[1].metadata = {}
    assert "0 cells are tagged 'parameters'; expected one" in violations(notebook)


def test_stored_outputs_counts_and_widget_state_are_found():
    notebook = sound_notebook()
    notebook.cells[1].execution_count = 1
    notebook.cells[3].outputs = [new_output("stream", text="3.11")]
    notebook.metadata["widgets"] = {"state": {}}
    found = violations(notebook)
    assert sum("stored with outputs" in problem for problem in found) == 2
    assert "the notebook holds widget state" in found


def test_a_large_file_is_found():
    assert violations(sound_notebook(), 250 * 1024) == []
    assert "at most 256000" in violations(sound_notebook(), 250 * 1024 + 1)[0]


def test_parameters_over_several_lines_are_declared():
    notebook = sound_notebook()
    notebook.cells[1].source = 'words = [\n    "ä",\n]  # some\nscale: float = 2.0  # how much'
    assert declared_parameters(notebook) == ["words", "scale"]
    assert violations(notebook) == []


def test_a_widget_needs_a_static_figure_beside_it():
    notebook = sound_notebook()
    widget = new_output("display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}})
    notebook.cells[1].outputs = [widget]
    assert widgets_without_figure(notebook) == [0]
    notebook.cells[2].outputs = [new_output("display_data", {"image/png": "AA=="})]
    assert widgets_without_figure(notebook) == []


@pytest.mark.notebook
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"cuont": 4}, "parameter 'cuont' is not declared by this notebook; did you mean 'count'?"),
        ({"count": 4, "derived": 5}, "parameter 'derived' is not declared by this notebook"),
        ({"count": 4}, ""),
        ({}, ""),
    ],
    ids=["misspelt", "set by a later cell", "declared", "none"],
)
def test_an_undeclared_parameter_stops_the_notebook(tmp_path, parameters, message):
    notebook = sound_notebook()
    notebook.cells[2].source += "\nderived = 2 * count"
    nbformat.write(notebook, tmp_path / "sound.ipynb")
    run = partial(run_notebook, tmp_path / "sound.ipynb", parameters, tmp_path / "out.ipynb", tmp_path)
    if not message:
        assert run()
        return
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        run()
    assert message in str(caught.value)


def test_a_notebook_that_runs_from_the_middle_is_sent_to_its_parameters():
    with pytest.raises(ConfigError, match="run the cell tagged 'parameters' first"):
        notebook_config({"In": ["", "config = notebook_config(globals())"], "seed": 1}, use_resolution_binning=False)


@pytest.mark.notebook
def test_quickstart_runs_whole_and_writes_what_it_says(project, tmp_path):
    values, folder, numbers = run_smoke(project, "00_quickstart", tmp_path, "quickstart.json")
    figures = ["film_strip.png", "guidance.png", "images.png", "steps.png"]
    check_files(folder, figures, ["quickstart.json"], least=100)
    check_quickstart_numbers(numbers, check_config(values))


def check_quickstart_numbers(numbers, config):
    # the notebook samples at exactly the given size
    assert numbers["config"] == config.model_dump() | {"use_resolution_binning": False}
    assert set(numbers["agreement"]["guidance"]) == {"1", "2", "4.5", "7"}
    assert list(numbers["agreement"]["steps"])[-1] == str(config.sampling_steps)
    assert numbers["agreement"]["images"] == numbers["agreement"]["guidance"]["2"]
    assert all(0.5 < numbers["agreement"]["images"][part] <= 1 for part in ("object", "colour", "setting"))
    assert numbers["film_strip_distance"][0] > numbers["film_strip_distance"][-1] >= 0
    assert numbers["steps_distance"][str(config.sampling_steps)] < 0.01
    assert set(numbers["seconds"]) == {"load", "draw", "guidance", "steps"}
    assert all(value > 0 for value in numbers["seconds"].values())
