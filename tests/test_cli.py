"""Commands explain themselves, refuse what they cannot use in one line, and write what they say."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from pixart_nb import commands
from pixart_nb.cli import app
from pixart_nb.core.data.captions import short_caption
from pixart_nb.core.data.sprites import all_scenes, draw, split_scenes
from pixart_nb.core.sampling.evaluation import agreement, evaluate_model, held_out_scenes, psnr, reconstruct

CONFIG = "configs/inference/tiny.yaml"
SCENES = {short_caption(scene): scene for scene in all_scenes()}


class Painter:
    """Called as a pipeline is; draws what the prompts say, or always the same scene."""

    def __init__(self, always=None):
        self.always, self.calls = always, []

    def __call__(self, prompts, *, generator, height, width, callback=None, **call):
        self.calls.append({"prompts": prompts, "height": height, "width": width, **call})
        for step in range(call["num_inference_steps"] if callback else 0):
            callback(step, 0, None)
        scenes = [self.always or SCENES[prompt] for prompt in prompts]
        return (np.stack([draw(scene, generator, height, width) for scene in scenes]) / 255.0,)


@pytest.fixture
def painter(monkeypatch):
    painter = Painter()
    monkeypatch.setattr(commands, "load_pipeline", lambda model, dtype: painter)
    return painter


@pytest.fixture
def run(monkeypatch, project):
    monkeypatch.chdir(project)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["sample", "--help"], ["evaluate", "--help"], ["tiny", "--help"]]
)
def test_help_explains_every_option(run, words):
    result = run(*words)
    assert "Traceback" not in result.output
    assert "--help" in result.output
    for option in [] if len(words) < 2 else app_options(words[0]):
        assert option.help, f"{words[0]} {option.name} has no help"


def app_options(name):
    from typer.main import get_command

    return [option for option in get_command(app).commands[name].params if option.name != "help"]


def test_help_loads_no_mindspore():
    check = "import sys, pixart_nb.cli; print('mindspore' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout.strip()
        == "False"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "-c", "none.yaml"], "none.yaml: cannot be read"),
        (["sample", "-c", CONFIG, "--height", "100"], "command line: image_height: given 100 (int)"),
        (["sample", "-c", CONFIG, "--prompt", ""], "prompts.0: given '' (str)"),
        (["sample", "-c", CONFIG, "--model", "/no/such/model"], "/no/such/model"),
        (["evaluate", "--count", "241"], "count must be between 1 and 240, got 241"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(run, words, message):
    result = run(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("pixart-nb: ")]
    assert len(errors) == 1
    assert result.stderr.splitlines()[-1] == errors[0]


def test_an_error_of_another_kind_is_not_hidden(run, monkeypatch):
    monkeypatch.setattr(commands, "load_pipeline", lambda model, dtype: 1 / 0)
    assert isinstance(run("sample", "-c", CONFIG).exception, ZeroDivisionError)


def test_sample_draws_the_prompts_of_the_configuration(run, painter, tmp_path):
    result = run("sample", "-c", CONFIG, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "sample.json").read_text())
    assert result.stdout.split() == [str(tmp_path / name) for name in written["files"]]
    assert written["files"][0] == "000_a-red-mushroom-in-a-forest.png"
    pictures = np.stack([np.asarray(Image.open(tmp_path / name)) for name in written["files"]])
    assert agreement(pictures, written["prompts"])["all"] == 1.0


def test_sample_options_replace_the_values_of_the_configuration(run, painter, tmp_path):
    words = ["--prompt", "a blue cup at night", "--height", 64, "--width", 96, "--steps", 3, "--guidance", 2]
    result = run("sample", "-c", CONFIG, *words, "--negative-prompt", "blur", "--seed", 5, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    call = painter.calls[0]
    assert (call["prompts"], call["height"], call["width"]) == (["a blue cup at night"], 64, 96)
    assert (call["num_inference_steps"], call["guidance_scale"], call["negative_prompt"]) == (3, 2.0, "blur")
    assert Image.open(tmp_path / "000_a-blue-cup-at-night.png").size == (96, 64)
    assert json.loads((tmp_path / "sample.json").read_text())["seed"] == 5


def test_the_same_seed_writes_the_same_pictures(run, painter, tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(
            "sample", "-c", CONFIG, "--prompt", "a blue cup at night", "--seed", seed, "-o", tmp_path / folder
        )
    first, again, other = ((tmp_path / k / "000_a-blue-cup-at-night.png").read_bytes() for k in "abc")
    assert first == again != other


def test_evaluate_counts_prints_and_writes(run, painter, tmp_path):
    words = ["--count", 10, "--steps", 4, "--guidance", 3, "--batch-size", 4, "-o", tmp_path]
    result = run("evaluate", *words)
    assert result.exit_code == 0, result.output
    assert [len(call["prompts"]) for call in painter.calls] == [4, 4, 2]
    assert "object     100.0%" in result.stdout
    assert "10 held-out scenes" in result.stdout
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["accuracy"] == {"object": 1.0, "colour": 1.0, "setting": 1.0, "all": 1.0}
    assert (report["count"], report["steps"], report["guidance"]) == (10, 4, 3.0)
    assert Image.open(tmp_path / "pictures.png").size == (10 * 128, 128)


def test_wrong_pictures_are_counted_as_wrong():
    scenes = [scene for scene in all_scenes() if scene.setting == "snow" and scene.colour == "red"][:4]
    report = evaluate_model(Painter(always=scenes[0]), scenes, steps=1)
    assert report["accuracy"] == {"object": 0.25, "colour": 1.0, "setting": 1.0, "all": 0.25}
    assert report["object_accuracy"][scenes[0].object] == 1.0
    assert report["object_accuracy"][scenes[1].object] == 0.0
    assert report["pictures"].shape == (4, 128, 128, 3)


def test_agreement_leaves_out_prompts_that_it_cannot_judge():
    picture = draw(SCENES["a red cup at night"], np.random.default_rng(0))
    assert agreement(np.stack([picture, picture]), ["a red cup at night", "a cathedral"])["all"] == 1.0
    assert agreement(picture[None], ["a cathedral"]) == {}
    with pytest.raises(ValueError, match="as many prompts as pictures, got 1 for 2"):
        agreement(np.stack([picture, picture]), ["a cathedral"])


def test_held_out_scenes_are_never_trained_on_and_spread_over_the_objects():
    trained = set(split_scenes()[0])
    scenes = held_out_scenes(30)
    assert len(set(scenes)) == 30
    assert not trained.intersection(scenes)
    assert len({scene.object for scene in scenes}) >= 20
    assert held_out_scenes(240) == split_scenes()[1]


def test_psnr_is_that_of_the_mean_square_error():
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr(black, black) == float("inf")
    assert psnr(black, black + 255) == 0.0
    assert psnr(black, black + 16) == pytest.approx(24.048, abs=1e-3)


def test_a_contact_sheet_keeps_the_order_of_its_pictures():
    pictures = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 2, 3, 3), np.uint8)
    sheet = commands.contact_sheet(pictures, columns=3)
    assert sheet.shape == (4, 9, 3)
    assert sheet[::2, ::3, 0].tolist() == [[0, 1, 2], [3, 4, 255]]


class HalvingAutoencoder:
    """Keeps every pixel but halves its distance from mid grey; nothing is random."""

    def encode(self, pixels):
        self.seen = (float(pixels.min()), float(pixels.max()))
        return (SimpleNamespace(mode=lambda: pixels * 0.5),)

    def decode(self, latents):
        return (latents,)


def test_reconstruction_is_measured_in_the_autoencoders_own_range():
    vae, pictures = HalvingAutoencoder(), np.zeros((1, 4, 4, 3), np.uint8)
    pictures[0, 0, 0] = 255
    rebuilt = reconstruct(vae, pictures)
    assert vae.seen == (-1.0, 1.0)
    assert (rebuilt.dtype, rebuilt.shape) == (np.uint8, pictures.shape)
    assert rebuilt[0, 0, 0].tolist() == [191, 191, 191]
    assert rebuilt[0, 1, 1].tolist() == [64, 64, 64]


def test_evaluate_measures_the_autoencoder_when_asked(run, painter, tmp_path):
    painter.vae = HalvingAutoencoder()
    result = run("evaluate", "--count", 2, "--vae", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    decibels = json.loads((tmp_path / "evaluation.json").read_text())["reconstruction_psnr"]
    assert 5 < decibels < 20
    assert f"autoencoder: {decibels:.2f} dB" in result.stdout
