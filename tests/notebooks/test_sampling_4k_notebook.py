"""The notebook on pictures of 4096 x 4096 runs whole, at a small size, and its files and numbers are what it says."""

import numpy as np
import pytest
from notebook_contract import check_figures, run_smoke
from PIL import Image

from pixart_nb.core.checkpoints.load import load_transformer

FIGURES = ["compared", "compress", "detail", "details", "scores", "tile_artifacts", "sizes", "stages", "ways"]
FILES = [f"{name}.png" for name in [*FIGURES, "image"]] + ["sampling_4k.json", "zoom.html"]
REST = ["kv.safetensors", "kv.safetensors.adapt", "kv.safetensors.errors.json", "stages", "training"]


@pytest.mark.notebook
def test_it_runs_whole_and_writes_what_it_says(project, tmp_path):
    values, folder, numbers = run_smoke(project, "06_sampling_4k", tmp_path, "sampling_4k.json")
    check_files(folder, values)
    check_numbers(numbers, values)


def check_files(folder, values):
    assert {*FILES, *REST} <= {path.name for path in folder.iterdir()}
    check_figures(folder / f"{name}.png" for name in FIGURES)
    picture = Image.open(folder / "image.png")
    assert picture.size == (values["image_width"], values["image_height"])
    assert np.asarray(picture, dtype=float).std() > 10
    assert "http" not in (folder / "zoom.html").read_text()
    assert load_transformer(folder / "kv.safetensors").config.kv_operator == "conv"


def check_numbers(numbers, values):
    sizes = numbers["sizes"]
    assert [size["ratio"] for size in sizes] == [1, 2]
    assert [row["steps"] for row in numbers["planned"]] == [4, 2]
    assert numbers["planned"][1]["estimated seconds, all keys"] > 0
    assert set(numbers["measured"]) == {"160 x 128", "320 x 256"}
    for stages in [*numbers["measured"].values(), *numbers["compared"].values()]:
        assert list(stages) == ["encode", "denoise", "decode"]
        assert all(stage["seconds"] > 0 and stage["peak_bytes"] > 1e8 for stage in stages.values())
    assert len(numbers["checks"]) == 6
    assert all(row["edges"] > 0 and row["ratio"] > 0 and 0 <= row["rank"] <= 1 for row in numbers["tile_artifacts"])
    assert {way: len(found) for way, found in numbers["scores"].items()} == {
        "progressive": 2,
        "at once, few keys": 2,
        "at once": 1,
    }
    errors = numbers["compress"]
    assert len(errors["timesteps"]) == len(errors["before"]) == len(errors["after"]) == values["judged_steps"]
    assert errors["before"] != errors["after"] and min(errors["before"]) > 0
    assert all(seconds >= 0 for seconds in numbers["seconds"].values())
