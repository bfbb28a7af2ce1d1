"""Noise, weights and batches of a diffusion training."""

from dataclasses import dataclass

import numpy as np
import pytest

from pixart_nb.core.backend import ms
from pixart_nb.core.data.reader import FeatureBatch
from pixart_nb.core.models.transformer import PixArt, PixArtConfig
from pixart_nb.core.sampling.noise_schedule import LINEAR
from pixart_nb.core.training.batches import DiffusionBatches, Noise
from pixart_nb.core.training.loss import diffusion_loss, min_snr_weights

CONFIG = PixArtConfig(hidden_size=32, num_heads=2, depth=1, caption_channels=6, input_size=8)
EMPTY = np.full((2, 6), 9.0, np.float16)


@dataclass
class Rows:
    """Features of the rows of a whole batch of four, from one row on."""

    first: int = 0
    count: int = 4

    def batch(self, step):
        rng = np.random.default_rng(step)
        lengths, part = [3, 5, 1, 4], slice(self.first, self.first + self.count)
        mean, std = rng.standard_normal((2, 4, 4, 8, 12), dtype=np.float32)
        embeds = rng.standard_normal((4, 5, 6), dtype=np.float32)
        mask = np.arange(5) < np.array(lengths)[:, None]
        return FeatureBatch(
            mean[part], abs(std)[part], embeds[part] * mask[part, :, None], mask[part], np.arange(4)[part]
        )


@pytest.fixture(scope="module")
def net():
    net = PixArt(CONFIG)
    net.initialize(np.random.default_rng(0), zero_cross_attention=False)
    return net


def test_a_batch_depends_on_its_number_and_seed_alone(net):
    batches = DiffusionBatches(Rows(), Noise(3), net, 0.5, EMPTY)
    for first, again in zip(batches(5), DiffusionBatches(Rows(), Noise(3), net, 0.5, EMPTY)(5), strict=True):
        assert np.array_equal(np.asarray(first), np.asarray(again))
    assert not np.array_equal(batches(5)[1], batches(6)[1])
    assert not np.array_equal(batches(5)[1], DiffusionBatches(Rows(), Noise(4), net, 0.5, EMPTY)(5)[1])


def test_a_worker_gets_its_rows_of_the_whole_batch(net):
    noise = Noise(3, offset=0.1, caption_drop=0.5)
    whole = DiffusionBatches(Rows(), noise, net, 0.5, EMPTY)(7)
    second = DiffusionBatches(Rows(2, 2), noise, net, 0.5, EMPTY, first_row=2)(7)
    for index, (all_rows, mine) in enumerate(zip(whole[:7], second[:7], strict=True)):
        if index in (4, 5):  # captions are padded to the longest of those that are there
            all_rows = all_rows[:, : mine.shape[1]]
        assert np.array_equal(all_rows[2:], mine)


def test_latents_are_drawn_anew_from_their_distribution_and_scaled(net):
    class Still(Rows):
        def batch(self, step):
            part = super().batch(0)
            return FeatureBatch(0 * part.mean + 2, 0 * part.std + 3, part.embeds, part.mask, part.indices)

    batches = DiffusionBatches(Still(), Noise(0), net, 0.5, EMPTY)
    drawn = np.stack([batches(number)[0] for number in range(30)])
    assert drawn.mean() == pytest.approx(1.0, abs=0.05)
    assert drawn.std() == pytest.approx(1.5, rel=0.05)
    assert not np.array_equal(drawn[0], drawn[1])


def test_a_dropped_caption_is_the_empty_one(net):
    all_dropped = DiffusionBatches(Rows(), Noise(0, caption_drop=1.0), net, 1.0, EMPTY)(0)
    assert all_dropped[4].shape == (4, 2, 6)
    assert (all_dropped[4] == 9).all()
    assert all_dropped[5].all()
    none = DiffusionBatches(Rows(), Noise(0, caption_drop=0.0), net, 1.0, EMPTY)(0)
    assert none[5].sum(1).tolist() == [3, 5, 1, 4]
    shares = [(DiffusionBatches(Rows(), Noise(0), net, 1.0, EMPTY)(k)[4][:, 0, 0] == 9).mean() for k in range(200)]
    assert np.mean(shares) == pytest.approx(0.1, abs=0.03)


def test_captions_of_compiled_graphs_have_few_lengths(net):
    batch = DiffusionBatches(Rows(), Noise(0, caption_drop=0.0), net, 1.0, EMPTY, length_multiple=20)(0)
    assert batch[4].shape == (4, 20, 6)
    assert batch[5].sum(1).tolist() == [3, 5, 1, 4]


def test_noise_offset_shifts_whole_channels():
    plain, shifted = (Noise(1, offset=offset).draw(0, 0, (64, 4, 8, 8))[3] for offset in (0.0, 0.5))
    difference = shifted - plain
    assert np.allclose(difference, difference[:, :, :1, :1], atol=1e-5)
    assert difference[:, :, 0, 0].std() == pytest.approx(0.5, rel=0.15)


def test_timesteps_reach_all_of_the_schedule():
    drawn = np.concatenate([Noise(0).draw(number, 0, (64, 1, 1, 1))[0] for number in range(60)])
    assert drawn.min() < 5
    assert drawn.max() > 994
    assert np.histogram(drawn, 4, (0, 1000))[0].min() > 850
    middle = np.concatenate([Noise(0, "logit_normal").draw(number, 0, (64, 1, 1, 1))[0] for number in range(20)])
    assert ((middle > 350) & (middle < 800)).mean() > 0.5


def test_min_snr_weights_are_those_of_the_paper():
    """Noise prediction: min(SNR, gamma) / SNR, 1 where there is little signal."""
    weights = min_snr_weights(5.0)
    alpha = LINEAR.alphas_cumprod
    for timestep in (0, 100, 250, 600, 999):
        snr = alpha[timestep] / (1 - alpha[timestep])
        assert weights(np.array([timestep]))[0] == pytest.approx(min(snr, 5.0) / snr)
    assert weights(np.array([999]))[0] == 1
    assert weights(np.array([0]))[0] < 1e-3
    with pytest.raises(ValueError, match="snr_gamma is 0"):
        min_snr_weights(0)


def test_the_loss_weighs_the_squared_error_and_not_the_bound(net):
    halves = DiffusionBatches(Rows(), Noise(0), net, 1.0, EMPTY, weights=lambda t: np.full(t.shape, 0.5))
    whole = DiffusionBatches(Rows(), Noise(0), net, 1.0, EMPTY)
    loss = diffusion_loss(net)
    half, full = (
        [float(v.asnumpy()) for v in loss(*(p if isinstance(p, ms.Tensor) else ms.Tensor(p) for p in b(0)))]
        for b in (halves, whole)
    )
    assert half[1:] == full[1:]
    assert full[0] == pytest.approx(full[1] + full[2])
    assert half[0] == pytest.approx(0.5 * full[1] + full[2])
