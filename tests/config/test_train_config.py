"""The configuration of a training: keys, values, and what may change when it goes on."""

import re
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pixart_nb.config import ConfigError, TrainConfig, check_config, load_config, training_identity
from pixart_nb.core.data.diffusiondb import import_diffusiondb
from pixart_nb.core.data.labels import load_labels
from pixart_nb.pixelart.datasets import write_published

LEAST = {"model": "m", "json_path": "labels.json", "image_dir": "pictures"}
#: The keys of mindone's training configurations for PixArt-Sigma that mean something here.
MINDONE = """
sample_size: 64
batch_size: 32
checkpoint: "models/PixArt-Sigma-XL-2-512-MS.ckpt"
vae_root: "models/vae"
text_encoder_root: "models/text_encoder"
tokenizer_root: "models/tokenizer"
sd_scale_factor: 0.13025
dtype: "fp16"
epochs: 100
scheduler: "constant"
start_learning_rate: 2.0e-5
optim: "came"
came_betas: [0.9, 0.999, 0.9999]
came_eps: [1.0e-30, 1.0e-16]
weight_decay: 0.0
loss_scaler_type: "dynamic"
init_loss_scale: 65536.0
gradient_accumulation_steps: 1
clip_grad: True
max_grad_norm: 0.01
ckpt_save_interval: 5
log_loss_interval: 1
recompute: True
multi_scale: True
class_dropout_prob: 0.1
real_prompt_ratio: 0.5
warmup_steps: 1000
auto_lr: sqrt
visualize: True
visualize_interval: 5
sampling_method: "dpm"
sampling_steps: 20
guidance_scale: 4.5
validation_prompts:
  - "portrait photo of a girl"
"""


def check(**changes):
    return check_config(LEAST | changes, "train")


def test_mindones_keys_are_known():
    values = yaml.safe_load(MINDONE) | {"json_path": "a.json", "image_dir": "b"}
    config = check_config(values, "train")
    assert all(getattr(config, key) == value for key, value in values.items())


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown key 'learning_rate'; did you mean 'end_learning_rate'"):
        check(learning_rate=1e-5)
    with pytest.raises(ConfigError, match="unknown key 'bath_size'; did you mean 'batch_size'"):
        check(bath_size=3)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_size": "8"}, r"batch_size: given '8' \(str\)"),
        ({"batch_size": 0}, "batch_size: given 0"),
        ({"optim": "sgd"}, "expected 'adamw' or 'came'"),
        ({"use_ema": "yes"}, "use_ema: given 'yes'"),
        ({"start_learning_rate": float("nan")}, "start_learning_rate"),
        ({"start_learning_rate": -1.0}, "start_learning_rate: given -1.0"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob"),
        ({"came_betas": [0.9]}, "came_betas"),
        ({"adamw_betas": [0.9, 1.0]}, r"betas \[1.0\]"),
        ({"kv_compress": True}, "at least one layer in kv_compress_layer"),
        ({"kv_compress": True, "kv_compress_layer": [1]}, "kv_compress_scale_factor above 1"),
        ({"visualize": True, "validation_prompts": []}, "at least one text in validation_prompts"),
        ({"validation_prompts": ["a"], "validation_negative_prompts": ["b", "c"]}, "2 validation_negative"),
        ({"use_dora": True}, "use_dora is True, which changes nothing without lora_rank; give both"),
        ({"lora_rank": 4, "from_scratch": True}, "exclude each other"),
        ({"hsdp_optimizer_level": "level3"}, "given 'level3' .*expected 'level1'"),
        ({"sample_size": 17}, "even number"),
        ({"json_path": ""}, "json_path"),
    ],
)
def test_a_wrong_value_says_what_was_expected(changes, told):
    with pytest.raises(ConfigError, match=told):
        check(**changes)


def test_what_is_missing_is_named():
    with pytest.raises(ConfigError, match="key 'json_path' is missing"):
        check_config({"model": "m", "image_dir": "b"}, "train")
    with pytest.raises(ConfigError, match="not given: tokenizer_root"):
        check(model="", checkpoint="a.pth", vae_root="v", text_encoder_root="t")
    with pytest.raises(ConfigError, match="not given: checkpoint, vae_root, text_encoder_root, tokenizer_root"):
        check(model="")


def test_numbers_with_exponents_are_read_as_people_write_them():
    """YAML takes 2e-5 for text."""
    values = yaml.safe_load("start_learning_rate: 2e-5\ncame_eps: [1e-30, 1e-16]\nadamw_eps: 1.e-8")
    config = check(**values)
    assert (config.start_learning_rate, config.came_eps, config.adamw_eps) == (2e-5, [1e-30, 1e-16], 1e-8)
    with pytest.raises(ConfigError, match="output_path"):
        check(output_path=2e-5)
    assert check(output_path="2e-5").output_path == "2e-5"


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers())


@given(st.dictionaries(st.sampled_from(list(TrainConfig.model_fields)), VALUES, min_size=1))
def test_any_values_are_taken_as_they_are_or_refused(values):
    with suppress(ConfigError):
        config = check(**values)
        assert all(getattr(config, key) in (value, [value], pytest.approx(value)) for key, value in values.items())


def test_every_key_is_described_and_belongs_to_a_panel():
    for name, field in TrainConfig.model_fields.items():
        assert field.description, name
        assert field.json_schema_extra["panel"], name


def test_a_run_goes_on_with_what_its_numbers_depend_on():
    before = training_identity(check())
    free = {"ckpt_max_keep": 9, "tensorboard": False, "output_path": "x", "steps": 5, "epochs": 3, "model": "n"}
    assert training_identity(check(**free)) == before
    for key, value in {"seed": 1, "optim": "adamw", "start_learning_rate": 1e-3, "use_ema": False}.items():
        assert training_identity(check(**{key: value})) != before
    assert training_identity(check(batch_size=32), 2) == training_identity(check(batch_size=64), 1)
    falling = {"scheduler": "cosine_decay"}
    assert training_identity(check(**falling, steps=5)) != training_identity(check(**falling, steps=6))


def test_the_shipped_configurations_are_valid_and_say_what_to_expect(project):
    files = sorted((project / "configs" / "train").glob("*.yaml"))
    assert {"tiny.yaml", "pixart-sigma-256x256.yaml", "pixart-sigma-512-MS.yaml"} <= {f.name for f in files}
    assert {"pixart-sigma-1024-MS.yaml", "pixart-sigma-2K-MS.yaml"} <= {f.name for f in files}
    for path in files:
        config = load_config(path, "train")
        head = path.read_text().split("\n\n")[0]
        lines = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert f"pixart-nb train -c configs/train/{path.name}" in lines[0] + lines[1], path
        assert re.search(r"[Mm]easured", head), path
        assert config.output_path.startswith("outputs/"), path


def test_the_shipped_configurations_read_what_the_import_writes(project, tmp_path):
    write_published(tmp_path / "raw", 6)
    import_diffusiondb(tmp_path / "raw", tmp_path / "data", 1, 2)
    for path in sorted((project / "configs" / "train").glob("pixart-sigma-*.yaml")):
        config = load_config(path, "train")
        folder = Path(config.json_path).parent
        json_path, image_dir = (
            tmp_path / "data" / Path(place).relative_to(folder) for place in (config.json_path, config.image_dir)
        )
        assert len(load_labels(json_path, image_dir)) == 4, path


@pytest.mark.parametrize(
    ("option", "replaced"),
    [("epochs", "steps"), ("ckpt_save_interval", "ckpt_save_steps"), ("visualize_interval", "visualize_steps")],
)
def test_an_option_in_epochs_takes_the_place_of_the_steps_of_a_file(project, option, replaced):
    path = project / "configs" / "train" / "tiny.yaml"
    assert getattr(load_config(path, "train", {replaced: 7}), replaced) == 7
    config = load_config(path, "train", {option: 3})
    assert getattr(config, option) == 3
    assert getattr(config, replaced) == TrainConfig.model_fields[replaced].default


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kv_compress_layer": [1, 2]}, "kv_compress_layer changes nothing without kv_compress"),
        ({"w_min": 3.0}, "w_min changes nothing without objective lcm"),
        ({"max_grad_norm": 1.0, "clip_grad": False}, "max_grad_norm changes nothing without clip_grad"),
    ],
)
def test_an_option_without_effect_is_named(project, options, sentence):
    with pytest.warns(UserWarning, match=sentence):
        load_config(project / "configs" / "train" / "tiny.yaml", "train", options)
