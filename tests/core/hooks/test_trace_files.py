"""A trace is one file, read back to the same maps, and refused when it is damaged or of another model."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from traced_models import compressing, draw, inputs

from pixart_nb.core import Trace, reweight_token, trace
from pixart_nb.core.io import CheckpointError, load_metadata, load_tensors, save_tensors


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


def test_a_file_of_version_0_1_is_read(saved, tmp_path):
    """It has one checksum of everything, and calls the images pictures."""
    t, path = saved
    arrays, metadata = load_tensors(path), load_metadata(path)
    arrays["pictures"] = arrays.pop("images")
    value = zlib.crc32(metadata["trace"].encode())
    for name in sorted(arrays):
        value = zlib.crc32(np.ascontiguousarray(arrays[name]).view(np.uint8).data, zlib.crc32(name.encode(), value))
    metadata = {"format": metadata["format"], "trace": metadata["trace"], "crc32": str(value)}
    save_file(arrays, tmp_path / "old.safetensors", metadata)
    again = Trace.load(tmp_path / "old.safetensors")
    assert np.array_equal(again.images, t.images)
    assert np.array_equal(again.word_maps(), t.word_maps())


def test_keys_that_steps_share_are_written_once(saved):
    names = [name for name in load_tensors(saved[1]) if name.endswith("/keys/values")]
    assert sum("cross_attn" in name for name in names) == 3  # one for each layer
    assert sum("cross_attn" not in name for name in names) == 9  # three layers at three steps


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


# ---- files from strangers: a valid checksum, but content that does not fit


def rewritten(path, target, change=lambda content: None, tensors=lambda tensors: None):
    """Write a trace file again with changed content and arrays, and the checksum of the changed content."""
    arrays, content = load_tensors(path), json.loads(load_metadata(path)["trace"])
    tensors(arrays)
    change(content)
    text = json.dumps(content)
    checksum = str(zlib.crc32(text.encode()))
    save_tensors(target, arrays, {"format": "pixart-nb trace 1", "trace": text, "trace_crc32": checksum})
    return target


FIRST = "blocks.0.attn/0"
REPLACEMENTS = [None, -1, 0, 2**62, 1e300, float("nan"), "x", [], {}, [[]], True, [[0, [0]]], {"a": {}}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(grid=[10**9, 10**9]), "grid"),
        (lambda c: c.update(grid=[4, 7]), "24 vectors for a grid of 4 x 7 tokens"),
        (lambda c: c["entries"][0].update(ratio=0), "ratio"),
        (lambda c: c["entries"][0].update(scale=1e300), "scale"),
        (lambda c: c["entries"][0].update(ratio=2), "vectors for a grid"),
        (lambda c: c["entries"][0].update(operator="__import__"), "operator"),
        (lambda c: c["entries"][0].update(name="blocks.0.mlp"), "name"),
        (lambda c: c["entries"][0].update(keys="../../etc/passwd"), "/etc/passwd"),
        (lambda c: c["entries"].pop(), "layers and steps"),
        (lambda c: c["entries"].append(c["entries"][0]), "twice"),
        (lambda c: c.update(labels=[]), "expected a prompt for each of 0 rows"),
        (lambda c: c.update(labels=["a"] * 10**6), "for each of 1000000 rows"),
        (lambda c: c.update(heads=list(range(9999))), "expected int16"),
        (lambda c: c.update(text_of=[[0, 9]]), "does not have"),
        (lambda c: c["texts"][0][0].__setitem__(1, ["x"] * 999), "more tokens than"),
        (lambda c: c.update(extra=1), "extra"),
        (lambda c: c.pop("names"), "names"),
    ],
)
def test_content_that_does_not_fit_its_arrays_is_refused(saved, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message) as error:
        Trace.load(rewritten(saved[1], tmp_path / "t.safetensors", change))
    assert "t.safetensors is not a valid trace" in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "tensors",
    [
        lambda t: t.pop(f"{FIRST}/queries/values"),
        lambda t: t.update({f"{FIRST}/queries/values": np.zeros(3, np.int16)}),
        lambda t: t.update({f"{FIRST}/queries/scale": t[f"{FIRST}/queries/scale"] * np.float32("nan")}),
        lambda t: t.update({f"{FIRST}/keys/offset": t[f"{FIRST}/keys/offset"].astype(np.float64)}),
        lambda t: t.update({"images": np.zeros((2, 4, 4), np.uint8)}),
    ],
)
def test_arrays_that_are_missing_or_of_another_form_are_refused(saved, tmp_path, tensors):
    with pytest.raises(CheckpointError, match="is not a valid trace"):
        Trace.load(rewritten(saved[1], tmp_path / "t.safetensors", tensors=tensors))


@settings(max_examples=150)
@given(data=st.data())
def test_a_mutated_header_loads_or_is_refused_in_one_line(saved, data):
    """Any value in the JSON replaced: CheckpointError, or a trace whose maps can be computed."""

    def mutate(node):
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = data.draw(st.sampled_from(keys))
            if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
                node[key] = data.draw(st.sampled_from(REPLACEMENTS))
                return
            node = node[key]

    path = rewritten(saved[1], saved[1].with_name("mutated.safetensors"), mutate)
    t, message = load_or_message(path)
    if t is None:
        assert "mutated.safetensors" in message and "\n" not in message
    else:
        assert np.isfinite(t.entropy()).all()
        assert t.word_maps(steps=0).shape == (len(t.words()), *t.grid)


def load_or_message(path):
    try:
        return Trace.load(path), ""
    except CheckpointError as error:
        return None, str(error)


def test_what_is_no_trace_is_refused(tmp_path):
    save_tensors(tmp_path / "weights.safetensors", {"weight": np.zeros(3)})
    with pytest.raises(CheckpointError, match="is not a trace"):
        Trace.load(tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        Trace.load(tmp_path / "none.safetensors")
