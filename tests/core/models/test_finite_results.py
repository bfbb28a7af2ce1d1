"""A result that is not finite is an error that names the stage, never a black image."""

import json
import shutil

import numpy as np
import pytest
from reference_data import diffusers
from safetensors.numpy import load_file, save_file

from benchmarks.ascend_stand_ins import ascend
from pixart_nb import PixArtSigmaPipeline
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError

ADVICE = r"is not finite: \d+ of \d+ values. Compute in float32"


@pytest.fixture
def pipe():
    return PixArtSigmaPipeline.from_pretrained(diffusers("sigma")[0])


def poison(parameter, value=np.nan):
    parameter.set_data(ms.Tensor(np.full(parameter.shape, value, np.float32)))


def call(pipe, **options):
    size = {"height": 32, "width": 32, "use_resolution_binning": False}
    return pipe("a red mushroom", num_inference_steps=1, **size, **options)


@pytest.mark.parametrize(
    ("stage", "parameter"),
    [
        ("the text encoder", lambda pipe: pipe.text_encoder.encoder.final_layer_norm.weight),
        ("the transformer at timestep 999", lambda pipe: pipe.transformer.final_layer.linear.bias),
        ("the VAE's decoder", lambda pipe: pipe.vae.decoder.conv_out.bias),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_pipeline_names_the_stage_that_failed(pipe, stage, parameter, value):
    poison(parameter(pipe), value)
    with pytest.raises(PixArtNBError, match=rf"the output of {stage} {ADVICE}"):
        call(pipe)


def test_encoding_and_decoding_in_tiles_are_checked_too(pipe):
    vae = pipe.vae
    poison(vae.encoder.conv_out.bias)
    with pytest.raises(PixArtNBError, match=f"the VAE's encoder {ADVICE}"):
        vae.encode(ms.Tensor(np.zeros((1, 3, 32, 32), np.float32)))
    poison(vae.decoder.conv_out.bias)
    vae.enable_tiling(32)
    with pytest.raises(PixArtNBError, match=f"a tile of the VAE {ADVICE}"):
        vae.decode(ms.Tensor(np.zeros((1, 4, 16, 16), np.float32)))


@pytest.fixture
def overflowing(tmp_path):
    """A pipeline in half precision whose decoder leaves the range of float16, with or without ``force_upcast``."""

    def write(force_upcast):
        folder = tmp_path / str(force_upcast)
        shutil.copytree(diffusers("sigma")[0], folder)
        config = json.loads((folder / "vae/config.json").read_text()) | {"force_upcast": force_upcast}
        (folder / "vae/config.json").write_text(json.dumps(config))
        (path,) = (folder / "vae").glob("*.safetensors")
        weights = {name: value.astype(np.float16) for name, value in load_file(path).items()}
        first = weights["decoder.conv_in.weight"].astype(np.float32)
        weights["decoder.conv_in.weight"] = (first * (3e4 / np.abs(first).max())).astype(np.float16)
        save_file(weights, path)
        return folder

    return write


def test_a_vae_that_overflows_in_half_precision_is_computed_in_float32(overflowing):
    folder = overflowing(True)
    half, single = (
        PixArtSigmaPipeline.from_pretrained(folder, mindspore_dtype=d).vae for d in (ms.float16, ms.float32)
    )
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    assert half.dtype == ms.float32
    assert np.array_equal(half.decode(latents)[0].asnumpy(), single.decode(latents)[0].asnumpy())


def test_without_force_upcast_its_overflow_is_an_error_and_never_a_black_image(overflowing):
    with ascend():
        pipe = PixArtSigmaPipeline.from_pretrained(overflowing(False), mindspore_dtype=ms.float16)
        assert pipe.vae.dtype == ms.float16
        with pytest.raises(PixArtNBError, match=rf"the output of the VAE's decoder {ADVICE}"):
            call(pipe)


def test_a_cpu_computes_what_leaves_the_range_of_float16(overflowing):
    folder, images = overflowing(False), []
    for dtype in (ms.float16, ms.float32):
        pipe = PixArtSigmaPipeline.from_pretrained(folder, mindspore_dtype=dtype)
        images.append(call(pipe, generator=np.random.default_rng(0), output_type="np")[0])
    assert np.abs(images[0] - images[1]).mean() < 0.05
