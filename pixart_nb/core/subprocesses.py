"""Calls a function in a process of its own.

MindSpore keeps the activation memory of everything it computed; here it is freed when the process ends.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pixart_nb.core.errors import PixArtNBError

_COMMAND = "import sys; from pixart_nb.core import subprocesses; subprocesses.answer(sys.argv[1])"


class SubprocessError(PixArtNBError):
    """A process of its own ended without a result."""


def run_in_subprocess(task: str, function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(*args)``, called in another process that shares the terminal.

    Args:
        task: What the process does ("measures the speed"), for the error message.
        function: Function of a module. Arguments and result must be picklable.

    Raises:
        SubprocessError: the process ended early; the reason is in its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result"
        code = subprocess.run(
            [sys.executable, "-c", _COMMAND, str(path)],
            input=pickle.dumps((function, args)),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(entry or os.getcwd() for entry in sys.path)},
        ).returncode
        if code or not path.exists():
            raise SubprocessError(
                f"the process that {task} ended with exit code {code}; its output is above. Exit code -9 usually "
                "means that memory ran out."
            )
        return pickle.loads(path.read_bytes())


def answer(path: str) -> None:
    """Call the function that arrives on the standard input and write its result to ``path``."""
    function, args = pickle.load(sys.stdin.buffer)
    Path(path).write_bytes(pickle.dumps(function(*args)))
