"""Objects outside of the training set of the bundled model: kept out of all training, drawn and evaluated as others."""

import json

import numpy as np
from PIL import Image

from pixart_nb.core.sampling.images import to_output_type
from pixart_nb.pixelart.captions import short_caption
from pixart_nb.pixelart.datasets import finetuning_scenes, write_scenes
from pixart_nb.pixelart.evaluation import evaluate_model
from pixart_nb.pixelart.evaluator import SceneEvaluator
from pixart_nb.pixelart.objects import OBJECTS, UNSEEN_OBJECTS
from pixart_nb.pixelart.scenes import draw, one
from pixart_nb.pixelart.split import held_out_scenes, training_scene


def test_no_training_scene_shows_an_unseen_object():
    assert UNSEEN_OBJECTS and not set(UNSEEN_OBJECTS) & set(OBJECTS)
    scenes = (
        [training_scene(np.random.default_rng(k)) for k in range(300)] + held_out_scenes(240) + held_out_scenes(90, 2)
    )
    assert not {thing.object for scene in scenes for thing in scene.things} & set(UNSEEN_OBJECTS)


def test_finetuning_scenes_are_new_objects_among_known_ones():
    scenes = finetuning_scenes(30)
    new = [scene for scene in scenes if scene.things[0].object in UNSEEN_OBJECTS]
    assert len(scenes) == len(set(scenes)) == 30 and len(new) == 20


def test_a_model_is_judged_on_unseen_objects():
    scenes = [one("anchor", "teal", "beach"), one("cat", "red", "snow"), one("anchor", "pink", "cave")]
    by_caption = {short_caption(scene): scene for scene in scenes}

    def pipe(prompts, *, generator, output_type, **rest):
        drawn = [draw(by_caption[p], rng) for p, rng in zip(prompts, generator, strict=True)]
        return (to_output_type(np.stack(drawn) / 255, output_type),)

    result = evaluate_model(pipe, scenes, sampling_steps=1)
    assert result["accuracy"]["all"] == 1.0
    assert result["object_accuracy"] == {"anchor": 1.0, "cat": 1.0}


def test_scenes_are_written_as_a_data_set_of_chosen_sizes(tmp_path):
    scenes = [one("anchor", "teal", "beach"), one("robot", "red", "snow"), one("cat", "blue", "cave")]
    path = write_scenes(tmp_path / "new", scenes, np.random.default_rng(0), [(256, 256), (256, 384)])
    labels = json.loads(path.read_text())
    assert [label["prompt"] for label in labels] == [short_caption(scene) for scene in scenes]
    assert [(label["height"], label["width"]) for label in labels] == [(256, 256), (256, 384), (256, 256)]
    images = [np.asarray(Image.open(path.parent / label["path"])) for label in labels]
    assert SceneEvaluator((*OBJECTS, *UNSEEN_OBJECTS)).accuracy(images, scenes)["all"] == 1.0
