"""Every module of figures: no MindSpore, no global state of pyplot, examples that hold, a file that can be read."""

import doctest
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "pixart_nb" / "viz"
FILES = sorted(FOLDER.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_examples_hold_and_no_file_is_longer_than_can_be_read(path):
    module = import_module(f"pixart_nb.viz.{path.stem}")
    assert doctest.testmod(module, extraglobs={"np": np}).failed == 0
    assert len(path.read_text().splitlines()) <= 350


def test_figures_load_neither_mindspore_nor_pyplot():
    names = [f"pixart_nb.viz.{path.stem}" for path in FILES]
    check = f"import sys, importlib; [importlib.import_module(name) for name in {names}]; print(sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert not {"'mindspore'", "'matplotlib.pyplot'"} & set(run.stdout.strip("[]\n").split(", "))
