"""A large image to be zoomed into: every pixel is in its tiles, and the page needs nothing but itself."""

import base64
import io
import itertools
import json
import re
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixart_nb.viz import zoom
from pixart_nb.viz.zoom import ZoomViewer, detailed_places, zoom_figure


def image(height=700, width=1100, seed=0):
    cells = np.random.default_rng(seed).integers(0, 255, (-(-height // 50), -(-width // 50), 3), np.uint8)
    return cells.repeat(50, 0).repeat(50, 1)[:height, :width]


def joined(level):
    """The pixels of a level's tiles, put together again."""
    rows = []
    for row in level["tiles"]:
        parts = [base64.b64decode(address.partition(",")[2]) for address in row]
        rows.append(np.concatenate([np.asarray(Image.open(io.BytesIO(part))) for part in parts], 1))
    return np.concatenate(rows)


@settings(max_examples=10)
@given(height=st.integers(1, 1300), width=st.integers(1, 1300))
def test_the_tiles_are_the_image_and_each_level_half_of_the_one_before(height, width):
    pixels = image(height, width)
    levels = ZoomViewer(pixels, quality=100).levels()
    assert np.array_equal(joined(levels[0]), pixels)
    for before, after in itertools.pairwise(levels):
        assert (after["height"], after["width"]) == (-(-before["height"] // 2), -(-before["width"] // 2))
    assert max(levels[-1]["height"], levels[-1]["width"]) <= zoom.TILE
    assert joined(levels[-1]).shape[:2] == (levels[-1]["height"], levels[-1]["width"])


def test_with_less_quality_the_file_is_smaller_and_the_image_close():
    pixels = np.random.default_rng(0).normal(image(512, 512), 3).clip(0, 255).astype(np.uint8)
    exact, close = ZoomViewer(pixels, quality=100), ZoomViewer(pixels)
    assert len(close.html()) < 0.7 * len(exact.html())
    assert np.abs(joined(close.levels()[0]).astype(int) - pixels).mean() < 4


def test_the_page_needs_no_network_and_its_title_is_text(tmp_path):
    path = ZoomViewer(image(), "a cup </script><b>").write(tmp_path / "page.html")
    page = path.read_text()
    assert not re.findall(r"(?:src|href)\s*=\s*[\"']?(?!data:)[a-z]+:", page)
    assert "http" not in page
    assert "<b>" not in page
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])
    assert data["title"] == "a cup </script><b>"


def test_an_image_is_read_from_its_file_and_shown_in_a_frame(tmp_path):
    Image.fromarray(image()).save(tmp_path / "cup.png")
    viewer = ZoomViewer(tmp_path / "cup.png", "cup")
    assert np.array_equal(viewer.image, image())
    assert repr(viewer).startswith("ZoomViewer of ") and repr(viewer).endswith("pixels: run this cell to use it")
    shown = viewer._repr_html_()
    assert shown.startswith("<iframe")
    assert 'sandbox="allow-scripts"' in shown
    assert np.array_equal(ZoomViewer(image() / 255.0).image, image())


@pytest.mark.parametrize("wrong", [np.zeros((4, 4)), np.zeros((0, 4, 3)), np.zeros((2, 4, 4, 3))])
def test_what_is_no_image_is_refused(wrong):
    with pytest.raises(ValueError, match="an image has shape"):
        ZoomViewer(wrong)
    with pytest.raises(ValueError, match="quality is 0"):
        ZoomViewer(image(), quality=0)


def test_details_are_shown_pixel_by_pixel_where_they_are_marked():
    pixels, places = image(), [(100, 200), (300, 40)]
    figure = zoom_figure(pixels, places, size=150)
    whole, *details = figure.axes
    for axes, (top, left) in zip(details, places, strict=True):
        assert np.array_equal(axes.images[0].get_array(), pixels[top : top + 150, left : left + 150])
        box = axes.get_window_extent()
        assert (box.width, box.height) == pytest.approx((150, 150))
    assert [patch.get_xy() for patch in whole.patches] == [(200, 100), (40, 300)]


def test_details_are_where_something_is():
    pixels = np.zeros((400, 400, 3), np.uint8)
    pixels[300:310, 320:330] = 255
    places = detailed_places(pixels, 100)
    assert any(top <= 300 <= top + 90 and left <= 320 <= left + 90 for top, left in places)
    assert len(zoom_figure(image(60, 40)).axes) >= 2


@pytest.mark.notebook
@pytest.mark.skipif(not shutil.which("chromium"), reason="runs once there is a chromium")
def test_the_viewer_zooms_and_moves_in_a_browser(tmp_path):
    api = pytest.importorskip("playwright.sync_api", reason="runs once playwright is installed")
    from lab import FLAGS, SLOW

    pixels, complaints = image(1400, 2200), []
    path = ZoomViewer(pixels, "cells", quality=100).write(tmp_path / "page.html")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 900, "height": 600})
        page.set_default_timeout(SLOW)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(path.as_uri())
        ready = "document.getElementById('canvas').dataset.ready === 'true'"
        page.wait_for_function(ready)
        assert page.inner_text("#say").startswith("4")  # 40%: the whole image
        page.click("#exact")
        page.wait_for_function(ready)
        assert page.inner_text("#say") == "100% · around 1100, 700"
        page.focus("#canvas")
        for _ in range(30):
            page.keyboard.press("ArrowLeft")
            page.keyboard.press("ArrowUp")
        page.wait_for_function(ready)
        shot = page.locator("#canvas").screenshot()
        shown = np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"))
        np.testing.assert_array_equal(shown[40:300, 40:700], pixels[40:300, 40:700])
        page.keyboard.press("0")
        page.wait_for_function(ready)
        assert page.inner_text("#say").startswith("4")
        browser.close()
    assert complaints == []


@pytest.mark.parametrize("title", ["{{data}}", '{{data}} onfocus="alert(1)" autofocus ', "</script><script>alert(1)"])
def test_a_prompt_with_a_placeholder_or_html_stays_text(title):
    page = ZoomViewer(image(8, 8), title).html()
    data = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data)["title"] == title
    rest = page.replace(data, "")
    assert 'levels":' not in rest
    assert "<script>alert" not in page
    assert 'onfocus="alert' not in rest


def test_a_detail_outside_of_the_image_is_refused():
    with pytest.raises(ValueError, match=r"details \[\(50, 0\)\] lie outside of the image; .* at most \(36, 36\)"):
        zoom_figure(np.zeros((100, 100, 3), np.uint8), [(0, 0), (50, 0)], 64)
