"""A copy of protobuf for MindSpore, where another library imported protobuf first."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

_NAME, _KEY = "google.protobuf", "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"


def import_mindspore() -> None:
    """Import MindSpore with a copy of protobuf of its own, if it needs another implementation than the imported one.

    MindSpore's generated files need protobuf's Python implementation, which is chosen at protobuf's first import. With
    another one they end in "Descriptors cannot be created directly".
    """
    api = sys.modules.get(f"{_NAME}.internal.api_implementation")
    if api is None or api.Type() == "python" or "mindspore" in sys.modules:
        return
    others, implementation = _pop_modules(), os.environ.get(_KEY)
    os.environ[_KEY] = "python"
    try:
        importlib.import_module("mindspore")
    finally:
        _pop_modules()
        sys.modules.update(others)
        sys.modules["google"].protobuf = others[_NAME]
        if implementation is not None:
            os.environ[_KEY] = implementation


def _pop_modules() -> dict[str, ModuleType]:
    """Remove protobuf from the imported modules and return it."""
    names = [name for name in sys.modules if name == _NAME or name.startswith(f"{_NAME}.")]
    return {name: sys.modules.pop(name) for name in names}
