"""Schedules and solvers have the properties that their equations promise."""

import numpy as np
import pytest
from reference_data import REFERENCE, relative_error

from pixart_nb.core.sampling.schedule import LINEAR, NoiseSchedule
from pixart_nb.core.sampling.solvers import dpm_solver_2m, linspace_timesteps

GOLDEN = dict(np.load(REFERENCE / "official" / "diffusion.npz"))


def gaussian_noise_prediction(mean, spread):
    """The exact noise prediction where the data are normal: E[noise | x_t]."""

    def predict(latents, timestep):
        alpha = LINEAR.alphas_cumprod[int(timestep)]
        variance = alpha * spread**2 + 1 - alpha
        return (np.sqrt(1 - alpha) * (latents - np.sqrt(alpha) * mean) / variance).astype(np.float32)

    return predict


def exact_end(latents, mean, spread):
    """Where the probability-flow ODE of normal data carries the latents from the first timestep."""
    alpha = LINEAR.alphas_cumprod[999]
    return mean + spread * (latents - np.sqrt(alpha) * mean) / np.sqrt(alpha * spread**2 + 1 - alpha)


def test_noising_matches_the_official_schedule():
    t = GOLDEN["train/t"]
    alpha = LINEAR.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    x_t = np.sqrt(alpha) * GOLDEN["train/x_start"] + np.sqrt(1 - alpha) * GOLDEN["train/noise"]
    assert relative_error(x_t, GOLDEN["train/x_t"]) < 1e-6


def test_a_single_picture_is_found_exactly_in_any_number_of_steps():
    start = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)
    target = np.random.default_rng(1).standard_normal((1, 4, 8, 8), dtype=np.float32)
    for count in (1, 2, 7):
        steps = list(
            dpm_solver_2m(gaussian_noise_prediction(target, 0.0), start, linspace_timesteps(count, 1000))
        )
        assert relative_error(steps[-1].latents, target) < 1e-4
        assert relative_error(steps[0].denoised, target) < 1e-2


def test_the_error_falls_with_the_square_of_the_number_of_steps():
    start = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)
    truth = exact_end(start, 0.3, 0.5)
    errors = []
    for count in (10, 20, 40):
        for step in dpm_solver_2m(
            gaussian_noise_prediction(0.3, 0.5), start, linspace_timesteps(count, 1000)
        ):
            last = step
        errors.append(relative_error(last.latents, truth))
    assert errors[0] > 2.5 * errors[1] > 2.5 * 2.5 * errors[2]


def test_steps_are_numbered_and_fall():
    steps = list(
        dpm_solver_2m(gaussian_noise_prediction(0, 1), np.ones((1, 4, 2, 2), np.float32), np.array([900, 20]))
    )
    assert [(s.index, s.timestep) for s in steps] == [(0, 900.0), (1, 20.0)]


@pytest.mark.parametrize("count", [0, 1000])
def test_impossible_numbers_of_steps_are_refused(count):
    with pytest.raises(ValueError, match="expected 1 to 999"):
        linspace_timesteps(count, 1000)


def test_an_impossible_schedule_is_refused():
    with pytest.raises(ValueError, match="0 < start <= end < 1"):
        NoiseSchedule(0.02, 0.0001)
