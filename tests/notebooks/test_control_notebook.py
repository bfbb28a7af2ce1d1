"""The notebook on control and editing runs whole, and its files and numbers are what it says."""

from itertools import pairwise

import numpy as np
import pytest
from notebook_contract import check_files, run_smoke

from pixart_nb.config import check_config
from pixart_nb.core import load_controlnet, load_transformer

FIGURES = [
    "control.png",
    "control_scale.png",
    "control_settings.png",
    "edges.png",
    "inpainting.png",
    "strength_curve.png",
    "strengths.png",
]
SETTINGS = ["scale 0", "scale 0.5", "scale 1", "scale 1.5", "first half", "second half", "guess mode"]


@pytest.mark.notebook
def test_it_runs_whole_and_writes_what_it_says(project, tmp_path):
    values, folder, numbers = run_smoke(project, "10_control_and_editing", tmp_path, "control.json")
    check_files(folder, FIGURES, ["control.json", "features", "images", "run"])
    check_controlnet(numbers["controlnet"], project / values["model"], values)
    check_numbers(numbers, values)


def check_controlnet(folder, model, values):
    net = load_controlnet(folder, base_model=load_transformer(model / "transformer"))
    assert len(net.controlnet) == values["copy_blocks_num"]
    assert np.abs(net.controlnet[0].after_proj.weight.asnumpy()).max() > 0


def check_numbers(numbers, values):
    assert check_config(numbers["config"]).sampling_steps == values["sampling_steps"]
    assert list(numbers["control"]) == SETTINGS and len(numbers["training"]["loss"]) == values["train_steps"]
    baselines = numbers["control_baselines"]
    assert baselines["another scene"] < baselines["through the VAE"] <= 1
    scores = [*numbers["control"].values(), *numbers["inpainting"].values()]
    assert all(0 <= value <= 1 for score in scores for value in score.values())
    assert list(numbers["image_to_image"]) == [f"{strength:g}" for strength in values["strengths"]]
    distances = [row["rms"] for row in numbers["image_to_image"].values()]
    assert numbers["monotone"] and all(weaker < stronger for weaker, stronger in pairwise(distances))
    assert numbers["image_to_image_baselines"]["through the VAE"] < distances[0]
    before, painted = numbers["inpainting"]["before"], numbers["inpainting"]["inpainted"]
    assert (before["object"], before["colour"], before["setting"]) == (0, 0, 1) and painted["setting"] == 1
    assert numbers["counts"] == {"controlled": 3, "image_to_image": 4, "inpainted": 4}
    assert all(seconds > 0 for seconds in numbers["seconds"].values())
