"""The rules that every stored notebook keeps, as functions that name what breaks them; and how tests run one."""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import nbformat
import numpy as np
import papermill
from PIL import Image

from pixart_nb.config import read_yaml

MOST_LINES = 25
MOST_BYTES = 250 * 1024
WIDGET = "application/vnd.jupyter.widget-view+json"
FIGURES = ("image/png", "image/svg+xml")


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The code cells in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def python_of(source: str) -> str:
    """A cell's source without the lines that belong to IPython (``%magic``, ``!command``)."""
    return "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))


def parameters_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The cells tagged ``parameters``."""
    return [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]


def declared_parameters(notebook: nbformat.NotebookNode) -> list[str]:
    """Names that the cell tagged ``parameters`` assigns, in order."""
    cells = parameters_cells(notebook)
    body = ast.parse(cells[0].source).body if cells else []
    return [name.id for node in body for name in _targets(node) if isinstance(name, ast.Name)]


def _targets(node: ast.stmt) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def undeclared_keys(notebook: nbformat.NotebookNode, values: Iterable[str]) -> list[str]:
    """Keys of a parameter file that the notebook does not declare; papermill itself only warns of them."""
    return sorted(set(values) - set(declared_parameters(notebook)))


def violations(notebook: nbformat.NotebookNode, size: int = 0) -> list[str]:
    """Every rule that the notebook breaks, in words; ``size`` is that of its file in bytes."""
    found = [*_opening(notebook), *_parameters(notebook), *_cells(notebook), *_stored(notebook), *_ending(notebook)]
    if size > MOST_BYTES:
        found.append(f"the file has {size} bytes; at most {MOST_BYTES}")
    return found


def _opening(notebook: nbformat.NotebookNode) -> Iterable[str]:
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        yield "the first cell is not a title in Markdown"
    else:
        for word in ("goal", "cost"):
            if word not in first.source.lower():
                yield f"the first cell does not name the {word}"


def _parameters(notebook: nbformat.NotebookNode) -> Iterable[str]:
    tagged = parameters_cells(notebook)
    if len(tagged) != 1:
        yield f"{len(tagged)} cells are tagged 'parameters'; expected one"
        return
    if code_cells(notebook)[0] is not tagged[0]:
        yield "there is code before the parameters"
    if not re.search(r"check_parameters\(globals\(\)|notebook_config\(globals\(\)", code_cells(notebook)[1].source):
        yield "the cell after the parameters does not check them"
    for node in ast.parse(tagged[0].source).body:
        yield from _parameter(node, tagged[0].source.splitlines())


def _parameter(node: ast.stmt, lines: list[str]) -> Iterable[str]:
    shown, last = ast.unparse(node), lines[node.end_lineno - 1]
    if len(_targets(node)) != 1 or not isinstance(_targets(node)[0], ast.Name):
        yield f"the parameters cell does more than assign: {shown}"
        return
    comment = last.encode()[node.end_col_offset :].decode()
    if not re.match(r"\s*# \S", comment):
        yield f"a parameter has no comment on its last line: {shown}"
    if "=" in comment or (isinstance(node, ast.AnnAssign) and "|" in ast.unparse(node.annotation)):
        yield f"papermill cannot read this parameter: {last.strip()}"


def _cells(notebook: nbformat.NotebookNode) -> Iterable[str]:
    for number, cell in enumerate(code_cells(notebook)):
        lines = len(cell.source.splitlines())
        if number and lines > MOST_LINES:  # the first are the parameters: a list to choose from, however long
            yield f"code cell {number} has {lines} lines; at most {MOST_LINES}"
        for node in ast.walk(ast.parse(python_of(cell.source))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield f"code cell {number} defines {node.name}; definitions belong in the package"


def _stored(notebook: nbformat.NotebookNode) -> Iterable[str]:
    if "widgets" in notebook.metadata:
        yield "the notebook holds widget state"
    for number, cell in enumerate(notebook.cells):
        if not cell.get("id"):
            yield f"cell {number} has no id"
    for number, cell in enumerate(code_cells(notebook)):
        if cell.outputs or cell.execution_count is not None:
            yield f"code cell {number} is stored with outputs or an execution count"


def _ending(notebook: nbformat.NotebookNode) -> Iterable[str]:
    last = notebook.cells[-1] if notebook.cells else None
    if last is None or last.cell_type != "code" or "version" not in last.source:
        yield "the last cell does not show the versions of what ran"


def widgets_without_figure(executed: nbformat.NotebookNode) -> list[int]:
    """Numbers of code cells that show a widget with no static figure in the same or a neighbouring code cell.

    A progress bar is a widget too, but its text says the same.
    """
    kinds = [
        {kind for output in cell.outputs if not _is_bar(output) for kind in output.get("data", {})}
        for cell in code_cells(executed)
    ]
    near = [set().union(*kinds[max(k - 1, 0) : k + 2]) for k in range(len(kinds))]
    return [k for k, shown in enumerate(kinds) if WIDGET in shown and not near[k].intersection(FIGURES)]


def _is_bar(output: nbformat.NotebookNode) -> bool:
    return bool(re.search(r"\d+%\|| \?/s\]|\dit \[", output.get("data", {}).get("text/plain", "")))


class SmokeRun(NamedTuple):
    """A notebook that ran with its smoke configuration: its parameters, the folder and the numbers that it wrote."""

    values: dict[str, Any]
    folder: Path
    numbers: dict[str, Any]


def run_smoke(project: Path, name: str, tmp_path: Path, numbers: str) -> SmokeRun:
    """Run ``notebooks/NAME.ipynb`` with ``configs/smoke/NAME.yaml``; every widget needs a figure beside it."""
    values = read_yaml(project / "configs" / "smoke" / f"{name}.yaml") | {"output_path": str(tmp_path / "out")}
    notebook = project / "notebooks" / f"{name}.ipynb"
    assert widgets_without_figure(run_notebook(notebook, values, tmp_path / "executed.ipynb", project)) == []
    path = tmp_path / "out" / numbers
    return SmokeRun(values, path.parent, json.loads(path.read_text()) if path.suffix == ".json" else {})


def check_files(folder: Path, figures: Iterable[str], others: Iterable[str] = (), least: int = 80) -> None:
    """A folder holds these figures, which show something, and other files and folders; nothing else."""
    assert {path.name for path in folder.iterdir()} == {*figures, *others}
    check_figures((folder / name for name in figures), least)


def check_figures(paths: Iterable[Path], least: int = 80) -> None:
    """Images are not empty and have more than ``least`` pixels a side."""
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=float)
        assert min(pixels.shape[:2]) > least
        assert pixels.std() > 10, f"{path.name} shows nothing"


def run_notebook(
    path: Path, parameters: Mapping[str, Any], output: Path, folder: Path, compiled: bool = True
) -> nbformat.NotebookNode:
    """Run a notebook whole by papermill in ``folder``, with this Python, and return it with its outputs.

    Unless ``compiled``, MindSpore runs what a training would compile operator by operator.

    Raises:
        papermill.PapermillExecutionError: a cell failed.
    """
    bin_first = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {"PATH": bin_first, "JUPYTER_PREFER_ENV_PATH": "1"} | ({} if compiled else {"MS_JIT": "0"})
    with mock.patch.dict(os.environ, environment):
        return papermill.execute_notebook(
            str(path), str(output), dict(parameters), kernel_name="python3", cwd=str(folder), progress_bar=False
        )
