"""Exceptions of the kit."""

from __future__ import annotations

import ast
import signal
from pathlib import Path

import pytest

import pixart_nb
from pixart_nb.core.errors import PixArtNBError, delayed_interrupt
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


def test_an_interrupt_of_an_import_is_raised_after_it():
    before, done = signal.signal(signal.SIGINT, signal.default_int_handler), []
    try:
        with pytest.raises(KeyboardInterrupt), delayed_interrupt():
            done.append(signal.raise_signal(signal.SIGINT))
        assert done == [None]  # the block went on
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
