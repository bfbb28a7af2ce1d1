"""What this process takes of the machine's memory: how much, the most that it took, and giving it back."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from contextlib import suppress

import psutil

#: Seconds between two looks at the memory.
_INTERVAL = 0.005


def in_use() -> int:
    """Bytes of memory that only this process holds. Pages of mapped files, which the system may drop, do not count."""
    found = psutil.Process().memory_info()
    return found.rss - getattr(found, "shared", 0)


def mapped_pages() -> int:
    """Bytes of mapped files that are in memory for this process; 0 where the system does not tell."""
    return getattr(psutil.Process().memory_info(), "shared", 0)


def available() -> int:
    """Bytes that this process may still take: what the machine has free, within the limit of its container."""
    free = psutil.virtual_memory().available
    return max(0, min([free, *(limit - in_use() for limit in _container_limits())]))


def _container_limits() -> list[int]:
    limits = []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError), open(path) as file:
            limits.append(int(file.read()))
    return limits


def release() -> None:
    """Give freed memory back to the system: what the allocator of the C library keeps for later, on Linux."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


class PeakMemory:
    """The most memory that this process held while a block ran: ``with PeakMemory() as memory: ...; memory.peak``.

    ``interval``: seconds between two looks. Each of them holds up a network of small operators a little.
    """

    def __init__(self, interval: float = _INTERVAL):
        self.before = self.peak = 0
        self.interval = interval
        self._done = threading.Event()

    def __enter__(self) -> PeakMemory:
        self.before = self.peak = in_use()
        self._done.clear()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(self.interval):
            self.look()

    def look(self) -> int:
        """The most so far, now included, in bytes."""
        self.peak = max(self.peak, in_use())
        return self.peak

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.look()
