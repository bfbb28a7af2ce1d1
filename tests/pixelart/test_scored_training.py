"""Trainings that are judged as they go: what was drawn is kept, and stands for the weights of its step."""

from dataclasses import replace

import numpy as np
import pytest
from small_pipeline import CONFIG, write_small_pipeline

from pixart_nb.config import check_config
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.sampling.pipeline import PixArtSigmaPipeline
from pixart_nb.pixelart.evaluation import evaluate_model
from pixart_nb.pixelart.scored_training import train_and_score
from pixart_nb.pixelart.split import held_out_scenes

DRAWING = {"sampling_steps": 2, "batch_size": 2, "seed": 5}


@pytest.fixture(scope="module")
def config(project, tmp_path_factory):
    """A configuration of a few steps that writes into a folder of its own."""
    model = write_small_pipeline(tmp_path_factory.mktemp("model"), project, replace(CONFIG, input_size=16))

    def changed(output, steps):
        return check_config(
            {
                "model": str(model),
                "json_path": str(project / "data/pixelart/labels.json"),
                "image_dir": str(project / "data/pixelart"),
                "feature_cache": str(model.parent / "features"),
                "steps": steps,
                "batch_size": 2,
                "start_learning_rate": 1e-2,
                "warmup_steps": 0,
                "ckpt_save_steps": 1,
                "tensorboard": False,
                "output_path": str(output),
            },
            "train",
        )

    return changed


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    return train_and_score(config(output, 3), held_out_scenes(2), (0, 2, 3), bar=False, **DRAWING)


def test_scores_losses_and_the_error_before_the_first_step_come_back(whole):
    assert list(whole.scores) == list(whole.images) == [0, 2, 3]
    assert all({"object", "colour", "setting", "all"} <= set(score) for score in whole.scores.values())
    assert whole.images[0].shape == (2, 128, 128, 3)
    assert whole.report["loss"] > 0
    assert [row["step"] for row in whole.rows] == [1, 2, 3]
    losses = [row["loss"] for row in whole.rows]
    assert whole.losses(2) == ([1.5, 3.0], [pytest.approx(np.mean(losses[:2])), losses[2]])
    assert whole.shares("object") == ([0, 2, 3], [score["object"] for score in whole.scores.values()])


def test_the_images_are_those_of_the_weights_of_their_step(whole):
    assert not np.array_equal(whole.images[0], whole.images[3])
    pipe = PixArtSigmaPipeline.from_pretrained(whole.result)
    drawn = evaluate_model(pipe, held_out_scenes(2), height=128, width=128, **DRAWING)["images"]
    assert np.array_equal(drawn, whole.images[3])


def test_a_run_in_parts_has_the_same_scores_and_draws_nothing_twice(whole, config, tmp_path):
    output = tmp_path / "out"
    train_and_score(config(output, 2), held_out_scenes(2), (0,), bar=False, **DRAWING)
    first = next((output / "scores").iterdir())
    before = first.stat().st_mtime_ns
    again = train_and_score(config(output, 3), held_out_scenes(2), (0, 2, 3), bar=False, **DRAWING)
    assert first.stat().st_mtime_ns == before
    assert again.report == whole.report and again.scores == whole.scores
    assert all(np.array_equal(again.images[step], whole.images[step]) for step in (0, 2, 3))


def test_what_was_drawn_of_other_scenes_is_not_taken_for_these(config, tmp_path):
    train_and_score(config(tmp_path, 1), held_out_scenes(2), (1,), bar=False, **DRAWING)
    with pytest.raises(CheckpointError, match="other scenes or with other settings"):
        train_and_score(config(tmp_path, 1), held_out_scenes(3), (1,), bar=False, **DRAWING)
