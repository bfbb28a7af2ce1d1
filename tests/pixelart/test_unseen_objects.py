"""Objects outside the bundled model's training set: drawn and evaluated as the others, and kept out of all training."""

import json
from itertools import product

import numpy as np
import pytest
from PIL import Image

from pixart_nb.core.sampling.images import to_output_type
from pixart_nb.pixelart.captions import short_caption
from pixart_nb.pixelart.datasets import write_scenes
from pixart_nb.pixelart.evaluation import evaluate_model
from pixart_nb.pixelart.evaluator import SpriteEvaluator
from pixart_nb.pixelart.scenes import COLOURS, OBJECTS, SETTINGS, UNSEEN_OBJECTS, Scene, all_scenes, draw, split_scenes


def unseen_scenes():
    return [Scene(*names) for names in product(UNSEEN_OBJECTS, COLOURS, SETTINGS)]


def test_no_training_scene_shows_an_unseen_object():
    assert UNSEEN_OBJECTS and not set(UNSEEN_OBJECTS) & set(OBJECTS)
    assert not {s.object for s in (*all_scenes(), *split_scenes()[0])} & set(UNSEEN_OBJECTS)


def test_an_evaluator_that_knows_them_reads_every_unseen_scene_back():
    rng, scenes = np.random.default_rng(1), unseen_scenes()
    evaluator = SpriteEvaluator((*OBJECTS, *UNSEEN_OBJECTS))
    assert evaluator.accuracy([draw(scene, rng) for scene in scenes], scenes)["all"] == 1.0


def test_knowing_more_objects_changes_no_verdict_on_known_ones():
    rng, scenes = np.random.default_rng(2), all_scenes()[::40]
    images = [draw(scene, rng) for scene in scenes]
    assert SpriteEvaluator((*OBJECTS, *UNSEEN_OBJECTS)).accuracy(images, scenes)["all"] == 1.0


def test_an_evaluator_never_names_an_object_outside_its_list():
    image = draw(Scene("anchor", "red", "grass"), np.random.default_rng(0))
    assert SpriteEvaluator().evaluate(image).object in OBJECTS
    assert SpriteEvaluator(["cat", "anchor"]).evaluate(image).object == "anchor"
    for objects in ([], ["cat", "ankor"]):
        with pytest.raises(ValueError, match="expected some of"):
            SpriteEvaluator(objects)


def test_a_model_is_judged_on_unseen_objects():
    scenes = [Scene("anchor", "teal", "beach"), Scene("cat", "red", "snow"), Scene("anchor", "pink", "cave")]
    by_caption = {short_caption(scene): scene for scene in scenes}

    def pipe(prompts, *, generator, output_type, **rest):
        drawn = [draw(by_caption[p], rng) for p, rng in zip(prompts, generator, strict=True)]
        return (to_output_type(np.stack(drawn) / 255, output_type),)

    result = evaluate_model(pipe, scenes, sampling_steps=1)
    assert result["accuracy"]["all"] == 1.0
    assert result["object_accuracy"] == {"anchor": 1.0, "cat": 1.0}


def test_scenes_are_written_as_a_data_set_of_chosen_sizes(tmp_path):
    scenes = [Scene("anchor", "teal", "beach"), Scene("robot", "red", "snow"), Scene("cat", "blue", "cave")]
    path = write_scenes(tmp_path / "new", scenes, np.random.default_rng(0), [(128, 128), (128, 192)])
    labels = json.loads(path.read_text())
    assert [label["prompt"] for label in labels] == [short_caption(scene) for scene in scenes]
    assert [(label["height"], label["width"]) for label in labels] == [(128, 128), (128, 192), (128, 128)]
    images = [np.asarray(Image.open(path.parent / label["path"])) for label in labels]
    assert SpriteEvaluator((*OBJECTS, *UNSEEN_OBJECTS)).accuracy(images, scenes)["all"] == 1.0
