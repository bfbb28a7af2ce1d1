"""Playground without widgets: parameters, a run that can be cancelled between two steps, the history, and files."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.config import GUIDANCE_SCALE, SAMPLING_METHOD, SAMPLING_STEPS, check_config
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.images import read_parameters, write_new_image
from pixart_nb.core.sampling.samplers import image_generators, steps_taken
from pixart_nb.viz.event_loop import give_way, giving_way
from pixart_nb.viz.figures import image_grid
from pixart_nb.viz.pixels import tiles
from pixart_nb.viz.playground_sources import arguments, kept_outside, write_source
from pixart_nb.viz.style import Figure

#: Entries that a history keeps.
HISTORY = 24
#: A preview is due once the steps since the last one took this many times as long as it did.
PREVIEW_PAUSE = 4
#: Bytes of the predictions that a session keeps, of its last runs, to look at single steps.
KEPT_BYTES = 256 * 2**20
#: Parameters that can be swept, and the type of their values.
SWEPT = {"guidance": float, "steps": int, "seed": int, "scheduler": str}
#: Latents with more cells a side than this are thinned for a preview.
PREVIEW_CELLS = 32


@dataclass(frozen=True)
class Parameters:
    """Parameters of a set of images of one prompt; sizes in pixels.

    ``image`` and ``mask`` are the bytes of files, empty for none: image-to-image takes the last ``strength`` of the
    steps from the image, and with a mask its white part alone changes. ``adapters``: (name, weight) of each LoRA.
    """

    prompt: str
    height: int
    width: int
    negative_prompt: str = ""
    steps: int = SAMPLING_STEPS
    guidance: float = GUIDANCE_SCALE
    scheduler: str = SAMPLING_METHOD
    seed: int = 0
    count: int = 1
    image: bytes = field(default=b"", repr=False)
    mask: bytes = field(default=b"", repr=False)
    strength: float = 0.8
    adapters: tuple[tuple[str, float], ...] = ()

    def check(self) -> None:
        """Refuse parameters that the pipeline would not refuse."""
        if not self.prompt.strip():
            raise PixArtNBError("the prompt is empty; write what to draw, for example 'a red mushroom on grass'")
        if self.count < 1:
            raise PixArtNBError(f"the number of images is {self.count}; expected at least 1")
        if self.seed < 0:
            raise PixArtNBError(f"the seed is {self.seed}; expected 0 or more")
        if self.mask and not self.image:
            raise PixArtNBError("a mask was given without an image to paint in; give both")

    @property
    def taken(self) -> int:
        """Number of steps that a run takes."""
        return steps_taken(self.steps, self.strength) if self.image else self.steps

    def call(self) -> dict[str, Any]:
        """Return the arguments of ``pipe.sample``. Image k of a seed does not depend on the images beside it."""
        return {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "num_images_per_prompt": self.count,
            "height": self.height,
            "width": self.width,
            "generator": image_generators(self.seed, range(self.count)),
        }

    @classmethod
    def read(cls, path: str | Path) -> Parameters:
        """Return the parameters of a PNG that the playground or ``pixart-nb sample`` wrote.

        Only what shapes the image is taken. A file without parameters, or with values that do not fit, is refused.
        """
        written = read_parameters(path)
        keys = cls("", 0, 0).configuration()
        config = check_config({"model": "any"} | {key: written[key] for key in keys if key in written})
        return cls(
            config.prompt[0] if config.prompt else "",
            config.image_height,
            config.image_width,
            config.negative_prompt if isinstance(config.negative_prompt, str) else " ".join(config.negative_prompt),
            config.sampling_steps,
            config.guidance_scale,
            config.sampling_method or SAMPLING_METHOD,
            config.seed,
            config.first_image + 1,
        )

    def swept(self, name: str, values: str) -> list[Parameters]:
        """Return copies with each of the values, separated by commas, of one of ``SWEPT``."""
        if name not in SWEPT:
            raise PixArtNBError(f"{name!r} cannot be swept; expected one of {', '.join(SWEPT)}")
        texts = [text.strip() for text in values.split(",") if text.strip()]
        try:
            copies = [replace(self, **{name: SWEPT[name](text)}) for text in texts]
        except ValueError:
            raise PixArtNBError(f"the values of {name} are {values!r}; expected numbers, such as 2, 4, 6") from None
        if not 1 <= len(copies) <= HISTORY:
            raise PixArtNBError(f"{len(copies)} values of {name} were given; expected 1 to {HISTORY}, such as 2, 4, 6")
        return copies

    def configuration(self, number: int = 0) -> dict[str, Any]:
        """Return the configuration that repeats image ``number``, with the keys of configuration files."""
        return {
            "prompt": [self.prompt],
            "negative_prompt": self.negative_prompt,
            "image_height": self.height,
            "image_width": self.width,
            "use_resolution_binning": False,
            "sampling_method": self.scheduler,
            "sampling_steps": self.steps,
            "guidance_scale": self.guidance,
            "seed": self.seed,
            "first_image": number,
        }

    @property
    def summary(self) -> str:
        """Parameters in one line.

        >>> Parameters("a red cup", 64, 96, seed=3, count=2).summary
        'a red cup · 96 x 64 · dpm++, 20 steps · guidance 4.5 · seed 3, 2 images'
        """
        without = f" · without {self.negative_prompt}" if self.negative_prompt else ""
        image = f" · {'inside a mask' if self.mask else 'from an image'}, strength {self.strength:g}" * bool(self.image)
        adapters = "".join(f" · {name} {weight:g}" for name, weight in self.adapters)
        images = f", {self.count} images" if self.count > 1 else ""
        return (
            f"{self.prompt}{without} · {self.width} x {self.height} · {self.scheduler}, {self.steps} steps · "
            f"guidance {self.guidance:g} · seed {self.seed}{images}{image}{adapters}"
        )


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
        self._count = 0
        self._predicted: dict[int, list[np.ndarray]] = {}  # latents that each step of an entry predicted

    async def sample(self, parameters: Parameters) -> Entry | None:
        """Draw, giving way to other tasks between two steps; the new entry, or None if ``cancel`` came first.

        Raises:
            RuntimeError: a run is under way.
            ValueError: the parameters do not fit each other or the pipeline.
        """
        if self.state is not State.IDLE:
            raise RuntimeError("a run is under way; wait for it, or cancel it")
        parameters.check()
        self._set(state=State.SAMPLING, progress=Progress(0, parameters.taken), entry=None, images=None)
        started = self._clock()
        done: dict[str, Any] = {}
        try:
            images = await self._run(parameters)
            if images is not None:
                done = self._remembered(parameters, images, self._clock() - started)
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
        async with aclosing(giving_way(begun(self.pipe, parameters))) as records:
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
        images = self.pipe.decode_latents(np.ascontiguousarray(latents))
        return (np.clip(images, 0, 1) * 255).round().astype(np.uint8)

    def _remembered(self, parameters: Parameters, images: np.ndarray, seconds: float) -> dict[str, Any]:
        """Return the changes when images are finished."""
        self._count += 1
        sizes = {number: sum(array.nbytes for array in arrays) for number, arrays in self._predicted.items()}
        while sum(sizes.values()) > KEPT_BYTES:
            del self._predicted[next(iter(sizes))], sizes[next(iter(sizes))]
        entry = Entry(self._count, parameters, images, seconds)
        return {"history": [*self.history, entry][-self._limit :], "entry": entry, "images": images}

    def _set(self, **changes: Any) -> None:
        for name, value in changes.items():
            setattr(self, name, value)
        self._on_change()


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
    words = re.sub(r"[^a-z0-9]+", "-", entry.parameters.prompt.lower()).strip("-")[:60] or "image"
    paths, stem = [], f"{words}_seed-{entry.parameters.seed}"
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
