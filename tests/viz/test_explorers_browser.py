"""The explorers as a user meets them: in JupyterLab, and as pages that need no Python, in a browser."""

import os
import time
from pathlib import Path

import numpy as np
from lab import (
    SLOW,
    browser,
    needs_browser,
    nothing_cut_or_covered,
    open_notebook,
    pixels_of,
    run_cell,
    server,
    until,
    watched_page,
)

pytestmark = needs_browser
__all__ = ["browser", "server"]  # fixtures
MODEL = os.environ.get("PLAYGROUND_MODEL", "data/tiny-sigma")
SCREENSHOTS = Path(os.environ.get("EXPLORER_IMAGES", "") or "outputs/explorers_browser")
#: Pixels of a screenshot, from the left.
WIDTH = 900
#: The large image of the attention explorer, and the images of the compression explorer.
LARGE = ".pixart-explorer .pixart-clickable img"
RESULTS = ".pixart-explorer .pixart-results img, .pixart-explorer img.pixart-results"
SET_UP = """
import os
os.chdir({project!r})
import numpy as np
from pixart_nb import AttentionExplorer, CompressionExplorer, PixArtSigmaPipeline
pipe = PixArtSigmaPipeline.from_pretrained({model!r})
"""
ATTENTION = """
from pixart_nb.core import trace
with trace(pipe) as t:
    call = dict(num_inference_steps=6, height=128, width=128, generator=np.random.default_rng(1))
    records = [*pipe.sample("a red mushroom on grass", **call)][1:]
images = pipe.decode_latents(np.concatenate([step.denoised for step in records]))
explorer = AttentionExplorer(t, images[-1], images)
explorer
"""
COMPRESSION = """
from pixart_nb.core.hooks.compression import CompressionStudy
study = CompressionStudy(pipe, "a red mushroom on grass", height=128, width=128, num_inference_steps=6)
explorer = CompressionExplorer(study, start=(range(3, 6), 2, "mean"))
explorer
"""


class User:
    """What a person does with an explorer on a page, and what they see."""

    def __init__(self, page):
        self.page, self.widget = page, page.locator(".pixart-explorer")
        self.clickable = self.widget.locator(".pixart-clickable")

    def click_cell(self, row, column, rows=8, columns=8, image=0):
        box = self.clickable.nth(image).bounding_box()
        place = {"x": (column + 0.5) / columns * box["width"], "y": (row + 0.5) / rows * box["height"]}
        self.clickable.nth(image).click(position=place)

    def slide(self, name, keys):
        handle = self.widget.locator(".widget-slider", has_text=name).locator("[role=slider]").first
        handle.focus()
        for key in keys:
            self.page.keyboard.press(key)

    def reads(self, text):
        self.widget.get_by_text(text).first.wait_for(timeout=SLOW)

    def image(self, selector=LARGE):
        return pixels_of(self.page, selector)

    def settled(self):
        """Wait until the kernel has answered. What it did before it was idle is then on the page."""
        self.page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(state="attached", timeout=SLOW)

    def sees(self, text, before=None, selector=LARGE):
        """Wait for a text that only the new state has; the image, which must not be ``before``."""
        self.reads(text)
        self.settled()
        changed = until(lambda: before is None or not np.array_equal(self.image(selector), before), self.page)
        assert changed, f"{text}: the image did not change"
        return self.image(selector)

    def mark(self):
        """The frame around the chosen patch, in cells of the image."""
        frame = self.clickable.first.locator(".pixart-mark").bounding_box()
        box = self.clickable.first.locator("img").bounding_box()
        return [round((frame[a] - box[a]) / box[side] * 8) for a, side in (("y", "height"), ("x", "width"))]

    def photograph(self, name):
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.widget.scroll_into_view_if_needed()
        box = self.widget.bounding_box()
        clip = box | {"width": min(box["width"], WIDTH)}
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png", clip=clip)


def opened(browser, server, project, name, cells):
    page, complaints = watched_page(browser, 1400, 1100)
    values = {"project": str(project), "model": MODEL}
    cells = [SET_UP.strip().format(**values), *(cell.strip() for cell in cells)]
    open_notebook(page, server, name, cells, ".pixart-explorer")
    page.keyboard.press("Control+B")  # without the list of files
    return page, complaints


def delay_of(page, act):
    """Seconds from an action until the large image has another address."""
    source = f"document.querySelector({LARGE!r}).src"
    before = page.evaluate(source)
    started = time.monotonic()
    act()
    page.wait_for_function(f"before => {source} !== before", arg=before, timeout=SLOW, polling=10)
    return time.monotonic() - started


def delays_of_clicks(user, enough, most=40):
    """Delays of five clicks; of more, up to ``most``, while the machine has other work and none is quick ``enough``."""
    delays = []
    while len(delays) < 5 or (min(delays) >= enough and len(delays) < most):
        row, column = divmod(len(delays), 8)
        delays.append(delay_of(user.page, lambda row=row, column=column: user.click_cell(row, column)))
        user.sees(f"Patch ({row}, {column})")
    return delays


def two_columns(user, page):
    """In a window of 1280 pixels, with the list of files, the overview stands beside the image."""
    page.set_viewport_size({"width": 1280, "height": 1100})
    page.keyboard.press("Control+B")
    place = lambda number: user.clickable.nth(number).bounding_box()  # noqa: E731
    assert until(lambda: place(0)["x"] > 300 and place(1)["x"] >= place(0)["x"] + place(0)["width"], page)
    nothing_cut_or_covered(user.widget)
    page.screenshot(path=SCREENSHOTS / "0_beside_the_files.png")
    page.keyboard.press("Control+B")
    page.set_viewport_size({"width": 1400, "height": 1100})


def test_a_patch_is_clicked_a_word_chosen_and_a_slider_moved(browser, server, project):
    save = f"str(explorer.export({str(server[0] / 'attention.html')!r}))"
    page, complaints = opened(browser, server, project, "explorer.ipynb", [ATTENTION, save])
    user = User(page)
    word = user.sees("“mushroom” gets")
    two_columns(user, page)
    user.photograph("1_word")
    user.click_cell(2, 5)
    patch = user.sees("Patch (2, 5) over 8 x 8 keys", word)
    assert user.mark() == [2, 5]
    user.slide("Layer", ["ArrowRight"] * 3)
    layer = user.sees("layer 2; mean over heads, steps", patch)
    user.slide("Step", ["ArrowRight"] * 2)
    step = user.sees("layer 2, step 1; mean over heads", layer)
    user.photograph("2_patch")
    page.keyboard.press("Escape")
    user.clickable.first.focus()
    page.keyboard.press("ArrowDown")
    moved = user.sees("Patch (3, 5)", step)
    user.click_cell(4, 1, 6, 6, image=1)
    head = user.sees("layer 4, head 1", moved)
    user.clickable.nth(1).locator(".pixart-mark").wait_for(timeout=SLOW)
    user.widget.get_by_role("button", name="mushroom").click()
    user.sees("“mushroom” gets", head)
    user.photograph("3_word_of_one_head")
    nothing_cut_or_covered(user.widget)
    delays = delays_of_clicks(user, 0.5)
    print("seconds from click to map:", [round(delay, 3) for delay in delays])
    assert min(delays) < 0.5
    user.click_cell(4, 3)
    user.sees("Patch (4, 3)")
    run_cell(page, 2)
    page.locator(".jp-OutputArea-output", has_text="attention.html").wait_for(timeout=SLOW)
    check_attention_page(browser, server[0] / "attention.html")
    assert complaints == []
    page.close()


def check_attention_page(browser, path):
    """The exported page in the same browser, with no server and no network."""
    page, complaints = watched_page(browser, 1000, 1000)
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready=yes]")
    page.screenshot(path=SCREENSHOTS / "4_attention_page.png")
    assert page.get_by_text("Patch (4, 3) over 8 x 8 keys").count()
    before = page.evaluate("document.getElementById('image').toDataURL()")
    page.get_by_role("button", name="mushroom").click()
    assert page.get_by_text("“mushroom” gets").count()
    after = page.evaluate("document.getElementById('image').toDataURL()")
    assert before != after
    page.locator("#frame").click(position={"x": 375, "y": 25})
    assert page.get_by_text("Patch (0, 7) over 8 x 8 keys").count()
    page.locator("#overview button").nth(8).click()
    assert page.locator("#layer").input_value() == "1"
    chosen = page.locator("#overview button[aria-pressed=true]")
    assert chosen.get_attribute("aria-label") == "layer 1, head 2"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert chosen.get_attribute("aria-label") == "layer 2, head 3"
    page.locator("#threshold").fill("0.5")
    assert complaints == []
    assert [url for url in requests if not url.startswith(("file:", "data:", "blob:"))] == []
    page.close()


def test_compressed_maps_follow_clicks_and_images_follow_runs(browser, server, project):
    save = f"str(explorer.export({str(server[0] / 'compression.html')!r}))"
    page, complaints = opened(browser, server, project, "explorer.ipynb", [COMPRESSION, save])
    page.keyboard.press("Control+B")  # with the list of files
    page.set_viewport_size({"width": 1280, "height": 900})
    user = User(page)
    middle = user.sees("Patch (4, 4), layer 5, mean over heads, step 3: mean 2", None)
    box = user.widget.bounding_box()
    assert box["x"] + box["width"] <= 1280 and box["height"] < 560
    user.click_cell(2, 5)
    patch = user.sees("Patch (2, 5)", middle)
    assert user.mark() == [2, 5]
    user.clickable.nth(1).focus()
    page.keyboard.press("ArrowDown")
    moved = user.sees("Patch (3, 5)", patch)
    user.slide("Layer", ["ArrowLeft"] * 2)
    layer = user.sees("layer 3, mean over heads", moved)
    user.widget.get_by_label("Word", exact=True).select_option("mushroom")
    user.sees("The patches that attend most to “mushroom”", layer)
    user.widget.get_by_role("button", name="4", exact=True).click()
    user.reads("compressed: 2 x 2 = 4 keys")
    user.photograph("5_compressed_maps")
    user.widget.get_by_role("button", name="2", exact=True).click()
    user.reads("Not run yet")
    delays = delays_of_clicks(user, 0.5)
    print("seconds from click to compressed map:", [round(delay, 3) for delay in delays])
    assert min(delays) < 0.5
    user.widget.get_by_role("button", name="Run").click()
    user.widget.get_by_role("button", name="Cancel").click()
    user.reads("Cancelled after ")
    user.widget.get_by_role("button", name="Run").click()
    two = user.sees("mean 2, layers 3-5: predictions are off by", None, RESULTS)
    assert "64\t16\t25.0%" in user.widget.locator("table").inner_text()
    user.widget.get_by_role("button", name="uniform").click()
    user.reads("Not run yet")
    user.widget.get_by_role("button", name="Run").click()
    user.sees("uniform 2, layers 3-5: predictions are off by", two, RESULTS)
    user.photograph("6_compression")
    nothing_cut_or_covered(user.widget)
    run_cell(page, 2)
    page.locator(".jp-OutputArea-output", has_text="compression.html").wait_for(timeout=SLOW)
    check_compression_page(browser, server[0] / "compression.html")
    assert complaints == []
    page.close()


def check_compression_page(browser, path):
    page, complaints = watched_page(browser, 1000, 900)
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-ready=yes]")
    page.screenshot(path=SCREENSHOTS / "7_compression_page.png")
    said, image = (page.locator("#say").inner_text(), page.locator("#images img").nth(2).get_attribute("src"))
    options = page.locator("#choice option").all_inner_texts()
    assert options[0] == "mean 2, layers 3-5"
    page.locator("#choice").select_option("0")
    assert page.locator("#say").inner_text() != said
    assert page.locator("#images img").nth(2).get_attribute("src") != image
    lines = page.locator("#curve polyline title").all_text_contents()
    assert set(lines) == {"mean 2, layers 3-5", "uniform 2, layers 3-5"}
    ticks = [float(text) for text in page.locator("#curve text[text-anchor=end]").all_text_contents()]
    assert len(ticks) >= 3 and all(len(f"{tick:.12g}".replace(".", "").strip("0")) <= 2 for tick in ticks), ticks
    assert complaints == []
    page.close()


def test_it_is_legible_in_a_narrow_window_and_in_the_dark_theme(browser, server, project):
    page, complaints = opened(browser, server, project, "explorer.ipynb", [ATTENTION])
    user = User(page)
    page.set_viewport_size({"width": 760, "height": 1900})
    page.get_by_role("menuitem", name="Settings").click()
    page.get_by_text("Theme", exact=True).hover()
    page.get_by_text("JupyterLab Dark", exact=True).click()
    user.sees("“mushroom” gets")
    user.click_cell(4, 4)
    user.sees("Patch (4, 4)")
    user.photograph("8_narrow_and_dark")
    nothing_cut_or_covered(user.widget)
    assert complaints == []
    page.close()
