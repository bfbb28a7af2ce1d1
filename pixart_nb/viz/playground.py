"""Playground: a widget that samples with a pipeline, shows the image at every step, and keeps a history."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from ipywidgets import FileUpload

from pixart_nb.config.keys import lora_name, split_weight
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import write_once
from pixart_nb.viz.event_loop import KernelLoop
from pixart_nb.viz.pixels import png_bytes
from pixart_nb.viz.playground_parameters import LCM_LORA, Parameters
from pixart_nb.viz.playground_run import Entry, Session, State, save_entry
from pixart_nb.viz.playground_sources import adapters_of, edges_of, fitted, is_from, load_beside, opened
from pixart_nb.viz.playground_view import View, make_controls, set_control, size_name
from pixart_nb.viz.widget_parts import mime_bundle, say


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
        examples: Prompts to choose from in a menu.
        lcm_lora: LCM-LoRA of the pipeline, a file or folder. It adds a box that draws while one types, in four steps.
        start: Initial parameters by name (see ``Parameters``); size and scheduler default to the first ones.
    """

    def __init__(
        self,
        pipe: Any,
        sizes: Sequence[tuple[int, int]],
        schedulers: Sequence[str] = ("dpm++",),
        folder: str | Path = "outputs/playground",
        others: Mapping[str, Any] | None = None,
        examples: Sequence[str] = (),
        lcm_lora: str | Path = "",
        **start: Any,
    ):
        if not sizes or not schedulers:
            raise PixArtNBError(f"need a size and a scheduler to choose from, got {sizes} and {schedulers}")
        parameters = dict(zip(("height", "width"), sizes[0], strict=True)) | {"scheduler": schedulers[0]}
        self.controls = make_controls(Parameters(**{"prompt": ""} | parameters | start), sizes, schedulers)
        self.view = View(self.controls, examples)
        self.session = Session(pipe, self._render)
        self.folder, self._others = Path(folder), dict(others or {})
        self._loop, self._rendered = KernelLoop(), None
        of_config = self._others.get("lora") or ()
        self._files = {lora_name(k): split_weight(text)[0] for k, text in enumerate(of_config)}  # by adapter
        self.view.source.set(start.get("image", b""), start.get("mask", b""))
        self.view.control.png = start.get("control_image", b"")
        self.view.adapters.show(adapters_of(pipe))
        self._retyped = self._drawing_typed = False
        if lcm_lora:
            self._load_lcm(lcm_lora)
            self.view.typing.layout.display = ""
            self.controls["prompt"].observe(self._loop.on_loop(self._typed), "value")
        if "adapters" in start:
            self.view.adapters.value = start["adapters"]
        for button, act in (
            (self.view.sample, lambda: self._start(self.sample())),
            (self.view.sweep, lambda: self._start(self.sweep(self.view.swept.value, self.view.values.value))),
            (self.view.cancel, self.cancel),
            (self.view.save, self.save),
            (self.view.next_seed, self._next_seed),
            (self.view.random_seed, self._random_seed),
        ):
            button.on_click(self._loop.on_loop(act))
        for upload, act in (
            (self.view.load, self._parameters_uploaded),
            (self.view.source.upload, lambda file: self.view.source.set(self._fitted(file))),
            (self.view.control.upload, self._control_uploaded),
            (self.view.adapters.upload, self._adapter_uploaded),
        ):
            upload.observe(self._loop.on_loop(partial(self._uploaded, upload, act)), "value")
        self.view.source.use.on_click(self._loop.on_loop(lambda: self._with_result(self.view.source.set)))
        self.view.control.use.on_click(self._loop.on_loop(lambda: self._with_result(self._edges_as_control)))
        self.view.control.edges.on_click(self._loop.on_loop(lambda: self._edges_as_control(self.view.control.png)))
        self.view.step.observe(self._loop.on_loop(lambda: self.session.show_step(self.view.step.value)), "value")
        self._render()

    # ---- what it is set to, and what it does

    @property
    def parameters(self) -> Parameters:
        """Parameters that the controls show; assign to set the controls."""
        values = {name: control.value for name, control in self.controls.items()}
        height, width = values.pop("size")
        source, adapters = self.view.source.painted, self.view.adapters.value
        values |= {"image": source.png, "mask": source.mask, "control_image": self.view.control.png}
        return Parameters(height=height, width=width, adapters=adapters, **values)

    @parameters.setter
    def parameters(self, value: Parameters) -> None:
        for name, control in self.controls.items():
            set_control(control, (value.height, value.width) if name == "size" else getattr(value, name))
        self.view.source.set(value.image, value.mask)
        self.view.control.png = value.control_image
        self.view.adapters.value = value.adapters
        if self.parameters != value:
            raise PixArtNBError(f"the controls reach {self.parameters} only; asked for {value}")

    @property
    def history(self) -> list[Entry]:
        """Entries, oldest first."""
        return self.session.history

    async def sample(self) -> Entry | None:
        """Draw with the parameters as they are set; None if the run was cancelled. Errors are shown, and raised."""
        self._retyped = False
        entry = await self._draw(self.parameters)
        if self._retyped and self.view.typing.value:  # typed during the run
            self._start(self._draw_typed())
        return entry

    async def _draw(self, parameters: Parameters, listed: bool = True) -> Entry | None:
        self.view.say("")
        try:
            entry = await self.session.sample(parameters, listed)
        except Exception as error:
            self.view.say(_in_words(error), wrong=True)
            raise
        if entry is None and listed:
            progress = self.session.progress
            self.view.say(f"Cancelled after step {progress.done} of {progress.total}.")
        elif self.session.notes:
            self.view.say("; ".join(self.session.notes))
        return entry

    async def _draw_typed(self) -> None:
        """Draw the prompt in few steps, again and again until it is the one in the controls."""
        self._drawing_typed = True
        try:
            while self._retyped and self.controls["prompt"].value.strip():
                self._retyped = False
                await self._draw(self.parameters.in_few_steps, listed=False)
        finally:
            self._drawing_typed = False

    async def sweep(self, name: str, values: str) -> list[Entry]:
        """Draw once with each of the values (separated by commas) of one parameter, and show them side by side.

        The finished entries are in the history; Cancel ends the sweep.
        """
        entries: list[Entry] = []
        notes: dict[str, None] = {}
        try:
            swept = self.parameters.swept(name, values)
            for parameters in swept:
                self.view.say(f"{name} {getattr(parameters, name)}")
                entry = await self.session.sample(parameters)
                notes |= dict.fromkeys(self.session.notes)
                if entry is None:
                    notes[f"Cancelled after {len(entries)} of {len(swept)} values"] = None
                    break
                entries.append(entry)
        except Exception as error:
            self.view.say(_in_words(error), wrong=True)
            raise
        if entries:
            values = ", ".join(f"{getattr(entry.parameters, name)}" for entry in entries)
            caption = f"{entries[0].parameters.prompt}: {name} {values}, in reading order. Each is in the history."
            self.session.show(None, np.stack([entry.images[0] for entry in entries]))
            say(self.view.caption, caption)
        self.view.say("; ".join(notes))
        return entries

    def load(self, path: str | Path) -> list[str]:
        """Set the controls to the parameters of a saved PNG; return those of its parameters that are not taken.

        A LoRA of it is taken if it is loaded.
        """
        names = {file: name for name, file in self._files.items() if name in self.view.adapters.sliders}
        loaded = Parameters.read(path, names)
        missing = loaded.not_taken(path, names, self._others, self.session.pipe)
        self.parameters = loaded
        return missing

    def load_lora(self, path: str | Path, name: str = "", weight: float = 1.0) -> None:
        """Load a LoRA file with a slider of its weight; ``name`` is the file's by default.

        It acts on drawings of the playground alone; the pipeline keeps the adapters that are active.
        """
        name = name or re.sub(r"\W+", "_", Path(path).stem)
        load_beside(self.session.pipe, path, name)
        self._files[name] = str(path)
        self.view.adapters.show(adapters_of(self.session.pipe) | {name: weight})

    def _load_lcm(self, path: str | Path) -> None:
        """Load the LCM-LoRA, unless the pipeline has it, in place of another one of its name."""
        pipe = self.session.pipe
        if is_from(pipe, LCM_LORA, path):
            self._files[LCM_LORA] = str(path)
            return
        if LCM_LORA in adapters_of(pipe):
            pipe.delete_adapters(LCM_LORA)
        self.load_lora(path, LCM_LORA, weight=0.0)

    def _uploaded(self, upload: FileUpload, act: Callable[[Mapping[str, Any]], None]) -> None:
        try:
            for file in upload.value:
                act(file)
        except (OSError, ValueError) as error:
            self.view.say(_in_words(error), wrong=True)
        upload.value = ()

    def _parameters_uploaded(self, file: Mapping[str, Any]) -> None:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "image.png"
            path.write_bytes(file["content"])
            try:
                missing = self.load(path)
            except (OSError, ValueError) as error:
                raise PixArtNBError(str(error).replace(str(path), file["name"])) from error
        rest = f"Sample draws another image, without its {', '.join(missing)}" if missing else "Sample draws it again"
        self.view.say(f"Parameters of {file['name']}; {rest}.")

    def _adapter_uploaded(self, file: Mapping[str, Any]) -> None:
        name, content = Path(file["name"]), bytes(file["content"])
        digest = hashlib.sha256(content).hexdigest()[:8]  # another file of this name must not replace it
        path = self.folder / "adapters" / f"{name.stem}-{digest}{name.suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_once(path, content)
        adapter = re.sub(r"\W+", "_", name.stem)
        if adapter in adapters_of(self.session.pipe):
            adapter = f"{adapter}_{digest}"
        if str(path) in self._files.values():
            return self.view.say(f"{file['name']} is loaded already.")
        self.load_lora(path, adapter)
        self.view.say(f"Loaded {path} as {adapter}")

    def _control_uploaded(self, file: Mapping[str, Any]) -> None:
        self.view.control.png = png_bytes(np.asarray(opened(self._fitted(file))))

    def _fitted(self, file: Mapping[str, Any]) -> bytes:
        """Return the image of a file, cut with a message if its ratio is not that of the size to draw."""
        content, parameters = bytes(file["content"]), self.parameters
        image = fitted(content, parameters)
        if image is not content:
            size = size_name(parameters.height, parameters.width)  # as the control says it
            self.view.say(f"{file['name']} was cut to the ratio of “{size}”, around its middle.")
        return image

    def _edges_as_control(self, image: bytes) -> None:
        """Take the edges of an image, the bytes of a file, as the condition."""
        path = self.parameters.controlnet.strip()
        if path and not Path(path).expanduser().exists():
            self.view.say(f"There is no ControlNet at {path}; its edges may differ from these.", wrong=True)
        self.view.control.png = png_bytes(edges_of(np.asarray(opened(image)), self.parameters))

    def _with_result(self, act: Callable[[bytes], None]) -> None:
        if self.session.images is None:
            return self.view.say("There is no image yet; sample one, or load a file.", wrong=True)
        act(png_bytes(self.session.images[0]))

    def cancel(self) -> None:
        """End the run after its current step."""
        self.session.cancel()

    def save(self) -> list[Path]:
        """Write the images that are shown with their parameters; none if there is no finished one."""
        entry = self.session.entry
        try:
            if entry is None:
                raise PixArtNBError("there is no finished image to save; sample one, or choose one below")
            loras = [f"{self._files.get(name, name)}:{weight:g}" for name, weight in entry.parameters.adapters]
            own = {"lora": loras} if loras or (self.view.adapters.sliders and "lora" in self._others) else {}
            paths = save_entry(entry, self.folder, self._others | own)
        except (OSError, ValueError) as error:
            self.view.say(_in_words(error), wrong=True)
            return []
        self.view.say(f"Saved {', '.join(str(path) for path in paths)}")
        return paths

    def restore(self, entry: Entry) -> None:
        """Set the controls to the parameters of an entry, and show its images unless a run is active."""
        try:
            self.parameters = entry.parameters
        except ValueError as error:
            self.view.say(_in_words(error), wrong=True)
        self.session.show(entry)
        self.view.show_last_step()

    def _repr_mimebundle_(self, **options: Any):
        return mime_bundle(self.view.widget, type(self).__name__, **options)

    # ---- clicks

    def _start(self, run: Coroutine) -> None:
        if self.session.state is State.IDLE:
            self._loop.start(run)
        else:
            run.close()

    def _typed(self) -> None:
        """Draw the new prompt if the box is ticked; a drawing of the prompt before ends after its current step."""
        if self.view.typing.value:
            self._retyped = True
            if self._drawing_typed:
                self.cancel()
            else:
                self._start(self._draw_typed())

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
