"""Playground: a widget that samples with a pipeline, shows the image at every step, and keeps a history."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.viz.event_loop import KernelLoop
from pixart_nb.viz.playground_run import Entry, Parameters, Session, State, save_entry
from pixart_nb.viz.playground_view import View, make_controls, size_name


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
        self._loop, self._rendered = KernelLoop(), None
        for button, act in (
            (self.view.sample, lambda: self._start(self.sample())),
            (self.view.sweep, lambda: self._start(self.sweep(self.view.swept.value, self.view.values.value))),
            (self.view.cancel, self.cancel),
            (self.view.save, self.save),
            (self.view.next_seed, self._next_seed),
            (self.view.random_seed, self._random_seed),
        ):
            button.on_click(self._loop.on_loop(act))
        self.view.load.observe(self._loop.on_loop(self._uploaded), "value")
        self.view.step.observe(self._loop.on_loop(lambda: self.session.show_step(self.view.step.value)), "value")
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

    async def sweep(self, name: str, values: str) -> list[Entry]:
        """Draw once with each of the values (separated by commas) of one parameter, and show them side by side.

        The finished entries are in the history; Cancel ends the sweep.
        """
        entries: list[Entry] = []
        try:
            for parameters in self.parameters.swept(name, values):
                self.view.say(f"{name} {getattr(parameters, name)}")
                entry = await self.session.sample(parameters)
                if entry is None:
                    break
                entries.append(entry)
        except Exception as error:
            self.view.say(_in_words(error), wrong=True)
            raise
        if entries:
            values = ", ".join(f"{getattr(entry.parameters, name)}" for entry in entries)
            caption = f"{entries[0].parameters.prompt}: {name} {values}, in reading order. Each is in the history."
            self.session.show(None, np.stack([entry.images[0] for entry in entries]))
            self.view.say_below(caption)
            self.view.say("")
        return entries

    def load(self, path: str | Path) -> None:
        """Set the controls to the parameters of a saved PNG; nothing else of it is used."""
        loaded = Parameters.read(path)
        for name, value in (("size", (loaded.height, loaded.width)), ("scheduler", loaded.scheduler)):
            options = self.controls[name].options
            if value not in [option[1] if isinstance(option, tuple) else option for option in options]:
                new = (size_name(*value), value) if name == "size" else value
                self.controls[name].options = [*options, new]
        self.parameters = loaded

    def _uploaded(self) -> None:
        files = self.view.load.value
        if not files:
            return
        try:
            with TemporaryDirectory() as folder:
                path = Path(folder) / "image.png"
                path.write_bytes(files[0]["content"])
                self.load(path)
            self.view.say(f"Parameters of {files[0]['name']}; Sample draws it again.")
        except (OSError, ValueError) as error:
            self.view.say(_in_words(error).replace(f"{folder}/", ""), wrong=True)
        self.view.load.value = ()

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

    def _start(self, run: Coroutine) -> None:
        if self.session.state is State.IDLE:
            self._loop.start(run)
        else:
            run.close()

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
        self.view.show_history(session.history, lambda entry: self._loop.on_loop(partial(self.restore, entry)))
        self.view.show_entry(session.entry, session.steps_of(session.entry) if session.entry else 0)


def _in_words(error: Exception) -> str:
    """Return an error as one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
