"""A short training for compression begins at the average, resumes where it was stopped, and has held-out images."""

import mindspore as ms
import numpy as np
import pytest

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.core.io import CheckpointError
from pixart_nb.pixelart import adaptation
from pixart_nb.pixelart.adaptation import CompressionAdaptation

DEEP = [3, 4, 5]
SMALL = {"images": 4, "batch": 2}


@pytest.fixture(scope="module")
def pipe(project):
    return PixArtSigmaPipeline.from_pretrained(project / "data/tiny-sigma", mindspore_dtype=ms.float32)


@pytest.fixture(scope="module")
def first(pipe, tmp_path_factory):
    return CompressionAdaptation(pipe, DEEP, 2, "conv", tmp_path_factory.mktemp("straight"), 2, **SMALL)


def weights(training):
    return {name: p.asnumpy().copy() for name, p in training.net.parameters_and_names()}


def test_a_training_that_was_stopped_goes_on_to_the_same_numbers(pipe, first, tmp_path, monkeypatch):
    monkeypatch.setattr(adaptation, "draw_scenes", None)  # what was drawn once is not drawn again
    start = weights(first)
    first.train(2)
    for last in (1, 2):
        again = CompressionAdaptation(pipe, DEEP, 2, "conv", tmp_path, 2, like=first, **SMALL)
        again.train(last)
    expected, found = weights(first), weights(again)
    assert all(np.array_equal(found[name], value) for name, value in expected.items())
    moved = {name for name, value in expected.items() if not np.array_equal(value, start[name])}
    assert {"blocks.3.attn.sr.weight", "blocks.0.mlp.fc1.weight"} <= moved


def test_it_begins_with_the_models_weights_and_the_average(pipe, tmp_path, first):
    training = CompressionAdaptation(pipe, DEEP, 2, "conv", tmp_path, 2, like=first, **SMALL)
    own = {name: p.asnumpy() for name, p in pipe.transformer.parameters_and_names()}
    found = weights(training)
    assert all(np.array_equal(found[name], value) for name, value in own.items())
    assert (found["blocks.5.attn.sr.weight"] == 0.25).all()
    assert training.pipe.transformer is training.net is not pipe.transformer
    assert pipe.transformer.config.kv_ratio == 1


def test_compression_costs_on_the_same_held_out_images(pipe, tmp_path, first):
    training = CompressionAdaptation(pipe, DEEP, 4, "uniform", tmp_path, 2, like=first, **SMALL)
    whole = training.held_out_error(pipe.transformer)
    assert whole == first.held_out_error(pipe.transformer)
    assert training.held_out_error(training.net) > 1.1 * whole > 0


def test_a_curve_is_measured_once_and_whole_when_it_goes_on(pipe, tmp_path, first):
    def begun():
        return CompressionAdaptation(pipe, DEEP, 2, "conv", tmp_path, 2, like=first, **SMALL)

    half = begun()
    error = {"error": lambda: half.held_out_error(half.net, 1)}
    early = half.measured([0, 1], error)["error"]
    asked = []
    whole = begun()
    late = {"error": lambda: asked.append(whole.trainer.step) or whole.held_out_error(whole.net, 1)}
    curve = whole.measured([0, 1, 2], late)["error"]
    assert (asked, list(curve)) == ([2], [0, 1, 2])
    assert early == {point: curve[point] for point in (0, 1)} and len(set(curve.values())) == 3
    again = begun()
    assert again.measured([0, 2], late)["error"] == {0: curve[0], 2: curve[2]}
    assert all(np.array_equal(weights(again)[name], value) for name, value in weights(whole).items())
    with pytest.raises(ValueError, match=r"is at step 2, and \['other'\] was not measured at step 1"):
        again.measured([1], {"other": lambda: 0.0})


@pytest.mark.parametrize(("change", "said"), [({"images": 2}, "images: 4 there, 2 here"), ({"steps": 3}, "steps")])
def test_a_training_of_something_else_is_not_gone_on_with(pipe, tmp_path, first, change, said):
    CompressionAdaptation(pipe, DEEP, 2, "conv", tmp_path, 2, like=first, **SMALL).train(1)
    with pytest.raises(CheckpointError, match=said):
        CompressionAdaptation(pipe, DEEP, 2, "conv", tmp_path, like=first, **{"steps": 2} | SMALL | change)
