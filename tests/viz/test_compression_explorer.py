"""The compression explorer without a browser: maps with full and compressed keys, runs, results, pages."""

import asyncio
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from reference_data import diffusers

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.core.backend import ms
from pixart_nb.core.hooks.compression import CompressionStudy
from pixart_nb.viz.compression_explorer import SHEET, CompressionExplorer
from pixart_nb.viz.explorers import Choice, compressed_view, view_pixels
from pixart_nb.viz.overlay import spread_cells
from pixart_nb.viz.pixels import with_cells

CALL = {"height": 64, "width": 96, "num_inference_steps": 2, "max_sequence_length": 16}
PATCH = Choice(patch=(1, 4), layer=2, step=1)


@pytest.fixture(scope="module")
def study():
    pipe = PixArtSigmaPipeline.from_pretrained(diffusers("sigma")[0], mindspore_dtype=ms.float32)
    return CompressionStudy(pipe, "a red cup", 5, **CALL)


@pytest.fixture
def explorer(study):
    study._outcomes.clear()
    return CompressionExplorer(study, (1, 2), ("mean", "conv"), ((1, 2), 2, "mean"))


def shown(panel):
    return np.asarray(Image.open(io.BytesIO(panel.png)))


def test_a_patch_looks_at_full_and_at_compressed_keys(study):
    view = compressed_view(study, PATCH, 2, "mean")
    full = study.trace.rows("blocks.2.attn", 1, [10])[:, 0].mean(0).reshape(4, 6)
    np.testing.assert_allclose(view.full, full, rtol=1e-6)
    small = study.compressed_attention(2, 1, [10], 2, "mean")[:, 0].mean(0)
    np.testing.assert_allclose(view.compressed, small, rtol=1e-6)
    assert view.compressed.shape == (2, 3)
    assert view.compressed.sum() == pytest.approx(1, abs=1e-5)
    assert view.overlap == pytest.approx(1 - np.abs(spread_cells(small, 2) - full).sum() / 2)
    assert compressed_view(study, PATCH, 1, "mean").overlap == pytest.approx(1, abs=1e-5)


def test_a_word_stands_for_the_patches_that_attend_to_it(study):
    choice = Choice(word=2, layer=1, step=0, head=1)
    view = compressed_view(study, choice, 2, "conv")
    weights = study.trace.word_map(2, 1, 1, 0).ravel()
    rows = study.trace.rows("blocks.1.attn", 0, None, 1)[0]
    np.testing.assert_allclose(view.full.ravel(), weights / weights.sum() @ rows, rtol=1e-5)


def test_maps_are_drawn_with_the_cells_of_the_keys(study):
    image = np.full((64, 96, 3), 0.5)
    full, compressed, difference = view_pixels(image, compressed_view(study, PATCH, 2, "mean"))
    assert full.shape == compressed.shape == difference.shape == (256, 384, 3) or full.shape[1] >= 256
    line = compressed.shape[1] // 3
    assert (compressed[:, line] == 255).all() and not (full[:, line] == 255).all()
    same = view_pixels(image, compressed_view(study, PATCH, 1, "mean"))
    np.testing.assert_array_equal(same[0], same[1])


def test_one_layer_and_step_must_be_chosen(study):
    with pytest.raises(ValueError, match="one layer and one step"):
        compressed_view(study, replace(PATCH, layer=None), 2, "mean")
    with pytest.raises(ValueError, match="ratio 8 leaves no key of 4x6 tokens"):
        compressed_view(study, PATCH, 8, "mean")
    with pytest.raises(ValueError, match=r"no patch \(4, 0\)"):
        compressed_view(study, replace(PATCH, patch=(4, 0)), 2, "mean")


def test_controls_change_the_maps_and_not_the_images(explorer):
    acts = (
        lambda: setattr(explorer.panels[1], "cell", (1, 4)),
        lambda: setattr(explorer.ratio, "value", 1),
        lambda: setattr(explorer.ratio, "value", 2),
        lambda: setattr(explorer.operator, "value", "conv"),
        lambda: setattr(explorer.layer, "value", 0),
        lambda: setattr(explorer.head, "value", 1),
        lambda: setattr(explorer.step, "value", 0),
        lambda: setattr(explorer.word, "value", 2),
    )
    for act in acts:
        before = [panel.png for panel in explorer.panels]
        act()
        view = compressed_view(explorer.study, explorer.selection, explorer.ratio.value, explorer.operator.value)
        for panel, pixels in zip(explorer.panels, view_pixels(explorer.study.images[0], view), strict=True):
            np.testing.assert_array_equal(shown(panel), pixels)
        assert [panel.png for panel in explorer.panels] != before
    assert explorer.selection == Choice(2, None, 0, 1, 0)
    assert explorer.panels[0].cell == ()
    explorer.panels[2].cell = (0, 0)
    assert explorer.selection == Choice(None, (0, 0), 0, 1, 0)
    assert explorer.outcome is None
    assert explorer.results.layout.display == "none"
    assert "Not run yet" in explorer.message.value


def test_a_run_shows_its_images_and_another_choice_hides_them(explorer):
    outcome = asyncio.run(explorer.sample())
    assert outcome is explorer.outcome is explorer.study.computed([1, 2], 2, "mean")
    assert explorer.results.layout.display == ""
    assert "predictions are off by" in explorer.message.value
    assert explorer.table().cells()[0] == ["keys of a layer", "24", "6", "25.0%"]
    explorer.operator.value = "conv"
    assert explorer.results.layout.display == "none"
    explorer.operator.value = "mean"
    assert explorer.results.layout.display == ""


def test_a_run_can_be_cancelled(explorer):
    async def cancelled():
        run = asyncio.ensure_future(explorer.sample())
        while explorer.bar.value < 1:
            await asyncio.sleep(0)
        assert explorer.study.pipe.transformer.hook_manager is None
        explorer.cancel.click()
        return await run

    assert asyncio.run(cancelled()) is None
    assert "Cancelled after 1 of 4" in explorer.message.value or "Cancelled after 2 of 4" in explorer.message.value
    assert explorer.outcome is None
    assert not explorer.run.disabled


def test_the_page_holds_every_choice_that_was_run(explorer, tmp_path):
    explorer.choice = ((0, 1), 2, "conv")
    explorer.choice = ((1, 2), 2, "mean")
    page = explorer.export(tmp_path / "page.html").read_text()
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.S).group(1))
    assert [outcome["name"] for outcome in data["outcomes"]] == ["conv 2, layers 0-1", "mean 2, layers 1-2"]
    assert data["start"] == 1
    assert explorer.figure().axes[1].get_title() == "mean 2, layers 1-2"
    assert "of the attention is the same" in explorer.attention_figure().axes[2].get_title()


def test_the_page_names_no_compression_once(explorer, tmp_path):
    for choice in (((1, 2), 1, "mean"), ((0, 1), 1, "conv"), ((2,), 2, "mean")):
        explorer.choice = choice
    explorer.choice = ((0, 1), 1, "conv")
    page = explorer.export(tmp_path / "page.html").read_text()
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', page, re.S).group(1))
    assert [outcome["name"] for outcome in data["outcomes"]] == ["no compression", "mean 2, layer 2"]
    assert data["start"] == 0


@pytest.mark.parametrize("side", [128, 512])
def test_lines_of_cells_are_seen_at_the_size_of_the_sheet(explorer, side):
    """Every line has a pixel left if some rows and columns are dropped. The page reduces the sheet smoothly."""
    size = SHEET // 3
    pixels = with_cells(np.zeros((side, side, 3), np.uint8), (8, 8), 2, shown=size)
    for start in np.linspace(0, 0.99, 5):
        reduced = pixels[5][((np.arange(size) + start) * len(pixels) / size).astype(int), 0] == 255
        assert np.count_nonzero(np.diff(reduced.astype(int)) == 1) + reduced[0] >= 4
    assert "pixart-crisp" not in explorer.images._dom_classes


def test_a_saved_widget_says_what_to_do(explorer):
    assert explorer._repr_mimebundle_()["text/plain"] == "CompressionExplorer: run this cell to use it"


def test_during_a_run_a_choice_that_was_run_before_is_shown(explorer):
    """Its images stand beside its own numbers, not beside those of the last choice."""
    asyncio.run(explorer.sample())
    first = explorer.images.value
    explorer.operator.value = "conv"
    asyncio.run(explorer.sample())
    second = explorer.images.value

    async def run_and_look():
        explorer.layers.value = (0, 0)
        run = asyncio.ensure_future(explorer.sample())
        while explorer.bar.value < 1:
            await asyncio.sleep(0)
        explorer.layers.value, explorer.operator.value = (1, 2), "mean"
        seen = explorer.images.value, explorer.results.layout.display
        await run
        return seen

    assert first != second
    assert asyncio.run(run_and_look()) == (first, "")
    assert "predictions are off by" in explorer.message.value


def test_layers_with_gaps_are_refused_and_other_ratios_have_a_default(study):
    explorer = CompressionExplorer(study, ratios=(4,))
    assert explorer.ratio.value == 4
    with pytest.raises(ValueError, match=r"layers \[0, 2\] have gaps"):
        explorer.choice = ((0, 2), 4, "mean")
