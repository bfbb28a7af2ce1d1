"""Playground: a widget that samples with a pipeline, shows the image at every step, and keeps a history."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz.playground_run import Entry, Parameters, Session, State, save_entry
from pixart_nb.viz.playground_view import View, make_controls


class Playground:
    """Widget around a ``Session``. Put it on the last line of a cell.

    Sampling runs in a task of the kernel's event loop, one step at a time, so other cells can run between two steps and
    Cancel works. ``await playground.sample()`` presses Sample from code.

    Args:
        pipe: Pipeline with ``sample(...)``, ``decode_latents`` and ``scheduler``.
        sizes: (height, width) in pixels to select from.
        schedulers: Short names to select from.
        folder: Folder that Save writes to.
        others: Further parameters of a saved image, such as ``{"model": "..."}``.
        start: Initial parameters by name (see ``Parameters``); size and scheduler default to the first ones.
    """

    def __init__(
        self,
        pipe: Any,
        sizes: Sequence[tuple[int, int]],
        schedulers: Sequence[str] = ("dpm++",),
        folder: str | Path = "outputs/playground",
        others: Mapping[str, Any] | None = None,
        **start: Any,
    ):
        if not sizes or not schedulers:
            raise PixArtNBError(f"need a size and a scheduler to choose from, got {sizes} and {schedulers}")
        parameters = dict(zip(("height", "width"), sizes[0], strict=True)) | {"scheduler": schedulers[0]}
        self.controls = make_controls(Parameters(**{"prompt": ""} | parameters | start), sizes, schedulers)
        self.view = View(self.controls)
        self.session = Session(pipe, self._render)
        self.folder, self._others = Path(folder), dict(others or {})
        self._loop, self._task, self._rendered = _running_loop(), None, None
        for button, act in (
            (self.view.sample, self._start),
            (self.view.cancel, self.cancel),
            (self.view.save, self.save),
            (self.view.next_seed, self._next_seed),
            (self.view.random_seed, self._random_seed),
        ):
            button.on_click(self._clicked(act))
        self._render()

    # ---- what it is set to, and what it does

    @property
    def parameters(self) -> Parameters:
        """Parameters that the controls show; assign to set the controls."""
        values = {name: control.value for name, control in self.controls.items()}
        height, width = values.pop("size")
        return Parameters(height=height, width=width, **values)

    @parameters.setter
    def parameters(self, value: Parameters) -> None:
        for name, control in self.controls.items():
            control.value = (value.height, value.width) if name == "size" else getattr(value, name)
        if self.parameters != value:
            raise PixArtNBError(f"the controls reach {self.parameters} only; asked for {value}")

    @property
    def history(self) -> list[Entry]:
        """Entries, oldest first."""
        return self.session.history

    async def sample(self) -> Entry | None:
        """Draw with the parameters as they are set; None if the run was cancelled. Errors are shown, and raised."""
        self.view.say("")
        try:
            entry = await self.session.sample(self.parameters)
        except Exception as error:
            self.view.say(_in_words(error), wrong=True)
            raise
        if entry is None:
            progress = self.session.progress
            self.view.say(f"Cancelled after step {progress.done} of {progress.total}.")
        return entry

    def cancel(self) -> None:
        """End the run after its current step."""
        self.session.cancel()

    def save(self) -> list[Path]:
        """Write the images that are shown with their parameters; none if there is no finished one."""
        entry = self.session.entry
        try:
            if entry is None:
                raise PixArtNBError("there is no finished image to save; sample one, or choose one below")
            paths = save_entry(entry, self.folder, self._others)
        except (OSError, ValueError) as error:
            self.view.say(_in_words(error), wrong=True)
            return []
        self.view.say(f"Saved {', '.join(str(path) for path in paths)}")
        return paths

    def restore(self, entry: Entry) -> None:
        """Set the controls to the parameters of an entry, and show its images unless a run is active."""
        self.parameters = entry.parameters
        self.session.show(entry)

    def _repr_mimebundle_(self, **options: Any):
        return self.view.widget._repr_mimebundle_(**options)

    # ---- clicks

    def _clicked(self, act: Callable[[], Any]) -> Callable[[Any], None]:
        """Return a callback that runs on the kernel's event loop; JupyterLab may deliver clicks on another thread."""

        def callback(_: Any) -> None:
            current = _running_loop()
            self._loop = self._loop or current
            if self._loop is current:
                act()
            else:
                self._loop.call_soon_threadsafe(act)

        return callback

    def _start(self) -> None:
        if self.session.state is State.IDLE:
            self._task = asyncio.ensure_future(self.sample())
            self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # shown already

    def _next_seed(self) -> None:
        self.controls["seed"].value += 1

    def _random_seed(self) -> None:
        self.controls["seed"].value = int(np.random.default_rng().integers(2**31))

    # ---- what is shown

    def _render(self) -> None:
        session = self.session
        if session.images is not self._rendered:
            self._rendered = session.images
            self.view.show_images(session.images)
        self.view.show_progress(session.state, session.progress)
        self.view.show_history(session.history, lambda entry: self._clicked(partial(self.restore, entry)))
        self.view.show_entry(session.entry)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _in_words(error: Exception) -> str:
    """Return an error as one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
