"""Behaviour of a training from its configuration to its result: files, locks, interruptions, conditions."""

import csv
import json
import shutil
from itertools import islice

import numpy as np
import pytest
from PIL import Image
from reference_data import diffusers
from small_pipeline import CONFIG, training_config, write_small_pipeline, write_training_data

from pixart_nb import AutoencoderKL, PixArtSigmaPipeline
from pixart_nb.config import ConfigError
from pixart_nb.core.checkpoints.components import write_vae
from pixart_nb.core.checkpoints.files import WEIGHTS
from pixart_nb.core.data.files import DataError
from pixart_nb.core.errors import FolderInUseError
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.training import run
from pixart_nb.core.training.log import read_curve
from pixart_nb.core.training.run import Training, train


@pytest.fixture(scope="module")
def folder(project, tmp_path_factory):
    """A small model, labels to train on, labels held out, and a feature cache."""
    folder = tmp_path_factory.mktemp("training")
    write_training_data(folder, project, 8, 2)
    return folder


@pytest.fixture(scope="module")
def config(folder, project):
    def make(output, **changes):
        values = {"steps": 6, "warmup_steps": 1}
        return training_config(folder, project, output, **values | changes)

    return make


@pytest.fixture(scope="module")
def looked(folder, config):
    """A training with a validation every three steps."""

    def make(output):
        return config(
            output,
            validation_json_path=str(folder / "test.json"),
            visualize=True,
            visualize_steps=3,
            validation_prompts=["a red cup"],
            sampling_steps=1,
        )

    return make


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def losses(folder):
    return [row["loss"] for row in csv.DictReader((folder / "curve.csv").open())]


# ---- results


def test_a_result_is_a_complete_folder_that_can_be_moved(config, project, tmp_path):
    model = tmp_path / "model"
    write_small_pipeline(model, project)
    result = train(config(tmp_path / "out", model=str(model), steps=1))
    assert not any(path.is_symlink() for path in [result, *result.rglob("*")])
    moved = shutil.move(result, tmp_path / "elsewhere")
    shutil.rmtree(model)
    pipe = PixArtSigmaPipeline.from_pretrained(moved)
    assert pipe("a red cup", num_inference_steps=1, height=64, width=64)[0][0].size == (64, 64)


@pytest.mark.parametrize("component", [{}, {"model": None}])
def test_a_model_in_the_place_of_the_result_is_refused_and_unchanged(config, project, tmp_path, component):
    own = tmp_path / "out" / "pipeline"
    own.parent.mkdir()
    write_small_pipeline(own, project)
    before = contents(tmp_path)
    changes = {"model": str(own)} if not component else {}
    with pytest.raises(ConfigError, match="choose another output_path"):
        train(config(tmp_path / "out", **changes))
    assert contents(tmp_path) == before


def test_a_configuration_of_something_else_in_the_output_folder_is_not_replaced(config, project, tmp_path):
    model = write_small_pipeline(tmp_path / "model", project)
    before = contents(model)
    with pytest.raises(ConfigError, match=r"config\.json was not written by `pixart-nb train`.*choose another"):
        train(config(model / "transformer", model=str(model)))
    assert contents(model) == before


def test_a_result_that_is_complete_is_left_alone_and_a_longer_training_replaces_it(config, tmp_path):
    result = train(config(tmp_path / "out", steps=1))
    note, scheduler = result / "note.txt", result / "scheduler" / "scheduler_config.json"
    note.write_text("mine")
    scheduler.write_text(scheduler.read_text() + "\n")
    before = contents(result)
    assert train(config(tmp_path / "out", steps=1)) == result
    assert contents(result) == before
    train(config(tmp_path / "out", steps=2))
    assert note.read_text() == "mine"
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (result / weights).read_bytes() != before[next(p for p in before if str(p) == weights)]


def test_files_that_are_missing_from_a_result_are_written_again(config, tmp_path):
    result = train(config(tmp_path / "out", steps=1))
    weights = result / "transformer/diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    train(config(tmp_path / "out", steps=1))
    assert weights.read_bytes() == before


def test_a_result_has_the_networks_of_its_training_and_not_of_an_earlier_one(config, project, tmp_path):
    result = train(config(tmp_path / "out", steps=1))
    for path in (tmp_path / "out").glob("step-*"):
        path.unlink()
    other = write_small_pipeline(tmp_path / "other", project)
    (other / "vae").unlink()  # a link to the bundled one
    vae = AutoencoderKL.from_pretrained(project / "data/tiny-sigma", subfolder="vae")
    vae.decoder.conv_out.bias.set_data(vae.decoder.conv_out.bias + 1)
    write_vae(other / "vae", vae)
    train(config(tmp_path / "out", steps=1, model=str(other), feature_cache=""))
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (result / "vae" / name).read_bytes() == (other / "vae" / name).read_bytes()


def test_a_result_that_was_interrupted_gets_the_networks_of_its_training(config, project, tmp_path, monkeypatch):
    result = train(config(tmp_path / "out", steps=1))
    for path in (tmp_path / "out").glob("step-*"):
        path.unlink()
    other = write_small_pipeline(tmp_path / "other", project)
    (other / "vae").unlink()
    write_vae(other / "vae", AutoencoderKL.from_pretrained(diffusers("sigma")[0], subfolder="vae"))
    (other / "vae" / "config.json").write_text((project / "data/tiny-sigma/vae/config.json").read_text() + "\n")
    shutil.copyfile(project / "data/tiny-sigma/vae" / WEIGHTS, other / "vae" / WEIGHTS)
    changes = {"steps": 1, "model": str(other), "feature_cache": ""}
    with monkeypatch.context() as patch:
        patch.setattr(run, "add_files", lambda *given: pytest.fail("interrupted"))
        with pytest.raises(pytest.fail.Exception):
            train(config(tmp_path / "out", **changes))
    train(config(tmp_path / "out", **changes))
    assert (result / "vae" / "config.json").read_bytes() == (other / "vae" / "config.json").read_bytes()


def test_a_result_has_the_scaling_factor_of_its_configuration(config, tmp_path):
    result = train(config(tmp_path / "out", steps=1, sd_scale_factor=0.5, feature_cache=""))
    assert json.loads((result / "vae" / "config.json").read_text())["scaling_factor"] == 0.5


def test_a_damaged_newest_state_is_skipped(config, tmp_path):
    train(config(tmp_path / "out", steps=2, ckpt_max_keep=2, scheduler="constant"))
    newest = max((tmp_path / "out").glob("step-*"))
    newest.write_bytes(newest.read_bytes()[:100])
    train(config(tmp_path / "out", steps=3, ckpt_max_keep=2, scheduler="constant"))
    assert read_curve(tmp_path / "out" / "curve.csv")[-1]["step"] == 3


def test_an_edit_of_a_result_does_not_change_the_model_that_was_trained(config, project, tmp_path):
    model = write_small_pipeline(tmp_path / "model", project)
    before = contents(model)
    result = train(config(tmp_path / "out", model=str(model), steps=1))
    for path in result.rglob("*.json"):
        with path.open("a") as file:
            file.write(" ")
    assert contents(model) == before


def test_weights_that_are_replaced_in_a_result_do_not_change_the_model_that_was_trained(config, project, tmp_path):
    model = write_small_pipeline(tmp_path / "model", project)
    before = contents(model)
    result = train(config(tmp_path / "out", model=str(model), steps=1))
    for path in result.rglob("*.safetensors"):
        path.write_bytes(b"other weights")
    assert contents(model) == before


def test_a_damaged_result_is_written_again(config, tmp_path):
    result = train(config(tmp_path / "out", steps=1))
    whole = contents(result)
    for part in ("transformer", "vae"):
        path = result / part / WEIGHTS
        path.write_bytes(path.read_bytes()[:1000])
    train(config(tmp_path / "out", steps=1))
    assert contents(result) == whole


def test_a_training_is_not_written_into_the_folder_of_a_model(config, project, tmp_path):
    model = write_small_pipeline(tmp_path / "model", project)
    with pytest.raises(ConfigError, match="model is the folder of a model; choose another output_path"):
        train(config(model, model=str(model), steps=1))


def test_held_out_images_may_lie_in_another_folder(looked, folder, project, tmp_path):
    for label in json.loads((folder / "test.json").read_text()):
        (tmp_path / "held" / label["path"]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(project / "data/pixelart" / label["path"], tmp_path / "held" / label["path"])
    for name, changes in {"a": {}, "b": {"validation_image_dir": str(tmp_path / "held")}}.items():
        train(looked(tmp_path / name).model_copy(update={"steps": 3} | changes))
    assert (tmp_path / "a/held_out.csv").read_text() == (tmp_path / "b/held_out.csv").read_text()


def test_changed_images_are_noticed_when_a_training_resumes(config, folder, project, tmp_path):
    changes = {"image_dir": str(tmp_path), "feature_cache": "", "use_ema": False}
    train(
        config(tmp_path / "out", steps=1, scheduler="constant", **changes | {"image_dir": f"{project}/data/pixelart"})
    )
    for label in json.loads((folder / "train.json").read_text()):
        shutil.copyfile(project / "data/pixelart" / label["path"], image := tmp_path / label["path"])
    train(config(tmp_path / "out", steps=2, scheduler="constant", **changes))
    Image.fromarray(255 - np.asarray(Image.open(image).convert("RGB"))).save(image)
    with pytest.raises(CheckpointError, match="another configuration: images: "):
        train(config(tmp_path / "out", steps=3, scheduler="constant", **changes))


def test_other_conditions_are_noticed_when_a_training_of_a_controlnet_resumes(config, folder, tmp_path):
    changes = {"copy_blocks_num": 1, "feature_cache": "", "scheduler": "constant"}
    train(config(tmp_path / "out", steps=1, **changes))
    conditions = tmp_path / "conditions"
    for label in json.loads((folder / "train.json").read_text()):
        (conditions / label["path"]).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (label["width"], label["height"])).save(conditions / label["path"])
    with pytest.raises(CheckpointError, match="another configuration: conditions: 'edges' there"):
        train(config(tmp_path / "out", steps=2, control_dir=str(conditions), **changes))


def test_mistakes_are_found_before_features_are_computed(config, tmp_path):
    cache = tmp_path / "features"
    train(config(tmp_path / "out", steps=1))
    for changes in ({"optim": "came"}, {"validation_json_path": str(tmp_path / "none.json")}):
        with pytest.raises(ValueError, match=r"another configuration|cannot be read|none\.json"):
            train(config(tmp_path / "out", steps=1, feature_cache=str(cache), **changes))
        assert not cache.exists()


def test_a_curve_of_another_program_is_refused_and_kept(config, tmp_path):
    curve = tmp_path / "out" / "curve.csv"
    curve.parent.mkdir()
    for text in ("epoch,loss\n1,0.5\n", "step;loss\n1;0.5\n", "step,loss\na,0.5\n", "my notes"):
        curve.write_text(text)
        with pytest.raises(ConfigError, match=r"curve\.csv is no log of a training, or was saved by another program"):
            train(config(tmp_path / "out", steps=1))
        assert curve.read_text() == text


def test_captions_that_cleaning_empties_are_named(config, folder, tmp_path):
    labels = json.loads((folder / "train.json").read_text())
    path, chinese = tmp_path / "labels.json", "\u7ea2\u8272\u7684\u732b"
    changes = {"json_path": str(path), "feature_cache": ""}
    for number, label in enumerate(labels):
        label["prompt"] = chinese if number < 2 else f"a cat {chinese}" if number < 3 else label["prompt"]
    path.write_text(json.dumps(labels))
    with pytest.warns(UserWarning, match="nothing is left of 2 of 16 and Chinese characters are removed from 1 of 16"):
        Training(config(tmp_path / "out", **changes))
    path.write_text(json.dumps([label | {"prompt": chinese, "sharegpt4v": ""} for label in labels]))
    with pytest.raises(DataError, match=r"nothing is left of 8 of 8 captions.* set clean_caption to false"):
        Training(config(tmp_path / "out", **changes))
    Training(config(tmp_path / "out", clean_caption=False, **changes))


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"dtype": "fp16", "init_loss_scale": 1024.0}])
def test_steps_after_a_result_was_written_continue_from_the_live_weights(config, tmp_path, changes):
    training = Training(config(tmp_path / "out", use_ema=True, **changes))
    rows = training.steps()
    list(islice(rows, 3))
    training.finish()
    list(rows)
    whole = Training(config(tmp_path / "whole", use_ema=True, **changes))
    list(whole.steps())
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_a_pipeline_finetuned_from_alpha_is_an_alpha_pipeline(config, tmp_path):
    alpha = diffusers("alpha")[0]
    changes = {"model": str(alpha), "sample_size": 8, "feature_cache": ""}
    training = Training(config(tmp_path / "out", steps=1, batch_size=1, **changes))
    assert training.networks.max_length == 120
    list(training.steps())
    index = json.loads((training.finish() / "model_index.json").read_text())
    assert index["_class_name"] == "PixArtAlphaPipeline"


def test_a_training_starts_from_the_averages_of_another_trainings_state(config, tmp_path):
    first = Training(config(tmp_path / "first", steps=2, use_ema=True))
    list(first.steps())
    state = str(first.trainer.checkpoints()[-1])
    second = Training(config(tmp_path / "second", checkpoint=state, sample_size=8))
    for name, average in first.trainer.weights().items():
        assert np.array_equal(second.trainer.parameters[name].asnumpy(), average), name


# ---- one process at a time


def test_a_second_training_is_refused_before_it_writes_anything(looked, tmp_path):
    first = Training(looked(tmp_path / "out"))
    rows = first.steps()
    list(islice(rows, 3))
    before = contents(tmp_path)
    with pytest.raises(FolderInUseError, match="is writing into"):
        train(looked(tmp_path / "out"))
    second = Training(looked(tmp_path / "out"))
    for call in (lambda: next(second.steps()), second.finish):
        with pytest.raises(FolderInUseError):
            call()
    assert contents(tmp_path) == before
    list(rows)
    assert [row["step"] for row in read_curve(tmp_path / "out" / "curve.csv")] == [1, 2, 3, 4, 5, 6]


# ---- interruptions


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it is written."""


@pytest.fixture(scope="module")
def whole(looked, tmp_path_factory):
    """The folder of a training with validations that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    train(looked(folder))
    return folder


@pytest.mark.parametrize(("step", "after"), [(0, False), (0, True), (3, False), (3, True), (6, False)])
def test_a_validation_is_complete_after_a_kill(looked, whole, tmp_path, monkeypatch, step, after):
    validate = Training.validate

    def killed(self, at):
        if at == step and not after:
            raise Killed
        results = validate(self, at)
        if at == step:
            raise Killed
        return results

    monkeypatch.setattr(Training, "validate", killed)
    with pytest.raises(Killed):
        list(Training(looked(tmp_path / "out")).steps())
    monkeypatch.undo()
    train(looked(tmp_path / "out"))
    assert [row["step"] for row in read_curve(tmp_path / "out" / "held_out.csv")] == [0, 3, 6]
    for name in ("held_out.csv", "samples", "pipeline/transformer"):
        one, other = tmp_path / "out" / name, whole / name
        assert (contents(one) == contents(other)) if one.is_dir() else (one.read_text() == other.read_text())


def test_an_interrupted_validation_leaves_the_weights_and_the_state(looked, tmp_path, monkeypatch):
    training = Training(looked(tmp_path / "out"))

    def interrupted(loss, batches):
        raise KeyboardInterrupt

    rows = training.steps()
    list(islice(rows, 3))
    monkeypatch.setattr(run, "mean_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(rows)
    assert training.trainer.step == 3 and training.net.training
    again = Training(looked(tmp_path / "out"))
    assert again.trainer.step == 3
    for name, parameter in again.trainer.parameters.items():
        assert np.array_equal(parameter.asnumpy(), training.trainer.parameters[name].asnumpy())


def test_a_lock_file_that_a_killed_writer_of_features_left_is_removed(config, folder, tmp_path):
    Training(config(tmp_path / "out"))
    lock = folder / "features" / ".lock"
    lock.write_text("12345 on host")
    Training(config(tmp_path / "out"))
    assert not lock.exists()


# ---- conditions, memory, reports


SIZES = [(300, 400), (520, 310), (256, 256)]


@pytest.fixture
def three_sizes(project, tmp_path):
    """Settings of a training of 256 x 256 on images of three shapes."""
    labels = []
    for number, (height, width) in enumerate(SIZES):
        Image.new("RGB", (width, height), (40 * number, 90, 20)).save(tmp_path / f"{number}.png")
        labels.append({"path": f"{number}.png", "prompt": "a cup"})
    (tmp_path / "labels.json").write_text(json.dumps(labels))
    net = type(CONFIG)(**CONFIG.to_dict() | {"micro_condition": True, "input_size": 32, "pe_interpolation": 0.5})
    write_small_pipeline(tmp_path / "model", project, net)
    return {
        "model": str(tmp_path / "model"),
        "json_path": str(tmp_path / "labels.json"),
        "image_dir": str(tmp_path),
        "feature_cache": "",
        "batch_size": 1,
    }


def test_micro_conditions_are_those_of_the_original_images(config, three_sizes, tmp_path):
    """Height and width of the image, and the ratio as the published table rounds it (official ``InternalDataMS``)."""
    for multi_scale, ratios in ((True, [0.72, 1.67, 1.0]), (False, [1.0, 1.0, 1.0])):
        training = Training(config(tmp_path / "out", multi_scale=multi_scale, **three_sizes))
        micro = {training.sampler.batch(number)[1][0]: training.batches(number)[-1] for number in range(9)}
        expected = [[*size, ratio] for size, ratio in zip(SIZES, ratios, strict=True)]
        assert np.array_equal(np.concatenate([micro[i] for i in range(3)]), np.array(expected, np.float32))


def test_a_training_says_how_many_graphs_it_will_compile(config, three_sizes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Training, "steps", lambda self, bar: iter(()))
    monkeypatch.setattr(Training, "finish", lambda self: None)
    for changes, several in (({"multi_scale": True}, True), ({}, False), ({"multi_scale": True, "mode": 1}, False)):
        train(config(tmp_path / "out", **three_sizes | {"mode": 0} | changes))
        assert ("3 training sizes: a graph is compiled for each" in capsys.readouterr().out) == several


def test_networks_that_a_training_no_longer_needs_are_released(looked, config, tmp_path):
    training = Training(looked(tmp_path / "out"))
    assert not {"vae", "embed"} & set(vars(training.networks))
    list(training.steps())
    training.finish()
    assert not {"vae", "embed"} & set(vars(training.networks))
    live = Training(config(tmp_path / "live", feature_cache=""))
    assert {"vae", "embed"} <= set(vars(live.networks))


def test_the_start_report_says_how_well_the_autoencoder_shows_the_images(config, tmp_path):
    training = Training(config(tmp_path / "out", start_report=True))
    assert not (tmp_path / "out").exists()
    with training.session():
        report = json.loads((tmp_path / "out" / "start.json").read_text())
    assert report == training.report
    assert 8 < report["reconstruction_psnr"] < 60


def test_a_warm_up_that_is_longer_than_the_training_is_named(config, tmp_path):
    with pytest.warns(UserWarning, match=r"warmup_steps is 1000 and the training has 6 steps.*ends at 5.3e-07"):
        Training(config(tmp_path / "out", warmup_steps=1000))


def test_no_steps_are_refused(config, tmp_path):
    with pytest.raises(ConfigError, match="steps: given 0"):
        config(tmp_path / "out", steps=0)
