"""Options follow the keys of the configuration: lists, booleans, underscores, and messages for what cannot be read."""

import os
import re
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from pixart_nb import __version__
from pixart_nb.cli import app
from pixart_nb.config import (
    SAMPLING_METHODS,
    ConfigError,
    InferenceConfig,
    TrainConfig,
    check_parameters,
    notebook_config,
)
from pixart_nb.core.sampling import generate, schedulers

RUN = CliRunner()


@pytest.fixture
def run(monkeypatch, project):
    """Run ``sample`` with these words; return the configuration that it generates with."""

    def command(*words, code=0):
        configs = []
        monkeypatch.chdir(project)
        monkeypatch.setattr(generate, "sample", lambda config: configs.append(config) or [])
        result = RUN.invoke(app, ["sample", *map(str, words)])
        assert result.exit_code == code, result.output
        return configs[0] if code == 0 else " ".join(re.sub("[│╭╰─╮╯]", " ", result.stderr).split())

    return command


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--image_width", 64, "--image-height", 96], {"image_width": 64, "image_height": 96}),
        (["--image_width=64"], {"image_width": 64}),
        (["--prompt", "a cat, 8k", "b", "--prompt", "c", "--seed", 3], {"prompt": ["a cat, 8k", "b", "c"], "seed": 3}),
        (["--prompt", "--image_width"], {"prompt": ["--image_width"]}),
        (["--kv_compress_layer", 14, "16-18"], {"kv_compress_layer": [14, 16, 17, 18]}),
        (["--kv_compress_layer", "0,2-3"], {"kv_compress_layer": [0, 2, 3]}),
        (["--negative_prompt", "blur"], {"negative_prompt": "blur"}),
        (["--imagegrid", "--seed", 1], {"imagegrid": True, "seed": 1}),
        (["--imagegrid", "True"], {"imagegrid": True}),
        (["--imagegrid", "false"], {"imagegrid": False}),
        (["--use-resolution-binning", "0"], {"use_resolution_binning": False}),
        (["--no-use_resolution_binning"], {"use_resolution_binning": False}),
        (["--seed", 0, "--tile_size", 0], {"seed": 0, "tile_size": 0}),
        (["--guidance_scale", "1e1"], {"guidance_scale": 10.0}),
        (["--t5_max_length", 120], {"t5_max_length": 120}),
        (["--prompt_path", "prompts.txt"], {"prompt_path": "prompts.txt", "prompt": []}),
        (["-o", "~/images"], {"output_path": os.path.expanduser("~/images")}),
        (["--model", "m"], {"model": "m", "checkpoint": ""}),
    ],
)
def test_options_are_read_as_their_keys_are(run, words, expected):
    config = run(*words)
    assert {key: getattr(config, key) for key in expected} == expected


def test_a_model_on_the_command_line_replaces_the_components_of_the_file(run):
    config = run("-c", "configs/inference/pixart-sigma-1024-MS.yaml", "--model", "m", "--vae_root", "v")
    assert (config.model, config.checkpoint, config.tokenizer_root, config.vae_root) == ("m", "", "", "v")
    assert config.sd_scale_factor == 0.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image_hight", 3], "No such option: --image-hight"),
        (["--image_hight", 3], "--image-height"),
        (["--image_height", "tall"], "command line: image_height: given 'tall' (str); expected an integer"),
        (["--image_height", 0], "image_height: given 0 (int); expected a number greater than 0"),
        (["--sampling_steps", 0], "sampling_steps: given 0 (int); expected a number greater than or equal to 1"),
        (["--imagegrid", "perhaps"], "imagegrid: given 'perhaps' (str); expected true or false"),
        (["--dtype", "fp23"], "expected 'fp32', 'fp16' or 'bf16'; did you mean 'fp32'?"),
        (["--kv_compress_layer", "deep"], "kv_compress_layer.0: given 'deep' (str); expected an integer"),
        (["--kv_compress_layer", "0-99999999999"], "kv_compress_layer"),
        (["--prompt"], "requires an argument"),
        (["-c", "configs/train/tiny.yaml"], "is a configuration of `pixart-nb train` (json_path, image_dir, steps)"),
    ],
)
def test_what_cannot_be_read_is_said(run, words, message):
    assert message in run(*words, code=2)


def test_a_sampling_file_is_refused_by_train(project, monkeypatch):
    monkeypatch.chdir(project)
    result = RUN.invoke(app, ["train", "-c", "configs/inference/tiny.yaml"])
    assert result.exit_code == 2
    assert "is a configuration of `pixart-nb sample`" in result.stderr


@pytest.mark.parametrize(("command", "model"), [("sample", InferenceConfig), ("train", TrainConfig)])
def test_every_key_is_an_option_with_its_help(command, model):
    text = RUN.invoke(app, [command, "--help"], env={"COLUMNS": "300"}).output
    for name, field in model.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text, name
        assert field.description.split(".")[0] in text, name


def test_commands_appear_in_the_order_in_which_they_are_met():
    text = RUN.invoke(app, ["--help"]).output
    names = [
        "sample",
        "upscale",
        "plan",
        "dataset",
        "train",
        "evaluate",
        "tiny",
        "convert",
        "compress",
        "bench",
        "doctor",
    ]
    assert re.findall(r"^│ (\w+) ", text, re.MULTILINE) == names
    assert "--install-completion" in text


def test_the_version_is_shown():
    assert RUN.invoke(app, ["--version"]).stdout == f"pixart-nb {__version__}\n"


@pytest.mark.parametrize("words", [["--debug", "sample", "-c", "none.yaml"], ["sample", "-c", "none.yaml", "--debug"]])
def test_debug_shows_the_traceback_of_every_error(words):
    assert isinstance(RUN.invoke(app, words).exception, ConfigError)


def test_an_error_of_the_operating_system_is_one_line_and_a_bug_is_not(run, monkeypatch, project, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.chdir(project)
    monkeypatch.setattr(generate, "sample", lambda config: (tmp_path / "file" / "x").mkdir(parents=True))
    result = RUN.invoke(app, ["sample"])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[1:] == [f"pixart-nb: {tmp_path / 'file' / 'x'}: Not a directory"]
    for error in (ValueError("bug"), KeyError("bug"), TypeError("bug")):
        monkeypatch.setattr(generate, "sample", lambda config, error=error: (_ for _ in ()).throw(error))
        assert RUN.invoke(app, ["sample"]).exception is error


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_characters_that_a_terminal_lacks_do_not_end_a_command(tmp_path, encoding):
    folder = tmp_path / "数据"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "a.txt").write_text("红色的猫", encoding="utf-8")
    words = [sys.executable, "-c", "from pixart_nb.cli import app; app()", "dataset", "folder", "-s", str(folder)]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(words, capture_output=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert rb"\u6570\u636e" in done.stdout or "数据".encode() in done.stdout


# ---- notebooks


def namespace(*cells, **values):
    return {"In": ["", *cells]} | values


def test_parameters_that_papermill_inserts_must_be_declared():
    check_parameters(namespace("count = 3  # number", "check_parameters(globals())"))
    check_parameters(namespace("count = 3  # number", "# Parameters\ncount = 4\n"))
    check_parameters({})
    with pytest.raises(ConfigError, match="parameter 'cuont' is not declared by this notebook; did you mean 'count'"):
        check_parameters(namespace("count = 3", "# Parameters\ncuont = 4\n"))
    with pytest.raises(ConfigError, match="'other' is not declared by this notebook; valid: count"):
        check_parameters(namespace("count: int = 3", "# Parameters\nother = 4", "%matplotlib inline\nother = 5"))


def test_a_notebook_gets_the_configuration_of_its_parameters():
    values = {"model": "m", "image_height": 64, "image_width": 64, "prompt": "a cup", "word": "cup"}
    config = notebook_config(namespace("...", **values), use_resolution_binning=False)
    assert (config.prompt, config.use_resolution_binning, config.image_height) == (["a cup"], False, 64)


@pytest.mark.parametrize(
    ("words", "position", "completions"),
    [
        ("pixart-nb ", 1, {"sample", "train", "dataset", "bench"}),
        ("pixart-nb sample --dtype ", 3, {"fp32", "fp16", "bf16"}),
        ("pixart-nb train --optim ", 3, {"adamw", "came"}),
    ],
)
def test_a_shell_completes_commands_and_choices(words, position, completions):
    variables = {"_PIXART_NB_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    result = RUN.invoke(app, [], prog_name="pixart-nb", env=variables)
    assert completions <= set(result.stdout.split())


def test_every_sampling_method_has_its_scheduler():
    assert set(SAMPLING_METHODS) == set(schedulers.SAMPLING_METHODS)
