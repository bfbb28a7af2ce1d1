"""A configuration becomes the pipeline that it describes."""

import json
import shutil

import numpy as np
import pytest
from lora_models import trained
from reference_data import diffusers, official

from benchmarks.ascend_stand_ins import ascend
from pixart_nb import PixArtAlphaPipeline, PixArtSigmaPipeline
from pixart_nb.config import ConfigError, check_config
from pixart_nb.core.backend import ms
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.models.low_precision import inference_dtype
from pixart_nb.core.sampling.generate import like, load_pipeline, sample
from pixart_nb.core.sampling.images import read_parameters
from pixart_nb.core.sampling.planning import architecture_of, max_sequence_length
from pixart_nb.core.sampling.schedulers import LCMScheduler

FOLDER = diffusers("sigma")[0]
SIZE = {"image_height": 64, "image_width": 96, "prompt": ["a red mushroom on grass"]}
PARTS = {
    "checkpoint": str(FOLDER / "transformer"),
    "vae_root": str(FOLDER / "vae"),
    "text_encoder_root": str(FOLDER / "text_encoder"),
    "tokenizer_root": str(FOLDER / "tokenizer"),
}


def picture(pipe):
    call = dict(height=64, width=96, num_inference_steps=2, generator=np.random.default_rng(0), output_type="np")
    return pipe("a red mushroom on grass", **call)[0]


def test_parts_that_are_given_one_by_one_make_the_pipeline_of_the_folder():
    whole = PixArtSigmaPipeline.from_pretrained(FOLDER)
    parts = load_pipeline(check_config(SIZE | PARTS | {"sample_size": 0}))
    assert np.array_equal(picture(parts), picture(whole))


def test_a_part_replaces_that_of_the_model_and_the_solver_is_the_one_asked_for():
    config = check_config(SIZE | {"model": str(FOLDER), "sampling_method": "euler", "sd_scale_factor": 0.5})
    pipe = load_pipeline(config)
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    assert pipe.vae.config.scaling_factor == 0.5
    assert pipe.transformer.config.input_size == 16


def test_a_model_says_itself_how_many_tokens_a_prompt_has():
    for name, length, cls in (("alpha", 120, PixArtAlphaPipeline), ("sigma", 300, PixArtSigmaPipeline)):
        config = check_config(SIZE | {"model": str(diffusers(name)[0])})
        assert max_sequence_length(config) == length
        assert isinstance(load_pipeline(config, ["tokenizer"]), cls)


def test_lora_files_are_applied_with_their_weights(tmp_path):
    pipe = PixArtSigmaPipeline.from_pretrained(FOLDER)
    adapter = trained(pipe.transformer)
    path = adapter.save(tmp_path / "lora")
    pipe.set_adapters(["style"], [0.5])
    expected = picture(pipe)
    config = check_config(SIZE | {"model": str(FOLDER), "lora": [f"{path}:0.5"]})
    assert np.array_equal(picture(load_pipeline(config)), expected)
    assert not np.array_equal(picture(load_pipeline(check_config(SIZE | {"model": str(FOLDER)}))), expected)
    with pytest.raises(CheckpointError, match="nothing"):
        load_pipeline(check_config(SIZE | {"model": str(FOLDER), "lora": "nothing.safetensors"}))
    for weight in ("nan", "inf", "-1e999"):
        with pytest.raises(ConfigError, match=f"weight of .*:{weight}.* is not finite; give PATH:WEIGHT"):
            check_config(SIZE | {"model": str(FOLDER), "lora": f"{path}:{weight}"})


def test_alpha_has_prompts_of_120_tokens_and_positions_of_its_own():
    alpha = check_config(SIZE | {"model": str(diffusers("alpha")[0]), "t5_max_length": 120})
    assert isinstance(load_pipeline(alpha), PixArtAlphaPipeline)
    at_256 = architecture_of(check_config(SIZE | {"model": "m", "t5_max_length": 120, "sample_size": 32}))
    assert (at_256["pe_interpolation"], at_256["class_name"]) == (1.0, "PixArt")


@pytest.mark.parametrize(
    ("size", "stretch", "kind"), [(32, 0.5, "PixArt"), (128, 2.0, "PixArtMS"), (512, 8.0, "PixArtMS")]
)
def test_sigma_stretches_its_positions_to_the_size_it_was_trained_at(size, stretch, kind):
    said = architecture_of(check_config(SIZE | {"model": "m", "sample_size": size}))
    assert (said["input_size"], said["pe_interpolation"], said["class_name"]) == (size, stretch, kind)


def test_compression_is_said_as_mindone_says_it():
    keys = {"kv_compress": True, "kv_compress_scale_factor": 2, "kv_compress_layer": [1, 3]}
    said = architecture_of(check_config(SIZE | {"model": "m"} | keys))
    assert said["kv_compress_config"] == {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": [1, 3]}


def test_a_checkpoint_of_another_size_is_refused():
    path, _, _ = official("sigma-ms-512")
    config = check_config(SIZE | {"model": str(FOLDER), "checkpoint": str(path), "t5_max_length": 120})
    with pytest.raises((CheckpointError, ValueError), match=r"model_max_length|num_heads"):
        load_pipeline(config)


def test_a_size_that_the_folder_contradicts_is_refused():
    with pytest.raises(CheckpointError, match="shows input_size = 16, but the configuration says 64"):
        load_pipeline(check_config(SIZE | PARTS | {"sample_size": 64}))


def test_weights_are_in_the_dtype_that_the_device_computes_in():
    config = check_config(SIZE | {"model": str(FOLDER), "dtype": "fp16"})
    assert load_pipeline(config).dtype == inference_dtype("fp16") != ms.float16
    with ascend():
        pipe = load_pipeline(config)
    assert {p.dtype for p in pipe.transformer.get_parameters()} == {ms.float16}


def with_scheduler(folder, **options):
    """A copy of the reference's pipeline with another scheduler."""
    shutil.copytree(FOLDER, folder)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(options))
    return str(folder)


def test_the_models_own_scheduler_is_kept_unless_another_is_asked_for(tmp_path, capsys):
    lcm = with_scheduler(tmp_path / "lcm", _class_name="LCMScheduler", original_inference_steps=20)
    pipe = load_pipeline(check_config(SIZE | {"model": lcm}))
    assert pipe.scheduler == LCMScheduler(original_inference_steps=20)
    load_pipeline(check_config(SIZE | {"model": lcm, "sampling_method": "lcm"}), ["scheduler"])
    assert "replaces" not in capsys.readouterr().err
    pipe = load_pipeline(check_config(SIZE | {"model": lcm, "sampling_method": "euler"}))
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    assert "sampling_method euler replaces LCMScheduler" in capsys.readouterr().err


def test_an_image_of_the_models_own_scheduler_is_repeated_with_it(tmp_path):
    lcm = with_scheduler(tmp_path / "lcm", _class_name="LCMScheduler")
    values = {"model": lcm, "sampling_steps": 1, "output_path": str(tmp_path / "out")}
    (path,) = sample(check_config(SIZE | values))
    assert "sampling_method" not in read_parameters(path)
    assert load_pipeline(like(path, model=lcm)).scheduler == LCMScheduler()
