"""The notebooks that look inside run whole, and their files and numbers are what they say."""

import nbformat
import numpy as np
import pytest
from notebook_contract import check_figures, run_notebook, run_smoke, undeclared_keys
from published_layout import published_parameters

from pixart_nb.config import read_yaml

ATTENTION = {
    "differences",
    "distance",
    "entropy",
    "explorer",
    "interventions",
    "layers_and_heads",
    "modulation",
    "nouns",
    "overlaps",
    "pairs",
    "patch",
    "positions",
    "threshold",
    "trajectory",
    "word_by_step",
    "words",
}
COMPRESSION = {
    "adaptation",
    "adapted",
    "cells",
    "cost",
    "explorer",
    "full_and_compressed",
    "images",
    "kernels",
    "keys_by_layer",
    "layers",
    "layers_trained",
    "lost",
    "operators",
    "operators_paper",
    "operators_trained",
    "outputs_by_layer",
}


@pytest.mark.parametrize("name", ["03_attention_maps", "04_token_compression"])
def test_they_take_the_configuration_of_the_bundled_model(project, name):
    values = read_yaml(project / "configs" / "inference" / "tiny.yaml")
    notebook = nbformat.read(project / "notebooks" / f"{name}.ipynb", as_version=4)
    assert undeclared_keys(notebook, values) == []


def check_shown(folder, names):
    assert {path.stem for path in folder.glob("*.png")} == names
    check_figures(folder.glob("*.png"), least=100)


@pytest.mark.notebook
def test_attention_maps_runs_whole_and_writes_what_it_says(project, tmp_path):
    values, folder, numbers = run_smoke(project, "03_attention_maps", tmp_path, "attention_maps.json")
    check_shown(folder, ATTENTION)
    assert all(value > 0 for value in numbers["seconds"].values())
    assert (folder / "explorer.html").stat().st_size > 100_000
    assert (folder / "trace.safetensors").stat().st_size >= numbers["trace_bytes"]
    assert numbers["overlaps"]["count"] == values["scenes"]
    assert numbers["overlaps"]["object"] >= 2 * numbers["overlaps"]["setting"]
    assert 0.1 < numbers["overlaps"]["position_prior"] < 0.5
    binding = numbers["binding"]
    assert {f"{part}, all images" for part in ("object", "colour")} < set(binding)
    assert all(0 <= row["share"] <= 1 and 0 < row["scenes"] <= values["pair_scenes"] for row in binding.values())
    assert 0 < numbers["entropy"]["last"] < numbers["entropy"]["first"] <= np.log(256)
    assert len(numbers["moved"]) == 3
    assert all(value > 0.01 for value in numbers["moved"].values())


@pytest.mark.notebook
def test_token_compression_runs_whole_and_writes_what_it_says(project, tmp_path):
    values, folder, numbers = run_smoke(project, "04_token_compression", tmp_path, "token_compression.json")
    check_shown(folder, COMPRESSION)
    assert all(value > 0 for value in numbers["seconds"].values())
    assert (folder / "explorer.html").stat().st_size > 10_000
    expected = {f"{operator} {ratio}" for operator in values["operators"] for ratio in values["ratios"]}
    assert set(numbers["operators"]) == expected
    for operator in values["operators"]:
        assert 0 < numbers["operators"][f"{operator} 2"] < numbers["operators"][f"{operator} 4"]
    assert set(numbers["layers"]) == {"shallow", "middle", "deep"}
    assert numbers["saved_at_4k"] == pytest.approx(0.33, abs=0.01)
    held_out = numbers["adaptation"]["held_out"]
    assert next(iter(held_out)) == "0"
    assert list(held_out)[-1] == str(values["adaptation_steps"])
    assert held_out["0"] > held_out[str(values["adaptation_steps"])] > numbers["adaptation"]["target"]
    assert 0 < numbers["adaptation"]["recovered"] < 1
    assert set(numbers["trained"]) == {"shallow", "middle", "deep", "uniform", "mean"}
    assert all(value > 0 for value in numbers["trained"].values())


@pytest.mark.notebook
@pytest.mark.parametrize(
    ("name", "changes", "missing"),
    [
        ("03_attention_maps", {"trace_steps": [0, 2]}, {"nouns", "overlaps", "pairs"}),
        (
            "04_token_compression",
            {"timed_sizes": [256], "operators": ["mean", "conv", "uniform"], "ratios": [2]},
            {"adaptation", "kernels", "layers_trained", "operators_trained"},
        ),
    ],
)
def test_they_run_on_a_checkpoint_of_the_published_layout(project, tmp_path, name, changes, missing):
    """28 layers and 16 heads with a published configuration; what needs the drawn scenes is skipped by name."""
    values = published_parameters(project, tmp_path, sampling_steps=3, output_path=str(tmp_path / "out"), **changes)
    done = run_notebook(project / "notebooks" / f"{name}.ipynb", values, tmp_path / "executed.ipynb", project)
    check_shown(tmp_path / "out", (ATTENTION if "03" in name else COMPRESSION) - missing)
    printed = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", ()))
    assert 'Skipped: "' in printed


@pytest.mark.notebook
def test_token_compression_takes_the_compression_out_of_a_model_that_has_it(project, tmp_path):
    """Its reference is the same model without compression, so that ratio 1 changes nothing."""
    values = read_yaml(project / "configs" / "inference" / "tiny-1k.yaml")
    values |= {"image_height": 128, "image_width": 128, "sampling_steps": 2, "output_path": str(tmp_path / "out")}
    values |= {"timed_sizes": [], "ratios": [2], "operators": ["mean", "conv"], "adaptation_steps": 0}
    notebook = project / "notebooks" / "04_token_compression.ipynb"
    done = run_notebook(notebook, values, tmp_path / "executed.ipynb", project)
    printed = "".join(output.get("text", "") for cell in done.cells for output in cell.get("outputs", ()))
    assert "The compression of layers [3, 4, 5] is taken out" in printed
    assert "Skipped: the times of the operators need at least one size in timed_sizes." in printed
