"""Prompts and captions with HTML, placeholders and mathematics, in every widget and every page, in a browser."""

import pytest
from lab import browser, needs_browser, open_notebook, server, watched_page
from untrusted_texts import PAGES, PROMPT, TEXTS, WIDGETS

pytestmark = needs_browser
__all__ = ["browser", "server"]  # fixtures
#: What a person can read: texts, values of controls, tooltips.
READ = """root => [root.innerText, ...[...root.querySelectorAll("textarea, input, button, option, canvas")]
    .map(part => [part.value, part.title, part.textContent].join("\\n"))].join("\\n")"""
#: Cells of a notebook that shows a widget.
CELLS = ("import sys\nsys.path[:0] = [{tests!r}, {project!r}]\nfrom untrusted_texts import WIDGETS", "{show}")


@pytest.mark.parametrize("where", [*(f"widget {name}" for name in WIDGETS), *(f"page {name}" for name in PAGES)])
def test_text_is_shown_as_it_is_written_and_nothing_runs(where, browser, server, project, tmp_path):
    page, complaints = watched_page(browser)
    kind, name = where.split()
    if kind == "page":
        page.goto(PAGES[name](tmp_path / "page.html").as_uri())
        assert page.title().split(": ")[-1] == " ".join(PROMPT.split())
        shown = page.locator("body")
    else:
        show = f"shown = WIDGETS[{name!r}]()\n" + "await shown.sample()\n" * (name == "playground") + "shown"
        values = {"tests": str(project / "tests"), "project": str(project), "show": show}
        open_notebook(page, server, "text.ipynb", [cell.format(**values) for cell in CELLS], ".jp-OutputArea-output")
        shown = page.locator(".jp-Cell").nth(1).locator(".jp-OutputArea")
    page.wait_for_timeout(2000)  # mathematics and handlers would come later
    frames = [frame for frame in page.frames[1:] if frame.locator("#canvas").count()]
    read = " ".join(" ".join([shown.evaluate(READ), *(f.locator("body").evaluate(READ) for f in frames)]).split())
    assert [text for text in TEXTS if " ".join(text.split()) not in read] == []
    assert [frame.evaluate("window.ran") for frame in page.frames] == [None] * len(page.frames)
    assert not page.locator("mjx-container, .MathJax").count()
    assert complaints == []
    page.close()
