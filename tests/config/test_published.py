"""The shipped configurations hold the published values, and mindone's files and command lines work unchanged."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from reference_data import diffusers
from typer.testing import CliRunner

from pixart_nb.cli import app
from pixart_nb.config import TrainConfig, load_config
from pixart_nb.core import PixArtConfig
from pixart_nb.core.checkpoints.convert import write_random
from pixart_nb.core.sampling import generate

MINDONE = Path(__file__).parent / "mindone"
DEEP = list(range(14, 28))
#: Name of the configuration -> checkpoint, pixels, latent side, tokens of a prompt, scaling factor, compressed layers.
INFERENCE = {
    "pixart-alpha-256x256": ("PixArt-XL-2-256x256", 256, 32, 120, 0.18215, []),
    "pixart-alpha-512x512": ("PixArt-XL-2-512x512", 512, 64, 120, 0.18215, []),
    "pixart-alpha-1024-MS": ("PixArt-XL-2-1024-MS", 1024, 128, 120, 0.18215, []),
    "pixart-sigma-256x256": ("PixArt-Sigma-XL-2-256x256", 256, 32, 300, 0.13025, []),
    "pixart-sigma-512-MS": ("PixArt-Sigma-XL-2-512-MS", 512, 64, 300, 0.13025, []),
    "pixart-sigma-1024-MS": ("PixArt-Sigma-XL-2-1024-MS", 1024, 128, 300, 0.13025, []),
    "pixart-sigma-2K-MS": ("PixArt-Sigma-XL-2-2K-MS", 2048, 256, 300, 0.13025, []),
    "pixart-sigma-2K-MS-KV-Compress": ("PixArt-Sigma-XL-2-2K-MS-KV-Compress", 2048, 256, 300, 0.13025, DEEP),
    "pixart-sigma-4K-MS-KV-Compress": ("PixArt-Sigma-XL-2-4K-MS-KV-Compress", 4096, 512, 300, 0.13025, DEEP),
}
#: Name -> checkpoint, latent side, batch size, learning rate, multi_scale, epochs between checkpoints, layers.
TRAIN = {
    "pixart-sigma-256x256": ("PixArt-Sigma-XL-2-256x256", 32, 64, 2e-5, False, 5, []),
    "pixart-sigma-512-MS": ("PixArt-Sigma-XL-2-512-MS", 64, 32, 2e-5, True, 5, []),
    "pixart-sigma-1024-MS": ("PixArt-Sigma-XL-2-1024-MS", 128, 12, 1e-5, True, 5, []),
    "pixart-sigma-2K-MS": ("PixArt-Sigma-XL-2-2K-MS", 256, 1, 1e-5, True, 1, []),
    "pixart-sigma-2K-MS-KV-Compress": ("PixArt-Sigma-XL-2-2K-MS", 256, 1, 1e-5, True, 1, DEEP),
}
RECIPE = {
    "epochs": 100, "scheduler": "constant", "warmup_steps": 1000, "auto_lr": "sqrt", "optim": "came",
    "came_betas": [0.9, 0.999, 0.9999], "came_eps": [1e-30, 1e-16], "weight_decay": 0.0, "clip_grad": True,
    "max_grad_norm": 0.01, "gradient_accumulation_steps": 1, "use_ema": True, "ema_rate": 0.9999,
    "class_dropout_prob": 0.1, "real_prompt_ratio": 0.5, "seed": 42, "dtype": "fp16", "recompute": True, "mode": 0,
    "loss_scaler_type": "dynamic", "init_loss_scale": 65536.0, "visualize": True, "sampling_method": "dpm",
    "sampling_steps": 20, "guidance_scale": 4.5, "sd_scale_factor": 0.13025,
}  # fmt: skip


#: Configurations of the published models for trainings that mindone has none for.
OWN = {"pixart-sigma-1024-controlnet", "pixart-sigma-1024-lcm", "pixart-sigma-512-dmd"}


def shipped(project, folder):
    return {path.stem for path in (project / "configs" / folder).glob("pixart-*.yaml")}


def test_every_published_configuration_is_in_the_table(project):
    assert shipped(project, "inference") == set(INFERENCE)
    assert shipped(project, "train") == set(TRAIN) | OWN


@pytest.mark.parametrize("name", INFERENCE)
def test_inference_configurations_hold_the_published_values(project, name):
    config = load_config(project / f"configs/inference/{name}.yaml")
    checkpoint, pixels, side, tokens, factor, layers = INFERENCE[name]
    assert config.checkpoint == f"models/{checkpoint}.pth"
    assert (config.image_height, config.image_width, config.sample_size) == (pixels, pixels, side)
    assert (config.t5_max_length, config.sd_scale_factor) == (tokens, factor)
    assert config.kv_compress == bool(layers)
    assert config.kv_compress_layer == layers
    assert config.kv_compress_scale_factor == (2 if layers else 1)
    assert config.kv_compress_sampling == "conv"
    assert (config.sampling_method, config.sampling_steps, config.guidance_scale) == ("dpm++", 20, 4.5)
    assert (config.negative_prompt, config.use_resolution_binning, config.dtype) == ("", True, "fp16")


@pytest.mark.parametrize("name", TRAIN)
def test_training_configurations_hold_the_published_values(project, name):
    config = load_config(project / f"configs/train/{name}.yaml", "train")
    checkpoint, side, batch_size, rate, multi_scale, interval, layers = TRAIN[name]
    assert config.checkpoint == f"models/{checkpoint}.pth"
    assert (config.sample_size, config.batch_size, config.start_learning_rate) == (side, batch_size, rate)
    assert (config.multi_scale, config.kv_compress, config.kv_compress_layer) == (multi_scale, bool(layers), layers)
    assert config.ckpt_save_interval == config.visualize_interval == interval
    assert {key: getattr(config, key) for key in RECIPE} == RECIPE


def test_the_defaults_of_training_are_the_published_recipe():
    device = {"dtype", "recompute", "mode", "visualize", "sd_scale_factor"}
    defaults = {key: field.default for key, field in TrainConfig.model_fields.items() if key in RECIPE}
    assert {key: defaults[key] for key in RECIPE.keys() - device} == {
        key: RECIPE[key] for key in RECIPE.keys() - device
    }


# ---- mindone


@pytest.fixture
def given_config(monkeypatch, project):
    """Run a command and return the configuration that it runs with, and what it wrote to stderr."""

    def run(*words):
        configs = []
        monkeypatch.chdir(project)
        monkeypatch.setattr(generate, "sample", lambda config: configs.append(config) or [])
        monkeypatch.setattr("pixart_nb.core.training.run.train", configs.append)
        result = CliRunner().invoke(app, list(map(str, words)))
        assert result.exit_code == 0, result.output
        return configs[0], result.stderr

    return run


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("inference-512", ["--prompt", "your magic prompt"]),
        ("inference-2K-KV-Compress", ["--prompt", "your magic prompt", "--checkpoint", "my.ckpt"]),
        ("train-512", ["--json_path", "path_to_your_label_file", "--image_dir", "path_to_your_image_directory"]),
    ],
)
def test_mindones_files_are_completed_by_the_command_line(given_config, name, words):
    path = MINDONE / f"{name}.yaml"
    config, errors = given_config("train" if "train" in name else "sample", "-c", path, *words)
    values = yaml.safe_load(path.read_text())
    assert values.pop("enable_flash_attention")
    assert {key: getattr(config, key) for key in values if values[key]} == {k: v for k, v in values.items() if v}
    ignored, device = errors.splitlines()
    assert ignored == "Ignored, without meaning here: enable_flash_attention (attention is always fused)"
    slow = "train" in name
    assert device.startswith(
        f"Device: CPU, {config.dtype} {'(slow on a CPU; fp32 is faster)' if slow else 'computed in '}"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "sample -c configs/inference/pixart-sigma-1024-MS.yaml --prompt a --image_width 1024 --image_height 512",
            {
                "prompt": ["a"],
                "image_width": 1024,
                "image_height": 512,
                "checkpoint": "models/PixArt-Sigma-XL-2-1024-MS.pth",
            },
        ),
        (
            "sample.py -c configs/inference/pixart-sigma-1024-MS.yaml --image_width 1024 --image_height 512 "
            "--seed 1024",
            {"seed": 1024, "prompt": ["A small cactus with a happy face in the Sahara desert."]},
        ),
        (
            "sample -c configs/inference/pixart-sigma-1024-MS.yaml --prompt_path prompts.txt --batch_size 4",
            {"prompt": [], "prompt_path": "prompts.txt", "batch_size": 4},
        ),
        (
            "./train.py -c configs/train/pixart-sigma-512-MS.yaml --json_path labels.json --image_dir images "
            "--use_parallel True",
            {"json_path": "labels.json", "image_dir": "images", "use_parallel": True},
        ),
        (
            "sample -c configs/inference/tiny.yaml --prompt a b --negative_prompt c d --enable_flash_attention False "
            "--device_target CPU --jit_level O1 --mode 0 --num_trials 3 --imagegrid True",
            {
                "prompt": ["a", "b"],
                "negative_prompt": ["c", "d"],
                "nrows": 3,
                "imagegrid": True,
                "device_target": "CPU",
                "mode": 0,
            },
        ),
    ],
)
def test_mindones_command_lines_run_with_pixart_nb_in_place_of_python(given_config, words, expected):
    config, _ = given_config(*words.split())
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.slow
def test_mindones_readme_runs_from_conversion_to_training(project, tmp_path, monkeypatch):
    """With a small transformer in place of the published one, in the folders that the README describes."""
    folder, reference = tmp_path / "models", diffusers("sigma")[0]
    for name in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(reference / name, folder / name)
    small = PixArtConfig(
        hidden_size=72, num_heads=1, depth=2, caption_channels=24, input_size=64, pe_interpolation=1.0,
        model_max_length=300,
    )  # fmt: skip
    write_random(folder / "PixArt-Sigma-XL-2-512-MS.pth", small)
    compression = {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": list(range(14, 28))}
    changes = {"depth": 28, "input_size": 256, "pe_interpolation": 4.0, "kv_compress_config": compression}
    write_random(folder / "PixArt-Sigma-XL-2-2K-MS-KV.pth", replace(small, **changes))
    monkeypatch.chdir(tmp_path)
    checkpoint = "models/PixArt-Sigma-XL-2-512-MS"
    labels = f"--json_path {project}/data/pixelart/labels.json --image_dir {project}/data/pixelart"
    for line in (
        f"tools/convert.py --source {checkpoint}.pth --target {checkpoint}.ckpt",
        f"sample.py -c {MINDONE}/inference-512.yaml --prompt magic --sampling_steps 1 -o images",
        f"train.py -c {MINDONE}/train-512.yaml {labels} --steps 1 --batch_size 1 --sampling_steps 1 -o run "
        "--validation_prompts magic",
        f"sample.py -c {MINDONE}/inference-512.yaml --prompt magic --sampling_steps 1 -o trained --checkpoint "
        "run/step-00000001.safetensors",
        f"sample.py -c {MINDONE}/inference-2K-KV-Compress.yaml --prompt magic --sampling_steps 1 -o compressed "
        "--checkpoint models/PixArt-Sigma-XL-2-2K-MS-KV.pth --image_height 256 --image_width 256 "
        "--use_resolution_binning False",
    ):
        result = CliRunner().invoke(app, line.split())
        assert result.exit_code == 0, result.output
    for drawn in ("images", "trained", "compressed"):
        assert len(list(Path(drawn).glob("*.png"))) == 1
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
