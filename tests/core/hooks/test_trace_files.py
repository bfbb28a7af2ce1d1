"""A trace is one file, read back to the same maps, and refused when it is damaged or of another model."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traced_models import compressing, draw, inputs

from pixart_nb.core import Trace, reweight_token, trace
from pixart_nb.core.io import CheckpointError, save_tensors


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "run.safetensors"
    with trace(pipe, announce=None) as t, reweight_token(pipe, "grass", 2.0):
        draw(pipe)
    t.images = [np.full((64, 96, 3), shade, np.uint8) for shade in (7, 200)]
    t.save(path)
    return t, path


def test_what_is_read_back_is_what_was_saved(pipe, saved):
    t, path = saved
    again = Trace.load(path, pipe)
    assert (again.names, again.heads, again.grid, again.labels) == (t.names, t.heads, t.grid, t.labels)
    assert (again.timestep_of, again.text_of, again.changes) == (t.timestep_of, t.text_of, t.changes)
    assert again.prompts == t.prompts and again.words(1) == t.words(1)
    assert again.nbytes == t.nbytes
    assert np.array_equal(again.images, t.images)
    for name in t.names:
        assert np.array_equal(again.rows(name, 1, [0, 23], row=1), t.rows(name, 1, [0, 23], row=1))
    assert np.array_equal(again.word_maps(), t.word_maps())


def test_keys_that_steps_share_are_written_once(saved):
    t, path = saved
    assert path.stat().st_size < t.nbytes + t.images.nbytes + 20_000


def test_compressed_layers_keep_their_grid(tmp_path):
    net = compressing("ave")
    with trace(net, announce=None) as t:
        net(*inputs())
    t.save(tmp_path / "t.safetensors")
    again = Trace.load(tmp_path / "t.safetensors", net)
    assert again.key_grid("blocks.1.attn") == (2, 3)
    assert np.array_equal(again.mean_distance(), t.mean_distance())


def test_a_trace_of_another_model_is_refused(saved, tmp_path):
    _, path = saved
    with pytest.raises(CheckpointError, match=r"of another model: .*depth 3 in the trace, 2 in the model"):
        Trace.load(path, compressing(None))
    net = compressing(None)
    with trace(net, announce=None) as t:
        net(*inputs())
    t.save(tmp_path / "t.safetensors")
    weight = net.blocks[1].attn.proj.weight
    weight.set_data(weight + 0.01)
    with pytest.raises(CheckpointError, match="same shape with other weights"):
        Trace.load(tmp_path / "t.safetensors", net)


@settings(max_examples=40)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_changed_bit_anywhere_is_noticed(saved, place, bit):
    _, path = saved
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    damaged = path.with_name("damaged.safetensors")
    damaged.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors"):
        Trace.load(damaged)


@settings(max_examples=20)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_that_was_cut_off_is_refused(saved, share):
    _, path = saved
    content = path.read_bytes()
    damaged = path.with_name("cut.safetensors")
    damaged.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        Trace.load(damaged)


def test_what_is_no_trace_is_refused(tmp_path):
    save_tensors(tmp_path / "weights.safetensors", {"weight": np.zeros(3)})
    with pytest.raises(CheckpointError, match="is not a trace"):
        Trace.load(tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        Trace.load(tmp_path / "none.safetensors")
