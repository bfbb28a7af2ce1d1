"""The notebook of conversion runs whole, and its files and numbers are what it says."""

import json

import papermill
import pytest
from notebook_contract import check_figures, run_notebook
from reference_data import official

from pixart_nb.config import read_yaml
from pixart_nb.core.checkpoints.files import open_checkpoint

FIGURES = ("key_map.png", "parity.png", "alpha_sigma.png")


@pytest.fixture(scope="module")
def ran(project, tmp_path_factory):
    """Run the notebook: values of parameters -> (executed notebook, folder of what it wrote, numbers)."""

    def run(**values):
        folder = tmp_path_factory.mktemp("notebook")
        path = project / "notebooks" / "01_checkpoint_conversion.ipynb"
        values = read_yaml(project / "configs" / "smoke" / f"{path.stem}.yaml") | values
        values["output_path"] = str(folder / "out")
        executed = run_notebook(path, values, folder / "executed.ipynb", project)
        return executed, folder / "out", json.loads((folder / "out" / "conversion.json").read_text())

    return run


def printed(executed):
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") for output in outputs)


@pytest.mark.notebook
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "models/absent.pth"}, "source 'models/absent.pth' does not exist; a relative path starts at the"),
        ({"hidden_size": 100}, "hidden_size is 100; expected a multiple of 72, for example 144"),
    ],
)
def test_wrong_parameters_stop_it_with_a_sentence(ran, values, message):
    with pytest.raises(papermill.PapermillExecutionError, match=message):
        ran(**values)


@pytest.mark.notebook
def test_it_converts_a_small_checkpoint_to_every_layout(ran):
    executed, folder, numbers = ran()
    check_figures((folder / name for name in FIGURES), least=300)
    assert numbers["largest_difference"] == 0.0
    assert numbers["audit"]["family"] == "sigma"
    assert numbers["audit"]["counts"] == {"mapped": 76, "recomputed": 1, "missing": 0, "unexpected": 0}
    assert len(numbers["layouts"]) == 9
    for row in numbers["layouts"]:
        assert (folder / row["file"]).stat().st_size == row["MB"] * 1e6
        assert {t.dtype for t in open_checkpoint(folder / row["file"]).tensors.values()} == {row["dtype"]}
        error = row["relative error"]
        assert error == 0 if row["dtype"] == "F32" else 1e-5 < error < 1e-2
    assert {name.split(".")[0] for name in numbers["differences"]} == {*("y_embedder", "csize_embedder", "ar_embedder")}
    assert ["120 caption tokens" in text for text in numbers["refused"]] == [True, False, False]
    assert "os.system" in numbers["refused"][2]
    assert not (folder / "the-command-ran").exists()
    assert "PixArt-sigma" in printed(executed)


@pytest.mark.notebook
def test_it_converts_a_checkpoint_that_it_is_given(ran):
    source = official("alpha-ms-1024-micro")[0]
    values = {"source": str(source), "targets": ["converted.ckpt"], "dtypes": ["keep"], "depth": 2}
    executed, folder, numbers = ran(**values)
    check_figures((folder / name for name in FIGURES), least=300)
    assert numbers["parameters"]["source"] == str(source)
    assert numbers["audit"]["config"]["micro_condition"] is True
    assert numbers["audit"]["counts"]["mapped"] == len(open_checkpoint(source).tensors) - 1
    assert [row["relative error"] for row in numbers["layouts"]] == [0.0]
    assert "PixArt-alpha" in printed(executed)
