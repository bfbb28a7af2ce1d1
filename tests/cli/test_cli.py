"""Commands explain themselves, refuse what they cannot use in one line, and write what they say."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from lora_models import trained
from PIL import Image
from typer.testing import CliRunner

from pixart_nb import __version__
from pixart_nb.cli import app
from pixart_nb.core import backend
from pixart_nb.core.checkpoints.load import load_transformer
from pixart_nb.core.errors import WriteError
from pixart_nb.core.sampling import generate as sample
from pixart_nb.core.sampling.images import read_parameters
from pixart_nb.core.training.validation import psnr, reconstruct
from pixart_nb.pixelart.captions import scene_of
from pixart_nb.pixelart.evaluation import agreement, evaluate_model
from pixart_nb.pixelart.objects import OBJECTS
from pixart_nb.pixelart.scenes import draw, one

CONFIG = "configs/inference/tiny.yaml"


class Painter:
    """Called as a pipeline is; draws what the prompts say, or always the same scene."""

    def __init__(self, always=None):
        self.always, self.calls = always, []

    def set_progress_bar_config(self, **options):
        """The command line draws a bar of its own."""

    def __call__(self, prompts, *, generator, height, width, callback=None, **call):
        self.calls.append({"prompts": prompts, "height": height, "width": width, **call})
        for step in range(call["num_inference_steps"] if callback else 0):
            callback(step, 0, prompts)
        scenes = [self.always or scene_of(prompt) for prompt in prompts]
        drawn = [draw(scene, rng, height, width) for scene, rng in zip(scenes, generator, strict=True)]
        return (np.stack(drawn) / 255.0,)


@pytest.fixture
def painter(monkeypatch):
    painter = Painter()
    monkeypatch.setattr(sample, "load_pipeline", lambda config: painter)
    return painter


@pytest.fixture
def run(monkeypatch, project):
    monkeypatch.chdir(project)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize(
    "words", [[], ["--help"], ["sample", "--help"], ["convert", "--help"], ["evaluate", "--help"], ["tiny", "--help"]]
)
def test_help_explains_every_option(run, words):
    result = run(*words)
    assert "Traceback" not in result.output
    assert "--help" in result.output
    for option in [] if len(words) < 2 else app_options(words[0]):
        assert option.help or option.hidden, f"{words[0]} {option.name} has no help"


def app_options(name):
    from typer.main import get_command

    return [option for option in get_command(app).commands[name].params if option.name != "help"]


@pytest.mark.parametrize("words", [["sample"], ["evaluate"], ["upscale"], ["convert"], ["dataset", "features"]])
def test_help_breaks_lines_only_between_paragraphs(words):
    lines = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "400"}).output.split("╭")[0].splitlines()
    paragraphs = [line.strip() for line in lines if line.strip()]
    usage, *texts, example = paragraphs
    assert usage.startswith("Usage:") and example.startswith("Example: ")
    assert texts and all(text.endswith(".") and text[0].isupper() for text in texts)
    assert len(lines) > 2 * len(texts)  # with empty lines between them


def test_help_shows_the_defaults_of_a_command_and_which_values_they_give_way_to():
    def help_of(name):
        return CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "300"}).output

    assert re.search(r"--kv-compress-scale-factor .*\[default: 2\]", help_of("compress"))
    text = help_of("evaluate")
    assert re.search(r"--batch-size .*\[default: 24\]", text)
    assert re.search(r"--output-path .*\[default: outputs/evaluation\]", text)
    for name in "sample", "evaluate", "train", "upscale", "plan":
        assert "The defaults shown below apply to keys that the file does not set." in help_of(name)


def test_the_package_runs_as_a_program():
    words = [sys.executable, "-m", "pixart_nb", "--version"]
    assert subprocess.run(words, capture_output=True, text=True).stdout == f"pixart-nb {__version__}\n"


def test_a_plan_without_times_has_no_columns_for_them(run):
    result = run("plan", "-c", CONFIG, "--no-timed")
    assert result.exit_code == 0, result.output
    assert "estimated" not in result.stdout
    assert "weights GB" in result.stdout and "tokens" in result.stdout


def test_help_loads_no_mindspore():
    check = "import sys, pixart_nb.cli; print('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "-c", "none.yaml"], "none.yaml: cannot be read"),
        (["sample", "-c", CONFIG, "--image_height", "0"], "command line: image_height: given 0 (int)"),
        (["sample", "-c", CONFIG, "--prompt", ""], "prompt.0: given '' (str)"),
        (["sample", "-c", CONFIG, "--model", "/no/such/model"], "/no/such/model"),
        (["evaluate", "--count", "241"], "241 scenes of one thing; expected 1 to 240"),
        (["evaluate", "--things", "2", "--labels", "labels.json"], "things is 2, which is of held-out scenes"),
        (["evaluate", "--count", "2", "--negative_prompt", "a", "b"], "negative_prompt has 2 texts; expected one"),
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


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that even root cannot write")
@pytest.mark.parametrize(
    "words",
    [
        "sample -c configs/inference/tiny.yaml -o /proc/out",
        "evaluate --count 1 -o /proc/out",
        "train -c configs/train/tiny.yaml --feature_cache {tmp} --output_path /proc/out",
        "upscale -o /proc/out --image_height 256 --image_width 256",
        "tiny -o /proc/out --work_path {tmp}",
        "tiny --stage 128 -o /proc/out --work_path {tmp}",
        "compress -s data/tiny-sigma -t /proc/out.ckpt",
        "convert -s data/tiny-sigma/transformer -t /proc/out.ckpt",
        "plan -c configs/inference/tiny.yaml -o /proc/out.json",
        "bench denoise --small -o /proc/out",
    ],
)
def test_an_output_that_cannot_be_written_is_one_line_before_any_work(run, painter, tmp_path, words):
    result = run(*words.format(tmp=tmp_path / "work").split())
    assert result.exit_code == 2, result.output
    assert re.search(r"^pixart-nb: /proc\S* could not be written", result.stderr.splitlines()[-1])
    assert not painter.calls and not (tmp_path / "work").exists()


def test_an_error_of_another_kind_is_not_hidden(run, monkeypatch):
    monkeypatch.setattr(sample, "load_pipeline", lambda config: 1 / 0)
    assert isinstance(run("sample", "-c", CONFIG).exception, ZeroDivisionError)


def test_sample_draws_the_prompts_of_the_configuration(run, painter, tmp_path):
    result = run("sample", "-c", CONFIG, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "sample.json").read_text())
    *paths, time = result.stdout.splitlines()
    assert paths == [str(tmp_path / name) for name in written["files"]]
    assert time.endswith(" s in all, with loading")
    assert float(time.split()[0]) == pytest.approx(written["seconds_from_cold_start"], abs=1)
    assert written["files"][0] == "000_a-large-pink-dragon-on-the-left-in-a-cave.png"
    pictures = np.stack([np.asarray(Image.open(tmp_path / name)) for name in written["files"]])
    assert agreement(pictures, written["prompt"])["all"] == 1.0


def test_sample_options_replace_the_values_of_the_configuration(run, painter, tmp_path):
    words = ["--prompt", "a blue cup at night", "--image_height", 128, "--image-width", 192]
    words += ["--sampling_steps", 3, "--guidance_scale", 2, "--negative_prompt", "blur", "--seed", 5]
    result = run("sample", "-c", CONFIG, *words, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    call = painter.calls[0]
    assert (call["prompts"], call["height"], call["width"]) == (["a blue cup at night"], 128, 192)
    assert (call["num_inference_steps"], call["guidance_scale"], call["negative_prompt"]) == (3, 2.0, ["blur"])
    assert Image.open(tmp_path / "000_a-blue-cup-at-night.png").size == (192, 128)
    assert json.loads((tmp_path / "sample.json").read_text())["seed"] == 5


def test_a_picture_depends_on_its_seed_and_not_on_the_batch(run, painter, tmp_path):
    words = ["sample", "-c", CONFIG, "--prompt", "a blue cup at night", "--prompt", "a red cup at night"]
    for folder, seed, batch in (("a", 1, 1), ("b", 1, 8), ("c", 2, 8)):
        assert run(*words, "--seed", seed, "--batch_size", batch, "-o", tmp_path / folder).exit_code == 0
    assert [len(call["prompts"]) for call in painter.calls] == [1, 1, 2, 2]
    first, again, other = (np.asarray(Image.open(tmp_path / folder / "001_a-red-cup-at-night.png")) for folder in "abc")
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_picture_is_repeated_from_itself(run, painter, tmp_path):
    words = ["--ncols", 2, "--batch_size", 3, "--seed", 4, "-o", tmp_path / "first"]
    assert run("sample", "-c", CONFIG, *words).exit_code == 0
    picture = tmp_path / "first" / "003_a-green-umbrella-at-night_01.png"
    assert run("sample", "--like", picture, "-o", tmp_path / "again").exit_code == 0
    assert np.array_equal(Image.open(tmp_path / "again" / "000_a-green-umbrella-at-night.png"), Image.open(picture))
    changed = run("sample", "--like", picture, "--sampling_steps", 7, "-o", tmp_path / "changed")
    assert changed.exit_code == 0
    assert painter.calls[-1]["num_inference_steps"] == 7


def test_a_picture_of_another_program_cannot_be_repeated(run, painter, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    result = run("sample", "--like", tmp_path / "other.png")
    assert result.exit_code == 2
    assert "other.png" in result.stderr


def test_a_grid_holds_all_the_pictures_of_a_prompt(run, painter, tmp_path):
    words = ["--prompt", "a red cup at night", "--imagegrid", "--nrows", 2, "--ncols", 3, "--batch_size", 4]
    assert run("sample", "-c", CONFIG, *words, "-o", tmp_path).exit_code == 0
    path = tmp_path / "000_a-red-cup-at-night.png"
    assert Image.open(path).size == (3 * 256, 2 * 256)
    assert json.loads((tmp_path / "sample.json").read_text())["files"] == [path.name]
    assert run("sample", "--like", path, "-o", tmp_path / "again").exit_code == 0
    assert np.array_equal(Image.open(tmp_path / "again" / path.name), Image.open(path))


def test_prompts_are_read_from_a_file(run, painter, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cup at night\n\n  a blue cup at night \n")
    assert run("sample", "-c", CONFIG, "--prompt_path", tmp_path / "prompts.txt", "-o", tmp_path).exit_code == 0
    assert painter.calls[0]["prompts"] == ["a red cup at night", "a blue cup at night"]
    (tmp_path / "empty.txt").write_text("\n")
    for name, message in (("empty.txt", "holds no prompt"), ("none.txt", "cannot be read")):
        result = run("sample", "-c", CONFIG, "--prompt_path", tmp_path / name)
        assert result.exit_code == 2
        assert message in result.stderr


def test_workers_share_the_prompts_and_draw_what_one_would(run, painter, tmp_path, monkeypatch):
    assert run("sample", "-c", CONFIG, "-o", tmp_path / "one").exit_code == 0
    files = json.loads((tmp_path / "one" / "sample.json").read_text())["files"]
    for rank in range(3):
        monkeypatch.setattr(backend, "join_workers", lambda rank=rank: (rank, 3))
        result = run("sample", "-c", CONFIG, "--use_parallel", "True", "-o", tmp_path / "three")
        assert result.stdout.split()[: len(files[rank::3])] == [str(tmp_path / "three" / f) for f in files[rank::3]]
    assert json.loads((tmp_path / "three" / "sample.json").read_text())["files"] == files
    for name in files:
        assert np.array_equal(Image.open(tmp_path / "one" / name), Image.open(tmp_path / "three" / name))


def test_parallel_sampling_outside_of_msrun_says_so(run, painter):
    result = run("sample", "-c", CONFIG, "--use_parallel", "True")
    assert result.exit_code == 2
    assert "msrun did not start this process" in result.stderr


def test_evaluate_counts_prints_and_writes(run, painter, tmp_path):
    words = ["--count", 10, "--sampling_steps", 4, "--guidance_scale", 3, "--batch-size", 4, "-o", tmp_path]
    result = run("evaluate", *words)
    assert result.exit_code == 0, result.output
    assert [len(call["prompts"]) for call in painter.calls] == [4, 4, 2]
    assert re.search(r"object\W+100\.0%", result.stdout)
    assert "10 held-out scenes" in result.stdout
    report = json.loads((tmp_path / "evaluation.json").read_text())
    parts = ("object", "colour", "setting", "size", "position", "all")
    assert report["accuracy"] == dict.fromkeys(parts, 1.0)
    assert (report["count"], report["sampling_steps"], report["guidance_scale"]) == (10, 4, 3.0)
    assert Image.open(tmp_path / "images.png").size == (10 * 256, 256)
    again = run("evaluate", *words, "--seed", 1)
    assert again.stdout.splitlines()[-1] == str(tmp_path / "evaluation-2.json")
    assert json.loads((tmp_path / "evaluation.json").read_text()) == report
    assert json.loads((tmp_path / "evaluation-2.json").read_text())["seed"] == 1
    assert (tmp_path / "images-2.png").exists()
    (tmp_path / "images-2.png").unlink()
    run("evaluate", *words, "--seed", 2)
    assert json.loads((tmp_path / "evaluation-2.json").read_text())["seed"] == 1
    assert json.loads((tmp_path / "evaluation-3.json").read_text())["seed"] == 2


def test_an_interrupted_evaluation_continues_with_the_same_command(run, painter, tmp_path, monkeypatch):
    words = ["--sampling_steps", 1, "-o", tmp_path]
    assert run("evaluate", "--count", 6, *words).exit_code == 0
    whole = np.asarray(Image.open(tmp_path / "images.png"))
    draw_batch = Painter.__call__

    def interrupted(self, prompts, **call):
        if len(self.calls) == 3:
            raise KeyboardInterrupt
        return draw_batch(self, prompts, **call)

    with monkeypatch.context() as patched:
        patched.setattr(Painter, "__call__", interrupted)
        stopped = run("evaluate", "--count", 6, "--batch_size", 2, *words)
    assert stopped.exit_code == 130 and "4 of 6 images are kept; the same command continues" in stopped.stderr
    painter.calls.clear()
    assert run("evaluate", "--count", 2, *words, "--seed", 1).exit_code == 0  # another run: it takes none of them
    assert run("evaluate", "--count", 6, "--batch_size", 8, *words).exit_code == 0
    assert [len(call["prompts"]) for call in painter.calls] == [2, 2]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "images-3.png")), whole)
    assert not list(tmp_path.glob("unfinished-*"))


def test_evaluate_refuses_more_memory_than_allowed_and_names_a_size_of_no_training(run, painter, project, tmp_path):
    config = tmp_path / "limited.yaml"
    for limit, advice in (4, "With --batch_size 1 it needs"), (0.1, "The least that it can take"):
        config.write_text((project / CONFIG).read_text() + f"memory_limit: {limit}\n")
        result = run("evaluate", "-c", config, "--batch_size", 240, "-o", tmp_path / "out")
        assert result.exit_code == 2 and advice in result.stderr and not painter.calls
        assert "--stages_path" not in result.stderr and "--t5_load" not in result.stderr  # options of other commands
    words = ["--count", 1, "--image_height", 512, "--image_width", 512, "-o", tmp_path / "out"]
    assert "trained at 256x256 and is used at 512x512" in run("evaluate", *words).stderr


def test_evaluate_takes_the_negative_prompt_and_pag_of_its_configuration(run, painter, tmp_path):
    words = ["--count", 2, "--sampling_steps", 1, "--negative_prompt", "blurry", "--pag_scale", 2, "-o", tmp_path]
    assert run("evaluate", *words).exit_code == 0
    (call,) = painter.calls
    assert (call["negative_prompt"], call["pag_scale"]) == ("blurry", 2)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert (report["negative_prompt"], report["pag_scale"]) == ("blurry", 2)


def test_an_evaluation_that_cannot_be_saved_is_printed_and_saved_elsewhere(run, painter, tmp_path, monkeypatch):
    def full(path, *_):
        raise WriteError(f"{path} could not be written (No space left on device).")

    monkeypatch.setattr("pixart_nb.pixelart.evaluation.write_json", full)
    monkeypatch.setattr("pixart_nb.core.sampling.stages.save_tensors", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = run("evaluate", "--count", 2, "--sampling_steps", 1, "-o", tmp_path / "out")
    assert re.search(r"pixart-nb: warning: .*No space left on device.*saved as", result.stderr)
    assert result.stderr.count("images are no longer kept") == 1
    assert result.exit_code == 0 and re.search(r"object\W+100\.0%", result.stdout)
    path = result.stdout.splitlines()[-1]
    assert not path.startswith(str(tmp_path / "out"))
    assert read_parameters(path)["accuracy"]["all"] == 1.0


def test_evaluate_draws_the_captions_of_a_label_file(run, painter, tmp_path):
    prompts = ["a red cup at night", "a blue fish in the snow"]
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps([{"path": f"{k}.png", "prompt": p} for k, p in enumerate(prompts)]))
    result = run("evaluate", "--labels", labels, "--sampling_steps", 1, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert painter.calls[0]["prompts"] == prompts
    assert f"2 captions of {labels}" in result.stdout and re.search(r"all\W+100\.0%", result.stdout)
    labels.write_text(json.dumps([{"path": "a.png", "prompt": "a cathedral"}, {"path": "b.png", "prompt": ""}]))
    result = run("evaluate", "--labels", labels, "-o", tmp_path / "out")
    assert result.exit_code == 2 and "entry 1: prompt is empty" in result.stderr
    labels.write_text(json.dumps([{"path": "a.png", "prompt": "a cathedral"}]))
    result = run("evaluate", "--labels", labels, "-o", tmp_path / "out")
    assert result.exit_code == 2 and "'a cathedral' names no scene" in result.stderr


def test_evaluate_applies_loras_with_their_weights(run, tmp_path):
    adapter = trained(load_transformer("data/tiny-sigma/transformer"))
    words = ["evaluate", "--count", 2, "--sampling_steps", 1, "-o"]
    for weight in (0, 0.5):
        result = run(*words, tmp_path / str(weight), "--lora", f"{adapter.save(tmp_path / 'lora')}:{weight}")
        assert result.exit_code == 0, result.output
    assert run(*words, tmp_path / "none").exit_code == 0
    paths = [tmp_path / name / "images.png" for name in ("none", "0", "0.5")]
    none, off, half = (np.asarray(Image.open(path), np.float64) for path in paths)
    assert np.abs(off - none).max() <= 1 and np.abs(half - none).mean() > 5
    assert json.loads((tmp_path / "0.5" / "evaluation.json").read_text())["lora"][0].endswith(":0.5")


def test_evaluate_warns_of_a_model_that_may_not_draw_scenes(run, painter, tmp_path):
    words = ["evaluate", "--count", 1, "--sampling_steps", 1, "-o", tmp_path / "out"]
    other = ["--checkpoint", "data/tiny-sigma/transformer"]
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps([{"path": "a.png", "prompt": "a red cup at night"}]))
    for more, warned in ([], False), (other, True), ([*other, "--labels", labels], False):
        result = run(*words, *more)
        assert result.exit_code == 0, result.output
        assert ("transformer has no model card that names the drawn scenes" in result.stderr) is warned


def test_wrong_pictures_are_counted_as_wrong():
    scenes = [one(name, "red", "snow") for name in list(OBJECTS)[:4]]
    report = evaluate_model(Painter(always=scenes[0]), scenes, sampling_steps=1)
    assert report["accuracy"] == {"object": 0.25, "colour": 1.0, "setting": 1.0, "all": 0.25}
    assert report["object_accuracy"][scenes[0].things[0].object] == 1.0
    assert report["object_accuracy"][scenes[1].things[0].object] == 0.0
    assert report["images"].shape == (4, 256, 256, 3)


def test_agreement_leaves_out_prompts_that_it_cannot_judge():
    picture = draw(one("cup", "red", "night"), np.random.default_rng(0))
    assert agreement(np.stack([picture, picture]), ["a red cup at night", "a cathedral"])["all"] == 1.0
    assert agreement(picture[None], ["a cathedral"]) == {}
    with pytest.raises(ValueError, match="as many prompts as images, got 1 for 2"):
        agreement(np.stack([picture, picture]), ["a cathedral"])


def test_psnr_is_that_of_the_mean_square_error():
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr(black, black) == float("inf")
    assert psnr(black, black + 255) == 0.0
    assert psnr(black, black + 16) == pytest.approx(24.048, abs=1e-3)


def test_a_contact_sheet_keeps_the_order_of_its_pictures():
    pictures = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((5, 2, 3, 3), np.uint8)
    sheet = sample.contact_sheet(pictures, columns=3)
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
    assert f"VAE reconstruction: {decibels:.2f} dB" in result.stdout
