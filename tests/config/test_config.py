"""Configuration files are validated, and errors say what was given and what was expected."""

import doctest
import json
import re
from pathlib import Path

import pytest
import yaml

from pixart_nb import config
from pixart_nb.config import (
    ConfigError,
    InferenceConfig,
    TrainConfig,
    check_config,
    load_config,
    project_folder,
    read_yaml,
)
from pixart_nb.core.checkpoints.components import component_paths
from pixart_nb.core.sampling.planning import prompts_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
MINIMAL = {"model": "m", "image_height": 64, "image_width": 96, "prompt": ["a red cup at night"]}
TRAINED = "data/tiny-sigma"
MOST_BYTES = 1024 * 1024


def ids(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


def write(folder, values):
    path = folder / "some.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def project_files():
    """Files of the project that a person or a program wrote on purpose, without what is made by running it."""
    made = re.compile(
        r"\.venv|\.git|build|outputs|__pycache__|\.ipynb_checkpoints|\..*_cache|\.hypothesis|.*\.egg-info"
    )
    for path in ROOT.rglob("*"):
        if path.is_file() and not any(made.fullmatch(part) for part in path.relative_to(ROOT).parts):
            yield path


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "inference").glob("*.yaml")), ids=lambda path: path.stem)
def test_inference_configurations_are_valid(path):
    assert isinstance(load_config(path), InferenceConfig)


@pytest.mark.parametrize("path", CONFIGS, ids=ids(CONFIGS))
def test_every_configuration_opens_with_its_command_and_what_to_expect(path):
    opening = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert path.read_text().startswith("# ")
    assert str(path.relative_to(ROOT)) in opening
    assert "Expect" in opening
    assert "easured" in opening


def test_defaults_are_those_of_the_published_pipeline():
    config = check_config(MINIMAL)
    assert (config.sampling_steps, config.guidance_scale, config.negative_prompt) == (20, 4.5, "")
    assert (config.sampling_method, config.dtype, config.seed) == ("dpm++", "fp32", 0)


def test_an_unknown_key_names_the_nearest_known_one(tmp_path):
    path = write(tmp_path, MINIMAL | {"sampling_step": 3})
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: unknown key 'sampling_step'; did you mean 'sampling_steps'?"


def test_a_key_like_no_other_gets_the_list_of_known_ones():
    with pytest.raises(ConfigError, match="unknown key 'zzz'; valid: model, checkpoint, "):
        check_config(MINIMAL | {"zzz": 3})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sampling_steps", "20", "sampling_steps: given '20' (str); expected an integer"),
        ("sampling_steps", True, "sampling_steps: given True (bool); expected an integer"),
        ("sampling_steps", 0, "sampling_steps: given 0 (int); expected a number greater than or equal to 1"),
        ("image_height", 0, "image_height: given 0 (int); expected a number greater than 0"),
        ("image_width", -16, "image_width: given -16 (int); expected a number greater than 0"),
        ("image_width", 64.0, "image_width: given 64.0 (float); expected an integer"),
        ("guidance_scale", -0.5, "guidance_scale: given -0.5 (float); expected a number greater than or equal to 0"),
        ("guidance_scale", float("nan"), "guidance_scale: given nan (float); expected a number greater than"),
        ("dtype", "fp8", "dtype: given 'fp8' (str); expected 'fp32', 'fp16' or 'bf16'"),
        ("t5_max_length", 77, "t5_max_length: given 77 (int); expected 0, 120 or 300"),
        ("prompt", 3, "prompt: given 3 (int); expected a list"),
        ("prompt", ["a cup", 3], "prompt.1: given 3 (int); expected a string"),
        ("kv_compress_layer", [0, "27-14"], "kv_compress_layer.1: given '27-14' (str); expected an integer"),
        ("seed", -1, "seed: given -1 (int); expected a number greater than or equal to 0"),
        ("negative_prompt", None, "negative_prompt: given nothing; expected a string or a list of strings"),
    ],
)
def test_a_wrong_value_says_the_key_what_was_given_and_what_was_expected(key, value, message):
    with pytest.raises(ConfigError) as caught:
        check_config(MINIMAL | {key: value}, source="some.yaml")
    assert str(caught.value).startswith(f"some.yaml: {message}")


def test_empty_prompts_are_refused():
    with pytest.raises(ConfigError, match=r"prompt\.0: given '' \(str\); expected at least 1 character"):
        check_config(MINIMAL | {"prompt": [""]})


def test_all_problems_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        check_config({"model": "m", "image_height": -3, "prompt": ["a"], "colour": 1})
    assert all(part in str(caught.value) for part in ("'colour'", "'image_width' is missing", "greater than 0"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ""}, "expected model, or all of checkpoint, vae_root, text_encoder_root, tokenizer_root"),
        ({"model": "", "checkpoint": "a.pth", "vae_root": "vae"}, "not given: text_encoder_root, tokenizer_root"),
        ({"prompt_path": "prompts.txt"}, "either prompt"),
        ({"prompt": []}, "either prompt"),
        ({"kv_compress": True}, "at least one layer in kv_compress_layer"),
        ({"use_resolution_binning": False, "image_height": 100}, "are 100 and 96; expected multiples of 16"),
        ({"strength": 0.3}, "strength is 0.3, which changes nothing without image or upscale_from; give both"),
        ({"pag_adaptive_scale": 0.1}, "pag_adaptive_scale is 0.1, which changes nothing without pag_scale"),
        ({"control_guidance_end": 0.5}, "control_guidance_end is 0.5, which changes nothing without controlnet"),
    ],
)
def test_values_that_do_not_go_together_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        check_config(MINIMAL | change)


def test_a_whole_number_serves_as_a_scale():
    assert check_config(MINIMAL | {"guidance_scale": 5}).guidance_scale == 5.0


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not YAML"),
        ("", "holds nothing"),
        ("- a", "expected lines of the form"),
        ("\xff\x00", "is not YAML"),
    ],
)
def test_a_file_that_holds_no_keys_is_refused(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [1, 2]\nb: [*a, *a]", r"the alias \*a stands for a list or a mapping; write it out"),
        ("a: &a {x: 1}\nb: {<<: *a}", r"the alias \*a"),
        ("seed: 1\nseed: 2", "the key 'seed' is given twice"),
        ("a: " + "[" * 2000, "is not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "is not YAML"),
        ("a: 2024-99-99", "is not YAML"),
        ("a: " + "9" * 5000, "is not YAML"),
        ("a: 1\n#" + "x" * 2**20, "larger than 1048576 bytes"),
    ],
    ids=["alias", "merge", "twice", "nested", "tag", "date", "digits", "size"],
)
def test_a_file_that_could_expand_or_execute_is_refused(tmp_path, text, message):
    path = tmp_path / "stranger.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


def test_an_alias_of_a_single_value_is_read(tmp_path):
    (tmp_path / "some.yaml").write_text("image_height: &side 512\nimage_width: *side\n")
    assert read_yaml(tmp_path / "some.yaml") == {"image_height": 512, "image_width": 512}


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def forbidden(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(ConfigError, match=r"some\.yaml: cannot be read \(Permission denied\)"):
        read_yaml(tmp_path / "some.yaml")


#: Numbers that scale something and size nothing.
SCALES = {
    "guidance_scale", "sd_scale_factor", "memory_limit", "start_learning_rate", "end_learning_rate", "adamw_eps",
    "weight_decay", "max_grad_norm", "snr_gamma", "noise_offset", "init_loss_scale", "loss_scale_factor", "lora_alpha",
    "valid_num",
}  # fmt: skip


@pytest.mark.parametrize("model", [InferenceConfig, TrainConfig])
def test_every_number_that_sizes_something_has_a_bound(model):
    for name, field in model.model_fields.items():
        if field.annotation in (int, float, int | None) and name not in SCALES:
            bounds = [getattr(part, limit) for part in field.metadata for limit in ("le", "lt") if hasattr(part, limit)]
            assert bounds and max(bounds) <= 2**63, name


@pytest.mark.parametrize(
    "change",
    [
        {"image_height": 2**31}, {"sampling_steps": 2**31}, {"nrows": 10**6}, {"batch_size": 10**9},
        {"kv_compress_layer": [2**63]}, {"kv_compress_layer": list(range(2000))}, {"sample_size": 2**20},
        {"seed": 2**64}, {"tile_size": 2**40}, {"lora": ["x"] * 1000},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_size_beyond_reason_is_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        check_config(MINIMAL | change)


def test_steps_that_are_zero_are_refused_and_null_means_epochs():
    training = {"model": "m", "json_path": "labels.json", "image_dir": "images"}
    assert check_config(training | {"steps": None}, "train").steps is None
    for key in ("steps", "visualize_steps", "ckpt_save_steps"):
        with pytest.raises(ConfigError, match=rf"{key}: given 0 \(int\); expected a number greater than or equal to 1"):
            check_config(training | {key: 0}, "train")


def test_bundled_files_are_found_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("configs/inference/tiny.yaml")
    assert Path(config.model).is_dir() and Path(config.model).name == "tiny-sigma"
    assert load_config("configs/train/tiny.yaml", "train").json_path.endswith("data/pixelart/labels.json")
    assert check_config(MINIMAL | {"model": "data/other"}).model == "data/other"
    assert component_paths("data/tiny-sigma", ["vae"])["vae"].is_dir()
    (tmp_path / "data" / "tiny-sigma").mkdir(parents=True)
    assert load_config("configs/inference/tiny.yaml").model == "data/tiny-sigma"


def test_a_home_folder_is_expanded():
    config = check_config(MINIMAL | {"model": "~/m", "output_path": "~/out", "lora": ["~/style.safetensors:0.5"]})
    home = str(Path.home())
    assert (config.model, config.output_path) == (f"{home}/m", f"{home}/out")
    assert config.lora == [f"{home}/style.safetensors:0.5"]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="type 'inferense' is not known"):
        check_config(MINIMAL, "inferense")


def test_options_replace_the_values_of_a_file(tmp_path):
    path = write(tmp_path, MINIMAL | {"seed": 1})
    assert load_config(path, options={"seed": 7}) == check_config(MINIMAL | {"seed": 7})
    partial = {key: value for key, value in MINIMAL.items() if key != "image_height"}
    assert load_config(write(tmp_path, partial), options={"image_height": 64}) == check_config(MINIMAL)
    with pytest.raises(ConfigError, match=r"command line: image_height: given 0.*; .*some\.yaml: seed: given 'x'"):
        load_config(write(tmp_path, MINIMAL | {"seed": "x"}), options={"image_height": 0})


def test_the_project_folder_is_found_from_below(tmp_path):
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    assert project_folder(below) == below
    (tmp_path / "pyproject.toml").touch()
    assert project_folder(below) == tmp_path


def test_no_file_is_large_but_weights_and_fixtures():
    allowed = (TRAINED, "tests/reference/")
    large = [str(path.relative_to(ROOT)) for path in project_files() if path.stat().st_size > MOST_BYTES]
    assert [name for name in large if not name.startswith(allowed)] == []


def test_every_yaml_file_is_yaml():
    for path in project_files():
        if path.suffix in (".yaml", ".yml"):
            assert yaml.safe_load(path.read_text(encoding="utf-8")), path


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(config)
    assert result.attempted > 0
    assert result.failed == 0


def test_a_prompt_file_is_read_as_editors_write_it(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  a dog\u2028asleep \r\n".encode())
    config = check_config(MINIMAL | {"prompt": [], "prompt_path": str(path)})
    assert prompts_of(config) == ["a cat", "a dog\u2028asleep"]
    path.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"prompts\.txt: cannot be read as text .*save it as UTF-8"):
        prompts_of(config)


def test_values_of_file_and_command_line_that_do_not_go_together_name_both(tmp_path):
    with pytest.raises(ConfigError, match=r"some\.yaml with the command line: 2 negative prompts for 1 prompts"):
        load_config(write(tmp_path, MINIMAL), options={"negative_prompt": ["a", "b"]})
    with pytest.raises(ConfigError, match=r"given 'DDIM' .*did you mean 'ddim'\?"):
        check_config(MINIMAL | {"sampling_method": "DDIM"})


@pytest.mark.parametrize(
    ("described", "name", "side"),
    [
        ({"caption_channels": 4096, "sample_size": 64}, "own", 512),
        ({"sample_size": 128}, "own", 1024),
        (None, "PixArt-Sigma-XL-2-256x256", 256),
        (None, "PixArt-Sigma-XL-2-2K-MS", 2048),
        (None, "somebody/their-model", 1024),
    ],
)
def test_without_a_file_a_published_model_is_drawn_at_its_size_and_the_default_guidance(
    tmp_path, monkeypatch, described, name, side
):
    model = tmp_path / name
    if described is not None:
        (model / "transformer").mkdir(parents=True)
        (model / "transformer" / "config.json").write_text(json.dumps(described))
    read = load_config("configs/inference/tiny.yaml", "inference", {"model": str(model)})
    assert (read.image_height, read.image_width, read.guidance_scale) == (side, side, config.GUIDANCE_SCALE)
    monkeypatch.setenv("HOME", str(tmp_path))
    home = load_config("configs/inference/tiny.yaml", "inference", {"model": f"~/{name}"})
    assert (home.image_height, home.guidance_scale) == (side, config.GUIDANCE_SCALE)
    given = {"model": str(model), "image_height": 128, "guidance_scale": 3.0}
    read = load_config("configs/inference/tiny.yaml", "inference", given)
    assert (read.image_height, read.guidance_scale) == (128, 3.0)


def test_without_a_file_a_model_of_the_bundled_kind_keeps_what_the_file_says(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"caption_channels": 128, "sample_size": 32}))
    for model in (TRAINED, "data/tiny-sigma-1k", str(tmp_path)):
        read = load_config("configs/inference/tiny.yaml", "inference", {"model": model})
        assert (read.image_height, read.guidance_scale) == (256, 2.0)
