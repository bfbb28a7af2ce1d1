"""The autoencoder gives the reference's moments and images."""

import numpy as np
import pytest
from reference_data import FORWARD, diffusers, relative_error

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.components import LOADERS, write_vae
from pixart_nb.core.checkpoints.key_maps import rename_vae
from pixart_nb.core.models.vae import AutoencoderKL, DiagonalGaussian, VAEConfig


def autoencoder(name="sigma"):
    return LOADERS["vae"](diffusers(name)[0] / "vae", ms.float32)


@pytest.mark.parametrize("name", ["sigma", "alpha"])
def test_moments_and_images_equal_the_reference(name):
    _, _, golden = diffusers(name)
    net = autoencoder(name)
    distribution = net.encode(ms.Tensor(golden["vae_in"]))[0]
    assert relative_error(distribution.mean.asnumpy(), golden["vae_mean"]) < FORWARD
    assert relative_error(distribution.logvar.asnumpy(), golden["vae_logvar"]) < FORWARD
    latents = ms.Tensor(golden["dpm++2m/trajectory"][-1]) / net.config.scaling_factor
    assert relative_error(net.decode(latents)[0].asnumpy(), golden["decoded"]) < FORWARD


def test_samples_of_the_latents_have_the_mean_and_spread_that_were_said():
    distribution = autoencoder().encode(ms.Tensor(diffusers("sigma")[2]["vae_in"]))[0]
    rng = np.random.default_rng(0)
    draws = np.stack([distribution.sample(rng).asnumpy() for _ in range(400)])
    spread = np.exp(0.5 * distribution.logvar.asnumpy())
    assert np.abs(draws.mean(0) - distribution.mean.asnumpy()).max() < 5 * spread.max() / 20
    assert relative_error(draws.std(0), spread) < 0.1
    assert np.array_equal(distribution.mode().asnumpy(), distribution.mean.asnumpy())


def test_a_fresh_autoencoder_keeps_the_blocks_of_a_image():
    net = AutoencoderKL(VAEConfig(block_out_channels=(8, 16, 32, 32), layers_per_block=1, norm_num_groups=4))
    net.initialize(np.random.default_rng(0))
    cells = np.random.default_rng(1).uniform(-1, 1, (1, 3, 4, 6)).astype(np.float32)
    image = ms.Tensor(cells.repeat(8, 2).repeat(8, 3))
    out = net.decode(net.encode(image)[0].mode())[0].asnumpy()
    assert out.shape == (1, 3, 32, 48)
    inside = out.reshape(1, 3, 4, 8, 6, 8)
    assert inside.std((3, 5)).max() < 1e-4
    assert out.std() > 0.1


@pytest.mark.parametrize(
    ("shape", "message"), [((1, 3, 20, 16), "multiples of 8"), ((1, 1, 16, 16), r"\(N, 3, H, W\)")]
)
def test_images_that_cannot_be_encoded_say_why(shape, message):
    with pytest.raises(ValueError, match=message):
        autoencoder().encode(ms.Tensor(np.zeros(shape, np.float32)))


def test_latents_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"\(N, 4, h, w\)"):
        autoencoder().decode(ms.Tensor(np.zeros((1, 3, 4, 4), np.float32)))


def test_names_of_older_autoencoders_are_understood():
    weight = np.arange(4.0).reshape(2, 2, 1, 1)
    out = rename_vae({"decoder.mid_block.attentions.0.proj_attn.weight": weight, "decoder.conv_in.weight": weight})
    assert out["decoder.mid_block.attentions.0.to_out.0.weight"].shape == (2, 2)
    assert out["decoder.conv_in.weight"].shape == (2, 2, 1, 1)


def test_a_written_autoencoder_is_read_back_the_same(tmp_path):
    net = autoencoder()
    write_vae(tmp_path / "vae", net)
    again = LOADERS["vae"](tmp_path / "vae", ms.float32)
    assert again.config == net.config
    pairs = zip(net.get_parameters(), again.get_parameters(), strict=True)
    assert all(np.array_equal(a.asnumpy(), b.asnumpy()) for a, b in pairs)


def test_the_gradient_predicts_the_change_of_the_loss():
    net = autoencoder()
    image = ms.Tensor(diffusers("sigma")[2]["vae_in"][:, :, :16, :24])
    noise = ms.Tensor(np.ones((1, 4, 2, 3), np.float32))

    def loss(image, noise):
        out, moments = net(image, noise)
        return ((out - image) ** 2).mean() + 1e-3 * (moments**2).mean()

    parameters = dict(net.parameters_and_names())
    for name in ("encoder.conv_in.weight", "decoder.up_blocks.1.upsamplers.0.conv.weight"):
        weight = parameters[name]
        slope = ms.grad(loss, None, weight)(image, noise).asnumpy().astype(np.float64)
        before, direction = weight.asnumpy().copy(), slope / np.linalg.norm(slope)
        values = []
        for step in (0.01, -0.01):
            weight.set_data(ms.Tensor((before + step * direction).astype(np.float32)))
            values.append(float(loss(image, noise)))
        weight.set_data(ms.Tensor(before))
        assert (values[0] - values[1]) / 0.02 == pytest.approx(np.linalg.norm(slope), rel=0.02)


def test_attention_in_chunks_gives_the_same_image(monkeypatch):
    net = autoencoder()
    latents = ms.Tensor(diffusers("sigma")[2]["dpm++2m/trajectory"][-1][:1])
    whole = net.decode(latents)[0].asnumpy()
    monkeypatch.setattr(backend, "ATTENTION_CHUNK_BYTES", 4 * 384 * 50)  # 50 of the 16 * 24 queries at a time
    assert relative_error(net.decode(latents)[0].asnumpy(), whole) < 1e-6


def test_log_variance_is_clipped():
    moments = np.zeros((1, 8, 1, 2), np.float32)
    moments[:, 4:, 0] = [-100, 100]
    logvar = DiagonalGaussian(ms.Tensor(moments)).logvar.asnumpy()
    assert np.array_equal(logvar[0, :, 0], [[-30, 20]] * 4)
