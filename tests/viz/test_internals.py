"""Views of a trajectory, of positions and of modulation show the numbers they are given."""

import numpy as np
import pytest
from viz_figures import check_layout, shown

from pixart_nb.viz.figures import image_differences
from pixart_nb.viz.internals import (
    MODULATION,
    denoising_trajectory,
    position_interpolation,
    timestep_modulation,
    trajectory_numbers,
)

RNG = np.random.default_rng(0)
LATENTS, DENOISED, GUIDANCE = (RNG.standard_normal((count, 4, 6, 8)) for count in (13, 12, 12))
TIMESTEPS = np.linspace(999, 80, 12)


def test_numbers_are_root_mean_squares_and_cosines():
    numbers = trajectory_numbers(LATENTS, DENOISED, GUIDANCE)
    rms = lambda x: np.sqrt(np.mean(x**2))  # noqa: E731
    for step in range(12):
        assert numbers["latents"][step] == pytest.approx(rms(LATENTS[step + 1]))
        assert numbers["step"][step] == pytest.approx(rms(LATENTS[step + 1] - LATENTS[step]))
        assert numbers["distance"][step] == pytest.approx(rms(DENOISED[step] - DENOISED[-1]))
        assert numbers["guidance"][step] == pytest.approx(rms(GUIDANCE[step]))
    a, b = GUIDANCE[4].ravel(), GUIDANCE[3].ravel()
    assert numbers["turn"][4] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert numbers["change"][4] == pytest.approx(rms(DENOISED[4] - DENOISED[3]))
    assert np.isnan(numbers["turn"][0]) and np.isnan(numbers["change"][0])


def test_the_trajectory_has_at_most_ten_images_and_all_numbers():
    images = RNG.random((12, 12, 16, 3))
    figure = denoising_trajectory(images, TIMESTEPS, LATENTS, DENOISED, GUIDANCE)
    strip = [place for place in figure.axes if place.images]
    assert len(strip) == 10
    np.testing.assert_array_equal(shown(strip[0]), images[0])
    np.testing.assert_array_equal(shown(strip[-1]), images[-1])
    numbers = trajectory_numbers(LATENTS, DENOISED, GUIDANCE)
    lines = {line.get_label(): line.get_ydata() for place in figure.axes for line in place.lines}
    np.testing.assert_array_equal(lines["moved by this step"], numbers["step"])
    np.testing.assert_array_equal(lines["guidance, with the step before"], numbers["turn"])
    assert len(lines) == 7
    check_layout(figure)


def test_without_guidance_there_is_no_panel_for_it():
    figure = denoising_trajectory(RNG.random((12, 8, 8, 3)), TIMESTEPS, LATENTS, DENOISED)
    assert [place.get_ylabel() for place in figure.axes if place.lines] == ["size, rms", "distance, rms"]


def test_a_trajectory_of_one_step_has_no_changes():
    images = RNG.random((1, 8, 8, 3))
    numbers = trajectory_numbers(LATENTS[:2], DENOISED[:1], GUIDANCE[:1])
    assert all(len(values) == 1 for values in numbers.values())
    assert np.isnan(numbers["change"]) and np.isnan(numbers["turn"]) and numbers["distance"] == 0
    check_layout(denoising_trajectory(images, TIMESTEPS[:1], LATENTS[:2], DENOISED[:1], GUIDANCE[:1]))


def test_latents_must_have_the_start_too():
    with pytest.raises(ValueError, match="latents after the first as predicted images, got 11 for 12"):
        trajectory_numbers(LATENTS[1:], DENOISED)


def test_positions_of_two_grids_share_one_scale():
    small, large = RNG.uniform(-1, 1, (4, 6, 32)), RNG.uniform(-1, 1, (16, 24, 32))
    figure = position_interpolation(small, large, ("256", "4K"), (0, 9))
    images = [place for place in figure.axes if place.images]
    np.testing.assert_array_equal(shown(images[1]), small[..., 9])
    np.testing.assert_array_equal(shown(images[4]), large[..., 9])
    assert {images[k].images[0].get_clim() for k in (0, 1, 3, 4)} == {(-1, 1)}
    unit = small / np.linalg.norm(small, axis=-1, keepdims=True)
    np.testing.assert_allclose(shown(images[2]), unit @ unit[2, 3])
    curves = {line.get_label(): line for place in figure.axes for line in place.lines}
    np.testing.assert_array_equal(curves["256"].get_ydata(), small[2, :, 0])
    np.testing.assert_allclose(curves["4K"].get_xdata(), np.arange(24) / 24)
    check_layout(figure)


def test_a_channel_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"no channels \[32\]; the embedding has 32"):
        position_interpolation(np.zeros((2, 2, 32)), np.zeros((4, 4, 32)), ("a", "b"), (0, 32))


@pytest.mark.parametrize("layers", [6, 28])
def test_modulation_has_a_panel_for_each_of_its_six_parts(layers):
    values = RNG.standard_normal((9, layers, 6, 16))
    figure = timestep_modulation(values, np.linspace(999, 0, 9))
    panels = [place for place in figure.axes if place.get_title() in MODULATION]
    assert [place.get_title() for place in panels] == list(MODULATION)
    for number, place in enumerate(panels):
        np.testing.assert_allclose(shown(place), np.sqrt((values[:, :, number] ** 2).mean(-1)).T)
    assert panels[0].get_yticklabels()[0].get_text() == "0"
    check_layout(figure)


def test_modulation_of_another_number_of_parts_is_refused():
    with pytest.raises(ValueError, match=r"expected \(3 timesteps, layers, 6, D\)"):
        timestep_modulation(np.zeros((3, 2, 5, 4)), [3, 2, 1])


def test_differences_are_means_over_colours_on_one_scale():
    first, second = RNG.random((2, 8, 12, 3))
    rows = {"seed 0": (first, second), "head 3 off": (first, first)}
    figure = image_differences(rows, ("before", "after"))
    np.testing.assert_allclose(shown(figure.axes[2]), np.abs(second - first).mean(2))
    assert shown(figure.axes[5]).max() == 0
    assert {figure.axes[k].images[0].get_clim() for k in (2, 5)} == {(0, np.abs(second - first).mean(2).max())}
    assert figure.axes[5].get_title() == "difference, rms 0.000"
    assert [figure.axes[k].get_ylabel() for k in (0, 3)] == list(rows)
    assert [figure.axes[k].get_title() for k in (0, 1)] == ["before", "after"]
    check_layout(figure)
    wide = RNG.random((2, 8, 16, 3))
    check_layout(image_differences({"the first of the cross-attention heads off": wide, "another": wide}))


def test_images_of_two_sizes_have_no_difference():
    with pytest.raises(ValueError, match="sizes must agree"):
        image_differences({"size": (np.zeros((8, 8, 3)), np.zeros((8, 9, 3)))})
