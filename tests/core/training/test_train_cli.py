"""``pixart-nb train``: from a configuration to a pipeline, on real images, with a small transformer."""

import csv
import json
import re
import subprocess

import numpy as np
import pytest
from PIL import Image
from small_pipeline import train_options, write_small_pipeline
from typer.testing import CliRunner

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.cli import app
from pixart_nb.config import TrainConfig, check_config, load_config
from pixart_nb.core.checkpoints.load import load_transformer
from pixart_nb.core.io import load_tensors
from pixart_nb.core.sampling.images import read_parameters
from pixart_nb.core.training.log import read_curve
from pixart_nb.core.training.run import Training


@pytest.fixture(scope="module")
def model(project, tmp_path_factory):
    return write_small_pipeline(tmp_path_factory.mktemp("model"), project)


@pytest.fixture(scope="module")
def run(project, model):
    """Train with these options; return the output of the command. The configuration is that of the bundled model."""

    def command(output, code=0, **changes):
        words = train_options(project, model, output, tensorboard=False, **changes)
        result = CliRunner().invoke(app, ["train", "-c", str(project / "configs/train/tiny.yaml"), *words])
        assert result.exit_code == code, result.output
        return result.output

    return command


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """Four steps without interruption, with validation images before and after."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    output = run(folder, start_report=True, visualize=True, visualize_steps=4, sampling_steps=2)
    return folder, output


def losses(folder):
    with (folder / "curve.csv").open() as file:
        return [row["loss"] for row in csv.DictReader(file)]


def state(folder):
    return load_tensors(sorted(folder.glob("step-*.safetensors"))[-1])


def test_a_pipeline_comes_out_that_draws(whole, project, model):
    folder, output = whole
    assert str(folder / "pipeline") in output
    pipe = PixArtSigmaPipeline.from_pretrained(folder / "pipeline")
    images = pipe("a red cup on grass", num_inference_steps=2, height=64, width=64)[0]
    assert images[0].size == (64, 64)
    averages = state(folder)["ema/final_layer.linear.weight"]
    assert np.array_equal(pipe.transformer.final_layer.linear.weight.asnumpy(), averages)
    first = load_transformer(model / "transformer").final_layer.linear.weight.asnumpy()
    assert np.abs(averages - first).max() > 1e-4


def test_everything_is_written_that_tells_of_the_training(whole):
    folder, output = whole
    assert len(losses(folder)) == 4
    report = json.loads((folder / "start.json").read_text())
    assert set(report) == {"loss", "latent_std", "reconstruction_psnr"}
    assert f"before the first step: loss {report['loss']:.4g}" in output
    assert check_config(json.loads((folder / "config.json").read_text()), "train").batch_size == 4
    assert [path.name for path in sorted((folder / "samples").iterdir())] == ["step-00000000", "step-00000004"]
    images = sorted((folder / "samples" / "step-00000004").iterdir())
    assert Image.open(images[0]).size == (64, 64)
    assert read_parameters(images[0])["prompt"] == load_config("configs/train/tiny.yaml", "train").validation_prompts[0]
    assert read_parameters(images[0])["step"] == 4


def test_a_training_in_parts_has_the_same_losses_and_weights_bit_for_bit(whole, run, tmp_path):
    run(tmp_path / "out", steps=1)
    run(tmp_path / "out", steps=3)
    run(tmp_path / "out", steps=4)
    assert losses(tmp_path / "out") == losses(whole[0])
    parts, undisturbed = state(tmp_path / "out"), state(whole[0])
    assert all(np.array_equal(parts[name], value) for name, value in undisturbed.items())


def test_held_out_images_are_measured_and_change_nothing(run, project, tmp_path):
    labels = json.loads((project / "data/pixelart/labels.json").read_text())
    for name, part in {"shown": labels[:24], "held_out": labels[24:]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    shown = {"json_path": tmp_path / "shown.json", "visualize_steps": 2}
    run(tmp_path / "plain", **shown)
    run(tmp_path / "out", **shown, steps=2, validation_json_path=tmp_path / "held_out.json")
    output = run(tmp_path / "out", **shown, steps=4, validation_json_path=tmp_path / "held_out.json")
    assert losses(tmp_path / "out") == losses(tmp_path / "plain")
    rows = read_curve(tmp_path / "out" / "held_out.csv")
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert len({row["held_out_loss"] for row in rows}) == 3
    assert f"step 4: held-out loss {rows[-1]['held_out_loss']:.4g}" in output


def test_a_full_disk_is_told(run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system, as root has")
    try:
        output = run(disk / "out", code=2, steps=2)
        assert "could not be written" in output and "Free space" in output and "Traceback" not in output
        assert not list((disk / "out").glob("*.safetensors"))
    finally:
        subprocess.run(["umount", disk], check=True)


def test_features_from_a_cache_train_what_live_ones_train(whole, run, tmp_path):
    cache = tmp_path / "features"
    run(tmp_path / "out", steps=2, feature_cache=cache, feature_dtype="fp32")
    assert [float(v) for v in losses(tmp_path / "out")] == pytest.approx(
        [float(v) for v in losses(whole[0])[:2]], rel=1e-3
    )
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    run(tmp_path / "out", steps=3, feature_cache=cache, feature_dtype="fp32")
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before


def test_another_configuration_is_refused_with_what_differs(run, tmp_path):
    run(tmp_path / "out", steps=1)
    before = state(tmp_path / "out")
    output = run(tmp_path / "out", code=2, seed=1, optim="came", batch_size=8)
    assert "another configuration" in output
    for difference in ("batch_size: 4 there, 8 here", "optim: 'adamw' there, 'came' here", "seed: 42 there, 1 here"):
        assert difference in " ".join(output.split())
    assert all(np.array_equal(value, state(tmp_path / "out")[name]) for name, value in before.items())


def test_a_training_that_blows_up_names_layer_and_images_and_keeps_its_checkpoint(run, tmp_path):
    output = " ".join(run(tmp_path / "out", code=1, steps=9, start_learning_rate=1e30, ckpt_save_steps=1).split())
    assert "were not updated; the last good checkpoint is" in output
    assert re.search(r"not finite is that of layer [\w.]+ \(\w+\), in rows \[|the gradients of \w", output), output
    assert ".png" in output
    assert np.isfinite(state(tmp_path / "out")["model/final_layer.linear.weight"]).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": "came", "gradient_accumulation_steps": 2, "snr_gamma": 5.0, "noise_offset": 0.1, "batch_size": 2},
        {"dtype": "fp16", "init_loss_scale": 1024.0, "use_ema": False, "recompute": True},
        pytest.param(
            {
                "mode": 0,
                "kv_compress": True,
                "kv_compress_scale_factor": 2,
                "kv_compress_layer": 1,
                "recompute": True,
                "scheduler": "cosine_decay",
                "auto_lr": "sqrt",
                "timestep_sampling": "logit_normal",
            },
            marks=pytest.mark.slow,
        ),
        {"from_scratch": True, "zero_cross_attention": False, "multi_scale": False, "weight_decay": 0.01},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_can_be_chosen_trains_and_goes_on(run, tmp_path, changes):
    run(tmp_path / "whole", steps=2, **changes)
    if "scheduler" not in changes:
        run(tmp_path / "parts", steps=1, **changes)
        run(tmp_path / "parts", steps=2, **changes)
        assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert all(np.isfinite(float(loss)) for loss in losses(tmp_path / "whole"))
    assert load_transformer(tmp_path / "whole" / "pipeline" / "transformer").config.depth == 2


def test_a_stage_takes_a_larger_size_and_compression(run, tmp_path):
    run(
        tmp_path / "out",
        steps=1,
        batch_size=1,
        sample_size=16,
        kv_compress=True,
        kv_compress_scale_factor=2,
        kv_compress_layer=1,
        start_report=True,
    )
    report = json.loads((tmp_path / "out" / "start.json").read_text())
    assert {"loss_not_interpolated", "loss_without_compression", "compression_error"} <= set(report)
    net = load_transformer(tmp_path / "out" / "pipeline" / "transformer")
    assert (net.config.input_size, net.config.pe_interpolation, net.config.kv_layers) == (16, 2.0, (1,))


def test_a_lora_comes_out_alone(run, model, tmp_path):
    output = run(tmp_path / "out", steps=2, lora_rank=2, lora_dropout=0.1)
    assert str(tmp_path / "out" / "lora") in output
    assert not (tmp_path / "out" / "pipeline").exists()
    assert all("lora" in name for name in state(tmp_path / "out"))
    files = {"adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"}
    assert files <= {path.name for path in (tmp_path / "out" / "lora").iterdir()}
    pipe = PixArtSigmaPipeline.from_pretrained(model)
    for name in (None, "adapter_model.safetensors"):  # as diffusers and as PEFT read it
        pipe.load_lora_weights(tmp_path / "out" / "lora", weight_name=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"json_path": "nowhere.json"}, "nowhere.json"),
        ({"image_dir": "nowhere"}, "nowhere"),
        ({"validation_json_path": "data/pixelart/labels.json"}, "36 of its 36 images are trained on too"),
        ({"batch_size": 37}, "a batch has 37 images, but there are only 36"),
        ({"model": "nowhere"}, "nowhere"),
        ({"vae_root": "nowhere"}, "vae nowhere"),
        ({"multi_scale": True}, "no table of sizes was published for 64 pixels"),
        ({"kv_compress": True, "kv_compress_scale_factor": 2, "kv_compress_layer": 7}, "layers 0 to 1"),
        ({"batch_size": 0}, "batch_size: given 0"),
        ({"use_parallel": True}, "msrun did not start this process"),
        ({"lora_rank": 2, "lora_target_modules": "nothing"}, "nothing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_said_before_anything_is_written(run, tmp_path, changes, message):
    output = run(tmp_path / "out", code=2, **changes)
    assert message in " ".join(output.split())
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_every_key_is_an_option():
    output = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    for name in TrainConfig.model_fields:
        assert f"--{name.replace('_', '-')} " in output, name


def test_an_option_of_another_kind_is_refused():
    result = CliRunner().invoke(app, ["train", "--use_ema", "perhaps"])
    assert result.exit_code == 2
    assert "true" in result.output


def test_a_notebook_sees_rows_and_images_as_they_come(project, model, tmp_path):
    words = train_options(project, model, str(tmp_path / "out"), tensorboard=True, visualize=True)
    values = load_config(project / "configs/train/tiny.yaml", "train").model_dump()
    options = dict(zip([word.removeprefix("--") for word in words[::2]], words[1::2], strict=True))
    kinds = {name: type(value) for name, value in values.items()}
    values |= {k: v == "True" if kinds[k] is bool else kinds[k](v) for k, v in options.items()}
    values |= {"visualize_steps": 1, "steps": 1, "sampling_steps": 2}
    training = Training(check_config(values, "train"))
    rows = list(training.steps())
    assert [row["step"] for row in rows] == [0, 1]
    assert all(path.is_file() for row in rows for path in row["images"])
    assert rows[1]["images_per_second"] > 0
    assert list((tmp_path / "out" / "tensorboard").iterdir())
