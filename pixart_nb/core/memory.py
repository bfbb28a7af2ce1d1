"""Memory of this process and of the machine or device it runs on."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from contextlib import suppress
from pathlib import Path

import psutil

from pixart_nb.core import backend

#: Seconds between two measurements of ``PeakMemory``.
_INTERVAL = 0.005
#: Files with the limit and the usage of a container, for cgroups version 2 and 1.
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def in_use() -> int:
    """Return the bytes of memory that only this process holds, without pages of mapped files."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


def mapped_pages() -> int:
    """Return the bytes of mapped files that are in memory for this process; 0 where the system does not tell."""
    return getattr(psutil.Process().memory_info(), "shared", 0)


def available() -> int:
    """Return the bytes that this process may still take on the device that it computes on.

    On a CPU: the free memory of the machine, within what the limit of the container leaves beside all of its
    processes. On Ascend: the free memory of the device (not run on Ascend).
    """
    device = backend.free_device_memory()
    if device is not None:
        return device
    free = [psutil.virtual_memory().available, *_free_in_containers()]
    return max(0, min(free))


def _free_in_containers() -> list[int]:
    free = []
    for limit, usage, stat in _CGROUPS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            used = int(Path(usage).read_text())
            counters = dict(line.split()[:2] for line in Path(stat).read_text().splitlines())
            # the system drops cached pages of files before a process is refused memory
            cached = int(counters.get("inactive_file", counters.get("total_inactive_file", 0)))
            free.append(int(Path(limit).read_text()) - used + cached)
    return free


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
