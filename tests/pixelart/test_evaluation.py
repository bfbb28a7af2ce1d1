"""Evaluation of models: which ones draw scenes, and what is left of it for the others."""

import numpy as np
import pytest

from pixart_nb.config import check_config
from pixart_nb.pixelart.evaluation import agreement, draws_scenes, evaluate_model
from pixart_nb.pixelart.scenes import Scene, draw

SIZE = {"prompt": ["a"], "image_height": 128, "image_width": 128}
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


def test_images_of_other_models_are_drawn_and_not_read():
    scene = Scene("cup", "red", "night")
    image = draw(scene, np.random.default_rng(0)) / 255.0
    result = evaluate_model(lambda prompts, **_: (np.stack([image] * len(prompts)),), [scene] * 3, read=False)
    assert (result["accuracy"], result["object_accuracy"], result["texture_ratios"]) == ({}, {}, {})
    assert result["count"] == 3 and len(result["images"]) == 3 and result["seconds_per_image"] > 0
    assert agreement(image[None], ["a red cup at night"])["all"] == 1.0
    assert agreement(image[None], ["a red cup at night"], read=False) == {}
