"""What every view keeps to: an example that holds, no MindSpore, no global state of pyplot, a file that can be read."""

import ast
import doctest
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "pixart_nb" / "viz"
FILES = sorted(FOLDER.glob("*.py"))


def views(path):
    """Public functions of a module that make a figure, by name; those that are given one are no views."""
    found = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    found = [node for node in found if node.returns and ast.unparse(node.returns) == "Figure"]
    given = {
        node.name for node in found for a in node.args.args if a.annotation and "Figure" in ast.unparse(a.annotation)
    }
    return {node.name: node for node in found if not node.name.startswith("_") and node.name not in given}


def test_there_are_views():
    assert {"word_heat_maps", "learned_kernels", "denoising_trajectory", "image_grid"} <= {
        name for path in FILES for name in views(path)
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_view_has_an_example_and_every_example_holds(path):
    without = [name for name, node in views(path).items() if ">>>" not in (ast.get_docstring(node) or "")]
    assert without == []
    module = import_module(f"pixart_nb.viz.{path.stem}")
    assert doctest.testmod(module, extraglobs={"np": np}).failed == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_file_is_longer_than_can_be_read(path):
    assert len(path.read_text().splitlines()) <= 350


def test_views_load_neither_mindspore_nor_pyplot():
    names = [f"pixart_nb.viz.{path.stem}" for path in FILES]
    check = f"import sys, importlib; [importlib.import_module(name) for name in {names}]; print(sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert not {"'mindspore'", "'matplotlib.pyplot'"} & set(run.stdout.strip("[]\n").split(", "))
