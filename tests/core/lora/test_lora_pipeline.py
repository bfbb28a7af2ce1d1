"""LoRAs of a pipeline: diffusers' calls, and the pictures that come of them."""

import warnings

import numpy as np
import pytest
from lora_models import trained, transformer
from reference_data import REFERENCE, relative_error

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.config import check_config
from pixart_nb.config.keys import split_weight
from pixart_nb.core.backend import ms
from pixart_nb.core.io import CheckpointError, load_tensors
from pixart_nb.core.lora import Adapters, LoraConfig
from pixart_nb.core.lora.files import PEFT_FILE, lora_path, read_lora

PEFT = REFERENCE / "lora" / "lora-patterns"


@pytest.fixture
def pipe():
    return PixArtSigmaPipeline.from_pretrained(REFERENCE / "diffusers" / "sigma")


def picture(pipe):
    call = {"height": 32, "width": 64, "num_inference_steps": 1, "use_resolution_binning": False}
    return pipe("a red cat", generator=np.random.default_rng(0), output_type="np", **call)[0]


def test_an_untrained_adapter_draws_the_same_picture_bit_for_bit(pipe, tmp_path):
    before = picture(pipe)
    for dora in (False, True):
        net = transformer()
        Adapters.of(net).add("new", LoraConfig(use_dora=dora)).save(tmp_path / str(dora))
        pipe.load_lora_weights(tmp_path / str(dora))
        assert np.array_equal(picture(pipe), before)
    assert pipe.get_active_adapters() == ["default_1"]


def test_a_loaded_adapter_changes_the_picture_until_it_is_unloaded(pipe):
    before = picture(pipe)
    pipe.load_lora_weights(PEFT, adapter_name="style")
    changed = picture(pipe)
    assert relative_error(changed, before) > 1e-3
    assert pipe.get_list_adapters() == {"transformer": ["style"]}
    pipe.disable_lora()
    assert pipe.get_active_adapters() == [] and np.array_equal(picture(pipe), before)
    pipe.enable_lora()
    assert np.array_equal(picture(pipe), changed)
    pipe.unload_lora_weights()
    assert pipe.get_list_adapters() == {} and np.array_equal(picture(pipe), before)


def test_a_fused_adapter_draws_the_same_and_can_be_taken_out(pipe):
    before = picture(pipe)
    pipe.load_lora_weights(PEFT)
    changed = picture(pipe)
    pipe.fuse_lora()
    assert relative_error(picture(pipe), changed) < 1e-4
    pipe.unfuse_lora()
    assert np.array_equal(picture(pipe), changed)
    pipe.fuse_lora(lora_scale=0.5)
    half = picture(pipe)
    assert 0 < relative_error(half, before) < relative_error(changed, before)
    pipe.unload_lora_weights()
    assert np.array_equal(picture(pipe), half)


def test_several_adapters_with_weights(pipe):
    pipe.load_lora_weights(PEFT, "a")
    alone = picture(pipe)
    pipe.load_lora_weights(REFERENCE / "lora" / "dora" / "adapter_model.safetensors", "b")
    assert pipe.get_active_adapters() == ["b"]
    pipe.set_adapters(["a", "b"], [1.0, 0.3])
    both = picture(pipe)
    assert pipe.get_active_adapters() == ["a", "b"] and not np.array_equal(both, alone)
    pipe.fuse_lora(adapter_names=["a"])
    assert relative_error(picture(pipe), alone) < 1e-4
    pipe.unfuse_lora()
    assert np.array_equal(picture(pipe), both)
    pipe.set_adapters("a")
    assert np.array_equal(picture(pipe), alone)
    pipe.delete_adapters("b")
    assert pipe.get_list_adapters() == {"transformer": ["a"]} and np.array_equal(picture(pipe), alone)


def test_when_the_active_adapter_is_deleted_another_one_is_active(pipe):
    trained(pipe.transformer, "a")
    alone = picture(pipe)
    pipe.load_lora_weights(REFERENCE / "lora" / "dora" / "adapter_model.safetensors", "b")
    with pytest.warns(UserWarning, match="'a' is active now"):
        pipe.delete_adapters("b")
    assert pipe.get_active_adapters() == ["a"] and np.array_equal(picture(pipe), alone)
    pipe.delete_adapters("a")
    assert pipe.get_active_adapters() == []


def test_a_weight_for_the_transformer_is_taken_out_of_a_mapping(pipe):
    trained(pipe.transformer, "a")
    pipe.set_adapters("a", 0.5)
    half = picture(pipe)
    for weights in ({"transformer": 0.5}, [{"transformer": 0.5}]):
        pipe.set_adapters("a", weights)
        assert np.array_equal(picture(pipe), half)


def test_saving_names_the_adapters_that_are_left_out(pipe, tmp_path):
    trained(pipe.transformer, "a")
    with pytest.warns(UserWarning, match=r"without the adapters \['a'\]: fuse_lora first"):
        pipe.save_pretrained(tmp_path / "plain")
    pipe.fuse_lora()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.save_pretrained(tmp_path / "fused")


@pytest.mark.parametrize("layout", ["peft", "diffusers"])
def test_an_adapter_of_a_pipeline_is_saved_and_loaded_again(pipe, layout, tmp_path):
    trained(pipe.transformer, "style", use_dora=True)
    changed = picture(pipe)
    path = pipe.save_lora_weights(tmp_path, layout=layout)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path, weight_name=path.name)
    assert np.array_equal(picture(pipe), changed)
    pipe.unload_lora_weights()
    if layout == "diffusers":  # which keeps everything in one file
        pipe.load_lora_weights(load_tensors(path))
        assert np.array_equal(picture(pipe), changed)


def test_it_has_to_be_said_which_of_several_is_saved(pipe, tmp_path):
    with pytest.raises(ValueError, match="adapter_name"):
        pipe.save_lora_weights(tmp_path)
    pipe.load_lora_weights(PEFT, "a")
    pipe.load_lora_weights(PEFT, "b")
    pipe.set_adapters(["a", "b"])
    with pytest.raises(ValueError, match=r"\['a', 'b'\].*adapter_name"):
        pipe.save_lora_weights(tmp_path)
    with pytest.raises(ValueError, match="'c'; there are"):
        pipe.save_lora_weights(tmp_path, "c")
    assert list(tmp_path.iterdir()) == []
    assert read_lora(pipe.save_lora_weights(tmp_path, "b")).modules


def test_a_lora_for_another_model_leaves_the_pipeline_as_it_was(pipe):
    pipe.load_lora_weights(PEFT, "a")
    before = picture(pipe)
    wider = {
        "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": np.ones((4, 1152), np.float32),
        "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight": np.ones((1152, 4), np.float32),
        "transformer.transformer_blocks.0.attn1.to_q.alpha": np.array(4.0),
    }
    with pytest.raises(CheckpointError, match=r"another model.*LoRA \(1152, 1152\), model \(24, 24\)"):
        pipe.load_lora_weights(wider)
    assert pipe.get_list_adapters() == {"transformer": ["a"]} and np.array_equal(picture(pipe), before)


def test_options_of_diffusers_calls_are_honoured_or_named(pipe, tmp_path):
    (tmp_path / "style").symlink_to(PEFT)
    with pytest.warns(UserWarning, match="load_lora_weights: no meaning here, ignored: low_cpu_mem_usage"):
        pipe.load_lora_weights(tmp_path, subfolder="style", low_cpu_mem_usage=True)
    with pytest.warns(UserWarning, match="fuse_lora: no meaning here, ignored: components, safe_fusing"):
        pipe.fuse_lora(components=["transformer"], safe_fusing=True)
    with pytest.warns(UserWarning, match="unfuse_lora: no meaning here, ignored: unfuse_text_encoder"):
        pipe.unfuse_lora(unfuse_text_encoder=True)
    with pytest.raises(ValueError, match="lora_scale is 'x'; expected a finite number"):
        pipe.fuse_lora("x")
    with pytest.warns(UserWarning, match="set_lora_device: there is one device"):
        pipe.set_lora_device(["default_0"], "cuda")


def test_weights_are_numbers_of_any_kind_and_no_text(pipe):
    pipe.load_lora_weights(PEFT, "a")
    pipe.load_lora_weights(PEFT, "b")
    for weights in ([0.5, 0.25], np.array([0.5, 0.25]), ms.Tensor([0.5, 0.25])):
        pipe.set_adapters(["a", "b"], weights)
        assert pipe.transformer.adapters.weights == {"a": 0.5, "b": 0.25}
    for weights in (np.array([0.5]), "12"):
        with pytest.raises(ValueError, match="adapters"):
            pipe.set_adapters(["a", "b"], weights)
    pipe.unload_lora_weights()


def test_a_lora_is_fetched_from_the_hub(pipe, monkeypatch, tmp_path):
    before, calls = picture(pipe), []
    (tmp_path / "style").symlink_to(PEFT)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: calls.append((a, k)) or str(tmp_path))
    pipe.load_lora_weights("owner/name", weight_name=PEFT_FILE, subfolder="style", revision="v1")
    patterns = [f"style/{PEFT_FILE}", "style/adapter_config.json"]
    assert calls == [(("owner/name",), {"revision": "v1", "allow_patterns": patterns, "ignore_patterns": []})]
    assert relative_error(picture(pipe), before) > 1e-3
    with pytest.raises(CheckpointError, match=r"\./style does not exist.*a folder with a LoRA"):
        pipe.load_lora_weights("./style")


def test_a_bundled_lora_is_found_from_any_folder_with_its_weight(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lora_path("data/tiny-sigma-lcm-lora").is_dir()
    values = {"model": "data/tiny-sigma", "prompt": "a", "image_height": 64, "image_width": 64}
    (text,) = check_config(values | {"lora": "data/tiny-sigma-lcm-lora:0.5"}).lora
    assert split_weight(text) == (str(lora_path("data/tiny-sigma-lcm-lora")), 0.5)


def test_a_pipeline_without_a_transformer_says_so():
    pipe = PixArtSigmaPipeline(None, None, None, None, None)
    with pytest.raises(ValueError, match="no transformer"):
        pipe.load_lora_weights(PEFT)
