"""Sampling that begins with a picture: noise as the first step expects it, and only the last steps."""

import numpy as np
import pytest
from reference_data import diffusers

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.config import SAMPLING_METHODS
from pixart_nb.core.sampling.images import resize_latents
from pixart_nb.core.sampling.samplers import Prediction, scales
from pixart_nb.core.sampling.schedulers import as_scheduler

SIZE = {"height": 64, "width": 96, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe():
    return PixArtSigmaPipeline.from_pretrained(diffusers("sigma")[0], vae=None)


def latents(seed, height=8, width=12):
    return np.random.default_rng(seed).standard_normal((1, 4, height, width), np.float32)


@pytest.mark.parametrize("method", sorted(set(SAMPLING_METHODS) - {"dmd"}))
def test_the_model_first_sees_the_picture_as_noisy_as_the_first_step_that_is_taken(method):
    scheduler, seen = as_scheduler(method), []
    plan = scheduler.plan(8).last(0.5)
    assert len(plan) == 4
    picture, noise = latents(1), latents(2)

    def predict(x, timestep):
        seen.append(x)
        return Prediction(noise, np.zeros_like(noise))

    list(scheduler.steps(predict, scheduler.noised(picture, noise, plan), plan, np.random.default_rng(0)))
    signal, scale = scales(float(plan.sigmas[0, 0]))
    assert 0.1 < signal < 1
    np.testing.assert_allclose(seen[0], signal * picture + scale * noise, rtol=1e-4, atol=1e-5)


def test_the_last_steps_of_the_plan_are_taken_and_little_strength_keeps_the_picture(pipe):
    whole = pipe.plan(20).timesteps
    drawn = {}
    for strength in (0.05, 0.5, 1.0):
        rng = np.random.default_rng(3)
        steps = pipe.sample(
            "a cup", num_inference_steps=20, image_latents=latents(1), strength=strength, generator=rng, **SIZE
        )
        records = list(steps)[1:]
        assert [step.timestep for step in records] == whole[-round(20 * strength) :].tolist()
        drawn[strength] = np.abs(records[-1].latents - latents(1)).mean()
    assert drawn[0.05] < drawn[0.5]


@pytest.mark.parametrize("strength", [0, -1, 1.5])
def test_a_strength_that_is_none_is_refused(pipe, strength):
    with pytest.raises(ValueError, match=r"strength is .*; expected above 0"):
        pipe.sample("a cup", image_latents=latents(1), strength=strength, **SIZE)


def test_a_mask_without_an_image_is_refused(pipe):
    with pytest.raises(ValueError, match="mask was given without image_latents"):
        pipe.sample("a cup", mask=np.ones((1, 1, 8, 12)), **SIZE)


def test_a_start_of_another_size_is_refused(pipe):
    with pytest.raises(ValueError, match=r"latents have shape \(1, 4, 8, 8\); expected \(1, 4, 8, 12\)"):
        pipe.sample("a cup", image_latents=latents(1, 8, 8), **SIZE)


def test_enlarging_repeats_cells_and_refuses_to_stretch():
    small = latents(0, 3, 2)
    assert np.array_equal(resize_latents(small, 6, 4), small.repeat(2, 2).repeat(2, 3))
    assert np.array_equal(resize_latents(small, 3, 2), small)
    assert resize_latents(small, 10, 7).shape == (1, 4, 10, 7)
    with pytest.raises(ValueError, match=r"24x16 \(height x width\), and 64x64 is drawn, which would stretch it"):
        resize_latents(small, 8, 8)
