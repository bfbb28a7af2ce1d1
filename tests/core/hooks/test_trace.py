"""A trace holds what attention computed, changes nothing, and says what is wrong with what it is asked."""

from __future__ import annotations

from copy import copy

import numpy as np
import pytest
from traced_models import CALL, NAMES, assert_untouched, compressing, direct_maps, draw, inputs, never, watched

from pixart_nb.core import TraceTooLargeError, trace
from pixart_nb.core.backend import ms
from pixart_nb.core.fast.cpu import CPUDenoiser
from pixart_nb.core.hooks import attention_maps as maps
from pixart_nb.core.hooks.hook_points import HookPoint
from pixart_nb.pixelart.adaptation import compressed_copy

# ---- what it holds


@pytest.mark.parametrize("size", [(8, 12), (12, 6), (10, 14)])
@pytest.mark.parametrize("operator", [None, "conv", "ave", "mean"])
def test_maps_are_those_of_the_direct_formula_in_float64(monkeypatch, operator, size):
    net, given = compressing(operator), inputs(*size)
    calls = watched(monkeypatch, lambda: net(*given))
    with trace(net, announce=None) as t:
        net(*given)
    assert t.names == NAMES
    assert t.grid == (size[0] // 2, size[1] // 2)
    for name, call in zip(NAMES, calls, strict=True):
        for row, expected in enumerate(direct_maps(call)):
            found = t.rows(name, 0, None, row=row)
            assert found.dtype == np.float32
            assert np.abs(found - expected).max() < 1e-3
            assert np.abs(found.sum(-1) - 1).max() < 1e-5
    rows, columns = (side // 2 for side in t.grid) if operator else t.grid
    assert t.key_grid("blocks.0.attn") == (rows, columns)
    assert t.compression("blocks.1.attn") == ((operator, 2) if operator else (None, 1))


def test_masked_tokens_get_no_attention():
    net, given = compressing(None), inputs()
    with trace(net, announce=None) as t:
        net(*given)
    short = t.rows("blocks.1.cross_attn", 0, None, row=1)
    assert short.shape[-1] == 4
    assert (short[..., 2:] == 0).all()
    assert (short[..., :2] > 0).all()


def test_the_picture_is_bit_for_bit_the_same(pipe):
    before = draw(pipe)
    with trace(pipe, announce=None):
        during = draw(pipe)
    assert np.array_equal(before, during)
    assert np.array_equal(before, draw(pipe))


@pytest.mark.parametrize("operator", ["conv", "ave", "mean"])
def test_a_model_that_compresses_draws_the_same_too(pipe, operator):
    other = copy(pipe)
    other.transformer = compressed_copy(pipe.transformer, [0, 2], 2, operator)
    before = draw(other, height=80, width=112)
    with trace(other, announce=None) as t:
        assert np.array_equal(draw(other, height=80, width=112), before)
    assert (t.grid, t.key_grid("blocks.2.attn"), t.key_grid("blocks.1.attn")) == ((5, 7), (2, 3), (5, 7))


def test_rows_of_the_prompts_are_kept_unless_told(pipe, traced):
    with trace(pipe, rows="all", announce=None) as every:
        draw(pipe)
    with trace(pipe, rows="unconditional", announce=None) as other:
        draw(pipe)
    assert every.labels == ["unconditional 0", "unconditional 1", "conditional 0", "conditional 1"]
    assert traced.labels == every.labels[2:]
    for row in range(2):
        place = "blocks.1.cross_attn", 2, [0, 7]
        assert np.array_equal(traced.rows(*place, row=row), every.rows(*place, row=2 + row))
        assert np.array_equal(other.rows(*place, row=row), every.rows(*place, row=row))
    assert np.abs(every.rows("blocks.1.attn", 2, [5]) - every.rows("blocks.1.attn", 2, [5], row=2)).max() > 1e-4
    assert traced.prompts == ["a red mushroom on grass", "blue cat"]
    assert traced.words(1) == ["blue", "cat", "</s>"]
    assert every.words(0) == []


def test_without_guidance_every_row_follows_a_prompt(pipe):
    with trace(pipe, announce=None) as t:
        draw(pipe, guidance_scale=1.0)
    assert t.labels == ["conditional 0", "conditional 1"]
    with pytest.raises(ValueError, match="without guidance"), trace(pipe, rows="unconditional", announce=None):
        draw(pipe, guidance_scale=1.0)


def test_chosen_layers_heads_and_steps_are_kept(pipe, traced):
    with trace(pipe, layers=(1, "blocks.0.attn"), heads=1, timesteps=traced.timesteps[1:], announce=None) as t:
        draw(pipe)
    assert t.names == [NAMES[0], *NAMES[2:]]
    assert (t.heads, t.steps, t.timesteps) == ([1], [1, 2], traced.timesteps[1:])
    found = t.rows("blocks.1.attn", 2, [3], heads=1)
    assert np.array_equal(found, traced.rows("blocks.1.attn", 2, [3], heads=[1]))
    with trace(pipe, attention="cross", steps=0, announce=None) as t:
        draw(pipe)
    assert t.names == [*NAMES[1::2], "blocks.2.cross_attn"]
    assert t.steps == [0]


def test_calls_of_a_transformer_are_steps():
    net, (latents, _, caption, mask) = compressing(None), inputs()
    with trace(net, announce=None) as t:
        for timestep in (900.0, 400.0):
            net(latents, ms.Tensor([timestep, timestep], ms.float32), caption, mask)
    assert t.timesteps == [900.0, 400.0]
    assert list(t.text().pieces) == ["<0>", "<1>", "<2>", "<3>"]
    assert t.word_map(1).shape == t.grid


# ---- what is made of it


def test_words_merge_their_pieces_and_sum_with_the_rest_to_one(traced):
    assert traced.words() == ["a", "red", "mushroom", "on", "grass", "</s>"]
    every = traced.word_maps()
    assert every.shape == (6, *traced.grid)
    assert np.abs(every.sum(0) - 1).max() < 1e-5
    pieces = [n for n, piece in enumerate(traced.text().pieces) if n in traced.word_tokens()[2].tokens]
    assert len(pieces) > 1  # else the test says nothing
    expected = np.mean(
        [traced.rows(n, step, None)[..., pieces].sum(-1) for n in traced.names[1::2] for step in traced.steps],
        axis=(0, 1),
    )
    assert np.allclose(traced.word_map("mushroom").ravel(), expected, atol=1e-6)
    assert np.allclose(traced.word_map("Mushroom,"), every[2], atol=1e-7)
    assert np.allclose(traced.word_map("red mushroom"), every[1] + every[2], atol=1e-6)
    one = traced.word_map("mushroom", layers=1, heads=[0], steps=2)
    assert np.allclose(one.ravel(), traced.rows(NAMES[3], 2, None, heads=0)[0][:, pieces].sum(-1), atol=1e-6)


def test_means_entropy_and_distance_are_those_of_the_whole_matrices():
    net = compressing("mean", kept=(1,))
    with trace(net, announce=None) as t:
        net(*inputs(8, 12))
    height, width = t.grid
    places = np.stack(np.divmod(np.arange(height * width), width), 1)
    cells = np.array([(2 * r + 0.5, 2 * c + 0.5) for r in range(height // 2) for c in range(width // 2)])
    for number, (name, keys) in enumerate([("blocks.0.attn", places), ("blocks.1.attn", cells)]):
        whole = t.rows(name, 0, None).astype(np.float64)
        mean = t.mean_map(number, queries=[1, 8])
        assert mean.shape == t.key_grid(name)
        assert np.allclose(mean.ravel(), whole[:, [1, 8]].mean((0, 1)), atol=1e-6)
        entropy = -(whole * np.log(whole)).sum(-1).mean(-1)
        assert np.allclose(t.entropy(number)[0, 0], entropy, atol=1e-5)
        distance = np.linalg.norm(places[:, None] - keys[None], axis=-1)
        assert np.allclose(t.mean_distance(name)[0, 0], (whole * distance).sum(-1).mean(-1), atol=1e-5)
    region = np.zeros(t.grid, bool)
    region[1, 2:4] = True
    cross = t.rows("blocks.0.cross_attn", 0, [width + 2, width + 3])
    assert np.allclose(t.mean_map(0, queries=region, attention="cross")[0], cross.mean((0, 1)), atol=1e-6)
    with pytest.raises(ValueError, match="different grids"):
        t.mean_map()


def test_no_chunk_is_larger_than_its_share_and_the_numbers_stay(monkeypatch, traced):
    plain = traced.entropy(), traced.mean_distance(), traced.word_maps(), traced.mean_map(0)
    sizes, original = [], maps.softmax_rows

    def softmax_rows(*args):
        sizes.append((out := original(*args)).nbytes)
        return out

    monkeypatch.setattr(maps, "softmax_rows", softmax_rows)
    monkeypatch.setattr(maps, "CHUNK_BYTES", 800)
    again = traced.entropy(), traced.mean_distance(), traced.word_maps(), traced.mean_map(0)
    assert max(sizes) <= 800
    for a, b in zip(plain, again, strict=True):
        assert np.allclose(a, b, atol=1e-5)


def test_queries_for_large_pictures_are_spread_evenly(traced):
    total = traced.grid[0] * traced.grid[1]
    assert traced.sample(3).tolist() == [0, 12, 23] and total == 24
    assert len(traced.sample(10**6)) == total


# ---- memory


def test_memory_is_announced_before_the_run_and_bounds_what_is_taken(pipe):
    said = []
    with trace(pipe, attention="self", announce=said.append) as t:
        steps = pipe.sample(**{k: v for k, v in CALL.items() if k not in ("output_type", "use_resolution_binning")})
        assert len(said) == 1 and not t.records
        list(steps)
    assert f"trace: {t.nbytes / 1e3:.1f} kB (3 blocks x 3 steps x 2 of 4 rows" in said[0]
    with trace(pipe, announce=said.append) as t:
        draw(pipe)
    announced = float(said[1].split()[1]) * 1e3
    assert 0.4 * announced < t.nbytes <= announced


def test_keys_of_a_caption_are_kept_once(traced):
    arrays = {id(traced.records[name, step].keys) for name in NAMES[1::2] for step in traced.steps}
    assert len(arrays) == 2


def test_a_trace_that_is_too_large_is_refused_before_the_run(pipe, monkeypatch):
    monkeypatch.setattr(CPUDenoiser, "__call__", never)
    monkeypatch.setattr(pipe, "_encode", never)
    with (
        pytest.raises(TraceTooLargeError, match=r"would take \d+\.\d kB.*the limit is 1\.0 kB.*fewer layers"),
        trace(pipe, memory_limit=1000),
    ):
        draw(pipe)
    assert pipe.transformer.hook_manager is None


def test_calls_of_a_transformer_stop_at_the_limit():
    net, given = compressing(None), inputs()
    with trace(net, announce=None) as t:
        net(*given)
    with trace(net, memory_limit=int(2.5 * t.nbytes), announce=None) as t:
        net(*given)
        net(*given)
        with pytest.raises(TraceTooLargeError):
            net(*given)
    assert t.steps == [0, 1]


def test_arrays_may_lie_on_the_disk_and_go_with_the_trace(pipe, traced, tmp_path):
    folder = tmp_path / "scratch"
    with trace(pipe, folder=folder, announce=None) as t:
        draw(pipe)
    assert isinstance(t.records["blocks.1.attn", 2].queries.values, np.memmap)
    assert np.array_equal(t.word_maps(), traced.word_maps())
    assert list(folder.iterdir()) == []


# ---- nothing is left behind


def test_after_an_error_the_model_is_as_it_was(pipe):
    net = pipe.transformer
    names, before = [name for name, _ in net.parameters_and_names()], draw(pipe)

    def stop(step, timestep, latents):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), trace(pipe, announce=None) as t:
        draw(pipe, callback=stop)
    assert t.steps == [0]
    assert t.word_map("grass").shape == t.grid
    assert_untouched(net, names)
    assert np.array_equal(before, draw(pipe))


def test_a_step_in_whose_middle_the_run_was_stopped_is_not_kept(pipe, monkeypatch):
    original = HookPoint.__call__

    def attend(self, *args):
        if self.name == "blocks.1.cross_attn" and self.manager.run.index == 1:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(HookPoint, "__call__", attend)
    with pytest.raises(KeyboardInterrupt), trace(pipe, announce=None) as t:
        draw(pipe)
    assert t.steps == [0]
    assert {step for _, step in t.records} == {0}


def test_traces_may_be_nested_and_leave_one_by_one(pipe):
    names = [name for name, _ in pipe.transformer.parameters_and_names()]
    with trace(pipe, announce=None) as outer:
        with trace(pipe, layers=0, announce=None) as inner:
            pass_through = draw(pipe)
        assert pipe.transformer.hook_manager is not None
    assert np.array_equal(outer.rows(NAMES[0], 1, [4]), inner.rows(NAMES[0], 1, [4]))
    assert pass_through.shape[0] == 2
    assert_untouched(pipe.transformer, names)
