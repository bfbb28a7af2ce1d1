"""What the weights are moved by: AdamW, clipping, schedules, the average."""

import numpy as np
import pytest
from mindspore import mint

from pixart_nb.core.backend import ms
from pixart_nb.core.training.optimizers import (
    EMA,
    AdamW,
    LossScale,
    clip_by_norm,
    global_norm,
    learning_rate,
    scaled_rate,
)


@pytest.mark.parametrize(("decay", "eps"), [(0.0, 1e-10), (0.1, 1e-8), (0.01, 1e-2)])
def test_adamw_follows_its_paper(decay, eps):
    """Loshchilov and Hutter 2019, Algorithm 2, in float64."""
    rng = np.random.default_rng(0)
    weight = ms.Parameter(ms.Tensor(rng.standard_normal((5, 7)).astype(np.float32)), name="w")
    expected, m, v = weight.asnumpy().astype(np.float64), 0.0, 0.0
    optimizer = AdamW({"w": weight}, (0.9, 0.95), eps, decay)
    for t in range(1, 40):
        gradient = rng.standard_normal((5, 7)).astype(np.float32) * 10.0 ** (t % 5 - 3)
        rate = 1e-2 / t
        optimizer.update({"w": ms.Tensor(gradient.astype(np.float32))}, rate)
        g = gradient.astype(np.float32).astype(np.float64)
        expected = expected * (1 - rate * decay)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        expected = expected - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + eps)
        assert np.abs(weight.asnumpy() - expected).max() < 2e-6, t


def test_a_learning_rate_of_zero_moves_nothing_but_is_remembered():
    weight = ms.Parameter(ms.Tensor(np.ones(3, np.float32)), name="w")
    optimizer = AdamW({"w": weight}, weight_decay=0.1)
    optimizer.update({"w": ms.Tensor(np.ones(3, np.float32))}, 0.0)
    assert np.array_equal(weight.asnumpy(), np.ones(3))
    assert optimizer.state()["exp_avg/w"].asnumpy() == pytest.approx(np.full(3, 0.1))


def test_clipping_bounds_the_norm_and_keeps_the_direction():
    gradients = [ms.Tensor(np.array([3.0, 0.0], np.float32)), ms.Tensor(np.array([[4.0]], np.float32))]
    norm = global_norm(gradients)
    assert norm == pytest.approx(5.0)
    assert np.array_equal(clip_by_norm(gradients, norm, 10.0)[1].asnumpy(), [[4.0]])
    assert np.array_equal(clip_by_norm(gradients, norm, None)[1].asnumpy(), [[4.0]])
    clipped = clip_by_norm(gradients, norm, 1.0)
    assert global_norm(clipped) == pytest.approx(1.0, abs=1e-5)
    assert clipped[0].asnumpy() == pytest.approx([0.6, 0.0], abs=1e-5)


def test_a_gradient_that_is_a_part_of_another_tensor_is_clipped_and_leaves_that_as_it_was():
    whole = ms.Tensor(np.arange(12, dtype=np.float32).reshape(3, 4))
    for part in (mint.transpose(whole, 0, 1), mint.split(whole, 2, 1)[1], whole[1:]):
        before = part.asnumpy().copy()
        (clipped,) = clip_by_norm([part], float(np.linalg.norm(before)), 1.0)
        np.testing.assert_allclose(clipped.asnumpy(), before / np.linalg.norm(before), rtol=1e-5)
        np.testing.assert_array_equal(whole.asnumpy().reshape(-1), np.arange(12))


def test_a_tensor_that_is_the_gradient_of_two_parameters_is_clipped_once():
    gradient = ms.Tensor(np.array([3.0, 4.0], np.float32))
    clipped = clip_by_norm([gradient, gradient], 5 * 2**0.5, 1.0)
    np.testing.assert_allclose(clipped[1].asnumpy(), np.array([0.6, 0.8]) / 2**0.5, rtol=1e-5)


def test_a_scaled_gradient_is_clipped_by_the_norm_it_really_has():
    gradients = [ms.Tensor(np.array([1536.0, 2048.0], np.float16))]
    norm = global_norm(gradients)
    assert norm == pytest.approx(5.0 * 512)
    whole = clip_by_norm(gradients, norm, 10.0, 1 / 512)[0]
    assert whole.dtype == ms.float32
    assert whole.asnumpy() == pytest.approx([3.0, 4.0])
    assert gradients[0].asnumpy() == pytest.approx([1536.0, 2048.0])
    assert clip_by_norm(gradients, norm, 0.5, 1 / 512)[0].asnumpy() == pytest.approx([0.3, 0.4], abs=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_none_shows_in_the_norm(bad):
    values = np.zeros(100_000, np.float32)
    values[77_777] = bad
    assert not np.isfinite(global_norm([ms.Tensor(np.ones(3, np.float32)), ms.Tensor(values)]))


def test_the_average_follows_the_weights_and_owns_its_memory():
    weight = ms.Parameter(ms.Tensor(np.zeros(200_000, np.float32)), name="w")
    ema = EMA({"w": weight}, rate=0.5)
    weight.set_data(ms.Tensor(np.ones(200_000, np.float32)))
    assert not ema.arrays()["w"].any()
    for _ in range(3):
        ema.update()
    first, second, third = 2 / 11, 3 / 12, 4 / 13  # the rate rises with the number of updates
    assert np.allclose(ema.arrays()["w"], 1 - first * second * third, atol=1e-6)
    with pytest.raises(ValueError, match="EMA rate is 1"):
        EMA({"w": weight}, rate=1.0)


def test_the_learning_rate_warms_up_and_falls():
    rates = [learning_rate(step, 1.0, 10, 110, "cosine") for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[60] == pytest.approx(0.5)
    assert rates[-1] < 1e-3
    straight = [learning_rate(step, 1.0, 10, 110, "linear", 0.2) for step in range(120)]
    assert straight[60] == pytest.approx(0.6)
    assert straight[110:] == [pytest.approx(0.2)] * 10
    assert learning_rate(99, 1.0, 0, 100, "constant") == 1.0
    with pytest.raises(ValueError, match="'constant', 'cosine' or 'linear'"):
        learning_rate(5, 1.0, 0, 10, "polynomial")


def test_a_rate_is_scaled_with_the_images_of_an_update():
    assert scaled_rate(2e-5, 64, "") == 2e-5
    assert scaled_rate(2e-5, 64, "sqrt") == pytest.approx(1e-5)
    assert scaled_rate(2e-5, 64, "linear") == pytest.approx(5e-6)
    with pytest.raises(ValueError, match="'linear', 'sqrt' or nothing"):
        scaled_rate(2e-5, 64, "cube")


def test_a_loss_scale_falls_at_an_overflow_and_rises_after_a_while():
    scale = LossScale(8.0, dynamic=True, factor=2.0, window=3)
    assert scale.used
    assert scale.overflowed()
    assert scale.value == 4.0
    for _ in range(3):
        scale.succeeded()
    assert (scale.value, scale.good) == (8.0, 0)
    scale.succeeded()
    assert scale.overflowed()
    assert scale.good == 0
    while scale.value > 1:
        assert scale.overflowed()
    assert not scale.overflowed()  # it is not the scale
    fixed = LossScale(128.0)
    assert fixed.used
    assert not fixed.overflowed()
    assert not LossScale().used
    with pytest.raises(ValueError, match="factor above 1"):
        LossScale(2.0, True, factor=1.0)
