"""Configurations from files: typed, bounded, and never ignored where they change the result."""

import json
import re
import shutil

import numpy as np
import pytest
from reference_data import diffusers

from benchmarks.ascend_stand_ins import ascend
from pixart_nb.core import PixArtConfig
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.components import LOADERS
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.t5 import T5Config
from pixart_nb.core.models.vae import VAEConfig

T5 = {"model_type": "t5", "feed_forward_proj": "gated-gelu", "d_model": 32, "num_layers": 2}
VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [32, 64], "scaling_factor": 0.5}


@pytest.mark.parametrize(
    ("config", "key", "value", "expected"),
    [
        (PixArtConfig, "depth", 10**6, "depth is 1000000; expected a whole number from 1 to 1000"),
        (PixArtConfig, "depth", 2**63, "depth is 9223372036854775808"),
        (PixArtConfig, "depth", "28", "depth is 28; expected a whole number"),
        (PixArtConfig, "depth", 28.0, "depth is 28.0; expected a whole number"),
        (PixArtConfig, "depth", True, "depth is True"),
        (PixArtConfig, "hidden_size", -4, "hidden_size is -4"),
        (PixArtConfig, "num_heads", 0, "num_heads is 0"),
        (PixArtConfig, "mlp_ratio", float("nan"), "mlp_ratio is nan; expected a number"),
        (PixArtConfig, "pe_interpolation", 0, "pe_interpolation is 0"),
        (PixArtConfig, "input_size", 2**40, "input_size is"),
        (PixArtConfig, "qk_norm", "yes", "qk_norm is yes; expected true or false"),
        (PixArtConfig, "class_name", 3, "class_name is 3; expected a string"),
        (PixArtConfig, "kv_compress_config", [1], "expected a mapping"),
        (PixArtConfig, "kv_compress_config", {"scale_factor": 10**9}, "scale_factor is 1000000000"),
        (PixArtConfig, "kv_compress_config", {"scale_factor": 2, "kv_compress_layer": [0, "1"]}, "names layers"),
        (VAEConfig, "layers_per_block", 10**6, "layers_per_block is 1000000; expected a whole number from 1 to 64"),
        (VAEConfig, "block_out_channels", [32] * 17, "at most 16 multiples"),
        (VAEConfig, "block_out_channels", [32, 40], "multiples of norm_num_groups, 32"),
        (VAEConfig, "block_out_channels", [], "expected whole numbers"),
        (VAEConfig, "block_out_channels", [[32]], "expected whole numbers"),
        (VAEConfig, "norm_num_groups", 0, "norm_num_groups is 0"),
        (VAEConfig, "scaling_factor", 0, "scaling_factor is 0"),
        (VAEConfig, "scaling_factor", None, "scaling_factor is None"),
        (VAEConfig, "shift_factor", "0.1", "shift_factor is 0.1; expected a number"),
        (VAEConfig, "sample_size", {}, "sample_size is {}"),
        (VAEConfig, "force_upcast", 1, "force_upcast is 1; expected true or false"),
        (T5Config, "num_layers", 2**31, "num_layers is 2147483648; expected a whole number from 0 to 1000"),
        (T5Config, "vocab_size", "32128", "vocab_size is 32128"),
        (T5Config, "relative_attention_num_buckets", 2, "expected a whole number from 4"),
        (T5Config, "relative_attention_max_distance", 8, "more than a quarter"),
        (T5Config, "layer_norm_epsilon", -1, "layer_norm_epsilon is -1"),
    ],
)
def test_a_value_of_a_wrong_type_or_size_is_refused_before_anything_is_built(config, key, value, expected):
    base = {PixArtConfig: {}, VAEConfig: VAE, T5Config: T5}[config]
    with pytest.raises(PixArtNBError, match=re.escape(expected)):
        config.from_dict(base | {key: value})


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        (VAEConfig, "_class_name", "AsymmetricAutoencoderKL"),
        (VAEConfig, "act_fn", "relu"),
        (VAEConfig, "down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        (VAEConfig, "up_block_types", ["UpDecoderBlock2D"]),
        (VAEConfig, "latents_mean", [0.0, 1.0, 0.0, 0.0]),
        (VAEConfig, "latents_std", [1.0, 2.0, 1.0, 1.0]),
        (T5Config, "model_type", "umt5"),
        (T5Config, "feed_forward_proj", "gated-silu"),
        (T5Config, "dense_act_fn", "relu"),
        (T5Config, "is_gated_act", False),
        (T5Config, "quantization_config", {"load_in_4bit": True}),
    ],
)
def test_a_key_that_would_change_the_result_is_refused_with_the_file(config, key, value):
    base = VAE if config is VAEConfig else T5
    with pytest.raises(PixArtNBError, match=rf"^x/config.json: {key} is .*; this kit only implements"):
        config.from_dict(base | {key: value}, "x/config.json")


def test_keys_that_a_file_leaves_out_have_the_defaults_of_the_library_that_wrote_it():
    config = VAEConfig.from_dict({"block_out_channels": [32, 64], "act_fn": "swish"})
    assert (config.scaling_factor, config.layers_per_block, config.sample_size) == (0.18215, 1, 32)
    assert config.force_upcast
    assert VAEConfig().scaling_factor == 0.13025
    assert T5Config.from_dict({"feed_forward_proj": "gated-gelu"}).d_model == 512
    with pytest.raises(PixArtNBError, match="feed_forward_proj is 'relu'"):
        T5Config.from_dict({"d_model": 32})


def test_latents_are_shifted_and_scaled_there_and_back():
    config = VAEConfig(scaling_factor=0.5, shift_factor=0.25)
    latents = np.array([1.25, -0.75], np.float32)
    assert config.to_model(latents).tolist() == [0.5, -0.5]
    assert np.array_equal(config.from_model(config.to_model(latents)), latents)


@pytest.fixture
def vae_folder(tmp_path):
    """Return a function that copies the reference's VAE with some keys changed."""

    def copy(**changes):
        shutil.copytree(diffusers("sigma")[0] / "vae", tmp_path / "vae")
        path = tmp_path / "vae" / "config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in values.items() if value != "absent"}))
        return tmp_path / "vae"

    return copy


def test_a_vae_without_a_scaling_factor_has_that_of_the_first_stable_diffusion(vae_folder):
    assert LOADERS["vae"](vae_folder(scaling_factor="absent"), ms.float32).config.scaling_factor == 0.18215


@pytest.mark.parametrize(("upcast", "dtype"), [(True, ms.float32), ("absent", ms.float32), (False, ms.float16)])
def test_a_vae_that_must_be_upcast_computes_in_float32(vae_folder, upcast, dtype):
    folder = vae_folder(force_upcast=upcast)
    assert LOADERS["vae"](folder, ms.float16).dtype == ms.float32  # a CPU has no other convolutions
    with ascend():
        assert LOADERS["vae"](folder, ms.float16).dtype == dtype
