"""Training a ControlNet: only the copied blocks move, it resumes, and its folder is what sampling reads."""

import json
from itertools import islice

import numpy as np
import pytest
from PIL import Image
from reference_data import diffusers
from small_pipeline import training_config, write_training_data

from pixart_nb.config import ConfigError, check_config
from pixart_nb.core import load_controlnet, load_transformer
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.controlnet import edge_options
from pixart_nb.core.data.control import ControlImages, EdgeOptions, edges
from pixart_nb.core.data.files import DataError
from pixart_nb.core.data.images import fit, load_image, to_signed
from pixart_nb.core.data.labels import load_labels
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.generate import sample
from pixart_nb.core.training.loss import control_loss
from pixart_nb.core.training.networks import vae_encoder
from pixart_nb.core.training.objectives import ControlObjective
from pixart_nb.core.training.run import Training, train


@pytest.fixture(scope="module")
def folder(project, tmp_path_factory):
    """A small model, labels to train on, labels held out, and condition images as files."""
    folder = tmp_path_factory.mktemp("control")
    write_training_data(folder, project, 6, 2, final_layer=0.1)
    for label in load_labels(folder / "train.json", project / "data/pixelart"):
        path = (folder / "maps" / label.path).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ControlImages().pixels(label, (label.height, label.width))).save(path)
    return folder


@pytest.fixture(scope="module")
def config(folder, project):
    def make(output, **changes):
        values = {"copy_blocks_num": 1, "steps": 4, "start_learning_rate": 1e-2, "auto_lr": ""}
        return training_config(folder, project, output, **values | changes)

    return make


def losses(rows):
    return [row["loss"] for row in rows]


def test_only_the_copied_blocks_are_trained_and_an_interrupted_training_resumes(config, tmp_path):
    whole = Training(config(tmp_path / "whole"))
    before = {name: p.asnumpy().copy() for name, p in whole.objective.network.parameters_and_names()}
    expected = losses(whole.steps())
    for name, parameter in whole.objective.network.parameters_and_names():
        assert np.array_equal(parameter.asnumpy(), before[name]) != name.startswith("controlnet."), name
    first = Training(config(tmp_path / "parts"))
    parts = losses(islice(first.steps(), 2))
    parts += losses(Training(config(tmp_path / "parts")).steps())
    assert parts == expected


def test_the_training_of_a_controlnet_goes_on_from_its_folder(config, tmp_path):
    first = Training(config(tmp_path / "first", use_ema=False))
    losses(first.steps())
    first.objective.write(tmp_path / "controlnet", first.trainer.weights())
    later = Training(config(tmp_path / "later", controlnet=str(tmp_path / "controlnet")))
    parameters = dict(later.objective.network.parameters_and_names())
    for name, parameter in first.objective.network.parameters_and_names():
        assert np.array_equal(parameter.asnumpy(), parameters[name].asnumpy()), name
    before = {name: p.asnumpy().copy() for name, p in later.objective.parameters().items()}
    losses(later.steps())
    assert all(not np.array_equal(p.asnumpy(), before[name]) for name, p in later.objective.parameters().items())


def test_a_controlnet_gets_further_blocks_but_never_fewer(config, tmp_path):
    net = load_transformer(diffusers("sigma")[0] / "transformer")

    def weights(copies, **start):
        keys = {"copy_blocks_num": copies} | start
        objective = ControlObjective(config(tmp_path / "run").model_copy(update=keys), net)
        return objective, {name: p.asnumpy().copy() for name, p in objective.parameters().items()}

    (objective, one), (_, two) = weights(1), weights(2)
    trained = {name: value + 1 for name, value in one.items()}
    objective.write(tmp_path / "one", trained)
    objective, larger = weights(2, controlnet=str(tmp_path / "one"))
    assert all(np.array_equal(larger[name], trained.get(name, two[name])) for name in two)
    objective.write(tmp_path / "two", larger)
    with pytest.raises(ConfigError, match="copies 2 blocks, and copy_blocks_num is 1; give at least 2"):
        weights(1, controlnet=str(tmp_path / "two"))


def test_cached_conditions_are_those_that_are_computed_live(config, tmp_path):
    cached = Training(config(tmp_path / "a", feature_dtype="fp32"))
    live = Training(config(tmp_path / "b", feature_cache=""))
    for found, expected in zip(cached.batches(1), live.batches(1), strict=True):
        first, second = (x.asnumpy() if isinstance(x, ms.Tensor) else x for x in (found, expected))
        np.testing.assert_allclose(first, second, atol=1e-4)


def test_files_beside_the_images_are_taken_in_place_of_edges(config, folder, tmp_path):
    training = Training(config(tmp_path / "a", control_dir=str(folder / "maps")))
    control, networks = training.networks.control, Training(config(tmp_path / "b", feature_cache="")).networks
    size, indices = training.sampler.batch(0)
    pixels = np.stack([fit(load_image(control.file(training.labels[i])), *size) for i in indices])
    expected = vae_encoder(networks.vae)(to_signed(pixels))[0] * networks.vae_config.scaling_factor
    assert folder / "maps" in control.file(training.labels[0]).parents
    np.testing.assert_allclose(training.batches(0)[8], expected, rtol=2e-3, atol=2e-3)
    with pytest.raises(DataError, match="does not exist"):
        Training(config(tmp_path / "c", control_dir=str(folder / "model")))


def test_the_folder_of_a_training_draws_with_its_base_model(config, folder, project, tmp_path):
    image = str(project / "data/pixelart" / json.loads((folder / "test.json").read_text())[0]["path"])
    drawn_edges = {"control_edge_sigma": 2, "control_edge_width": 3}
    result = train(
        config(
            tmp_path / "out",
            visualize=True,
            visualize_steps=4,
            sampling_steps=1,
            validation_prompts=["a cup"],
            validation_control_images=[image],
            validation_json_path=str(folder / "test.json"),
            start_report=True,
            use_ema=False,
            **drawn_edges,
        )
    )
    assert result.name == "controlnet" and len(list((tmp_path / "out/samples").rglob("*.png"))) == 2
    net = load_controlnet(result, base_model=load_transformer(folder / "model/transformer"))
    trained = Training(config(tmp_path / "out", use_ema=False, **drawn_edges)).objective.network
    for name, parameter in trained.parameters_and_names():
        if name.startswith("controlnet."):
            assert np.array_equal(parameter.asnumpy(), dict(net.parameters_and_names())[name].asnumpy()), name
    values = {"model": str(folder / "model"), "prompt": ["a cup"], "image_height": 64, "image_width": 64}
    values |= {"use_resolution_binning": False, "sampling_steps": 2, "controlnet": str(result), "control_image": image}
    drawn = []
    assert edge_options(result) == EdgeOptions(2, 0.1, 3)
    lines = tmp_path / "lines.png"
    Image.fromarray(edges(fit(load_image(image), 64, 64), EdgeOptions(2, 0.1, 3))).save(lines)
    for number, changes in enumerate(({}, {"control_edges": True}, {"control_image": str(lines)})):
        changes |= {"output_path": str(tmp_path / f"drawn-{number}")}
        drawn.append(sample(check_config(values | changes)))
    first, second, third = (np.asarray(Image.open(paths[0])) for paths in drawn)
    assert first.shape == (64, 64, 3) and not np.array_equal(first, second)
    assert np.array_equal(second, third)


def test_gradients_of_the_loss_equal_finite_differences(config, tmp_path):
    training = Training(config(tmp_path / "out"))
    list(islice(training.steps(), 2))
    net = training.objective.network
    tensors = training.trainer._tensors(3)
    for name in ("before_proj.weight", "copied_block.attn.qkv.weight", "after_proj.weight"):
        weight = dict(net.controlnet[0].parameters_and_names())[name]
        loss = control_loss(net)
        gradient = ms.value_and_grad(loss, None, [weight], has_aux=True)(*tensors)[1][0].asnumpy()
        direction = gradient / np.linalg.norm(gradient)
        start, step, values = weight.asnumpy().copy(), 0.05, []
        for sign in (1, -1):
            weight.set_data(ms.Tensor(start + sign * step * direction))
            values.append(float(loss(*tensors)[0].asnumpy()))
        weight.set_data(ms.Tensor(start))
        numeric = (values[0] - values[1]) / (2 * step)
        assert numeric == pytest.approx(float((gradient * direction).sum()), rel=3e-2), name


@pytest.mark.slow
def test_a_compiled_step_trains_as_an_eager_one(config, tmp_path):
    eager, compiled = (losses(Training(config(tmp_path / str(mode), mode=mode)).steps()) for mode in (1, 0))
    np.testing.assert_allclose(compiled, eager, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 2}, "goes neither with lora_rank nor with from_scratch"),
        ({"control_edge_width": 2}, "control_edge_width is 2; expected an odd number"),
        ({"copy_blocks_num": 0, "control_dir": "maps"}, "expected copy_blocks_num"),
        ({"copy_blocks_num": 0, "controlnet": "."}, "expected copy_blocks_num"),
        ({"visualize": True, "validation_prompts": ["a", "b"]}, "0 validation_control_images for 2 validation_prompts"),
    ],
)
def test_options_of_a_controlnet_that_do_not_go_together_are_refused(config, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path / "out", **changes)


def test_a_controlnet_copies_fewer_blocks_than_the_model_has(config, tmp_path):
    with pytest.raises(PixArtNBError, match="copy_blocks_num is 2; expected 1 to 1"):
        Training(config(tmp_path / "out", copy_blocks_num=2))
