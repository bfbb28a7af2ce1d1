"""T5 and autoencoders as single files with the names of other programs, and tensors in 8-bit floats."""

import json
import struct

import numpy as np
import pytest
from reference_data import diffusers, official
from safetensors.numpy import load_file, save_file

from pixart_nb import T5EncoderModel
from pixart_nb.config import check_config
from pixart_nb.core import PixArtConfig
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.components import LOADERS, write_transformer
from pixart_nb.core.checkpoints.convert import convert, plan_conversion
from pixart_nb.core.checkpoints.files import open_checkpoint, read_tensors
from pixart_nb.core.checkpoints.load import load_transformer
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig
from pixart_nb.core.sampling.generate import load_pipeline
from pixart_nb.core.sampling.planning import networks_of, stated_config, transformer_config

PIPELINE, _, GOLDEN = diffusers("sigma")
IDS, MASK = GOLDEN["input_ids"], GOLDEN["prompt_mask"].astype(bool)


def write_fp8(path, arrays, dtype):
    """Write a safetensors file of 8-bit floats with these bits."""
    header, start = {}, 0
    for name, bits in arrays.items():
        header[name] = {"dtype": dtype, "shape": list(bits.shape), "data_offsets": [start, start + bits.size]}
        start += bits.size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(bits.tobytes() for bits in arrays.values()))
    return path


def float8(bits, exponents, bias, infinite):
    """Return the value of an 8-bit float, from the definition of the format."""
    mantissas = 7 - exponents
    exponent, mantissa = (bits & 127) >> mantissas, (bits & (2**mantissas - 1)) / 2**mantissas
    sign = -1.0 if bits & 128 else 1.0
    if infinite and exponent == 2**exponents - 1:
        return sign * float("nan" if mantissa else "inf")
    if not infinite and bits & 127 == 127:
        return float("nan")
    return sign * (mantissa * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa) * 2.0 ** (exponent - bias))


@pytest.mark.parametrize(("dtype", "form"), [("F8_E4M3", (4, 7, False)), ("F8_E5M2", (5, 15, True))])
def test_every_8_bit_float_is_read_exactly(tmp_path, dtype, form):
    bits = np.arange(256, dtype=np.uint8).reshape(16, 16)
    checkpoint = open_checkpoint(write_fp8(tmp_path / "a.safetensors", {"w": bits}, dtype))
    values = np.asarray(checkpoint.tensors["w"])
    expected = np.array([float8(number, *form) for number in range(256)], np.float32).reshape(16, 16)
    assert values.dtype == np.float32 and checkpoint.notes == [f"Stored as {dtype}, read as F32."]
    assert np.array_equal(values, expected, equal_nan=True)
    finite = ~np.isnan(expected)
    assert np.array_equal(np.signbit(values)[finite], np.signbit(expected)[finite])


def test_a_transformer_in_8_bit_floats_converts_to_float32(tmp_path):
    path, config, _ = official("sigma-256")
    bits = {n: np.random.default_rng(0).integers(0, 100, t.shape, np.uint8) for n, t in read_tensors(path).items()}
    source = write_fp8(tmp_path / "a.safetensors", bits, "F8_E4M3")
    plan = plan_conversion(source, tmp_path / "b.safetensors", PixArtConfig(**config))
    convert(plan)
    assert "Stored as F8_E4M3, read as F32." in plan.audit.sentences
    expected, written = read_tensors(source), read_tensors(tmp_path / "b.safetensors")
    assert all(np.array_equal(written[name], expected[name]) for name in written)


# ---- T5


@pytest.mark.parametrize("prefix", ["", "text_encoders.t5xxl.transformer."])
@pytest.mark.parametrize("table", ["shared.weight", "encoder.embed_tokens.weight"])
@pytest.mark.parametrize("options", [{}, {"stream": True}, {"load_in_8bit": True}])
def test_t5_in_one_file_encodes_as_its_folder(tmp_path, prefix, table, options):
    tensors = load_file(PIPELINE / "text_encoder" / "model.safetensors")
    tensors[table] = tensors.pop("shared.weight")
    tensors = {prefix + name: value for name, value in tensors.items()} | {"other.weight": np.ones(3, np.float32)}
    save_file(tensors, tmp_path / "t5.safetensors")
    file, folder = (
        T5EncoderModel.from_pretrained(path, **options)(IDS, MASK).asnumpy()
        for path in (tmp_path / "t5.safetensors", PIPELINE / "text_encoder")
    )
    assert np.array_equal(file, folder)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", "is no T5 v1.1 encoder: .*wi_0"),
        ("shared.weight", "is no T5 v1.1 encoder: .*embed_tokens"),
        ("encoder.block.1.layer.1.DenseReluDense.wo.weight", "does not fit the model: 1 missing"),
    ],
)
def test_a_file_that_is_no_whole_t5_is_named(tmp_path, missing, message):
    tensors = load_file(PIPELINE / "text_encoder" / "model.safetensors")
    del tensors[missing]
    save_file(tensors, tmp_path / "t5.safetensors")
    with pytest.raises(CheckpointError, match=rf"t5\.safetensors {message}"):
        T5EncoderModel.from_pretrained(tmp_path / "t5.safetensors")


# ---- autoencoders


def ldm_names(levels, blocks):
    """Map the modules of LDM's autoencoder, as its code numbers them, to those of diffusers'."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side, stem, count in (("encoder", "down", blocks), ("decoder", "up", blocks + 1)):
        names |= {f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")}
        names[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        resnets = {f"{side}.mid.block_{k + 1}": f"{side}.mid_block.resnets.{k}" for k in (0, 1)}
        for level in range(levels):
            place = level if side == "encoder" else levels - 1 - level
            for k in range(count):
                resnets[f"{side}.{stem}.{level}.block.{k}"] = f"{side}.{stem}_blocks.{place}.resnets.{k}"
            sampler = f"{side}.{stem}_blocks.{place}.{stem}samplers.0.conv"
            names[f"{side}.{stem}.{level}.{stem}sample.conv"] = sampler
        for old, new in resnets.items():
            names |= {f"{old}.{part}": f"{new}.{part}" for part in ("norm1", "conv1", "norm2", "conv2")}
            names[f"{old}.nin_shortcut"] = f"{new}.conv_shortcut"
        attention = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
        for old, new in attention.items():
            names[f"{side}.mid.attn_1.{old}"] = f"{side}.mid_block.attentions.0.{new}"
    return names


@pytest.fixture
def vae():
    net = AutoencoderKL(VAEConfig(block_out_channels=(32, 64, 32), layers_per_block=1, force_upcast=False))
    rng = np.random.default_rng(0)
    for parameter in net.get_parameters():
        parameter.set_data(ms.Tensor(rng.standard_normal(parameter.shape).astype(np.float32) * 0.1))
    return net.set_train(False)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize(("file", "scale"), [("sdxl_vae", 0.13025), ("vae-ft-mse-840000-ema-pruned", 0.18215)])
def test_an_autoencoder_with_ldm_names_decodes_as_the_same_with_diffusers_names(tmp_path, vae, prefix, file, scale):
    names = ldm_names(3, 1)
    stored = {name: parameter.asnumpy() for name, parameter in vae.parameters_and_names()}
    tensors = {"loss.logvar": np.ones(1, np.float32)}
    for old, new in names.items():
        for leaf in ("weight", "bias"):
            if f"{new}.{leaf}" in stored:
                value = stored.pop(f"{new}.{leaf}")
                tensors[f"{prefix}{old}.{leaf}"] = (
                    value[..., None, None] if ".attn_1." in old and value.ndim == 2 else value
                )
    assert not stored
    save_file(tensors, tmp_path / f"{file}.safetensors")
    with pytest.warns(UserWarning, match=f"does not show its scaling_factor; {scale} is used. Set sd_scale_factor"):
        loaded = LOADERS["vae"](tmp_path / f"{file}.safetensors", ms.float32)
    assert loaded.config.scaling_factor == scale
    rng = np.random.default_rng(1)
    latents, image = (ms.Tensor(rng.standard_normal(s).astype(np.float32)) for s in ((1, 4, 4, 8), (1, 3, 16, 32)))
    assert np.array_equal(loaded.decode(latents)[0].asnumpy(), vae.decode(latents)[0].asnumpy())
    assert np.array_equal(loaded.encode(image)[0].mean.asnumpy(), vae.encode(image)[0].mean.asnumpy())


def test_a_configuration_beside_the_file_of_an_autoencoder_is_used(tmp_path, recwarn):
    source = PIPELINE / "vae"
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    (tmp_path / "vae.safetensors").write_bytes((source / "diffusion_pytorch_model.safetensors").read_bytes())
    assert LOADERS["vae"](tmp_path / "vae.safetensors", ms.float32).config == LOADERS["vae"](source, ms.float32).config
    assert not [w for w in recwarn if "scaling_factor" in str(w.message)]


def test_a_configuration_may_name_single_files(tmp_path):
    files = {"vae": "diffusion_pytorch_model", "text_encoder": "model"}
    for name, file in files.items():
        (tmp_path / f"{name}.safetensors").write_bytes((PIPELINE / name / f"{file}.safetensors").read_bytes())
    (tmp_path / "config.json").write_text((PIPELINE / "vae" / "config.json").read_text())
    values = {"model": str(PIPELINE), "prompt": "a cat", "image_height": 64, "image_width": 64, "sampling_steps": 1}
    files = {f"{name}_root": str(tmp_path / f"{name}.safetensors") for name in files}
    config, plain = check_config(values | files), check_config(values)
    call = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "np"}
    images = [load_pipeline(c)("a cat", generator=np.random.default_rng(0), **call)[0] for c in (config, plain)]
    assert np.array_equal(*images)
    networks, notes = networks_of(config)
    assert notes == [] and networks == networks_of(plain)[0]


def test_a_file_without_an_autoencoder_is_named(tmp_path):
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors is no autoencoder .*lacks 'encoder.conv_in.weight'"):
        LOADERS["vae"](tmp_path / "a.safetensors", ms.float32)


def converted(path, **changes):
    """Write a random transformer, whose width does not show its heads, as a .ckpt file with its audit."""
    config = dict(hidden_size=96, num_heads=6, depth=2, caption_channels=32, input_size=16, pe_interpolation=1.0)
    net = PixArt(PixArtConfig(**config | changes))
    net.initialize(np.random.default_rng(0))
    write_transformer(path.parent / "transformer", net)
    convert(plan_conversion(path.parent / "transformer", path))
    return net


def test_a_configuration_completes_what_the_audit_beside_a_file_says(tmp_path):
    compression = {"sampling": "ave", "scale_factor": 2, "kv_compress_layer": [1]}
    net = converted(tmp_path / "a.ckpt", kv_compress_config=compression)
    keys = {"checkpoint": str(tmp_path / "a.ckpt"), "model": str(PIPELINE), "prompt": ["a"], "t5_max_length": 300}
    config = check_config(keys | {"image_height": 128, "image_width": 128})
    read = transformer_config(config)
    assert (read.num_heads, read.input_size, read.pe_interpolation) == (6, 16, 1.0)
    assert read.kv_compress_config == compression and read.model_max_length == 300
    loaded = load_transformer(tmp_path / "a.ckpt", stated_config(config))
    assert loaded.config.num_heads == 6 and loaded.config.kv_layers == net.config.kv_layers
    with pytest.raises(CheckpointError, match="shows input_size = 16, but the configuration says 32"):
        transformer_config(check_config(keys | {"image_height": 256, "image_width": 256, "sample_size": 32}))


def test_a_sample_size_keeps_the_positions_that_a_folder_has_for_it(tmp_path):
    converted(tmp_path / "a.ckpt", input_size=32)
    for source in ("transformer", "a.ckpt"):
        loaded = load_transformer(tmp_path / source, PixArtConfig(model_max_length=300), sample_size=32)
        assert (loaded.config.input_size, loaded.config.pe_interpolation) == (32, 1.0)
    with pytest.raises(CheckpointError, match="shows input_size = 32, but the configuration says 64"):
        load_transformer(tmp_path / "transformer", PixArtConfig(model_max_length=300), sample_size=64)
