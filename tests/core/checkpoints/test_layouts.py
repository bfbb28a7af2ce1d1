"""Names of tensors: two layouts, wrappers and spellings of others, and what they show of the model."""

import re
from pathlib import Path

import numpy as np
import pytest
from reference_data import OFFICIAL, official

from pixart_nb.core import PixArtConfig, load_transformer
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import key_maps
from pixart_nb.core.checkpoints.configuration import config_from_diffusers, diffusers_config, positions_shown, shown_by
from pixart_nb.core.checkpoints.files import Checkpoint, read_tensors
from pixart_nb.core.checkpoints.key_maps import to_layout, to_official_names
from pixart_nb.core.checkpoints.lazy_tensor import LazyTensor
from pixart_nb.core.checkpoints.load import shapes_of
from pixart_nb.core.io import CheckpointError, save_tensors
from pixart_nb.core.models.transformer import PixArt


def test_names_map_without_weights():
    assert key_maps.diffusers_names("blocks.7.attn.qkv.bias") == tuple(
        f"transformer_blocks.7.attn1.to_{part}.bias" for part in "qkv"
    )
    assert key_maps.official_name("transformer_blocks.7.attn2.to_v.weight") == (
        "blocks.7.cross_attn.kv_linear.weight",
        1,
    )
    assert key_maps.official_name("nothing.weight") is None
    net = PixArt(
        PixArtConfig(hidden_size=12, num_heads=2, depth=1, caption_channels=4, micro_condition=True, qk_norm=True)
    )
    for name, _ in net.parameters_and_names():
        for place, other in enumerate(key_maps.diffusers_names(name)):
            assert key_maps.official_name(other) == (name, place)


def opened(**tensors):
    return Checkpoint(Path("a.ckpt"), {name: LazyTensor.of(value, name) for name, value in tensors.items()})


def in_diffusers_layout(tensors):
    named = {name: LazyTensor.of(value, name) for name, value in tensors.items()}
    return {name: np.asarray(tensor) for name, tensor in to_layout(named, "diffusers").items()}


def small_transformer(**options):
    config = PixArtConfig(hidden_size=24, num_heads=2, depth=2, caption_channels=8, model_max_length=5, **options)
    return config, {name: np.ones(shape, np.float32) for name, shape in shapes_of(config).items()}


@pytest.mark.parametrize("prefix", ["module.", "network.", "model.", "module.model.", "_orig_mod.", "ema."])
def test_prefixes_of_what_wrapped_the_network_are_taken_off(prefix):
    _, tensors = small_transformer()
    view = to_official_names(opened(**{prefix + name: value for name, value in tensors.items()}, step=np.ones(1)))
    assert set(view.tensors) == set(tensors)
    assert list(view.rest) == ["step"]
    assert view.origins["t_block.1.bias"] == (f"{prefix}t_block.1.bias",)
    assert repr(prefix) in view.notes[0]


def test_averaged_weights_are_preferred_and_strangers_are_not_taken_for_the_network():
    _, tensors = small_transformer()
    both = {f"ema.{name}": 0 * value for name, value in tensors.items()} | {
        f"network.{name}": value for name, value in tensors.items()
    }
    moments = {f"adam_m.{name}": value for name, value in tensors.items()}
    view = to_official_names(opened(**both, **moments))
    assert not np.asarray(view.tensors["t_block.1.bias"]).any()
    assert set(view.rest) == set(moments)
    assert "Not read: the same network under 'network.'" in view.notes[1]


def test_mindspores_names_of_norms_are_understood():
    _, tensors = small_transformer(qk_norm=True)
    new = {"weight": "gamma", "bias": "beta"}
    theirs = {re.sub(r"(?<=norm\.)\w+$", lambda leaf: new[leaf[0]], name): v for name, v in tensors.items()}
    assert "blocks.0.attn.q_norm.gamma" in theirs
    assert set(to_official_names(opened(**theirs)).tensors) == set(tensors)


def test_folders_of_alpha_carry_the_empty_caption_under_a_name_of_their_own():
    _, tensors = small_transformer()
    theirs = in_diffusers_layout(tensors)
    assert theirs["caption_projection.y_embedding"].shape == (5, 8)
    theirs["pos_embed.pos_embed"] = np.zeros((1, 4, 24), np.float32)
    view = to_official_names(opened(**theirs))
    assert view.layout == "diffusers"
    assert set(view.tensors) == set(tensors)
    assert list(view.recomputed) == ["pos_embed"]
    assert not view.rest


def test_half_of_a_stack_is_no_tensor():
    _, tensors = small_transformer()
    theirs = in_diffusers_layout(tensors)
    del theirs["transformer_blocks.1.attn1.to_k.weight"]
    view = to_official_names(opened(**theirs))
    assert "blocks.1.attn.qkv.weight" not in view.tensors
    assert set(view.rest) == {f"transformer_blocks.1.attn1.to_{part}.weight" for part in "qv"}


def test_mindones_compressed_layers_load_without_the_parameters_that_its_model_lacks(tmp_path):
    compression = {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": [1]}
    config, tensors = small_transformer(kv_compress_config=compression)
    lacking = [name for name in tensors if "attn.norm" in name or name.endswith("sr.bias")]
    assert len(lacking) == 3
    theirs = {name: value for name, value in tensors.items() if name not in lacking}
    path = tmp_path / "mindone.ckpt"
    ms.save_checkpoint([{"name": name, "data": ms.Tensor(value)} for name, value in theirs.items()], str(path))
    net = load_transformer(path, PixArtConfig(num_heads=2))
    assert net.config.kv_layers == (1,)
    loaded = {name: parameter.asnumpy() for name, parameter in net.parameters_and_names()}
    assert (loaded["blocks.1.attn.norm.weight"] == 1).all()
    assert not loaded["blocks.1.attn.sr.bias"].any()
    assert config.kv_layers == net.config.kv_layers


def test_compression_that_was_never_trained_is_explained(tmp_path):
    _, tensors = small_transformer()
    save_tensors(tmp_path / "a.safetensors", tensors)
    compression = {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": [1]}
    with pytest.raises(CheckpointError, match=r"no weights for the compressed layers \[1\].*start as averages"):
        load_transformer(tmp_path / "a.safetensors", PixArtConfig(num_heads=2, kv_compress_config=compression))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_embedder.proj.weight": np.ones(3)}, "expected 4 axes"),
        ({"x_embedder.proj.weight": np.ones((10**12, 0, 2, 2))}, "none of them empty"),
        ({"blocks.900.mlp.fc1.bias": np.ones(3)}, r"blocks up to 900, but not \[2, 3"),
        ({"blocks.1.attn.qkv.weight": np.ones((3, 1))}, "blocks.1.attn.qkv.weight has shape"),
        ({"blocks.1.attn.sr.weight": np.ones(3)}, "expected 4 axes"),
        ({"y_embedder.y_embedding": np.ones(3)}, "expected 2 axes"),
    ],
)
def test_a_checkpoint_that_shows_an_impossible_model_builds_none(change, message):
    _, tensors = small_transformer()
    with pytest.raises(CheckpointError, match=message):
        shown_by(tensors | change, "a.pth")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "is of 'UNet2DModel'"),
        ({"num_attention_heads": None}, ": num_attention_heads is None; expected"),
        ({"num_layers": ...}, ": num_layers is None; expected"),
        ({"attention_head_dim": 11}, "is no PixArt transformer's: cross_attention_dim is '24'"),
    ],
)
def test_a_wrong_config_json_is_named(values, message):
    known = diffusers_config(PixArtConfig(hidden_size=24, num_heads=2, depth=2)) | values
    with pytest.raises(CheckpointError, match=f"c.json:? ?{message.removeprefix(': ')}"):
        config_from_diffusers({key: value for key, value in known.items() if value is not ...}, "c.json")


def test_positions_show_the_size_and_the_stretching_they_were_made_for():
    for case in OFFICIAL:
        path, config, _ = official(case)
        stored = LazyTensor.of(read_tensors(path)["pos_embed"])
        expected = {name: config[name] for name in ("input_size", "pe_interpolation")}
        assert positions_shown(stored, 2) == positions_shown(stored.astype("F16"), 2) == expected
    assert positions_shown(LazyTensor.of(np.zeros((1, 16, 8), np.float32)), 2) == {"input_size": 8}
    assert positions_shown(LazyTensor.of(np.zeros((1, 15, 8), np.float32)), 2) == {}
