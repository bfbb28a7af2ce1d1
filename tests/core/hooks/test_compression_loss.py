"""What compression loses is measured as the direct formulas say, without changing the run."""

from __future__ import annotations

import numpy as np
import pytest
from reference_data import relative_error
from traced_models import CALL, compressing, direct_maps, draw, inputs, watched

from pixart_nb.core import compression_loss, replace_compression, trace
from pixart_nb.core.sampling.trajectory import follow, predictions

NAME = "blocks.0.attn"


def cosines(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def merged(x):
    """(B, H, N, d) -> (B, N, H d)."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


@pytest.mark.parametrize("size", [(8, 12), (10, 14)])
def test_similarities_and_errors_are_those_of_the_direct_formulas(monkeypatch, size):
    net = compressing(None)
    call = watched(monkeypatch, lambda: net(*inputs(*size)))[0]
    with compression_loss(net, 0, ratio=2, operator="mean") as found:
        net(*inputs(*size))
    height, width = (side // 2 for side in size)
    rows, columns = height // 2, width // 2

    def cells(x):  # the mean of each 2x2 cell, (B, H, M, d)
        grid = x.reshape(*x.shape[:2], height, width, -1)[:, :, : 2 * rows, : 2 * columns]
        return (
            grid.reshape(*x.shape[:2], rows, 2, columns, 2, -1).mean((3, 5)).reshape(*x.shape[:2], rows * columns, -1)
        )

    small = call | {"k": cells(call["k"]), "v": cells(call["v"])}
    projection = net.blocks[0].attn.proj
    weight, bias = (p.asnumpy().astype(np.float64) for p in (projection.weight, projection.bias))
    whole, lossy = (merged(direct_maps(c) @ c["v"]) @ weight.T + bias for c in (call, small))
    loss = found.losses[NAME, 0]
    assert np.allclose(loss.output_similarity.reshape(2, -1), cosines(whole, lossy), atol=1e-5)
    expected = [np.linalg.norm(lossy[r] - whole[r]) / np.linalg.norm(whole[r]) for r in range(2)]
    assert np.allclose(loss.output_error, expected, rtol=1e-4)

    keys = merged(call["k"]).reshape(2, height, width, -1)
    near = merged(small["k"]).reshape(2, rows, columns, -1).repeat(2, 1).repeat(2, 2)
    covered = keys[:, : 2 * rows, : 2 * columns]
    assert np.allclose(loss.key_similarity[:, : 2 * rows, : 2 * columns], cosines(covered, near), atol=1e-5)
    assert (
        np.isnan(loss.key_similarity[:, 2 * rows :]).all() and np.isnan(loss.key_similarity[:, :, 2 * columns :]).all()
    )
    expected = [np.linalg.norm(near[r] - covered[r]) / np.linalg.norm(covered[r]) for r in range(2)]
    assert np.allclose(loss.key_error, expected, rtol=1e-4)

    assert found.map("output_similarity", NAME, row=1).shape == (height, width)


def test_measuring_changes_nothing(pipe):
    before = draw(pipe)
    with compression_loss(pipe, ratio=2, operator="conv", steps=[0, 2]) as found:
        assert np.array_equal(draw(pipe), before)
    assert found.steps == [0, 2]
    assert found.values("output_error").shape == (3, 2)
    assert (found.values("output_error") > 0).all()
    assert pipe.transformer.hook_manager is None


def test_along_a_kept_run_only_rows_of_the_prompts_are_measured(pipe):
    call = {key: CALL[key] for key in ("height", "width", "num_inference_steps", "max_sequence_length")}
    with compression_loss(pipe, ratio=2, operator="mean") as during:
        run = follow(pipe, CALL["prompt"], generator=np.random.default_rng(0), **call)
    with compression_loss(pipe, ratio=2, operator="mean") as along, trace(pipe, announce=None) as t:
        predictions(pipe, run)
    assert t.labels == ["conditional 0", "conditional 1"]
    assert t.prompts == CALL["prompt"]
    assert along.losses[NAME, 1].key_error.shape == (2,)
    assert np.allclose(along.values("output_error", row=1), during.values("output_error", row=1), rtol=1e-5)


def test_a_compression_of_the_model_is_measured_unless_told(pipe):
    net = compressing("conv", kept=(1,))
    with compression_loss(net) as own:
        net(*inputs())
    assert own.compression == {NAME: (None, 1), "blocks.1.attn": ("conv", 2)}
    assert own.values("output_error")[0] == 0 < own.values("output_error")[1]
    with compression_loss(net, ratio=2, operator="conv") as told:
        net(*inputs())
    assert told.values("key_error")[1] == own.values("key_error")[1]
    with replace_compression(pipe, [0], 2, "mean"), compression_loss(pipe) as put, trace(pipe, announce=None) as t:
        draw(pipe)
    assert put.values("output_similarity")[0].max() < 1
    assert (put.values("output_similarity")[1:] == 1).all()
    assert t.key_grid(NAME) == (2, 3)


def test_what_changes_little_loses_little(pipe):
    with (
        compression_loss(pipe, ratio=2, operator="mean") as two,
        compression_loss(pipe, ratio=4, operator="mean") as four,
    ):
        draw(pipe)
    assert (two.values("output_error") < four.values("output_error")).all()
    assert relative_error(two.values("key_similarity"), four.values("key_similarity")) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "none of blocks.0.attn, .* compresses its keys; give ratio and operator"),
        ({"ratio": 2}, "give both or neither"),
        ({"ratio": 2, "operator": "max"}, "'max' is unknown"),
        ({"ratio": 9, "operator": "mean"}, "leaves no key of 4x6 tokens"),
        ({"ratio": 2, "operator": "mean", "steps": 5}, "it has steps 0 to 2"),
        ({"ratio": 2, "operator": "mean", "layers": 4}, "it has blocks.0 to blocks.2"),
    ],
)
def test_what_cannot_be_measured_is_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):  # noqa: SIM117
        with compression_loss(pipe, **options):
            draw(pipe)


def test_what_was_not_measured_is_refused_with_what_was():
    net = compressing("ave")
    with compression_loss(net, layers=1) as found:
        net(*inputs())
    with pytest.raises(ValueError, match=r"layer 'blocks.0.attn' was not measured; measured were blocks.1.attn"):
        found.map("key_similarity", NAME)
    with pytest.raises(ValueError, match=r"step 3 was not measured; measured were \[0\]"):
        found.map("key_similarity", "blocks.1.attn", steps=3)
