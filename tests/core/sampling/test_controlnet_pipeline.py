"""The ControlNet pipelines: the condition changes the image where and as much as was asked."""

import numpy as np
import pytest
from PIL import Image
from reference_data import diffusers, relative_error
from safetensors.numpy import save_file

from pixart_nb import (
    PixArtControlNet,
    PixArtSigmaControlNetPipeline,
    PixArtSigmaPipeline,
    load_controlnet,
    load_transformer,
)
from pixart_nb.config import ConfigError, check_config, read_yaml
from pixart_nb.core import trace
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.sampling.generate import like, sample

FOLDER = diffusers("sigma")[0]
CALL = {"num_inference_steps": 4, "guidance_scale": 3.0, "height": 64, "width": 96, "use_resolution_binning": False}
EDGES = np.random.default_rng(0).integers(0, 2, (64, 96, 1), np.uint8).repeat(3, 2) * 255


@pytest.fixture(scope="module")
def base():
    pipe = PixArtSigmaPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe(base):
    controlnet = PixArtControlNet.from_transformer(base.transformer, 1)
    rng = np.random.default_rng(1)
    for name, parameter in controlnet.parameters_and_names():
        if "before_proj" in name or "after_proj" in name:
            parameter.set_data(ms.Tensor((0.1 * rng.standard_normal(parameter.shape)).astype(np.float32)))
    pipe = PixArtSigmaControlNetPipeline.from_pipe(base, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, *args, **call):
    return pipe("a cup", *args, generator=np.random.default_rng(0), output_type="latent", **CALL | call)[0]


def test_a_scale_of_zero_is_the_pipeline_without_control(base, pipe):
    assert relative_error(latents(pipe, EDGES, 0.0), latents(base)) < 1e-5


def test_the_condition_changes_the_image_by_its_scale(base, pipe):
    without = latents(base)
    half, whole = (np.linalg.norm(latents(pipe, EDGES, scale) - without) for scale in (0.5, 1.0))
    assert 0 < half < whole


def test_another_condition_gives_another_image(pipe):
    assert not np.array_equal(latents(pipe, EDGES), latents(pipe, 255 - EDGES))


@pytest.mark.parametrize("scheduler", ["dpm++", "euler"])
def test_control_acts_between_its_start_and_its_end(base, pipe, scheduler):
    def steps(model, **call):
        states = []
        model.scheduler = scheduler
        latents(model, callback=lambda index, timestep, x: states.append(x.copy()), **call)
        model.scheduler = "dpm++"
        return states

    without = steps(base)
    late = steps(pipe, image=EDGES, control_guidance_start=0.5)
    assert [relative_error(a, b) < 1e-5 for a, b in zip(without, late, strict=True)] == [True, True, False, False]
    early = steps(pipe, image=EDGES, control_guidance_end=0.5)
    whole = steps(pipe, image=EDGES)
    assert [relative_error(a, b) < 1e-5 for a, b in zip(whole, early, strict=True)] == [True, True, False, False]


def test_in_guess_mode_the_condition_acts_on_the_prediction_with_the_prompt_alone(base, pipe):
    def first_step(model, guidance, **call):
        """The latents after one Euler step, which is linear in the guided noise."""
        model.scheduler = "euler"
        call |= {"num_inference_steps": 1, "guidance_scale": guidance}
        out = latents(model, **call)
        model.scheduler = "dpm++"
        return out

    without, controlled = first_step(base, 1.0), first_step(pipe, 1.0, image=EDGES)
    negative = 2 * without - first_step(base, 2.0)  # guidance 0
    guessed = first_step(pipe, 3.0, image=EDGES, guess_mode=True)
    assert relative_error(guessed, negative + 3 * (controlled - negative)) < 1e-4
    assert relative_error(guessed, first_step(pipe, 3.0, image=EDGES)) > 1e-3
    assert relative_error(latents(pipe, EDGES, 0.0, guess_mode=True), latents(base)) < 1e-5
    one = {"image": EDGES, "guidance_scale": 1.0}
    assert np.array_equal(latents(pipe, guess_mode=True, **one), latents(pipe, **one))


def test_a_trace_in_guess_mode_is_refused(pipe):
    with trace(pipe), pytest.raises(PixArtNBError, match="switch guess_mode off"):
        latents(pipe, EDGES, guess_mode=True)


def test_conditions_are_given_once_or_for_every_image(pipe):
    many = latents(pipe, np.stack([EDGES, 255 - EDGES]), num_images_per_prompt=2)
    assert many.shape[0] == 2
    with pytest.raises(PixArtNBError, match=r"2 condition images were given for 1 image; expected 1$"):
        latents(pipe, np.stack([EDGES, EDGES]))


def test_a_condition_image_may_be_grey_and_of_another_size_but_not_of_another_ratio(pipe):
    grey = Image.fromarray(EDGES[..., 0])
    assert np.array_equal(latents(pipe, grey), latents(pipe, EDGES))
    assert np.isfinite(latents(pipe, grey.resize((60, 40)))).all()
    with pytest.raises(PixArtNBError, match=r"condition image is 40x40 .* 64x96 is drawn, which would stretch it"):
        latents(pipe, grey.resize((40, 40)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "image is None; expected a PIL image"),
        (
            {"image": EDGES, "control_guidance_start": 0.6, "control_guidance_end": 0.5},
            "expected 0 <= start < end <= 1",
        ),
        ({"image": EDGES, "controlnet_conditioning_scale": float("nan")}, "expected a finite number"),
        ({"image": EDGES, "pag_scale": 2.0}, "does not go with a ControlNet"),
    ],
)
def test_wrong_arguments_are_refused(pipe, call, message):
    with pytest.raises(PixArtNBError, match=message):
        latents(pipe, **call)


def test_a_pipeline_without_a_controlnet_says_so(base):
    with pytest.raises(PixArtNBError, match="has no ControlNet"):
        latents(PixArtSigmaControlNetPipeline.from_pipe(base), EDGES)


def test_a_configuration_draws_with_a_controlnet_file_and_an_image_file(tmp_path, project, monkeypatch):
    monkeypatch.chdir(project)
    net = PixArtControlNet.from_transformer(load_transformer("data/tiny-sigma/transformer"), 1)
    rng = np.random.default_rng(2)
    weights = {name: p.asnumpy() for name, p in net.parameters_and_names() if name.startswith("controlnet")}
    projections = [name for name in weights if "before_proj" in name or "after_proj" in name]
    weights |= {name: 0.02 * rng.standard_normal(weights[name].shape).astype(np.float32) for name in projections}
    save_file(weights, tmp_path / "control.safetensors")
    Image.fromarray(EDGES[:, :64]).save(tmp_path / "edges.png")
    values = read_yaml(project / "configs/inference/tiny.yaml")
    values |= {"sampling_steps": 2, "prompt": ["a cup"], "controlnet": str(tmp_path / "control.safetensors")}
    values |= {"control_image": str(tmp_path / "edges.png"), "output_path": str(tmp_path / "a")}
    paths = sample(check_config(values))
    without = sample(check_config(values | {"controlnet": "", "control_image": "", "output_path": str(tmp_path / "b")}))
    assert not np.array_equal(np.asarray(Image.open(paths[0])), np.asarray(Image.open(without[0])))
    for control_edges in (True, False):
        wide = {"image_width": 512, "control_edges": control_edges}
        with pytest.raises(PixArtNBError, match=r"edges\.png is 64x64 .* 256x512 is drawn, which would stretch it"):
            sample(check_config(values | wide))
    with pytest.raises(ConfigError, match="Paths are not taken from an image; give --controlnet --control_image"):
        like(paths[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"controlnet": "x.pth"}, "expected controlnet and control_image together"),
        ({"guess_mode": True}, "guess_mode is True, which changes nothing without controlnet"),
        ({"control_edges": True}, "control_edges is on, so expected controlnet and control_image"),
        ({"controlnet": "x.pth", "control_image": "x.png", "pag_scale": 3.0}, "goes neither with image nor with"),
        ({"control_guidance_start": 0.5, "control_guidance_end": 0.5}, "control_guidance_start must be below"),
    ],
)
def test_a_configuration_of_a_controlnet_is_checked(project, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_config(read_yaml(project / "configs/inference/tiny.yaml") | changes)


def test_a_controlnet_is_a_component_that_is_shared_and_saved(base, pipe, tmp_path):
    assert PixArtSigmaControlNetPipeline.from_pipe(pipe).controlnet is pipe.controlnet
    assert PixArtSigmaPipeline.from_pipe(pipe).transformer is pipe.transformer
    pipe.save_pretrained(tmp_path)
    again = PixArtSigmaControlNetPipeline.from_pretrained(tmp_path)
    assert np.array_equal(latents(again, EDGES), latents(pipe, EDGES))
    with pytest.raises(ValueError, match="lacks the folders"):
        PixArtSigmaControlNetPipeline.from_pretrained(diffusers("sigma")[0])


def test_a_transformer_that_is_not_the_base_model_is_refused(base, pipe):
    other = PixArtSigmaControlNetPipeline.from_pipe(pipe)
    other.transformer = load_transformer(diffusers("sigma")[0] / "transformer")
    with pytest.raises(PixArtNBError, match="is not the base model of its ControlNet"):
        latents(other, EDGES)


def test_a_controlnet_may_be_given_by_its_path(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    by_path = PixArtSigmaControlNetPipeline.from_pretrained(FOLDER, controlnet=str(tmp_path / "controlnet"))
    by_path.set_progress_bar_config(disable=True)
    assert np.array_equal(latents(by_path, EDGES), latents(pipe, EDGES))


def test_a_transformer_in_the_place_of_the_configuration_is_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    with pytest.raises(PixArtNBError, match=r"config is a PixArt, .*base_model=pipe"):
        load_controlnet(tmp_path / "controlnet", pipe.transformer)
