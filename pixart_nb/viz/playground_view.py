"""Widgets of the playground and their layout. Knows nothing of sampling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import ipywidgets as widgets
import numpy as np

from pixart_nb.viz.pixels import png_bytes, tiles
from pixart_nb.viz.playground_parameters import CONTROL, SWEPT, Parameters
from pixart_nb.viz.playground_run import Entry, Progress, State
from pixart_nb.viz.widget_parts import ClickableImage, PaintedImage, button, column, row, say, side_by_side, text_line

IMAGE = 512
THUMBNAIL = 96
#: An image of nothing, for the time before the first one.
CLEAR = np.zeros((1, 1, 4), np.uint8)


def make_controls(
    first: Parameters, sizes: Sequence[tuple[int, int]], schedulers: Sequence[str]
) -> dict[str, widgets.ValueWidget]:
    """Return a control for each parameter by name; ``size`` is (height, width)."""
    size = (first.height, first.width)
    sizes, schedulers = ([*dict.fromkeys([*all_, own])] for all_, own in ((sizes, size), (schedulers, first.scheduler)))
    made = {
        "prompt": widgets.Textarea(rows=3, placeholder="what to draw", continuous_update=True),
        "negative_prompt": widgets.Textarea(rows=1, placeholder="what to steer away from"),
        "size": widgets.Dropdown(options=[(size_name(*one), one) for one in sizes]),
        "scheduler": widgets.Dropdown(options=schedulers),
        "steps": widgets.IntSlider(min=1, max=max(50, first.steps)),
        "guidance": widgets.FloatSlider(min=1, max=max(12.0, first.guidance), step=0.5, readout_format=".2f"),
        "count": widgets.IntSlider(min=1, max=max(8, first.count)),
        "strength": widgets.FloatSlider(min=0.05, max=1, step=0.05),
        "seed": widgets.BoundedIntText(min=0, max=2**53 - 1),
        "controlnet": widgets.Text(placeholder="folder or file of a ControlNet"),
        "controlnet_conditioning_scale": widgets.FloatSlider(
            min=0, max=max(2, first.controlnet_conditioning_scale), step=0.05
        ),
        "control_guidance_start": widgets.FloatSlider(min=0, max=0.95, step=0.05),
        "control_guidance_end": widgets.FloatSlider(min=0.05, max=1, step=0.05),
        "guess_mode": widgets.Checkbox(indent=True),
    }
    for name, (description, tooltip) in _NAMES.items():
        control = made[name]
        control.description, control.tooltip = description, tooltip
        control.layout.width, control.style.description_width = "auto", "88px"
        control.value = size if name == "size" else getattr(first, name)
    return made


_NAMES = {
    "prompt": ("Prompt", "What to draw, in English"),
    "negative_prompt": ("Negative", "What to steer away from; needs guidance above 1"),
    "size": ("Size", "Width and height in pixels"),
    "scheduler": ("Scheduler", "How the steps are taken"),
    "steps": ("Steps", "More steps are slower and finer"),
    "guidance": ("Guidance", "How strongly the prompt pulls; 1 switches guidance off"),
    "count": ("Images", "How many images at once"),
    "strength": ("Strength", "How much of the image changes: the share of the steps that are taken from it"),
    "seed": ("Seed", "The same seed draws the same images"),
    "controlnet": ("ControlNet", "Path of a ControlNet for this model: an adapter folder of diffusers, or a .pth file"),
    "controlnet_conditioning_scale": ("Scale", "How strongly the image follows the condition"),
    "control_guidance_start": ("Start", "Share of the steps from which the ControlNet acts"),
    "control_guidance_end": ("End", "Share of the steps up to which the ControlNet acts"),
    "guess_mode": ("Guess mode", "Guidance strengthens the condition as it does the prompt"),
}


def set_control(control: widgets.ValueWidget, value: object) -> None:
    """Set a control, whose range or choices are extended to the value."""
    if isinstance(control, (widgets.IntSlider, widgets.FloatSlider)):
        control.min, control.max = min(control.min, value), max(control.max, value)
    elif isinstance(control, widgets.Dropdown):
        choices = [choice[1] if isinstance(choice, tuple) else choice for choice in control.options]
        if value not in choices:
            control.options = [*control.options, (size_name(*value), value) if isinstance(value, tuple) else value]
    control.value = value


def size_name(height: int, width: int) -> str:
    """Return a size as width x height with its orientation.

    >>> size_name(128, 192)
    '192 x 128, wide'
    """
    shape = "square" if height == width else "wide" if width > height else "tall"
    return f"{width} x {height}, {shape}"


class View:
    """Controls at the left, progress and history below them, the image at the right. ``widget`` holds all of them."""

    def __init__(self, controls: dict[str, widgets.ValueWidget], examples: Sequence[str] = ()):
        self.examples = _example_menu(examples, controls["prompt"])
        self.typing = widgets.Checkbox(description="Draw while typing", indent=False)
        self.typing.tooltip = "Draw the prompt as you type, in four steps by the LCM-LoRA; Sample draws it in full"
        self.typing.layout = widgets.Layout(width="auto", margin="0 2px 0 96px", display="none")
        self.sample = button("Sample", "Draw with these parameters", "play", "primary")
        self.cancel = button("Cancel", "End after the step that is being computed", "stop")
        self.save = button("Save", "Write the images as PNG files that carry their parameters", "save")
        self.next_seed = button("Next", "The next seed", width="64px")
        self.random_seed = button("Random", "A random seed", width="80px")
        self.load = widgets.FileUpload(accept=".png", description="Load", tooltip="Take the parameters of a saved PNG")
        self.load.layout = widgets.Layout(width="100px", flex="none")
        self.swept = widgets.Dropdown(options=list(SWEPT), layout=widgets.Layout(width="100px"))
        self.values = widgets.Text(placeholder="1, 4.5, 8", tooltip="Values of the parameter, separated by commas")
        self.values.layout = widgets.Layout(flex="1 1 0", min_width="0")
        self.sweep = button("Sweep", "Draw once with each of these values of one parameter", width="80px")
        self.image = ClickableImage(png=png_bytes(CLEAR), width=IMAGE, zoomable=True, label="image; Enter enlarges it")
        self.step = widgets.IntSlider(min=1, max=2, description="Look at step", continuous_update=False)
        self.step.layout, self.step.style.description_width = widgets.Layout(width="400px", display="none"), "88px"
        self.caption, self.message, self.status = text_line(), text_line(), text_line()
        self.bar = widgets.IntProgress(min=0, layout=widgets.Layout(width="160px", flex="none"))
        self.progress = widgets.HBox([self.bar, self.status])
        self.cards = widgets.HBox(layout=widgets.Layout(flex_flow="row wrap", max_height="252px", overflow="auto"))
        self.cards.add_class("pixart-cards")
        self.source, self.adapters = SourceView(controls["strength"]), AdapterView()
        self.control = ControlView([controls[name] for name in CONTROL])
        self.widget = self._laid_out(controls)
        self._listed: tuple[Entry, ...] = ()
        self._stepped: Entry | None = None

    def _laid_out(self, controls: dict[str, widgets.ValueWidget]) -> widgets.HBox:
        controls["seed"].layout.flex, controls["seed"].layout.min_width = "1 1 0", "0"
        seed = widgets.HBox([controls["seed"], self.next_seed, self.random_seed])
        sweep, buttons = (
            widgets.HBox(parts)
            for parts in ([self.swept, self.values, self.sweep], [self.sample, self.cancel, self.save, self.load])
        )
        elsewhere = ("prompt", "seed", "strength", *CONTROL)
        rest = [control for name, control in controls.items() if name not in elsewhere]
        pages = [
            widgets.VBox([controls["prompt"], self.typing, self.examples, *rest, seed]),
            self.source.widget,
            self.control.widget,
            self.adapters.widget,
        ]
        tabs = widgets.Tab(children=pages, titles=["Prompt", "Image", "Control", "Adapters"])
        left = column([tabs, buttons, sweep, self.progress, self.message, self.cards], "400px")
        frame = widgets.Box([self.image], layout=widgets.Layout(width=f"{IMAGE}px", max_width="100%"))
        frame.add_class("pixart-frame")
        right = widgets.VBox([frame, self.step, self.caption], layout=widgets.Layout(flex="1", min_width="320px"))
        return side_by_side([left, right], "pixart-playground")

    def show_images(self, images: np.ndarray | None) -> None:
        """Show (N, H, W, 3) uint8 side by side, small ones enlarged with sharp pixels; None shows nothing."""
        sheet = CLEAR if images is None else tiles(images)
        self.image.smooth = max(sheet.shape) >= IMAGE
        self.image.png = png_bytes(sheet)

    def show_progress(self, state: State, progress: Progress) -> None:
        """Show the progress of a run, and enable the buttons that have an effect."""
        idle = state is State.IDLE
        self.sample.disabled = self.sweep.disabled = self.load.disabled = not idle
        self.cancel.disabled = state is not State.SAMPLING
        self.bar.max, self.bar.value = progress.total, 0 if idle else progress.done
        self.progress.layout.display = "none" if idle else "flex"
        say(self.status, "" if idle else _in_words(state, progress))

    def show_entry(self, entry: Entry | None, steps: int) -> None:
        """Describe the finished images, of which so many steps can be looked at; None if there is nothing to save."""
        self.save.disabled = entry is None
        seconds = f" · {entry.seconds:.1f}\N{NO-BREAK SPACE}s" if entry else ""
        say(self.caption, entry.parameters.summary + seconds if entry else "")
        self.step.layout.display = "" if steps > 1 else "none"
        if entry is not self._stepped and steps > 1:
            with self.step.hold_trait_notifications():
                self._stepped, self.step.max, self.step.value = entry, steps, steps
        for listed, card in zip(reversed(self._listed), self.cards.children, strict=True):
            (card.add_class if listed is entry else card.remove_class)("pixart-chosen")

    def show_last_step(self) -> None:
        """Set the slider of steps to the last one, whose images an entry shows first."""
        self.step.value = self.step.max

    def show_history(self, history: Sequence[Entry], act: Callable[[Entry], Callable]) -> None:
        """Show a small image for each entry, newest first; a click restores it."""
        if tuple(history) == self._listed:
            return
        entries = dict(zip(reversed(self._listed), self.cards.children, strict=True))
        self._listed = tuple(history)
        self.cards.children = [entries.get(entry) or _card(entry, act(entry)) for entry in reversed(history)]

    def say(self, text: str, wrong: bool = False) -> None:
        """Show a message; ``wrong`` marks an error."""
        say(self.message, text, wrong)


class SourceView:
    """Image that a run starts from, with the mask that is painted on it."""

    def __init__(self, strength: widgets.ValueWidget):
        self.upload = widgets.FileUpload(accept="image/*", description="Image", tooltip="Start from this image")
        self.upload.layout = widgets.Layout(width="115px", flex="none")
        self.use = button("Use result", "Start from the image that is shown", width="100px")
        self.remove = button("Remove", "Draw from noise again", width="100px")
        self.clear = button("Clear mask", "Let the whole image change", width="100px")
        self.painted = PaintedImage(label="image that is changed; paint over the part to draw again")
        self.brush = widgets.IntSlider(value=15, min=2, max=50, description="Brush", tooltip="Width in percent")
        self.brush.layout.width, self.brush.style.description_width = "auto", "88px"
        widgets.link((self.brush, "value"), (self.painted, "brush"))
        buttons = row([self.upload, self.use, self.remove, self.clear])
        hint = text_line()
        say(hint, "Paint over the part to draw again. Without paint the whole image changes.")
        self.shown_with_image = [self.painted, hint, self.brush, strength]
        self.widget = widgets.VBox([buttons, *self.shown_with_image])
        for act in (self.remove, self.clear):
            act.on_click(self._cleared)
        self.painted.observe(self._image_changed, "png")
        self._image_changed()

    def set(self, image: bytes, mask: bytes = b"") -> None:
        """Show an image, the bytes of a file, and a mask; both empty for none."""
        self.painted.png, self.painted.mask = image, mask

    def _cleared(self, pressed: widgets.Button) -> None:
        self.set(b"" if pressed is self.remove else self.painted.png)

    def _image_changed(self, _: object = None) -> None:
        chosen = bool(self.painted.png)
        for part in self.shown_with_image:
            part.layout.display = "" if chosen else "none"
        self.remove.disabled = self.clear.disabled = not chosen


class ControlView:
    """Condition image of a ControlNet, above the ``controls`` of the ControlNet."""

    def __init__(self, controls: Sequence[widgets.ValueWidget]):
        self.upload = widgets.FileUpload(accept="image/*", description="Condition", tooltip="Load a condition image")
        self.upload.layout = widgets.Layout(width="130px", flex="none")
        self.use = button("Edges of result", "Take the edges of the image that is shown", width="130px")
        self.edges = button("To edges", "Replace the condition by its edges", width="130px")
        self.remove = button("Remove", "Draw without a condition", width="130px")
        self.image = ClickableImage(width=200, zoomable=True, label="condition image; Enter enlarges it")
        self.image.layout.margin = "6px 2px"
        hint = text_line()
        say(hint, "The image follows a condition, such as edges, by a ControlNet that was trained on such images.")
        self.widget = widgets.VBox([row([self.upload, self.use, self.edges, self.remove]), hint, self.image, *controls])
        self.remove.on_click(lambda _: setattr(self, "png", b""))
        self.png = b""

    @property
    def png(self) -> bytes:
        """Condition image, a PNG; empty for none."""
        return self.image.png

    @png.setter
    def png(self, content: bytes) -> None:
        self.image.png = content
        self.image.layout.display = "" if content else "none"
        self.edges.disabled = self.remove.disabled = not content


class AdapterView:
    """LoRAs of the pipeline, each with a slider of its weight."""

    def __init__(self):
        self.upload = widgets.FileUpload(accept=".safetensors", description="Load LoRA", multiple=True)
        self.upload.layout = widgets.Layout(width="140px", flex="none")
        self.sliders: dict[str, widgets.FloatSlider] = {}
        self.hint = text_line()
        self.widget = widgets.VBox([self.upload, self.hint])
        self.show({})

    def show(self, weights: Mapping[str, float]) -> None:
        """Show a slider for each adapter with its weight; those that are shown keep theirs."""
        for name, weight in weights.items():
            slider = widgets.FloatSlider(value=weight, min=min(-1, weight), max=max(2, weight), step=0.05)
            slider.description = name
            slider.tooltip = f"Weight of {name}"
            slider.layout.width, slider.style.description_width = "auto", "120px"
            self.sliders.setdefault(name, slider)
        self.sliders = {name: self.sliders[name] for name in weights}
        say(self.hint, "Weights may be negative; 0 switches a LoRA off." if weights else "No LoRA is loaded.")
        self.widget.children = [self.upload, self.hint, *self.sliders.values()]

    @property
    def value(self) -> tuple[tuple[str, float], ...]:
        """Names and weights of those that are not switched off; set the weights of all, 0 for those left out."""
        return tuple((name, slider.value) for name, slider in self.sliders.items() if slider.value)

    @value.setter
    def value(self, pairs: Sequence[tuple[str, float]]) -> None:
        for name, slider in self.sliders.items():
            set_control(slider, dict(pairs).get(name, 0))


def _example_menu(prompts: Sequence[str], prompt: widgets.Textarea) -> widgets.Dropdown:
    """Return a menu of prompts that sets ``prompt``; hidden without any."""
    menu = widgets.Dropdown(options=[("choose a prompt", ""), *((text, text) for text in prompts)])
    menu.description, menu.tooltip = "Examples", "Example prompts; choosing one replaces the prompt"
    menu.layout = widgets.Layout(width="auto", display="" if prompts else "none")
    menu.style.description_width = "88px"

    def choose(change: dict) -> None:
        if change["new"]:
            prompt.value, menu.value = change["new"], ""

    menu.observe(choose, "value")
    return menu


def _card(entry: Entry, clicked: Callable) -> widgets.VBox:
    thumbnail = widgets.Image(value=png_bytes(tiles(entry.images), 2 * THUMBNAIL), format="png")
    thumbnail.layout = widgets.Layout(width=f"{THUMBNAIL}px", height=f"{THUMBNAIL}px", margin="0 0 20px 0")
    summary = f"{entry.number}: {entry.parameters.summary}"
    restore = widgets.Button(description=f"{entry.number}: {entry.parameters.prompt}", tooltip=summary)
    restore.on_click(clicked)
    card = widgets.VBox([thumbnail, restore])
    card.add_class("pixart-card")
    return card


def _in_words(state: State, progress: Progress) -> str:
    if state is State.CANCELLING:
        return "cancelling"
    if progress.done == 0:
        return "reading the prompt"
    if progress.done == progress.total:
        return "decoding"
    left = f", {progress.seconds_left:.0f} s left" if progress.seconds_left is not None else ""
    return f"step {progress.done} of {progress.total}{left}"
