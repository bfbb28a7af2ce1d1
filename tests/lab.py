"""JupyterLab in a browser: fixtures and gestures that the browser tests share. Import the fixtures by name."""

import base64
import io
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

CHROMIUM = shutil.which("chromium")
sync_api = pytest.importorskip(
    "playwright.sync_api", reason="runs once playwright is installed: pip install -e '.[browser]'"
)
needs_browser = [
    pytest.mark.notebook,
    pytest.mark.skipif(not CHROMIUM, reason="runs once there is a chromium: apt-get install chromium"),
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
#: Milliseconds that a slow machine may take for anything.
SLOW = 300_000


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A JupyterLab of its own: the folder it serves, and the address with a token."""
    folder = tmp_path_factory.mktemp("lab")
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "IdentityProvider.token": token,
        "ServerApp.root_dir": folder,
        "LabApp.user_settings_dir": folder / "settings",
        "LabApp.workspaces_dir": folder / "workspaces",
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command + [f"--{name}={value}" for name, value in options.items()], stdout=log, stderr=log
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/api?token={token}", process, folder / "server.log")
            yield folder, f"http://127.0.0.1:{port}/lab/workspaces/{{}}/tree/{{}}?token={token}"
        finally:
            process.terminate()
            process.wait(SLOW / 1000)


def wait_for(address, process, log):
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            return urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"JupyterLab does not answer:\n{log.read_text()}")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def watched_page(browser, width=1400, height=1040):
    """A page, and the list of its errors: what the console or a script complains of."""
    page, complaints = browser.new_page(viewport={"width": width, "height": height}), []
    page.set_default_timeout(SLOW)
    page.on("console", lambda message: message.type == "error" and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    return page, complaints


def open_notebook(page, server, name, cells, shown, run=2):
    """Open a notebook of these cells, run the first ``run`` of them, and wait for what the selector finds."""
    folder, address = server
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells], metadata={"kernelspec": kernel})
    nbformat.write(notebook, folder / name)
    page.goto(address.format(secrets.token_hex(4), name))  # a layout of its own, not that of an earlier page
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=SLOW)
    page.wait_for_selector(".jp-Spinner", state="detached", timeout=SLOW)
    for number in range(run):
        run_cell(page, number)
    error = page.locator("[data-mime-type='application/vnd.jupyter.error']")
    page.locator(shown).or_(error).first.wait_for(timeout=SLOW)
    assert not error.count(), error.inner_text()


def run_cell(page, number):
    """Press Shift and Enter in a cell, again if it was lost, as happens when JupyterLab has only just opened."""
    cell = page.locator(".jp-Cell").nth(number)
    for _ in range(5):
        cell.locator(".cm-content").click()
        page.keyboard.press("Shift+Enter")
        try:
            return sync_api.expect(cell.locator(".jp-InputPrompt").first).not_to_have_text("[ ]:", timeout=3000)
        except AssertionError:
            continue
    raise AssertionError(f"cell {number} does not run")


def pixels_of(page, selector):
    """What an image on the page shows, (H, W, 3) uint8."""
    address = page.evaluate(
        """async (selector) => {
            const image = document.querySelector(selector)
            await image.decode().catch(() => {})  // the next one may be coming
            const canvas = document.createElement('canvas')
            Object.assign(canvas, {width: image.naturalWidth, height: image.naturalHeight})
            canvas.getContext('2d').drawImage(image, 0, 0)
            return canvas.toDataURL()
        }""",
        selector,
    )
    png = base64.b64decode(address.split(",", 1)[1])
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def until(condition, page, seconds=20):
    """Return what a condition returns once it is true, or at the end of the time."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        page.wait_for_timeout(250)
    return value


def nothing_cut_or_covered(widget):
    """Nothing is cut at an edge of the widget's boxes, and nothing lies over another control."""
    cut = """widget => [widget, ...widget.querySelectorAll('.widget-box')]
        .filter(box => box.scrollWidth > box.clientWidth)
        .map(box => `${box.className}, ${box.scrollWidth} in ${box.clientWidth} pixels: ${box.textContent}`)"""
    whole = until(lambda: not widget.evaluate(cut), widget.page)  # the page may still be laying itself out
    assert whole, widget.evaluate(cut)
    boxes = [
        part.bounding_box()
        for part in widget.locator("textarea, select, input, .widget-readout, button").all()
        if part.is_visible()
    ]
    for number, box in enumerate(boxes):
        for other in boxes[:number]:
            apart = (
                box["x"] + box["width"] <= other["x"] + 1 or other["x"] + other["width"] <= box["x"] + 1,
                box["y"] + box["height"] <= other["y"] + 1 or other["y"] + other["height"] <= box["y"] + 1,
            )
            assert any(apart), (box, other)
