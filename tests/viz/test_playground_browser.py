"""The playground as a user meets it: in JupyterLab, in a browser."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from lab import (
    SLOW,
    browser,
    needs_browser,
    nothing_cut_or_covered,
    open_notebook,
    pixels_of,
    run_cell,
    server,
    sync_api,
    watched_page,
)
from lora_models import trained
from PIL import Image, UnidentifiedImageError
from safetensors.numpy import save_file

from pixart_nb import PixArtControlNet, load_transformer
from pixart_nb.config import check_config
from pixart_nb.core.sampling.images import read_parameters

pytestmark = needs_browser
__all__ = ["browser", "server"]  # fixtures
MODEL = os.environ.get("PLAYGROUND_MODEL", "data/tiny-sigma")
SCREENSHOTS = Path(__file__).resolve().parents[2] / "outputs" / "playground_browser"
README_IMAGE = os.environ.get("PLAYGROUND_IMAGE", "")
CELLS = (
    """
import os
os.chdir({project!r})
model, folder = {model!r}, {folder!r}
""",
    """
from pixart_nb import PixArtSigmaPipeline
from pixart_nb.viz.playground import Playground

pipe = PixArtSigmaPipeline.from_pretrained(model)
Playground(
    pipe,
    sizes=[(128, 128), (128, 192), (192, 128), (120, 100)],
    schedulers=["dpm++", "ddim", "euler", "unipc"],
    folder=folder,
    others={{"model": model}},
    steps=16,
)
""",
    "6 * 7",
)


@pytest.fixture
def page(server, browser, project):
    """A page with the playground, the kernel idle; an error in the browser's console fails the test."""
    values = {"project": str(project), "model": MODEL, "folder": str(server[0] / "saved")}
    page, complaints = watched_page(browser)
    cells = [cell.strip().format(**values) for cell in CELLS]
    open_notebook(page, server, "play.ipynb", cells, ".pixart-playground")
    yield page
    page.close()
    assert complaints == []  # none is excluded


class User:
    """What a person does with the playground on a page, and what they see."""

    def __init__(self, page):
        self.page, self.widget = page, page.locator(".pixart-playground")

    def press(self, name):
        self.widget.get_by_role("button", name=name).click()

    def write(self, name, text):
        self.widget.get_by_label(name, exact=True).fill(text)

    def choose(self, name, option):
        self.widget.get_by_label(name, exact=True).select_option(option)

    def slide(self, name, value):
        """Type into the number beside a slider."""
        row = self.widget.locator(".widget-slider", has_text=name)
        number = row.locator(".widget-readout")
        number.click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.type(str(value))
        self.page.keyboard.press("Enter")

    def reads(self, text):
        self.widget.get_by_text(text).first.wait_for(timeout=SLOW)

    def sees_cards(self, count):
        sync_api.expect(self.widget.locator(".pixart-card")).to_have_count(count, timeout=SLOW)

    def image(self):
        """What the large image shows, (H, W, 3) uint8."""
        return pixels_of(self.page, ".pixart-frame img")

    def sees_image(self, right):
        """Wait until the large image is right."""
        end = time.monotonic() + SLOW / 1000
        while not self.shows(right):
            assert time.monotonic() < end, "the image did not change as it should"
            time.sleep(0.05)

    def shows(self, right):
        """Whether the large image is right now; it is not while it is being replaced."""
        try:
            return right(self.image())
        except UnidentifiedImageError:
            return False

    def sees_everything(self):
        nothing_cut_or_covered(self.widget)

    def photograph(self, name):
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")


@pytest.fixture
def user(page):
    return User(page)


def test_a_prompt_becomes_a_image_that_can_be_saved_and_come_back_to(user, server):
    user.photograph("1_empty")
    user.write("Prompt", "a red mushroom on grass")
    user.slide("Steps", 30)
    user.press("Sample")
    user.sees_image(lambda pixels: pixels.shape == (128, 128, 3) and pixels.std() > 10)  # a preview
    user.reads("step ")
    user.photograph("2_sampling")
    user.sees_cards(1)
    user.reads("a red mushroom on grass · 128 x 128 · dpm++, 30 steps · guidance 4.5 · seed 0")
    user.press("Save")
    user.reads("Saved ")
    saved = server[0] / "saved" / "a-red-mushroom-on-grass_seed-0_0.png"
    assert check_config(read_parameters(saved)).prompt == ["a red mushroom on grass"]
    user.sees_image(lambda pixels: np.array_equal(pixels, Image.open(saved)))
    user.press("Next")
    user.slide("Steps", 16)
    user.choose("Size", "192 x 128, wide")
    user.slide("Images", 4)
    user.press("Sample")
    user.sees_cards(2)
    user.sees_image(lambda pixels: pixels.shape == (262, 390, 3))  # two by two, with gaps
    user.sees_everything()
    user.photograph("3_four_wide_images")
    user.press("1: a red mushroom on grass")
    user.reads("dpm++, 30 steps · guidance 4.5 · seed 0")
    user.sees_image(lambda pixels: np.array_equal(pixels, Image.open(saved)))
    assert user.widget.get_by_label("Size", exact=True).input_value() == "128 x 128, square"
    user.photograph("4_history")
    final = user.image()
    user.slide("Look at step", 10)
    user.sees_image(lambda pixels: not np.array_equal(pixels, final))
    user.widget.get_by_role("button", name="image; Enter enlarges it", exact=True).click()
    user.page.locator("dialog.pixart-large img").wait_for(timeout=SLOW)
    user.photograph("5_enlarged")
    user.page.keyboard.press("Escape")
    sync_api.expect(user.page.locator("dialog")).to_have_count(0)
    user.write("Prompt", "something else")
    with user.page.expect_file_chooser() as chooser:
        user.press("Load")
    chooser.value.set_files(saved)
    user.reads("Parameters of a-red-mushroom-on-grass_seed-0_0.png")
    assert user.widget.get_by_label("Prompt", exact=True).input_value() == "a red mushroom on grass"
    user.widget.get_by_placeholder("1, 4.5, 8").fill("1, 4, 8")
    user.slide("Steps", 4)
    user.press("Sweep")
    user.reads("a red mushroom on grass: guidance 1.0, 4.0, 8.0, in reading order")
    user.sees_cards(5)
    user.sees_everything()
    user.photograph("6_sweep")


def test_a_run_can_be_cancelled_and_the_kernel_is_free_meanwhile(user):
    user.write("Prompt", "a blue fish in the snow")
    user.slide("Steps", 50)
    user.slide("Images", 8)
    user.press("Sample")
    user.reads("step ")
    run_cell(user.page, 2)
    user.page.locator(".jp-OutputArea-output", has_text="42").wait_for(timeout=SLOW)
    assert user.widget.get_by_role("button", name="Cancel").is_enabled(), "the cell waited for the end of the run"
    user.press("Cancel")
    user.reads("Cancelled after step ")
    user.photograph("5_cancelled")
    user.sees_cards(0)
    assert user.widget.get_by_role("button", name="Sample").is_enabled()
    user.slide("Steps", 2)
    user.press("Sample")
    user.sees_cards(1)


def test_what_is_wrong_is_said_in_the_widget(user):
    user.press("Sample")
    user.reads("the prompt is empty; write what to draw")
    user.write("Prompt", "a cup")
    user.choose("Size", "100 x 120, tall")
    user.press("Sample")
    user.reads("height and width are 120x100; both must be positive multiples of 16")
    user.photograph("6_error")
    assert not user.page.get_by_text("Traceback").count()


def test_a_mask_is_painted_with_the_mouse_and_what_is_outside_stays(user, server):
    user.write("Prompt", "a red mushroom on grass")
    user.slide("Steps", 4)
    user.press("Sample")
    user.sees_cards(1)
    before = user.image()
    user.widget.get_by_role("tab", name="Image").click()
    user.press("Use result")
    canvas = user.widget.locator(".pixart-painter canvas")
    canvas.wait_for(timeout=SLOW)
    box = canvas.bounding_box()
    middle = box["y"] + box["height"] / 2
    user.page.mouse.move(box["x"] + 0.4 * box["width"], middle)
    user.page.mouse.down()
    user.page.mouse.move(box["x"] + 0.6 * box["width"], middle, steps=5)
    user.page.mouse.up()
    user.slide("Strength", 1)
    user.photograph("8_mask")
    user.sees_everything()
    user.widget.get_by_role("tab", name="Prompt").click()
    user.write("Prompt", "a blue fish on grass")
    user.press("Sample")
    user.sees_cards(2)
    user.reads("inside a mask, strength 1")
    user.sees_image(lambda pixels: not np.array_equal(pixels, before))
    changed = (user.image() != before).any(-1)
    assert changed[54:74, 46:82].mean() > 0.3
    rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
    assert rows.min() >= 64 - 11 and rows.max() <= 64 + 11  # a brush of 15% of 128 pixels
    assert columns.min() >= 51 - 11 and columns.max() <= 77 + 11
    user.press("Save")
    user.reads("Saved ")
    assert np.asarray(Image.open(server[0] / "saved" / "a-blue-fish-on-grass_seed-0_mask.png")).any()


def test_it_is_legible_in_a_narrow_window_and_in_the_dark_theme(user):
    user.page.set_viewport_size({"width": 900, "height": 1500})
    user.page.get_by_role("menuitem", name="Settings").click()
    user.page.get_by_text("Theme", exact=True).hover()
    user.page.get_by_text("JupyterLab Dark", exact=True).click()
    user.write("Prompt", "a purple potion at night")
    user.slide("Steps", 4)
    user.press("Sample")
    user.sees_cards(1)
    user.photograph("7_narrow_and_dark")
    user.sees_everything()
    assert user.widget.locator(".pixart-frame").bounding_box()["width"] > 400


@pytest.mark.skipif(not README_IMAGE, reason="runs when PLAYGROUND_IMAGE names the file to write")
def test_an_image_for_the_readme(user):
    user.page.set_viewport_size({"width": 1180, "height": 900})
    user.page.keyboard.press("Control+B")  # without the list of files
    prompts = (
        "a green dragon on a beach",
        "a purple potion at night",
        "a blue fish in the snow",
        "an orange rocket on grass",
        "a yellow ghost in the desert",
        "a red mushroom in a forest",
    )
    for number, prompt in enumerate(prompts, 1):
        user.write("Prompt", prompt)
        user.press("Sample")
        user.sees_cards(number)
    user.reads("red mushroom in a forest · 128 x 128")
    user.widget.scroll_into_view_if_needed()
    user.page.screenshot(path=README_IMAGE)


@pytest.fixture(scope="module")
def adapter_files(tmp_path_factory, project):
    """Paths of a ControlNet and of LoRAs for the model."""
    folder = tmp_path_factory.mktemp("adapters")
    net = load_transformer(project / MODEL / "transformer")
    controlnet = PixArtControlNet.from_transformer(net, 2).parameters_and_names()
    rng = np.random.default_rng(0)
    tensors = {
        name: parameter.asnumpy() if "copied" in name else 0.01 * rng.standard_normal(parameter.shape, np.float32)
        for name, parameter in controlnet
        if name.startswith("controlnet.")
    }
    save_file(tensors, folder / "control.safetensors")
    loras = []
    for number, name in enumerate(("watercolour", "a_style_with_a_rather_long_name")):
        file = trained(net, name, seed=number).save(folder / name)
        loras.append(file.rename(folder / f"{name}.safetensors"))
    return folder / "control.safetensors", loras


def test_a_controlnet_follows_edges_and_loras_have_a_slider_each(user, adapter_files):
    controlnet, loras = adapter_files
    user.page.set_viewport_size({"width": 1280, "height": 1040})
    user.write("Prompt", "a red mushroom on grass")
    user.slide("Steps", 4)
    user.press("Sample")
    user.sees_cards(1)
    before = user.image()
    tab = user.widget.get_by_role("tab", name="Control")
    tab.click()
    user.photograph("9_control_empty")
    user.sees_everything()
    user.press("Edges of result")
    user.widget.locator(".pixart-clickable").nth(1).wait_for(timeout=SLOW)
    user.write("ControlNet", "missing.pth")
    user.press("Sample")
    user.reads("missing.pth does not exist")
    user.photograph("10_control_error")
    user.write("ControlNet", str(controlnet))
    user.slide("Scale", 0.8)
    user.slide("End", 0.5)
    user.press("Sample")
    user.sees_cards(2)
    user.reads("control 0.8, from 0 to 0.5 of the steps")
    user.sees_image(lambda pixels: not np.array_equal(pixels, before))
    user.sees_everything()
    user.photograph("11_control")
    user.widget.get_by_role("tab", name="Adapters").click()
    user.photograph("12_adapters_empty")
    with user.page.expect_file_chooser() as chooser:
        user.press("Load LoRA")
    chooser.value.set_files(loras)
    user.reads("watercolour")
    user.reads("Loaded ")
    user.slide("watercolour", 0.5)
    user.press("Sample")
    user.sees_cards(3)
    user.reads("watercolour 0.5")
    user.sees_everything()
    user.photograph("13_adapters")
    user.page.get_by_role("menuitem", name="Settings").click()
    user.page.get_by_text("Theme", exact=True).hover()
    user.page.get_by_text("JupyterLab Dark", exact=True).click()
    user.page.wait_for_timeout(1000)
    user.photograph("14_adapters_dark")
    tab.click()
    user.photograph("15_control_dark")


TYPING = """
Playground(
    pipe, sizes=[(256, 256)], folder=folder, lcm_lora="data/tiny-sigma-lcm-lora", others={{"model": model}},
)
"""


def test_the_image_follows_the_prompt_while_one_types(server, browser, project):
    """The preview comes within seconds of the last letter, also beside other tests; a quiet machine takes one."""
    values = {"project": str(project), "model": "data/tiny-sigma", "folder": str(server[0] / "typed")}
    page, complaints = watched_page(browser)
    setup = CELLS[1].split("Playground(")[0]
    cells = [part.strip().format(**values) for part in (CELLS[0] + setup, TYPING)]
    open_notebook(page, server, "typing.ipynb", cells, ".pixart-playground")
    user = User(page)
    user.widget.get_by_label("Draw while typing").check()
    prompt = user.widget.get_by_label("Prompt", exact=True)
    prompt.press_sequentially("a red mushroom on gras", delay=30)
    user.sees_image(lambda pixels: pixels.shape == (256, 256, 3) and pixels.std() > 10)
    seconds = []
    for letters in ("s", " ", "at night"):
        page.wait_for_timeout(5000)  # for what was typed before
        before, started = user.image(), time.monotonic()
        prompt.press_sequentially(letters)
        user.sees_image(lambda pixels, before=before: pixels.std() > 10 and not np.array_equal(pixels, before))
        seconds.append(time.monotonic() - started)
    print("seconds from the last letter to an image:", [round(value, 2) for value in seconds])
    page.wait_for_timeout(5000)
    user.sees_everything()
    user.photograph("16_typing")
    page.close()
    assert complaints == []
    assert max(seconds) < 20
