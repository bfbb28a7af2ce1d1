"""The answer of a function that is called in a process of its own.

MindSpore keeps the memory that it once computed in; here it ends with the process. And only in a fresh process is a
network's first call what a user's first call is.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pixart_nb.core.errors import PixArtNBError

_COMMAND = "import sys; from pixart_nb.core import apart; apart.answer(sys.argv[1])"


class ProcessError(PixArtNBError):
    """A process of its own did not come to its end."""


def apart(what: str, function: Callable[..., Any], *given: Any) -> Any:
    """``function(*given)``, called in another process, whose output and progress bars are this one's.

    The function is one of a module, and what it is given and answers can be pickled. ``what`` it does, for the message.

    Raises ``ProcessError`` if the process ends early; the reason is then on its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer"
        asked = pickle.dumps((function, given))
        code = subprocess.run([sys.executable, "-c", _COMMAND, str(path)], input=asked).returncode
        if code or not path.exists():
            raise ProcessError(
                f"the process that {what} ended with code {code}; what it wrote is above. Code -9 usually means that "
                "memory ran out."
            )
        return pickle.loads(path.read_bytes())


def answer(path: str) -> None:
    """In the other process: call what is asked on the standard input, and write what it answers."""
    function, given = pickle.load(sys.stdin.buffer)
    Path(path).write_bytes(pickle.dumps(function(*given)))
