"""Widgets of the playground and their layout. Knows nothing of sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

import ipywidgets as widgets
import numpy as np

from pixart_nb.viz.pixels import png_bytes, tiles
from pixart_nb.viz.playground_run import Entry, Parameters, Progress, State

STYLE = """<style>
.pixart-playground img { object-fit: contain; }
.pixart-playground input[type="number"] { min-width: 0; }
.pixart-playground .pixart-crisp { image-rendering: pixelated; }
.pixart-playground .pixart-frame { background: var(--jp-layout-color2, #eee); border-radius: 4px; }
.pixart-playground .pixart-frame img { aspect-ratio: 1; }
.pixart-playground .pixart-line .widget-html-content { line-height: 1.4; overflow-wrap: anywhere; }
.pixart-playground .pixart-wrong .widget-html-content { color: var(--jp-error-color1, #b71c1c); font-weight: 600; }
.pixart-playground .pixart-cards { gap: 8px; padding: 4px; align-content: flex-start; }
.pixart-playground .pixart-card { position: relative; flex: none; overflow: visible; }
.pixart-playground .pixart-card button { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0;
  padding: 0; background: none; box-shadow: none; display: flex; align-items: flex-end; justify-content: center; }
.pixart-playground .pixart-card button:hover, .pixart-playground .pixart-card button:focus-visible,
.pixart-playground .pixart-chosen button { outline: 2px solid var(--jp-brand-color1, #1976d2); }
</style>"""
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
        self.sample = _button("Sample", "Draw with these parameters", "play", "primary")
        self.cancel = _button("Cancel", "End after the step that is being computed", "stop")
        self.save = _button("Save", "Write the images as PNG files that carry their parameters", "save")
        self.next_seed = _button("Next", "The next seed", width="64px")
        self.random_seed = _button("Random", "A random seed", width="80px")
        self.image = widgets.Image(value=png_bytes(CLEAR), format="png")
        self.image.layout = widgets.Layout(width=f"{IMAGE}px", max_width="100%", margin="0")
        self.caption, self.message, self.status = _line(), _line(), _line()
        self.bar = widgets.IntProgress(min=0, layout=widgets.Layout(width="160px", flex="none"))
        self.progress = widgets.HBox([self.bar, self.status])
        self.cards = widgets.HBox(layout=widgets.Layout(flex_flow="row wrap", max_height="252px", overflow="auto"))
        self.cards.add_class("pixart-cards")
        self.widget = self._laid_out(controls)
        self._listed: tuple[Entry, ...] = ()

    def _laid_out(self, controls: dict[str, widgets.ValueWidget]) -> widgets.VBox:
        controls["seed"].layout.flex, controls["seed"].layout.min_width = "1 1 0", "0"
        seed = widgets.HBox([controls["seed"], self.next_seed, self.random_seed])
        buttons = widgets.HBox([self.sample, self.cancel, self.save])
        rest = [control for name, control in controls.items() if name != "seed"]
        left = widgets.VBox([*rest, seed, buttons, self.progress, self.message, self.cards])
        left.layout = widgets.Layout(width="380px", flex="none")
        frame = widgets.Box([self.image], layout=widgets.Layout(width="fit-content", max_width="100%"))
        frame.add_class("pixart-frame")
        right = widgets.VBox([frame, self.caption], layout=widgets.Layout(flex="1", min_width="320px"))
        style = widgets.HTML(STYLE, layout=widgets.Layout(display="none"))
        whole = widgets.HBox([style, left, right], layout=widgets.Layout(flex_flow="row wrap", grid_gap="16px"))
        whole.add_class("pixart-playground")
        return whole

    def show_images(self, images: np.ndarray) -> None:
        """Show (N, H, W, 3) uint8 side by side; small ones are enlarged with sharp pixels."""
        sheet = tiles(images)
        crisp = max(sheet.shape) < IMAGE
        (self.image.add_class if crisp else self.image.remove_class)("pixart-crisp")
        self.image.value = png_bytes(sheet)

    def show_progress(self, state: State, progress: Progress) -> None:
        """Show the progress of a run, and enable the buttons that have an effect."""
        idle = state is State.IDLE
        self.sample.disabled, self.cancel.disabled = not idle, state is not State.SAMPLING
        self.bar.max, self.bar.value = progress.total, 0 if idle else progress.done
        self.progress.layout.display = "none" if idle else "flex"
        self.status.value = "" if idle else escape(_in_words(state, progress))

    def show_entry(self, entry: Entry | None) -> None:
        """Describe the finished images; None if there is nothing to save."""
        self.save.disabled = entry is None
        seconds = f" · {entry.seconds:.1f}\N{NO-BREAK SPACE}s" if entry else ""
        self.caption.value = escape(entry.parameters.summary + seconds) if entry else ""
        for listed, card in zip(reversed(self._listed), self.cards.children, strict=True):
            (card.add_class if listed is entry else card.remove_class)("pixart-chosen")

    def show_history(self, history: Sequence[Entry], act: Callable[[Entry], Callable]) -> None:
        """Show a small image for each entry, newest first; a click restores it."""
        if tuple(history) == self._listed:
            return
        entries = dict(zip(reversed(self._listed), self.cards.children, strict=True))
        self._listed = tuple(history)
        self.cards.children = [entries.get(entry) or _card(entry, act(entry)) for entry in reversed(history)]

    def say(self, text: str, wrong: bool = False) -> None:
        """Show a message; ``wrong`` marks an error."""
        self.message.value = escape(text)
        (self.message.add_class if wrong else self.message.remove_class)("pixart-wrong")


def _card(entry: Entry, clicked: Callable) -> widgets.VBox:
    thumbnail = widgets.Image(value=png_bytes(tiles(entry.images), 2 * THUMBNAIL), format="png")
    thumbnail.layout = widgets.Layout(width=f"{THUMBNAIL}px", height=f"{THUMBNAIL}px", margin="0 0 20px 0")
    summary = f"{entry.number}: {entry.parameters.summary}"
    button = widgets.Button(description=f"{entry.number}: seed {entry.parameters.seed}", tooltip=summary)
    button.on_click(clicked)
    card = widgets.VBox([thumbnail, button])
    card.add_class("pixart-card")
    return card


def _button(name: str, tooltip: str, icon: str = "", style: str = "", width: str = "auto") -> widgets.Button:
    layout = widgets.Layout(width=width, flex="1" if width == "auto" else "none")
    return widgets.Button(description=name, tooltip=tooltip, icon=icon, button_style=style, layout=layout)


def _line() -> widgets.HTML:
    line = widgets.HTML()
    line.add_class("pixart-line")
    return line


def _in_words(state: State, progress: Progress) -> str:
    if state is State.CANCELLING:
        return "cancelling"
    if progress.done == 0:
        return "reading the prompt"
    if progress.done == progress.total:
        return "decoding"
    left = f", {progress.seconds_left:.0f} s left" if progress.seconds_left is not None else ""
    return f"step {progress.done} of {progress.total}{left}"
