"""A result that is not finite is an error that names the stage, never a black image."""

import numpy as np
import pytest
from reference_data import diffusers

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError

ADVICE = r"is not finite: \d+ of \d+ values. Compute in float32"


@pytest.fixture
def pipe():
    return PixArtSigmaPipeline.from_pretrained(diffusers("sigma")[0])


def poison(parameter, value=np.nan):
    parameter.set_data(ms.Tensor(np.full(parameter.shape, value, np.float32)))


def call(pipe):
    return pipe("a red mushroom", height=32, width=32, num_inference_steps=1, use_resolution_binning=False)


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
