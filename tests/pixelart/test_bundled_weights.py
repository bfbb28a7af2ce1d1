"""The weights that come with the kit draw what their cards say."""

import numpy as np
import pytest

from pixart_nb import PixArtSigmaControlNetPipeline, PixArtSigmaPipeline, load_controlnet
from pixart_nb.core.checkpoints.controlnet import edge_options
from pixart_nb.core.data.control import EdgeOptions, edge_f1, edges
from pixart_nb.core.sampling.images import to_uint8
from pixart_nb.pixelart.captions import short_caption, silent_caption
from pixart_nb.pixelart.evaluation import draw_prompts, evaluator_of
from pixart_nb.pixelart.evaluator import accuracy_of
from pixart_nb.pixelart.scenes import draw
from pixart_nb.pixelart.split import held_out_scenes

pytestmark = pytest.mark.slow


@pytest.fixture
def pipe(project):
    return PixArtSigmaPipeline.from_pretrained(project / "data/tiny-sigma")


def share_right(pipe, scenes, **call):
    images = draw_prompts(pipe, [short_caption(scene) for scene in scenes], 4, 0, **call)
    return accuracy_of(evaluator_of(scenes).scenes(images, scenes), scenes)["all"]


@pytest.mark.parametrize("things", [1, 2])
def test_the_bundled_model_draws_held_out_scenes(pipe, things):
    call = {"num_inference_steps": 10, "guidance_scale": 2.0, "height": 256, "width": 256}
    assert share_right(pipe, held_out_scenes(12, things), **call) >= 11 / 12


def test_the_model_of_1024_pixels_compresses_and_draws_held_out_scenes_at_512(project):
    pipe = PixArtSigmaPipeline.from_pretrained(project / "data/tiny-sigma-1k")
    assert pipe.transformer.config.kv_layers == (3, 4, 5) and pipe.transformer.config.kv_ratio == 2
    call = {"num_inference_steps": 6, "guidance_scale": 2.0, "height": 512, "width": 512}
    assert share_right(pipe, held_out_scenes(4), **call) >= 3 / 4


def test_its_lcm_lora_draws_them_in_four_steps(pipe, project):
    pipe.load_lora_weights(project / "data/tiny-sigma-lcm-lora")
    pipe.scheduler = "lcm"
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "height": 256, "width": 256}
    assert share_right(pipe, held_out_scenes(12), **call) >= 11 / 12


def test_its_controlnet_follows_edges_and_keeps_the_objects(pipe, project):
    scenes, rng = held_out_scenes(6), np.random.default_rng(0)
    drawn, lines = (
        [draw(scene, rng, 256, 256) for scene in scenes],
        edge_options(project / "data/tiny-sigma-controlnet"),
    )
    assert lines == EdgeOptions(sigma=4, threshold=0.12, width=3)
    control, asked = [edges(image, lines) for image in drawn], [edges(image, lines.thin) for image in drawn]
    net = load_controlnet(project / "data/tiny-sigma-controlnet", base_model=pipe.transformer)
    controlled = PixArtSigmaControlNetPipeline.from_pipe(pipe, controlnet=net)
    same = {"num_inference_steps": 10, "guidance_scale": 2.0, "height": 256, "width": 256, "output_type": "np"}
    f1, right = {}, {}
    settings = {0.0: {"controlnet_conditioning_scale": 0.0}, 1.0: {}, "guess mode": {"guess_mode": True}}
    for scale, options in settings.items():
        rngs = [np.random.default_rng((0, k)) for k in range(len(scenes))]
        call = same | options | {"generator": rngs}
        images = to_uint8(controlled([silent_caption(scene) for scene in scenes], image=control, **call)[0])
        found = [edges(image, lines.thin) for image in images]
        f1[scale] = np.mean(list(map(edge_f1, found, asked)))
        right[scale] = accuracy_of(evaluator_of(scenes).scenes(images, scenes), scenes)
    assert f1[1.0] > f1[0.0] + 0.4 and f1["guess mode"] > f1[0.0] + 0.5
    assert min(right[1.0]["object"], right["guess mode"]["object"]) >= 5 / 6
    assert right[1.0]["position"] > right[0.0]["position"] + 0.5
