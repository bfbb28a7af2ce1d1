"""The training loss is the official one."""

import numpy as np
import pytest
from mindspore import mint, ops
from reference_data import FORWARD, REFERENCE, relative_error

from pixart_nb.core import training_losses
from pixart_nb.core.backend import ms

GOLDEN = dict(np.load(REFERENCE / "official" / "diffusion.npz"))


def analytic_model(x, timestep):
    """eps = tanh(0.3 x) + t / 5000, v = sin(0.5 x); tanh by sigmoid, which is exact on the CPU."""
    noise = 2 * ops.sigmoid(0.6 * x) - 1 + timestep.astype(ms.float32).reshape(-1, 1, 1, 1) / 5000
    return mint.cat((noise, ops.sin(0.5 * x)), 1)


def losses(model=analytic_model, **changes):
    arrays = {name: ms.Tensor(GOLDEN[f"train/{name}"]) for name in ("x_start", "t", "noise")} | changes
    return training_losses(model, arrays["x_start"], arrays["t"], arrays["noise"])


@pytest.mark.parametrize("name", ["mse", "vb", "loss"])
def test_each_term_equals_the_official_one_at_every_timestep(name):
    term = losses()[name].asnumpy()
    assert term.shape == (6,)
    assert relative_error(term, GOLDEN[f"train/{name}"]) < FORWARD
    assert np.abs(term / GOLDEN[f"train/{name}"] - 1).max() < FORWARD


def test_the_model_sees_the_noised_image():
    seen = []

    def model(x, t):
        seen.append(x.asnumpy())
        return analytic_model(x, t)

    losses(model)
    assert relative_error(seen[0], GOLDEN["train/x_t"]) < FORWARD


def test_the_bound_moves_the_variance_and_not_the_noise():
    weights = ms.Tensor(np.array([1.0, 1.0], np.float32))

    def bound(w):
        def model(x, t):
            out = analytic_model(x, t)
            return mint.cat((out[:, :4] * w[0], out[:, 4:] * w[1]), 1)

        return losses(model)["vb"].sum()

    noise, variance = ms.grad(bound)(weights).asnumpy()
    assert noise == 0.0
    assert abs(variance) > 1e-3


@pytest.mark.parametrize("timestep", [np.array([1000]), np.array([-1]), np.array([[1]])])
def test_timesteps_outside_the_schedule_are_refused(timestep):
    x = ms.Tensor(np.zeros((1, 4, 8, 8), np.float32))
    with pytest.raises(ValueError, match=r"0\.\.999"):
        training_losses(analytic_model, x, timestep, x)
