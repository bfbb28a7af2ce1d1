"""Exceptions of the kit."""

from __future__ import annotations

import ast
from pathlib import Path

import pixart_nb
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import CheckpointError


def test_every_exception_of_the_package_derives_from_one_base():
    bases = {"PixArtNBError"}
    classes = []
    for path in Path(pixart_nb.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        classes += [
            (node.name, path.name, {ast.unparse(base) for base in node.bases})
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and node.name != "PixArtNBError"
        ]
    for _ in classes:
        bases |= {name for name, _, parents in classes if parents & bases}
    assert [(name, file) for name, file, _ in classes if name not in bases] == []
    assert issubclass(CheckpointError, PixArtNBError)
    assert issubclass(PixArtNBError, ValueError)
