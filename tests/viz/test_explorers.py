"""The explorers without a browser: what is chosen, what is shown, what is refused, what is exported."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from reference_data import diffusers
from traced_models import MASK, compressing, inputs

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.core import swap_prompt, trace
from pixart_nb.core.hooks.interventions import replace_compression
from pixart_nb.core.hooks.selection import Text
from pixart_nb.core.sampling.trajectory import follow
from pixart_nb.viz import explorers
from pixart_nb.viz.attention_explorer import AttentionExplorer
from pixart_nb.viz.explorers import Choice, figure_of, in_words, map_of, map_pixels, overview_of
from pixart_nb.viz.html_export import export_attention, quantised
from pixart_nb.viz.overlay import overlay, spread_cells
from pixart_nb.viz.pixels import enlarged, with_cells
from pixart_nb.viz.widget_parts import ClickableImage

IMAGE = np.random.default_rng(0).random((64, 96, 3))


@pytest.fixture(scope="module")
def run():
    """A trace of two calls on 4 x 6 tokens: layer 0 compresses its keys by 2, layer 1 does not."""
    net = compressing("mean", 2, kept=(0,))
    latents, _, caption, _ = inputs()
    with trace(net, announce=None) as found:
        for timestep in (900, 100):
            net(latents, np_timesteps(timestep), caption, MASK)
    found.texts = [[Text("red cup!", ("\u2581red", "\u2581c", "up", "</s>"))] * 2]
    return found


def np_timesteps(value):
    from pixart_nb.core.backend import ms

    return ms.Tensor(np.full(2, value, np.float32))


def test_a_words_map_is_that_of_the_trace(run):
    shown = map_of(run, Choice(word=1, layer=1, head=0, step=0))
    np.testing.assert_array_equal(shown.heat, run.word_map("cup", 1, 0, 0))
    assert (shown.ratio, shown.grid) == (1, (4, 6))


def test_a_patchs_map_has_the_grid_of_the_layers_keys(run):
    shown = map_of(run, Choice(patch=(3, 2), layer=0, step=1))
    expected = run.rows("blocks.0.attn", 1, [20])[:, 0].mean(0).reshape(2, 3)
    np.testing.assert_allclose(shown.heat, expected, rtol=1e-6)
    assert shown.ratio == 2
    assert shown.heat.sum() == pytest.approx(1, abs=1e-5)


def test_layers_with_different_grids_are_averaged_token_by_token(run):
    shown = map_of(run, Choice(patch=(3, 2), step=1))
    small = spread_cells(run.rows("blocks.0.attn", 1, [20])[:, 0].mean(0).reshape(2, 3), 2)
    full = run.rows("blocks.1.attn", 1, [20])[:, 0].mean(0).reshape(4, 6)
    np.testing.assert_allclose(shown.heat, (small + full) / 2, rtol=1e-5)


def test_the_overview_has_the_map_of_every_layer_and_head(run):
    for choice in (Choice(patch=(1, 1), step=0), Choice(word=1, step=0)):
        maps = overview_of(run, choice)
        assert maps.shape == (2, len(run.heads), 4, 6)
        one = map_of(run, Choice(choice.word, choice.patch, 1, run.heads[-1], 0))
        np.testing.assert_allclose(maps[1, -1], one.tokens, rtol=1e-5)


def test_too_large_an_overview_is_left_out(run, monkeypatch):
    monkeypatch.setattr(explorers, "OVERVIEW_SCORES", 10)
    assert overview_of(run, Choice(patch=(1, 1))) is None
    explorer = AttentionExplorer(run, IMAGE)
    assert explorer.overview.layout.display == "none"
    assert "too large" in explorer.note.value


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (Choice(), "choose a word or a patch"),
        (Choice(word=0, patch=(0, 0)), "one of the two"),
        (Choice(patch=(4, 0)), r"no patch \(4, 0\); rows are 0 to 3, columns 0 to 5"),
        (Choice(word=0, layer=7), r"no cross-attention of layer 7; it has layers \[0, 1\]"),
        (Choice(word=9), "no word number 9; the prompt 'red cup!' has 0: 'red'"),
        (Choice(word=0, step=5), "no step 5"),
        (Choice(word=0, head=9), "no head 9"),
    ],
)
def test_what_the_trace_does_not_have_is_refused_with_what_it_has(run, choice, message):
    with pytest.raises(ValueError, match=message):
        map_of(run, choice)


def test_a_trace_of_one_kind_says_that_it_has_no_other(run):
    net = compressing(None)
    latents, _, caption, _ = inputs()
    with trace(net, attention="cross", announce=None) as words_only:
        net(latents, np_timesteps(900), caption, MASK)
    with pytest.raises(ValueError, match=r"has no self-attention; it has blocks\.0\.cross_attn"):
        map_of(words_only, Choice(patch=(0, 0)))
    explorer = AttentionExplorer(words_only, IMAGE)
    before = explorer.choice
    explorer.view.cell = (1, 1)
    assert "has no self-attention; select a word" in explorer.message.value
    assert explorer.choice == before
    assert explorer.view.cell == ()


# ---- the widget


def image_of(explorer):
    return np.asarray(Image.open(io.BytesIO(explorer.view.png)))


def expected(run, choice):
    return enlarged(map_pixels(IMAGE, map_of(run, choice), choice.threshold))


def test_clicks_words_and_sliders_change_the_map(run):
    explorer = AttentionExplorer(run, IMAGE)
    assert explorer.choice.word == 0  # the longest
    seen = [explorer.choice]
    acts = (
        lambda: setattr(explorer.view, "cell", (2, 5)),
        lambda: setattr(explorer.layer, "value", 0),
        lambda: setattr(explorer.step, "value", 1),
        lambda: setattr(explorer.head, "value", 1),
        lambda: setattr(explorer.words, "value", 1),
        lambda: setattr(explorer.threshold, "value", 0.5),
        lambda: setattr(explorer.overview, "cell", (1, 0)),
    )
    for act in acts:
        act()
        seen.append(explorer.choice)
        np.testing.assert_array_equal(image_of(explorer), expected(run, explorer.choice))
    assert seen[1:] == [
        Choice(patch=(2, 5)),
        Choice(patch=(2, 5), layer=0),
        Choice(patch=(2, 5), layer=0, step=1),
        Choice(None, (2, 5), 0, 1, 1),
        Choice(1, None, 0, 1, 1),
        Choice(1, None, 0, 1, 1, 0.5),
        Choice(1, None, 1, 0, 1, 0.5),
    ]
    assert explorer.overview.cell == (1, 0)


def test_a_choice_can_be_assigned_and_one_that_cannot_be_shown_changes_nothing(run):
    explorer = AttentionExplorer(run, IMAGE)
    explorer.choice = choice = Choice(None, (0, 4), 1, 0, 0)
    assert explorer.choice == choice
    with pytest.raises(ValueError, match="no patch"):
        explorer.choice = Choice(patch=(9, 9))
    with pytest.raises(ValueError, match=r"no head 7; it has \[0, 1\]"):
        explorer.choice = Choice(patch=(0, 0), head=7)
    assert explorer.choice == choice


def test_images_of_the_steps_lie_under_their_maps(run):
    by_step = np.random.default_rng(1).random((2, 64, 96, 3))
    explorer = AttentionExplorer(run, IMAGE, by_step)
    explorer.step.value = 1
    shown = map_of(run, explorer.choice)
    np.testing.assert_array_equal(image_of(explorer), enlarged(map_pixels(by_step[1], shown)))
    with pytest.raises(ValueError, match="by_step has 1 images, the trace keeps 2 steps"):
        AttentionExplorer(run, IMAGE, by_step[:1])


def test_the_figure_is_what_is_shown(run):
    explorer = AttentionExplorer(run, IMAGE, choice=Choice(patch=(1, 1), layer=0, step=0))
    figure = explorer.figure()
    titles = [place.get_title() for place in figure.axes if place.images]
    assert titles == [f"layer 0, head {head}" for head in run.heads]
    one = figure_of(run, IMAGE, Choice(None, (1, 1), 0, 1, 0))
    heat = map_of(run, Choice(None, (1, 1), 0, 1, 0)).heat
    np.testing.assert_allclose(one.axes[0].images[0].get_array(), overlay(IMAGE, heat, None, None, 2, (4, 6)))


def test_the_sentence_has_the_numbers(run):
    choice = Choice(patch=(1, 1), layer=0, step=0)
    shown = map_of(run, choice)
    said = in_words(run, choice, shown)
    top = np.unravel_index(shown.heat.argmax(), shown.heat.shape)
    assert f"most at ({top[0]}, {top[1]}): {shown.heat.max():.3f}" in said
    assert said.endswith(". Layer 0, step 0; mean over heads.")


def test_a_word_that_the_prompt_does_not_have_is_refused(run):
    with pytest.raises(ValueError, match=r"there is no word 99; the prompt has 3, numbered from 0: \['red'"):
        AttentionExplorer(run, IMAGE).choice = Choice(word=99)


def test_a_cell_outside_of_the_image_is_refused():
    image = ClickableImage(rows=2, columns=3)
    image.cell = (1, 2)
    with pytest.raises(Exception, match="no cell"):
        image.cell = (2, 0)
    assert image.cell == (1, 2)


# ---- pages


def page_data(path):
    text = path.read_text(encoding="utf-8")
    return text, json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S).group(1))


def decoded(layer, steps, heads):
    """Maps of a page as numbers, (steps, heads, n, kh, kw)."""
    shape = (steps, heads, layer["count"])
    most = np.frombuffer(base64.b64decode(layer["most"]), "<f4").reshape(shape)
    values = np.frombuffer(base64.b64decode(layer["values"]), np.uint8).reshape(*shape, *layer["cells"])
    return values / 255 * most[..., None, None]


def test_a_page_holds_every_map_in_eight_bits(run, tmp_path):
    path = export_attention(tmp_path / "page.html", run, IMAGE, Choice(None, (1, 1), 0, 1, 1))
    text, data = page_data(path)
    assert data["start"] == {"word": None, "patch": [1, 1], "layer": 0, "head": 1, "step": 1, "threshold": 0.0}
    assert data["words"] == ["red", "cup", "</s>"]
    assert [layer["ratio"] for layer in data["self"]] == [2, 1]
    for layer, name in zip(data["self"], ("blocks.0.attn", "blocks.1.attn"), strict=True):
        maps = decoded(layer, 2, len(run.heads))
        for step in (0, 1):
            rows = run.rows(name, step, None)
            np.testing.assert_allclose(maps[step].reshape(rows.shape), rows, atol=rows.max() / 500)
    words = decoded(data["cross"][1], 2, len(run.heads))
    np.testing.assert_allclose(words[1, 0, 1], run.word_map("cup", 1, run.heads[0], 1), atol=1 / 500)
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in text
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=\"(?!data:)", text)


def test_text_of_a_prompt_cannot_break_the_page(run, tmp_path):
    own = run.texts
    run.texts = [[Text("</script><b>", ("</script>", "<b>", "x", "</s>"))] * 2]
    try:
        text, data = page_data(export_attention(tmp_path / "page.html", run, IMAGE, Choice(word=0)))
    finally:
        run.texts = own
    assert data["title"] == "</script><b>"
    assert text.count("</script>") == 2
    assert "&lt;/script&gt;&lt;b&gt;" in text


def test_a_page_keeps_less_where_there_is_too_much_and_says_what(run, tmp_path):
    choice, pages = Choice(None, (1, 1), 0, None, 1), []
    for most in (10**6, 3000, 600, 200, 100):
        _, data = page_data(export_attention(tmp_path / "page.html", run, IMAGE, choice, most_bytes=most))
        kept = [[layer["layer"] for layer in data["cross"]], data["heads"], [step for step, _ in data["steps"]]]
        pages.append((*kept, len(data["patches"]), data["notes"]))
        assert data["start"]["step"] == 1
    said = "All maps are too large for one page. It holds {}. A mean is over what it holds."
    assert pages == [
        ([0, 1], [0, 1], [0, 1], 24, ""),
        ([0, 1], [0, 1], [1], 24, said.format("1 of 2 steps (1)")),
        ([0, 1], [0, 1], [1], 1, said.format("1 of 2 steps (1); 1 of 24 patches")),
        ([0, 1], [1], [1], 1, said.format("1 of 2 steps (1); 1 of 2 heads (1); 1 of 24 patches")),
        ([0], [1], [1], 1, said.format("1 of 2 steps (1); 1 of 2 layers (0); 1 of 2 heads (1); 1 of 24 patches")),
    ]
    with pytest.raises(ValueError, match=r"one layer, head and step take 7.8e-05 MB"):
        export_attention(tmp_path / "none.html", run, IMAGE, choice, most_bytes=50)
    assert not (tmp_path / "none.html").exists()


def test_eight_bits_are_at_most_a_fivehundredth_of_the_most_away():
    maps = np.random.default_rng(0).random((2, 3, 4, 5, 6)).astype(np.float32)
    packed = quantised(maps) | {"cells": [5, 6]}
    np.testing.assert_allclose(decoded(packed, 2, 3), maps, atol=1 / 509)


def test_a_map_of_replaced_compression_has_its_cells():
    net = compressing(None)
    latents, _, caption, _ = inputs()
    with replace_compression(net, ratio=2, operator="uniform"), trace(net, announce=None) as found:
        net(latents, np_timesteps(500), caption, MASK)
    shown = map_of(found, Choice(patch=(0, 0), layer=1, step=0))
    assert shown.heat.shape == (2, 3)


# ---- prompts that are swapped during a run


@pytest.fixture(scope="module")
def swapped():
    pipe = PixArtSigmaPipeline.from_pretrained(diffusers("sigma")[0])
    with trace(pipe, announce=None) as record, swap_prompt(pipe, 2, "a blue fish in snow"):
        follow(pipe, "a red cup", generator=np.random.default_rng(0), num_inference_steps=4, height=32, width=32)
    return record


def test_a_step_without_the_word_says_so_and_shows_no_map_of_another(swapped):
    explorer = AttentionExplorer(swapped, np.zeros((32, 32, 3), np.uint8), choice=Choice(word=2))
    assert "cup" in explorer.message.value
    explorer.step.value = 3
    assert "the prompt" in explorer.message.value and "blue" in explorer.message.value
    pixels = np.asarray(Image.open(io.BytesIO(explorer.view.png)))
    assert not pixels.any()
    explorer.step.value = 1
    assert "attention on average" in explorer.message.value


@pytest.mark.parametrize(("step", "steps", "words"), [(None, [0, 1], "a red cup"), (3, [2, 3], "a blue fish in snow")])
def test_a_page_has_the_steps_of_one_prompt(swapped, tmp_path, step, steps, words):
    choice = Choice(patch=(0, 0), step=step)
    path = export_attention(tmp_path / "page.html", swapped, np.zeros((32, 32, 3), np.uint8), choice)
    page = page_data(path)[1]
    assert [number for number, _ in page["steps"]] == steps
    assert page["title"] == words
    assert page["notes"] == "The prompt was swapped during the run; the page has the steps of one prompt."


def test_a_page_without_self_attention_has_no_patches_to_click(tmp_path):
    pipe = PixArtSigmaPipeline.from_pretrained(diffusers("sigma")[0])
    with trace(pipe, attention="cross", announce=None) as record:
        follow(pipe, "a red cup", generator=np.random.default_rng(0), num_inference_steps=1, height=32, width=32)
    _, page = page_data(
        export_attention(tmp_path / "page.html", record, np.zeros((32, 32, 3), np.uint8), Choice(word=1))
    )
    assert page["patches"] == [] and page["self"] == []


@pytest.mark.parametrize("side", [256, 384, 512, 1024])
def test_lines_of_cells_stay_visible_when_the_image_is_shown_small(side):
    pixels = with_cells(np.zeros((side, side, 3), np.uint8), (side // 16, side // 16), 2)
    shown = np.asarray(Image.fromarray(pixels).resize((256, 256), Image.Resampling.NEAREST))
    lines = (shown[128 + 256 // (side // 16) // 2] == 255).all(1)
    assert np.count_nonzero(np.diff(lines.astype(int)) > 0) >= side // 32 - 1
