"""The commands of ``pixart-nb dataset`` do what they say, and name what they cannot use with exit code 2."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from pixart_nb.cli import app
from pixart_nb.pixelart.datasets import write_published

IMAGES = ("000_teal_fish_snow", "001_green_heart_desert", "002_yellow_snail_forest", "003_blue_flower_lava")
ROOTS = {"model": "", "checkpoint": "data/none.pth", "vae_root": "a", "text_encoder_root": "b", "tokenizer_root": "c"}


@pytest.fixture
def run(monkeypatch, project):
    monkeypatch.chdir(project)
    return lambda *words: CliRunner().invoke(app, ["dataset", *(str(word) for word in words)])


@pytest.fixture
def config(tmp_path):
    """A training on four of the shipped images, at the size of the bundled model."""
    names = [f"{name}.png" for name in IMAGES]
    (tmp_path / "labels.json").write_text(json.dumps([{"path": name, "prompt": name[4:-4]} for name in names]))

    def write(**more):
        keys = {
            "model": "data/tiny-sigma",
            "json_path": str(tmp_path / "labels.json"),
            "image_dir": "data/pixelart",
            "feature_cache": str(tmp_path / "features"),
            "batch_size": 2,
        }
        (tmp_path / "train.yaml").write_text(json.dumps(keys | more))
        return tmp_path / "train.yaml"

    return write


@pytest.mark.parametrize("words", [(), ("diffusiondb",), ("folder",), ("check",), ("features",)])
def test_help_has_an_example_for_each_command(run, words):
    result = run(*words, "--help")
    assert result.exit_code == 0
    assert not words or f"Example: pixart-nb dataset {words[0]}" in " ".join(result.output.split())


def test_a_published_data_set_becomes_labels(run, tmp_path):
    write_published(tmp_path / "source", 10)
    words = ("diffusiondb", "--source", tmp_path / "source", "--target", tmp_path / "target")
    result = run(*words, "--max_nsfw", "1", "--test_count", "2")
    assert result.exit_code == 0, result.output
    assert "8 training images, 2 test images" in result.output
    assert len(json.loads((tmp_path / "target" / "labels.json").read_text())) == 8
    result = run(*words)
    assert result.exit_code == 2 and "test_count is 400" in result.output


def test_a_folder_becomes_labels_or_a_list_of_problems(run, tmp_path):
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_text("a cat")
    result = run("folder", "--source", tmp_path)
    assert result.exit_code == 2 and "2 problems" in result.output
    lines = [line.strip() for line in result.output.splitlines()]
    assert any(line.startswith("b.png: has no b.txt") for line in lines)
    assert any(line.startswith("c.png: has no c.txt") for line in lines)
    result = run("folder", "--source", tmp_path, "--skip")
    assert result.exit_code == 0 and "1 training images" in result.output


def test_captions_may_be_the_names_of_the_files(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "red_house.png")
    result = run("folder", "--source", tmp_path, "--caption_from", "file")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "labels.json").read_text())[0]["prompt"] == "red house"


def test_a_sample_is_written_and_imported(run, tmp_path):
    assert "13 images" in run("sample", "-o", tmp_path / "raw", "--count", 4, "--side", 128).output
    words = ("diffusiondb", "--source", tmp_path / "raw", "-o", tmp_path / "data")
    assert run(*words, "--test_count", 1).exit_code == 0
    result = run(*words, "--test_count", 2)
    assert result.exit_code == 2 and "--overwrite" in result.output
    assert run(*words, "--test_count", 2, "--overwrite").exit_code == 0


def test_check_tells_the_sizes(run, config):
    result = run("check", "-c", config())
    assert result.exit_code == 0, result.output
    assert "0 of them with a sharegpt4v caption" in result.output
    assert "256x256: 4 images" in result.output
    result = run("check", "-c", config(sample_size=32, multi_scale=True))
    assert "256x256: 3 images" in result.output and "208x304: 1 images, fewer than the 2 of a batch" in result.output


def test_check_names_every_problem(run, config, tmp_path):
    path = config()
    labels = [{"path": "../x.png", "prompt": "x"}, {"path": "000_teal_fish_snow.png", "prompt": ""}]
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    result = run("check", "-c", path)
    assert result.exit_code == 2
    assert "leaves the folder" in result.output and "entry 1: prompt is empty" in result.output
    (tmp_path / "labels.json").write_text(json.dumps([{"path": f"{k}.png", "prompt": ""} for k in range(60)]))
    said = run("check", "-c", path).output
    assert all(f"entry {k}: prompt is empty" in said and f"{k}.png" in said for k in range(60))
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"batch_size": 5}, "but there are only 4"),
        ({"multi_scale": True, "sample_size": 16}, "no table of sizes was published for 128"),
        ({"json_path": "nothing.json"}, "cannot be read"),
        ({"jsonpath": "x"}, "did you mean 'json_path'"),
        (ROOTS, "not found"),
    ],
)
def test_what_cannot_be_trained_on_is_told(run, config, more, expected):
    result = run("check", "-c", config(**more))
    assert result.exit_code == 2 and expected in result.output, result.output


def test_keys_of_a_training_are_options_of_the_check(run, config):
    result = run("check", "-c", config(), "--batch_size", "5")
    assert result.exit_code == 2 and "but there are only 4" in result.output, result.output


def test_features_are_made_once_and_again_where_they_are_stale(run, config, tmp_path):
    result = run("features", "-c", config(), "--batch_size", "4")
    assert result.exit_code == 0, result.output
    assert "made 2 of 2 shards (2 missing)" in result.output
    assert "nothing to do" in run("features", "-c", config()).output
    shard = max((tmp_path / "features").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert "made 1 of 2 shards" in run("features", "-c", config()).output
    result = run("features", "-c", config(), "--clean_caption", "false", "--stream")  # a key as an option
    assert "made 1 of 2 shards (1 missing); 1 shards (0 MB) are of other data" in result.output


def test_features_without_a_place_are_refused(run, config):
    result = run("features", "-c", config(feature_cache=""))
    assert result.exit_code == 2 and "feature_cache is not given" in result.output
