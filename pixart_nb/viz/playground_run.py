"""Playground without widgets: a run that can be cancelled between two steps, the history, and files."""

from __future__ import annotations

import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.images import file_stem, to_uint8, write_new_image
from pixart_nb.viz.event_loop import give_way, giving_way
from pixart_nb.viz.figures import image_grid
from pixart_nb.viz.pixels import tiles
from pixart_nb.viz.playground_parameters import HISTORY, Parameters
from pixart_nb.viz.playground_sources import (
    ControlNets,
    arguments,
    each_with_adapters,
    kept_outside,
    with_adapters,
    write_source,
)
from pixart_nb.viz.style import Figure

#: A preview is due once the steps since the last one took this many times as long as it did.
PREVIEW_PAUSE = 4
#: Bytes of the predictions that a session keeps, of its last runs, to look at single steps.
KEPT_BYTES = 256 * 2**20
#: Latents with more cells a side than this are thinned for a preview.
PREVIEW_CELLS = 32


@dataclass(frozen=True, eq=False)
class Entry:
    """Finished images (N, H, W, 3) uint8, their parameters, their index in the history, and their seconds."""

    number: int
    parameters: Parameters
    images: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Progress:
    """Finished steps, total steps, and remaining seconds (None before the first step is done)."""

    done: int
    total: int
    seconds_left: float | None = None


class State(str, Enum):
    """State of a session."""

    IDLE = "idle"
    SAMPLING = "sampling"
    CANCELLING = "cancelling"


class Session:
    """Samples with a pipeline, one run at a time, and keeps a history.

    ``on_change()`` is called after every change of an attribute. ``images`` (N, H, W, 3) uint8 are a preview, or
    those of ``entry``, which is None during a run and after a cancelled one.
    """

    def __init__(
        self,
        pipe: Any,
        on_change: Callable[[], None] = lambda: None,
        history_limit: int = HISTORY,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.pipe, self._on_change, self._limit, self._clock = pipe, on_change, history_limit, clock
        self.state, self.progress = State.IDLE, Progress(0, 1)
        self.images: np.ndarray | None = None
        self.entry: Entry | None = None
        self.history: list[Entry] = []
        self.notes: list[str] = []  # warnings about the prompt of the last run
        self._count, self._controlnets = 0, ControlNets()
        self._predicted: dict[int, list[np.ndarray]] = {}  # latents that each step of an entry predicted

    async def sample(self, parameters: Parameters, listed: bool = True) -> Entry | None:
        """Draw, giving way to other tasks between two steps; the new entry, or None if ``cancel`` came first.

        An entry that is not ``listed`` is shown, but is not in the history. The images before it stay until its first
        preview, so that they do not flicker while somebody types.

        Raises:
            RuntimeError: a run is under way.
            ValueError: the parameters do not fit each other or the pipeline.
        """
        if self.state is not State.IDLE:
            raise RuntimeError("a run is under way; wait for it, or cancel it")
        parameters.check()
        images = None if listed else self.images
        self._set(state=State.SAMPLING, progress=Progress(0, parameters.taken), entry=None, images=images)
        started = self._clock()
        done: dict[str, Any] = {}
        try:
            images = await self._run(parameters)
            if images is not None:
                done = self._remembered(Entry(self._count + 1, parameters, images, self._clock() - started), listed)
        finally:
            self._set(state=State.IDLE, **done)
        return self.entry

    def cancel(self) -> None:
        """End the active run after its current step."""
        if self.state is State.SAMPLING:
            self._set(state=State.CANCELLING)

    def show(self, entry: Entry | None, images: np.ndarray | None = None) -> None:
        """Show an earlier entry, or images of several entries; ignored during a run."""
        if self.state is State.IDLE:
            self._set(entry=entry, images=entry.images if entry else images)

    def steps_of(self, entry: Entry) -> int:
        """Return the number of steps whose predictions are kept; 0 for entries of long ago."""
        return len(self._predicted.get(entry.number, ()))

    def show_step(self, step: int) -> None:
        """Show what a step of the current entry predicted, 1 .. ``steps_of(entry)``; ignored during a run."""
        if self.state is State.IDLE and self.entry is not None and 1 <= step <= self.steps_of(self.entry):
            last = step == self.steps_of(self.entry)
            latents = self._predicted[self.entry.number][step - 1]
            self._set(images=self.entry.images if last else self._decode(latents))

    async def _run(self, parameters: Parameters) -> np.ndarray | None:
        """The images (N, H, W, 3) uint8, or None if the run was cancelled."""
        pipe = self._controlnets.pipeline(self.pipe, parameters)
        self.notes = []
        with noted(self.notes), with_adapters(self.pipe, parameters):
            steps = each_with_adapters(self.pipe, parameters, begun(pipe, parameters))
        async with aclosing(giving_way(steps)) as records:
            latents = await self._follow(records, parameters.taken)
        images: list[np.ndarray] = []
        for row in latents if latents is not None else ():
            await give_way()
            if self.state is State.CANCELLING:
                return None
            images.append(self._decode(row[None])[0])
        return kept_outside(np.stack(images), parameters) if images else None

    async def _follow(self, records: AsyncIterator[Any], total: int) -> np.ndarray | None:
        """Consume the conditioning and the steps, with progress and previews; the last latents."""
        with noted(self.notes):
            await anext(records)
        started = preview_ended = self._clock()
        cost, latents = 0.0, None
        predicted = self._predicted[self._count + 1] = []
        async for step in records:
            predicted.append(np.array(step.denoised))
            latents, done, now = step.latents, step.index + 1, self._clock()
            left = (now - started) / done * max(total - done, 0)
            self._set(progress=Progress(done, max(total, done), left))
            if self.state is State.CANCELLING:
                return None
            if done < total and now - preview_ended >= PREVIEW_PAUSE * cost:
                self._set(images=self._decode(thinned(step.denoised)))
                preview_ended = self._clock()
                cost = preview_ended - now
        return latents

    def _decode(self, latents: np.ndarray) -> np.ndarray:
        return to_uint8(self.pipe.decode_latents(np.ascontiguousarray(latents)))

    def _remembered(self, entry: Entry, listed: bool) -> dict[str, Any]:
        """Return the changes when images are finished."""
        self._count += listed
        sizes = {number: sum(array.nbytes for array in arrays) for number, arrays in self._predicted.items()}
        while sum(sizes.values()) > KEPT_BYTES:
            del self._predicted[next(iter(sizes))], sizes[next(iter(sizes))]
        history = [*self.history, entry][-self._limit :] if listed else self.history
        return {"history": history, "entry": entry, "images": entry.images}

    def _set(self, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(self, name, value)
        self._on_change()


@contextmanager
def noted(notes: list[str]) -> Iterator[None]:
    """Add the warnings of the block to ``notes``, in place of printing them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    notes += [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def begun(pipe: Any, parameters: Parameters) -> Iterator[Any]:
    """Return the generator ``pipe.sample`` with the selected scheduler; the pipeline keeps its own."""
    own = pipe.scheduler
    pipe.scheduler = parameters.scheduler
    try:
        return pipe.sample(**parameters.call(), **arguments(pipe, parameters))
    finally:
        pipe.scheduler = own


def thinned(latents: np.ndarray) -> np.ndarray:
    """Subsample latents (N, C, h, w) to at most ``PREVIEW_CELLS`` cells per side."""
    every = -(-max(latents.shape[2:]) // PREVIEW_CELLS)
    return latents[:, :, ::every, ::every]


def save_entry(entry: Entry, folder: str | Path, others: Mapping[str, Any] | None = None) -> list[Path]:
    """Write each image of an entry as a PNG that carries the configuration that repeats it, with ``others``.

    A file that exists is never replaced by another image.
    """
    paths, stem = [], f"{file_stem(entry.parameters.prompt) or 'image'}_seed-{entry.parameters.seed}"
    others = dict(others or {}) | write_source(Path(folder) / f"{stem}.png", entry.parameters)
    for number, pixels in enumerate(entry.images):
        parameters = others | entry.parameters.configuration(number)
        path = Path(folder) / f"{stem}_{number}.png"
        paths.append(write_new_image(path, pixels, parameters))
    return paths


def history_figure(history: Sequence[Entry], columns: int = 4) -> Figure:
    """Draw the history: the images of each entry with its parameters above."""
    if not history:
        raise PixArtNBError("the history is empty; sample something first")
    sheets = [np.where(s[..., 3:] > 0, s[..., :3], np.uint8(255)) for s in (tiles(e.images) for e in history)]
    titles = [f"{entry.number}: {entry.parameters.summary}" for entry in history]
    return image_grid(sheets, titles, columns=columns, cell=2.6)
