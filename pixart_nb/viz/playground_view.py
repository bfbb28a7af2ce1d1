"""Widgets of the playground and their layout. Knows nothing of sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import ipywidgets as widgets
import numpy as np

from pixart_nb.viz.pixels import png_bytes, tiles
from pixart_nb.viz.playground_run import SWEPT, Entry, Parameters, Progress, State
from pixart_nb.viz.widget_parts import ClickableImage, button, column, say, side_by_side, text_line

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
        "seed": widgets.BoundedIntText(min=0, max=2**53 - 1),
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
    "seed": ("Seed", "The same seed draws the same images"),
}


def size_name(height: int, width: int) -> str:
    """Return a size as width x height with its orientation.

    >>> size_name(128, 192)
    '192 x 128, wide'
    """
    shape = "square" if height == width else "wide" if width > height else "tall"
    return f"{width} x {height}, {shape}"


class View:
    """Controls at the left, progress and history below them, the image at the right. ``widget`` holds all of them."""

    def __init__(self, controls: dict[str, widgets.ValueWidget]):
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
        rest = [control for name, control in controls.items() if name != "seed"]
        left = column([*rest, seed, buttons, sweep, self.progress, self.message, self.cards], "380px")
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

    def show_history(self, history: Sequence[Entry], act: Callable[[Entry], Callable]) -> None:
        """Show a small image for each entry, newest first; a click restores it."""
        if tuple(history) == self._listed:
            return
        entries = dict(zip(reversed(self._listed), self.cards.children, strict=True))
        self._listed = tuple(history)
        self.cards.children = [entries.get(entry) or _card(entry, act(entry)) for entry in reversed(history)]

    def say_below(self, text: str) -> None:
        """Describe the images that are shown."""
        say(self.caption, text)

    def say(self, text: str, wrong: bool = False) -> None:
        """Show a message; ``wrong`` marks an error."""
        say(self.message, text, wrong)


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
