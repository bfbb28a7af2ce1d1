"""Long work on the kernel's event loop, one step at a time, so that clicks and other cells are handled in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

#: Turns of the event loop between two steps: a message takes a few from the socket to the widget's callback.
TURNS = 8


async def give_way() -> None:
    """Let the event loop handle what has come in since."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


async def giving_way(records: Iterator[Any]) -> AsyncIterator[Any]:
    """Yield the records of an iterator that computes, with time for other tasks before each and after the last.

    A generator is closed at the end, however that comes.
    """
    try:
        await give_way()
        for record in records:
            await give_way()
            yield record
    finally:
        if hasattr(records, "close"):
            records.close()


class KernelLoop:
    """Event loop of the kernel, on which callbacks of widgets run; JupyterLab may deliver clicks on another thread."""

    def __init__(self):
        self._loop, self.task = _running_loop(), None

    def on_loop(self, act: Callable[[], Any]) -> Callable[[Any], None]:
        """Return a callback of a button that calls ``act`` on the event loop."""

        def callback(_: Any) -> None:
            current = _running_loop()
            self._loop = self._loop or current
            if self._loop is current:
                act()
            else:
                self._loop.call_soon_threadsafe(act)

        return callback

    def start(self, work: Coroutine) -> None:
        """Run a coroutine as a task. Its errors are those that it shows itself."""
        self.task = asyncio.ensure_future(work)
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
