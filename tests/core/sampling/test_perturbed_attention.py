"""Perturbed-attention guidance gives the numbers of diffusers, in the pipeline and from a configuration."""

import numpy as np
import pytest
from devices import DEVICES
from PIL import Image
from reference_data import TRAJECTORY, diffusers, relative_error

from pixart_nb import PixArtSigmaPAGPipeline, PixArtSigmaPipeline
from pixart_nb.config import check_config
from pixart_nb.core.backend import ms
from pixart_nb.core.hooks.recorder import trace
from pixart_nb.core.sampling import generate

FOLDER, CALL, GOLDEN = diffusers("sigma")
#: Name in ``pag.npz`` -> layers, guidance_scale, pag_scale.
CASES = {
    "cfg+pag": (["blocks.1"], 4.5, 3.0),
    "pag": ("blocks.1", 1.0, 3.0),
    "cfg+pag two layers": (["blocks.0", "blocks.2"], 4.5, 1.5),
}
SHORT = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent", "use_resolution_binning": False}
pytestmark = pytest.mark.filterwarnings("ignore:prompt has 33 tokens", "ignore:the tokenizer spells")


@pytest.fixture(scope="module")
def pipe():
    pipe = PixArtSigmaPAGPipeline.from_pretrained(FOLDER, pag_applied_layers=["blocks.1"], mindspore_dtype=ms.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, **call):
    return pipe("a cup", generator=np.random.default_rng(0), **SHORT | call)[0]


@DEVICES
@pytest.mark.parametrize("name", CASES)
def test_trajectories_of_diffusers_are_met(pipe, name, device):
    layers, guidance_scale, pag_scale = CASES[name]
    pipe.set_pag_applied_layers(layers)
    same = ("negative_prompt", "height", "width", "max_sequence_length", "clean_caption", "use_resolution_binning")
    latents = []
    with device():
        pipe(
            CALL["prompts"],
            num_inference_steps=CALL["steps"],
            latents=GOLDEN["latents"],
            guidance_scale=guidance_scale,
            pag_scale=pag_scale,
            output_type="latent",
            callback=lambda index, timestep, x: latents.append(x.copy()),
            **{key: CALL[key] for key in same},
        )
    reference = np.load(FOLDER / "pag.npz")[f"{name}/trajectory"]
    assert relative_error(np.stack(latents), reference) < TRAJECTORY / 50


def test_a_scale_of_0_is_the_plain_pipeline_and_3_is_the_default(pipe):
    pipe.set_pag_applied_layers("blocks.1")
    plain = PixArtSigmaPipeline.from_pipe(pipe)
    plain.set_progress_bar_config(disable=True)
    assert np.array_equal(drawn(pipe, pag_scale=0), drawn(plain))
    assert np.array_equal(drawn(pipe), drawn(plain, pag_scale=3.0))
    assert not np.allclose(drawn(pipe), drawn(plain))


def test_the_adaptive_scale_falls_with_time_to_0(pipe):
    pipe.set_pag_applied_layers("blocks.1")
    assert np.array_equal(drawn(pipe, pag_scale=1.0, pag_adaptive_scale=1.5), drawn(pipe, pag_scale=0))
    assert not np.allclose(drawn(pipe, pag_adaptive_scale=0.01), drawn(pipe))


def test_layers_are_named_as_in_diffusers_and_a_missing_one_is_an_error(pipe):
    with pytest.raises(ValueError, match=r"there is no layer 'blocks\.99'; expected names such as blocks\.0 to blocks"):
        pipe.set_pag_applied_layers(["blocks.1", "blocks.99"])
    with pytest.raises(ValueError, match="pag_scale is -1"):
        drawn(pipe, pag_scale=-1)
    with pytest.raises(ValueError, match=r"no layer 'blocks\.7'"):
        PixArtSigmaPAGPipeline.from_pipe(pipe, pag_applied_layers=["blocks.7"])


def test_hooks_see_the_unperturbed_pass_only(pipe):
    pipe.set_pag_applied_layers("blocks.1")
    with trace(pipe, announce=None) as traced:
        latents = drawn(pipe)
    assert len(traced.steps) == 2
    assert np.array_equal(latents, drawn(pipe))
    assert pipe.transformer.hook_manager is None
    assert all(block.attn.hook_point is None for block in pipe.transformer.blocks)


def test_a_configuration_draws_with_it_also_in_stages(tmp_path):
    values = {"model": str(FOLDER), "image_height": 64, "image_width": 64, "prompt": ["a cup"], "sampling_steps": 2}
    values |= {"use_resolution_binning": False, "tile_size": 64, "output_path": str(tmp_path / "whole")}
    pag = {"pag_scale": 3.0, "pag_applied_layers": ["blocks.0"]}
    (plain,) = generate.sample(check_config(values))
    (whole,) = generate.sample(check_config(values | pag))
    stages = {"stages_path": str(tmp_path / "state"), "output_path": str(tmp_path / "stages")}
    (staged,) = generate.sample(check_config(values | pag | stages))
    assert plain.read_bytes() != whole.read_bytes()
    again = generate.like(whole, model=str(FOLDER))
    assert (again.pag_scale, again.pag_applied_layers) == (3.0, ["blocks.0"])
    assert np.array_equal(*(np.asarray(Image.open(path)) for path in (whole, staged)))
