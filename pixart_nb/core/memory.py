"""Memory of this process and of the device it runs on, and processes that free their memory when they end."""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from pixart_nb.core import backend
from pixart_nb.core.errors import PixArtNBError

#: Seconds between two measurements of ``PeakMemory``.
_INTERVAL = 0.005
#: Folder of the control groups of memory, and the files of the limit and the usage of one, for versions 2 and 1.
_CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)
_OWN_CGROUPS = "/proc/self/cgroup"
_COMMAND = "import sys; from pixart_nb.core import memory; memory.answer(sys.argv[1])"


class SubprocessError(PixArtNBError):
    """A process of its own ended without a result."""


def in_use() -> int:
    """Return the bytes of memory that only this process holds, without pages of mapped files."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


def mapped_pages() -> int:
    """Return the bytes of mapped files that are in memory for this process; 0 where the system does not tell."""
    return getattr(psutil.Process().memory_info(), "shared", 0)


def available() -> int:
    """Return the free bytes of the device: the memory of Ascend (not run on Ascend), or that of the host."""
    device = backend.free_device_memory()
    return available_on_host() if device is None else device


def available_on_host() -> int:
    """Return the free memory of the machine, within what the limit of the container leaves beside its processes."""
    free = [psutil.virtual_memory().available, *_free_in_containers()]
    return max(0, min(free))


def _free_in_containers() -> list[int]:
    """Return what each limit leaves: that of the container, and those of a job or service inside of it."""
    free = []
    for root, limit, usage in _CGROUPS:
        for group in _own_groups(Path(root)):
            with suppress(OSError, ValueError):  # no such file, or "max"
                used = int((group / usage).read_text())
                counters = dict(line.split()[:2] for line in (group / "memory.stat").read_text().splitlines())
                # the system drops cached pages of files before a process is refused memory
                cached = int(counters.get("total_inactive_file", counters.get("inactive_file", 0)))
                free.append(int((group / limit).read_text()) - used + cached)
    return free


def _own_groups(root: Path) -> list[Path]:
    """Return the folders of the control groups that this process is in, the outer first."""
    groups = [root]
    with suppress(OSError):
        for line in Path(_OWN_CGROUPS).read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "memory" in controllers.split(","):  # versions 2 and 1
                own = root / path.lstrip("/")
                groups += [group for group in (*own.parents, own) if root in group.parents]
    return groups


def release() -> None:
    """Return freed memory to the system, which the C library of Linux otherwise keeps."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


class PeakMemory:
    """Peak memory of this process while a block runs: ``with PeakMemory() as memory: ...; memory.peak``.

    Args:
        interval: Seconds between two measurements. Each slows a network of small operators a little.
    """

    def __init__(self, interval: float = _INTERVAL):
        self.before = self.peak = 0
        self.interval = interval
        self._done = threading.Event()

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = in_use()
        self._done.clear()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(self.interval):
            self.update()

    def update(self) -> int:
        """Measure now and return the peak so far, in bytes."""
        self.peak = max(self.peak, in_use())
        return self.peak

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.update()


def run_in_subprocess(task: str, function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(*args)``, called in another process that shares the terminal.

    MindSpore keeps the activation memory of everything it computed; here it is freed when the process ends.

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
