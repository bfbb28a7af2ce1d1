"""Evaluation of models: which ones draw scenes, and what is left of it for the others."""

import re

import numpy as np
import pytest

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.config import check_config
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.pixelart.captions import short_caption
from pixart_nb.pixelart.evaluation import (
    agreement,
    draw_prompts,
    drawn_images,
    draws_scenes,
    evaluate_model,
    reference_drawings,
    requested_scenes,
)
from pixart_nb.pixelart.scenes import draw, one
from pixart_nb.pixelart.split import held_out_scenes
from pixart_nb.pixelart.textures import texture_ratios

SIZE = {"prompt": ["a"], "image_height": 256, "image_width": 256}
ROOTS = {f"{name}_root": f"data/tiny-sigma/{name}" for name in ("vae", "text_encoder", "tokenizer")}


@pytest.mark.parametrize(
    ("weights", "draws"),
    [
        ({"model": "data/tiny-sigma"}, True),
        ({"model": "data/tiny-sigma", "checkpoint": "another.pth"}, False),
        ({"model": "data/tiny-sigma/transformer"}, False),
        ({"model": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"}, False),
        ({"checkpoint": "another.pth", **ROOTS}, False),
    ],
)
def test_a_model_draws_scenes_if_its_card_has_their_words_and_its_transformer_is_its_own(weights, draws):
    assert draws_scenes(check_config(SIZE | weights)) is draws


def test_images_too_small_for_the_evaluator_are_left_out_and_refused_before_they_are_drawn():
    small = check_config(SIZE | {"model": "data/tiny-sigma", "image_width": 112})
    with pytest.warns(UserWarning, match="image_height and image_width are 256 and 112: .* from 128 pixels on"):
        assert not draws_scenes(small)
    scene = one("cup", "red", "night")
    image = draw(scene, np.random.default_rng(0))[:112]
    assert agreement(image[None], ["a red cup at night"]) == {}
    with pytest.raises(PixArtNBError, match=r"height and width are 112 and 256; .* choose another size"):
        evaluate_model(lambda *given, **call: pytest.fail("drawn"), [scene], height=112)


def test_images_of_other_models_are_drawn_and_not_read():
    scene = one("cup", "red", "night")
    image = draw(scene, np.random.default_rng(0)) / 255.0
    result = evaluate_model(lambda prompts, **_: (np.stack([image] * len(prompts)),), [scene] * 3, read=False)
    assert (result["accuracy"], result["object_accuracy"], result["texture_ratios"]) == ({}, {}, {})
    assert result["count"] == 3 and len(result["images"]) == 3 and result["seconds_per_image"] > 0
    assert agreement(image[None], ["a red cup at night"])["all"] == 1.0
    assert agreement(image[None], ["a red cup at night"], read=False) == {}


def test_held_out_scenes_of_two_things_are_drawn_and_read():
    scenes = requested_scenes(3, 2)
    drawn = {short_caption(scene): scene for scene in scenes}

    def pipe(prompts, *, generator, **rest):
        return (np.stack([draw(drawn[p], rng) / 255.0 for p, rng in zip(prompts, generator, strict=True)]),)

    result = evaluate_model(pipe, scenes)
    assert result["accuracy"] == {"object": 1.0, "colour": 1.0, "setting": 1.0, "relation": 1.0, "all": 1.0}
    assert set(result["object_accuracy"].values()) == {1.0} and len(result["object_accuracy"]) >= 4


def test_textures_are_compared_with_drawings_of_other_scenes():
    scenes = held_out_scenes(40)
    references, same = reference_drawings(scenes, 0, 128, 192)
    assert references.shape == same.shape == (40, 128, 192, 3)
    assert np.array_equal(same, drawn_images(scenes, 0, 128, 192))
    again = texture_ratios(drawn_images(scenes, 7, 128, 192), references, same)
    assert all(0.6 < ratio < 1.6 for ratio in again.values())
    noise = np.random.default_rng(0).normal(0, 20, same.shape)
    assert max(texture_ratios((same + noise).clip(0, 255).astype(np.uint8), references, same).values()) > 3


def test_one_progress_bar_shows_while_many_images_are_drawn(project, capsys):
    pipe = PixArtSigmaPipeline.from_pretrained(project / "data/tiny-sigma")
    call = {"height": 64, "width": 64, "num_inference_steps": 1}
    draw_prompts(pipe, ["a red cup", "a blue cup"], 1, **call)
    bars = {line.split(":")[0] for line in re.split(r"[\r\n]+", capsys.readouterr().err) if "%|" in line}
    assert bars == {"draw"}
    pipe("a red cup", generator=np.random.default_rng(0), **call)
    assert "1/1" in capsys.readouterr().err
