"""Large images are decoded by rows on the CPU, to the same values."""

from functools import partial

import numpy as np
import pytest
from reference_data import relative_error

from pixart_nb.core import fast, onednn
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.components import write_vae
from pixart_nb.core.checkpoints.load import load_vae
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.fast import cpu_decoder
from pixart_nb.core.models.low_precision import unsupported
from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig


def autoencoder(*widths, **config):
    """An autoencoder in which every part of the decoder shows."""
    rng = np.random.default_rng(0)
    net = AutoencoderKL(VAEConfig(block_out_channels=widths, norm_num_groups=8, **config))
    for name, weight in net.parameters_and_names():
        value = rng.standard_normal(weight.shape) / np.sqrt(max(1, np.prod(weight.shape[1:])))
        weight.set_data(ms.Tensor((value + float("norm" in name and "weight" in name)).astype(np.float32)))
    return net.set_train(False)


def hidden(channels, *shape):
    return ms.Tensor(np.random.default_rng(1).standard_normal((shape[0], channels, *shape[1:]), dtype=np.float32))


@pytest.mark.parametrize(
    ("widths", "shape", "layers"),
    [((16, 32, 64), (1, 5, 9), 2), ((24, 24), (2, 7, 4), 1), ((8,), (1, 3, 2), 1), ((8, 16), (1, 40, 3), 1)],
)
def test_an_image_by_rows_has_the_values_of_the_layers(widths, shape, layers):
    net = autoencoder(*widths, layers_per_block=layers)
    x = hidden(widths[-1], *shape)
    out = fast.decode_fine(net.decoder, x)
    assert relative_error(out.asnumpy(), net.decoder.fine(x).asnumpy()) < 3e-6


@pytest.mark.parametrize("band", [1, 2000])
def test_the_height_of_the_bands_changes_nothing(monkeypatch, band):
    net, x = autoencoder(16, 32), hidden(32, 1, 19, 6)
    whole = fast.decode_fine(net.decoder, x).asnumpy()
    assert np.array_equal(fast.decode_fine(net.decoder, x).asnumpy(), whole)
    monkeypatch.setattr(cpu_decoder, "BAND", band)
    assert relative_error(fast.decode_fine(net.decoder, x).asnumpy(), whole) < 1e-6


def test_groups_far_from_zero_keep_their_precision():
    net, x = autoencoder(16, 16), hidden(16, 1, 8, 8)
    bias = net.decoder.up_blocks[0].resnets[0].conv1.bias
    bias.set_data(bias + 300)
    out = fast.decode_fine(net.decoder, x).asnumpy()
    assert relative_error(out, net.decoder.fine(x).asnumpy()) < 1e-4


def test_it_works_without_onednn(monkeypatch):
    net, x = autoencoder(16, 32), hidden(32, 1, 4, 5)
    expected = fast.decode_fine(net.decoder, x).asnumpy()
    monkeypatch.setattr(onednn, "function", lambda name: None)
    assert relative_error(fast.decode_fine(net.decoder, x).asnumpy(), expected) < 2e-6


def test_large_images_are_decoded_by_rows_and_others_as_before(monkeypatch):
    net, calls = autoencoder(64, 64), []
    latents = np.random.default_rng(1).standard_normal((2, 4, 8, 12), dtype=np.float32)
    monkeypatch.setattr(cpu_decoder, "decode_fine", partial(_counted, calls, cpu_decoder.decode_fine))
    before = net.decode(latents)[0].asnumpy()
    assert calls == []
    monkeypatch.setattr(fast, "LARGE_IMAGE", 16 * 24)
    assert relative_error(net.decode(latents)[0].asnumpy(), before) < 3e-6
    assert calls == [(2, 64, 8, 12)]
    net.enable_tiling(8)
    net.decode(latents)
    assert len(calls) == 1
    assert not fast.decodes_by_rows(VAEConfig(block_out_channels=(32, 64)), 4096, 4096)


def _counted(calls, function, decoder, x, gemm):
    calls.append(x.shape)
    return function(decoder, x, gemm)


@pytest.mark.skipif(bool(unsupported()), reason=f"needs bfloat16 products: {unsupported()}")
def test_a_vae_without_force_upcast_multiplies_bfloat16_where_half_precision_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(fast, "LARGE_IMAGE", 1)
    latents, images = np.random.default_rng(1).standard_normal((1, 4, 6, 9), dtype=np.float32), {}
    for upcast in (True, False):
        write_vae(tmp_path / str(upcast), autoencoder(64, 64, force_upcast=upcast))
        for dtype in (ms.float16, ms.bfloat16, ms.float32):
            images[upcast, dtype] = load_vae(tmp_path / str(upcast), dtype).decode(latents)[0].asnumpy()
    exact = images[True, ms.float32]
    assert all(np.array_equal(images[True, dtype], exact) for dtype in (ms.float16, ms.bfloat16))
    assert np.array_equal(images[False, ms.float32], exact)
    assert np.array_equal(images[False, ms.float16], images[False, ms.bfloat16])
    assert 1e-4 < relative_error(images[False, ms.float16], exact) < 3e-2


def test_damaged_weights_are_an_error(monkeypatch):
    monkeypatch.setattr(fast, "LARGE_IMAGE", 1)
    net = autoencoder(64, 64)
    weight = net.decoder.up_blocks[1].resnets[0].conv1.weight
    weight.set_data(ms.Tensor(np.full(weight.shape, np.nan, np.float32)))
    with pytest.raises(PixArtNBError, match="the output of the VAE's decoder is not finite"):
        net.decode(np.zeros((1, 4, 4, 4), np.float32))
