"""Handling of SIGINT and SIGTERM while a training must not be cut."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_signal(handler: Callable) -> Iterator[None]:
    """Handle SIGINT and SIGTERM with ``handler`` for a while; Python gives signals to the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
