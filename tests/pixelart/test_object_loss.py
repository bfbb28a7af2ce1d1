"""The loss of the bundled models: weights of timesteps and cells, the head that names objects, gradients."""

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.models.transformer import PixArt, PixArtConfig
from pixart_nb.core.sampling.noise_schedule import LINEAR
from pixart_nb.core.training.loss import NOISE, SIGNAL, coefficients, diffusion_loss
from pixart_nb.pixelart.object_loss import (
    DECIDING,
    cell_weights,
    cut,
    draw_timesteps,
    name_head,
    object_loss,
    object_windows,
    timestep_weights,
    token_names,
)
from pixart_nb.pixelart.objects import OBJECTS

CONFIG = PixArtConfig(hidden_size=24, num_heads=2, depth=2, caption_channels=8, input_size=8)


def test_a_timestep_weighs_as_the_error_of_the_velocity_up_to_a_limit():
    rng, t = np.random.default_rng(0), np.array([100, 400, 600])
    table = coefficients(t)
    x, noise, predicted = rng.standard_normal((3, 3))
    x_t = table[:, SIGNAL] * x + table[:, NOISE] * noise
    found = (x_t - table[:, NOISE] * predicted) / table[:, SIGNAL]
    velocity = table[:, SIGNAL] * (noise - predicted) - table[:, NOISE] * (x - found)
    np.testing.assert_allclose(timestep_weights(t) * (noise - predicted) ** 2, velocity**2, rtol=1e-4)
    assert timestep_weights(np.array([999]))[0] == 200 < 1 / LINEAR.alphas_cumprod[999]


def test_most_timesteps_are_those_that_decide_objects():
    t = draw_timesteps(np.random.default_rng(0), 20_000, 0.7)
    inside = (t >= DECIDING[0]) & (t < DECIDING[1])
    expected = 0.7 + 0.3 * (DECIDING[1] - DECIDING[0]) / 1000
    assert abs(inside.mean() - expected) < 0.02 and t.min() < 20 and t.max() > 980


def test_cells_of_objects_weigh_more_and_all_cells_one_on_average():
    objects = np.full((2, 4, 6), -1, np.int8)
    objects[0, :2, :3] = 7
    weights = cell_weights(objects)
    assert weights.shape == (2, 1, 4, 6)
    np.testing.assert_allclose(weights.mean((1, 2, 3)), 1, rtol=1e-6)
    np.testing.assert_allclose(weights[0, 0, 0, 0] / weights[0, 0, 3, 5], 5, rtol=1e-6)


def test_a_token_is_named_after_what_half_of_its_cells_show():
    objects = np.full((1, 4, 4), -1, np.int8)
    objects[0, 0, :2] = 3  # half of the first token
    objects[0, 2, 2] = 5  # a quarter of the last
    objects[0, :2, 2:] = 9
    assert token_names(objects).tolist() == [[3, 9, len(OBJECTS), len(OBJECTS)]]


def test_without_weights_and_head_the_loss_is_that_of_the_published_training():
    net = PixArt(CONFIG)
    net.initialize(np.random.default_rng(0), zero_cross_attention=False)
    rng = np.random.default_rng(1)
    net.final_layer.linear.weight.set_data(ms.Tensor(0.1 * rng.standard_normal((32, 24)), ms.float32))
    t = np.array([300, 700])
    latents, noise = rng.standard_normal((2, 2, 4, 8, 8)).astype(np.float32)
    caption, mask = rng.standard_normal((2, 5, 8)).astype(np.float32), np.ones((2, 5), bool)
    batch = [ms.Tensor(a) for a in (latents, noise, coefficients(t), t.astype(np.float32), caption, mask)]
    objects = np.full((2, 8, 8), -1, np.int8)
    further = [ms.Tensor(a) for a in (np.ones(2, np.float32), cell_weights(objects), token_names(objects))]
    positions, head = net.positions(8, 8), name_head(24, 0)
    _, mse, vb, names = object_loss(net, head, positions)(*batch, *further)
    _, plain_mse, plain_vb = diffusion_loss(net, positions)(*batch)
    np.testing.assert_allclose([float(mse), float(vb)], [float(plain_mse), float(plain_vb)], rtol=1e-5)
    assert 0 < float(names) < 2 * np.log(len(OBJECTS) + 1)


def test_the_head_teaches_the_blocks_before_it():
    net, head = PixArt(CONFIG), name_head(24, 0)
    net.initialize(np.random.default_rng(0), zero_cross_attention=False)  # the last layer is zero
    rng, t = np.random.default_rng(1), np.array([600])
    latents, noise = rng.standard_normal((2, 1, 4, 8, 8)).astype(np.float32)
    objects = np.zeros((1, 8, 8), np.int8)
    arrays = (
        latents, noise, coefficients(t), t.astype(np.float32), np.ones((1, 3, 8), np.float32), np.ones((1, 3), bool),
        timestep_weights(t), cell_weights(objects), token_names(objects),
    )  # fmt: skip
    loss = object_loss(net, head, net.positions(8, 8))
    weights = [net.blocks[0].mlp.fc1.weight, net.blocks[1].mlp.fc1.weight]
    gradients = ms.value_and_grad(loss, None, weights, has_aux=True)(*map(ms.Tensor, arrays))[1]
    before, after = (float(abs(gradient).max()) for gradient in gradients)
    assert before > 0 and after == 0  # with the last layer at zero only the head gives gradients


def test_windows_lie_near_an_object_and_inside_the_image():
    objects = np.full((60, 32, 48), -1, np.int8)
    objects[:, 20:30, 30:46] = 4
    corners = object_windows(objects, 10, np.random.default_rng(0))
    assert corners.min() >= 0 and (corners <= np.array([16, 24]) - 10).all()
    assert len(np.unique(corners, axis=0)) > 5  # they vary
    shown = cut(objects, 2 * corners, 20)
    assert shown.shape == (60, 20, 20) and ((shown >= 0).sum((1, 2)) >= 60).all()


def test_a_window_at_its_place_gives_the_loss_of_its_tokens():
    """A model that looks at nothing but its token has the same output in a window as in the image."""
    net, head = PixArt(CONFIG), name_head(24, 0)
    net.initialize(np.random.default_rng(0), zero_cross_attention=False)
    rng = np.random.default_rng(1)
    net.final_layer.linear.weight.set_data(ms.Tensor(0.1 * rng.standard_normal((32, 24)), ms.float32))
    for block in net.blocks:
        block.attn.proj.weight.set_data(ms.Tensor(np.zeros((24, 24), np.float32)))
    latents, noise = rng.standard_normal((2, 1, 4, 8, 8)).astype(np.float32)
    t, objects = np.array([500]), np.zeros((1, 8, 8), np.int8)
    text = np.ones((1, 3, 8), np.float32), np.ones((1, 3), bool)
    positions = net.positions(8, 8).asnumpy().reshape(4, 4, 24)
    losses = []
    for y, x in ((0, 0), (0, 2), (2, 0), (2, 2)):
        corner = np.array([[2 * y, 2 * x]])
        parts = (cut(grid, corner, 4) for grid in (latents, noise))
        further = (timestep_weights(t), cell_weights(objects[:, :4, :4]), token_names(objects[:, :4, :4]))
        own = positions[y : y + 2, x : x + 2].reshape(1, 4, 24)
        arrays = (*parts, coefficients(t), t.astype(np.float32), *text, *further, own)
        losses.append(float(object_loss(net, head)(*map(ms.Tensor, arrays))[1]))
    further = (timestep_weights(t), cell_weights(objects), token_names(objects))
    whole = (latents, noise, coefficients(t), t.astype(np.float32), *text, *further)
    expected = float(object_loss(net, head, net.positions(8, 8))(*map(ms.Tensor, whole))[1])
    np.testing.assert_allclose(np.mean(losses), expected, rtol=1e-5)
