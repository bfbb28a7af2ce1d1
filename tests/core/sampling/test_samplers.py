"""Schedules and samplers have the properties that their equations promise."""

from functools import partial

import numpy as np
import pytest
from reference_data import REFERENCE, relative_error
from scipy.integrate import quad

from pixart_nb.core.sampling.noise_schedule import LINEAR, NoiseSchedule
from pixart_nb.core.sampling.samplers import (
    Prediction,
    StepSchedule,
    adams_weights,
    dpm_solver,
    draw_noise,
    iddpm_moments,
    lcm,
    sa_solver,
    scales,
    unipc,
)
from pixart_nb.core.sampling.schedulers import (
    DDIMScheduler,
    IDDPMScheduler,
    LCMScheduler,
    SASolverScheduler,
    scheduler_named,
)
from pixart_nb.core.sampling.sigma_samplers import deis

GOLDEN = dict(np.load(REFERENCE / "official" / "diffusion.npz"))
#: The samplers that add no noise of their own, or none when told so.
ODE = ["dpm++", "dpm++karras", "ddim", "euler", "unipc", "ddim-diffusers", "dpm", "sa-solver"]
ODE += ["heun", "dpm++2s", "dpm++3m", "deis", "lms", "pndm"]


def named(name: str):
    """A scheduler by its short name, SA-Solver as the ODE."""
    return SASolverScheduler(tau_func=lambda timestep: 0.0) if name == "sa-solver" else scheduler_named(name)


def unit_noise(seed=0, shape=(1, 4, 8, 8)):
    return np.random.default_rng(seed).standard_normal(shape)


def normal_data(plan, mean, spread, variance=None):
    """The exact noise prediction where the data are normal, E[noise | x_t], at the timesteps of a plan."""
    levels = dict(zip(plan.timesteps.tolist(), plan.sigmas[:, 0].tolist(), strict=True))

    def predict(latents, timestep):
        signal, noise = scales(levels[timestep])
        expected = noise * (latents - signal * mean) / ((signal * spread) ** 2 + noise**2)
        return Prediction(expected, None if variance is None else np.full_like(latents, variance))

    return predict


def carried(latents, mean, spread, start, end):
    """Where the probability-flow ODE of normal data carries latents from one noise level to another."""
    (signal, noise), (signal_end, noise_end) = scales(start), scales(end)
    grown = np.hypot(signal_end * spread, noise_end) / np.hypot(signal * spread, noise)
    return signal_end * mean + grown * (latents - signal * mean)


def last_of(steps):
    for step in steps:
        last = step
    return last


def samples(scheduler, count, mean, spread, rows=64, variance=None, **steps):
    """A plan, and all steps from many samples of pure noise: 16,384 independent values."""
    plan = scheduler.plan(count)
    predict = normal_data(plan, mean, spread, variance)
    latents = unit_noise(3, (rows, 4, 8, 8))
    return plan, list(scheduler.steps(predict, latents, plan, np.random.default_rng(4), **steps))


# ---- schedules


def test_noising_matches_the_official_schedule():
    t = GOLDEN["train/t"]
    alpha = LINEAR.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    x_t = np.sqrt(alpha) * GOLDEN["train/x_start"] + np.sqrt(1 - alpha) * GOLDEN["train/noise"]
    assert relative_error(x_t, GOLDEN["train/x_t"]) < 1e-6


def test_noise_levels_and_timesteps_are_each_others_inverse():
    timesteps = np.array([999, 640, 17, 0])
    assert np.allclose(LINEAR.timestep_of(LINEAR.sigma_at(timesteps)), timesteps)
    assert np.allclose(LINEAR.sigma_at(timesteps), LINEAR.sigmas[timesteps], rtol=1e-12)
    assert np.allclose(LINEAR.continuous_sigma_at(timesteps), LINEAR.sigmas[timesteps], rtol=1e-9)


def test_between_timesteps_the_official_solvers_take_the_geometric_mean_of_the_signal():
    between = np.sqrt(LINEAR.alphas_cumprod[0] * LINEAR.alphas_cumprod[1])
    assert LINEAR.continuous_sigma_at([0.5])[0] == pytest.approx(np.sqrt(1 / between - 1), rel=1e-9)
    assert abs(LINEAR.sigma_at([0.5])[0] / LINEAR.continuous_sigma_at([0.5])[0] - 1) > 0.01
    plan = scheduler_named("dpm").plan(timesteps=[0.5])
    assert plan.sigmas[0].tolist() == LINEAR.continuous_sigma_at([0.5, 0.0]).tolist()


def test_a_respaced_schedule_has_the_levels_of_the_timesteps_that_it_keeps():
    spaced = LINEAR.respaced([999, 500, 3])
    assert spaced.timesteps == (3, 500, 999)
    assert np.allclose(spaced.alphas_cumprod, LINEAR.alphas_cumprod[[3, 500, 999]])
    assert np.isfinite(LINEAR.respaced([400]).posterior_log_variance).all()


@pytest.mark.parametrize(("start", "end", "steps"), [(0.02, 1e-4, 1000), ("a", 0.02, 1000), (1e-4, 0.02, 1)])
def test_an_impossible_schedule_is_refused(start, end, steps):
    with pytest.raises(ValueError, match=r"0 < start <= end < 1|num_train_timesteps is 1"):
        NoiseSchedule(start, end, steps)


# ---- the official numbers


def analytic(latents, timestep):
    return Prediction(np.tanh(0.3 * latents) + timestep / 5000, np.sin(0.5 * latents))


def analytic_guided(latents, timestep):
    unconditional = np.tanh(0.3 * latents) + timestep / 5000
    return Prediction(unconditional + 4.5 * ((unconditional + 0.05) - unconditional))


def test_official_ddim_is_met():
    scheduler = scheduler_named("ddim")
    steps = list(scheduler.steps(analytic, GOLDEN["ddim10/noise"], scheduler.plan(10)))
    assert [step.timestep for step in steps] == GOLDEN["ddim10/timestep_map"][::-1].tolist()
    assert relative_error(np.stack([s.latents for s in steps]), GOLDEN["ddim10/trajectory"]) < 1e-5


def test_official_iddpm_moments_are_met():
    scheduler = scheduler_named("iddpm")
    spaced = scheduler.schedule.respaced(scheduler.plan(10).timesteps)
    for picture, row in enumerate(GOLDEN["iddpm10/index"]):
        latents = GOLDEN["ddim10/noise"][picture]
        ours = iddpm_moments(latents, analytic(latents, spaced.timesteps[row]), int(row), spaced)
        for values, name in zip(ours, ("mean", "log_variance", "pred_xstart"), strict=True):
            assert relative_error(values, GOLDEN[f"iddpm10/{name}"][picture]) < 1e-6


@pytest.mark.parametrize("count", [5, 14])
def test_official_continuous_dpm_solver_is_met(count):
    scheduler = scheduler_named("dpm")
    last = last_of(scheduler.steps(analytic_guided, GOLDEN["ddim10/noise"], scheduler.plan(count)))
    assert relative_error(last.latents, GOLDEN[f"dpms{count}/final"]) < 1e-5


# ---- solvers of the ODE


@pytest.mark.parametrize("name", ODE)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_single_picture_is_found_exactly_in_any_number_of_steps(name, count):
    scheduler, target = named(name), unit_noise(1)
    plan = scheduler.plan(count)
    start, end = plan.sigmas[0, 0], plan.sigmas[-1, 1]
    latents = unit_noise()
    last = last_of(scheduler.steps(normal_data(plan, target, 0.0), latents, plan))
    if scheduler.init_noise_sigma(plan) != 1:  # its start has no share of the picture taken off
        latents = latents * start * scales(start)[0]
    assert relative_error(last.latents, carried(latents, target, 0.0, start, end)) < 1e-10
    assert relative_error(last.denoised, target) < 1e-10


def no_noise(timestep):
    return 0.0


#: Integrators of the ODE and the order that their equations promise, all steps alike.
ORDERS = {
    "DPM-Solver++ 1": (partial(dpm_solver, order=1, lower_order_final=False), 1),
    "DPM-Solver++ 2M": (partial(dpm_solver, order=2, lower_order_final=False), 2),
    "DPM-Solver++ 3M": (partial(dpm_solver, order=3, lower_order_final=False), 2),  # its first step is of first order
    "DPM-Solver++ Heun": (partial(dpm_solver, heun=True, lower_order_final=False), 2),
    "DEIS 2": (partial(deis, order=2, lower_order_final=False), 2),
    "UniPC 3": (partial(unipc, order=3, lower_order_final=False), 4),
    "UniPC 1": (partial(unipc, order=1, lower_order_final=False), 2),
    "UniPC 2": (partial(unipc, order=2, lower_order_final=False), 3),
    "SA predictor 1": (partial(sa_solver, tau=no_noise, orders=(1, 0)), 1),
    "SA predictor 2": (partial(sa_solver, tau=no_noise, orders=(2, 0)), 2),
    "SA 2, 2": (partial(sa_solver, tau=no_noise), 2),
    "SA 3, 3": (partial(sa_solver, tau=no_noise, orders=(3, 3)), 2),  # its last step is of first order
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_error_falls_with_the_promised_order(name):
    solver, order = ORDERS[name]
    errors = []
    for count in (80, 160):
        plan = StepSchedule.chained(np.arange(count, 0, -1.0), np.geomspace(10, 0.05, count + 1))
        last = last_of(solver(normal_data(plan, 0.3, 0.5), unit_noise(), plan))
        errors.append(relative_error(last.latents, carried(unit_noise(), 0.3, 0.5, 10, 0.05)))
    assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("name", ODE)
def test_normal_data_are_met_with_many_steps(name):
    scheduler = named(name)
    plan = scheduler.plan(200)
    start, end = plan.sigmas[0, 0], plan.sigmas[-1, 1]
    latents = unit_noise()
    last = last_of(scheduler.steps(normal_data(plan, 0.3, 0.5), latents, plan))
    assert relative_error(last.latents, carried(latents, 0.3, 0.5, start, end)) < 0.015


def test_steps_are_numbered_and_fall():
    scheduler = scheduler_named("dpm++")
    plan = scheduler.plan(timesteps=[900, 20])
    steps = list(scheduler.steps(normal_data(plan, 0, 1), np.ones((1, 4, 2, 2), np.float32), plan))
    assert [(s.index, s.timestep) for s in steps] == [(0, 900.0), (1, 20.0)]
    assert steps[-1].latents.dtype == np.float32


# ---- SA-Solver


@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_adams_weights_are_the_integrals_of_the_interpolation(tau, count):
    nodes, h, rate = np.array([-0.7, -0.4, 0.0])[-count:], 0.5, 1 + tau**2
    weights = adams_weights(nodes, h, rate, rescaled=False)
    for weight, node in zip(weights, nodes, strict=True):
        others = nodes[nodes != node]

        def integrand(u, node=node, others=others):
            return np.exp(rate * (u - h)) * np.prod((u - others) / (node - others))

        assert weight == pytest.approx(quad(integrand, 0, h)[0], rel=1e-9)


def test_a_picture_linear_in_the_log_signal_to_noise_ratio_is_followed_exactly():
    """Second order means that: ODE with D(l) = 2 - 3 l, whose solution is alpha (2 - 3 l + 3) + c sigma."""
    plan = StepSchedule.chained(np.arange(6, 0, -1.0), np.geomspace(8, 0.2, 7))

    def predict(latents, timestep):
        sigma = plan.sigmas[int(6 - timestep), 0]
        signal, noise = scales(sigma)
        return Prediction((latents - signal * (2 + 3 * np.log(sigma))) / noise)

    def solution(sigma):
        signal, noise = scales(sigma)
        return signal * (5 + 3 * np.log(sigma)) + 0.4 * noise

    start = np.full((1, 1, 1, 1), solution(8.0))
    steps = list(sa_solver(predict, start, plan, tau=no_noise, rescaled=False))
    for step in steps[1:-1]:  # the first prediction and the last step are of first order
        assert step.latents.item() == pytest.approx(solution(plan.sigmas[step.index, 1]), rel=1e-12)
    assert steps[0].latents.item() != pytest.approx(solution(plan.sigmas[0, 1]), rel=1e-3)


def test_sa_solver_draws_noise_in_the_middle_of_time_only():
    tau = SASolverScheduler().tau
    assert [tau(t) for t in (998.0, 799.0, 500.5, 199.0, 198.0, 0.0)] == [0, 1, 1, 1, 0, 0]


# ---- samplers that draw noise


STOCHASTIC = {
    "sa-solver": (SASolverScheduler(tau_func=lambda t: 1.0), {}),
    "sa-solver, tau 0.6": (SASolverScheduler(tau_func=lambda t: 0.6), {}),
    "sa-solver, its own tau": (SASolverScheduler(), {}),
    "ddim, eta 1": (scheduler_named("ddim-diffusers"), {"eta": 1.0}),
    "official ddim, eta 0.7": (scheduler_named("ddim"), {"eta": 0.7}),
    "iddpm, posterior variance": (IDDPMScheduler(), {"variance": -1.0}),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_around_a_single_picture_the_noise_has_the_variance_of_its_level(name):
    scheduler, options = STOCHASTIC[name]
    plan, steps = samples(scheduler, 6, 0.7, 0.0, **options)
    for step in steps:
        signal, noise = scales(plan.sigmas[step.index, 1])
        if noise > 0:
            rest = (step.latents - signal * 0.7) / noise
            assert abs(rest.mean()) < 0.03
            assert rest.var() == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_normal_data_are_sampled_with_their_variance(name):
    scheduler, options = STOCHASTIC[name]
    _, steps = samples(scheduler, 500, 0.3, 0.5, **options)
    assert steps[-1].latents.mean() == pytest.approx(0.3, abs=0.02)
    assert steps[-1].latents.std() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("variance", [-1.0, 0.0, 1.0])
def test_iddpm_draws_with_the_variance_that_the_model_says(variance):
    scheduler = IDDPMScheduler()
    plan = scheduler.plan(4)
    spaced = scheduler.schedule.respaced(plan.timesteps)
    latents = np.full((64, 4, 8, 8), 0.2)
    first = next(scheduler.steps(normal_data(plan, 0, 1, variance), latents, plan, np.random.default_rng(0)))
    low, high = spaced.posterior_variance[-1], spaced.betas[-1]
    expected = low ** ((1 - variance) / 2) * high ** ((1 + variance) / 2)
    assert first.latents.var() == pytest.approx(expected, rel=0.04)


def test_the_last_step_of_iddpm_adds_no_noise():
    plan, steps = samples(IDDPMScheduler(), 3, 0.7, 0.0, variance=1.0)
    assert plan.sigmas[-1, 1] == 0
    assert relative_error(steps[-1].latents, np.full((64, 4, 8, 8), 0.7)) < 1e-10


def test_iddpm_without_a_predicted_variance_says_what_is_missing():
    plan = IDDPMScheduler().plan(2)
    with pytest.raises(ValueError, match="the variance that the model predicts"):
        next(IDDPMScheduler().steps(normal_data(plan, 0, 1), unit_noise(), plan))


@pytest.mark.parametrize("name", ["ddim", "iddpm", "lcm", "sa-solver"])
def test_a_seed_repeats_and_a_row_does_not_depend_on_the_others(name):
    scheduler = scheduler_named(name)
    plan = scheduler.plan(6)
    predict = normal_data(plan, 0.3, 0.5, 0.0)
    latents = unit_noise(0, (2, 4, 8, 8)).astype(np.float32)

    def final(rows, generator):
        return last_of(scheduler.steps(predict, latents[rows], plan, generator, eta=1.0)).latents

    both = final([0, 1], [np.random.default_rng(8), np.random.default_rng(9)])
    assert np.array_equal(both, final([0, 1], [np.random.default_rng(8), np.random.default_rng(9)]))
    assert np.array_equal(both[1:], final([1], np.random.default_rng(9)))
    assert not np.array_equal(both, final([0, 1], [np.random.default_rng(9), np.random.default_rng(8)]))
    assert both.dtype == np.float32


def test_noise_of_the_wrong_generators_is_refused():
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        draw_noise((3, 1, 1, 1), [np.random.default_rng(0)] * 2)
    with pytest.raises(ValueError, match=r"generator is 7; expected a numpy\.random\.Generator"):
        draw_noise((3, 1, 1, 1), 7)


# ---- consistency models


def consistency_function(plan, mean, spread, scaling=10.0):
    """The noise prediction of a perfect consistency model of normal data."""
    levels = dict(zip(plan.timesteps.tolist(), plan.sigmas[:, 0].tolist(), strict=True))

    def predict(latents, timestep):
        signal, noise = scales(levels[timestep])
        end = carried(latents, mean, spread, levels[timestep], 0.0)
        skip = 0.25 / ((timestep * scaling) ** 2 + 0.25)
        out = timestep * scaling / np.sqrt((timestep * scaling) ** 2 + 0.25)
        return Prediction((latents - signal * (end - skip * latents) / out) / noise)

    return predict


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_perfect_consistency_model_gives_perfect_samples(count):
    scheduler = LCMScheduler()
    plan = scheduler.plan(count)
    latents = unit_noise(2, (64, 4, 8, 8))
    predict = consistency_function(plan, 0.3, 0.5)
    steps = list(scheduler.steps(predict, latents, plan, np.random.default_rng(0)))
    assert relative_error(steps[0].denoised, carried(latents, 0.3, 0.5, plan.sigmas[0, 0], 0.0)) < 1e-10
    for step in steps:
        assert step.denoised.mean() == pytest.approx(0.3, abs=0.02)
        assert step.denoised.std() == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(steps[-1].latents, steps[-1].denoised)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_lcm_finds_a_single_picture_in_any_number_of_steps(count):
    target, plan = unit_noise(1), LCMScheduler().plan(count)
    last = last_of(LCMScheduler().steps(normal_data(plan, target, 0.0), unit_noise(), plan))
    assert relative_error(last.latents, target) < 1e-4  # the boundary condition keeps 2e-6 of the latents


def test_lcm_leaves_latents_of_timestep_0_as_they_are():
    plan = LCMScheduler().plan(timesteps=[0])
    last = last_of(lcm(lambda x, t: Prediction(np.sin(x)), unit_noise(), plan))
    assert np.array_equal(last.latents, unit_noise())


def test_between_jumps_lcm_adds_the_noise_of_the_next_timestep():
    plan = LCMScheduler().plan(4)
    predict = normal_data(plan, 0.7, 0.0)
    steps = list(lcm(predict, unit_noise(0, (64, 4, 8, 8)), plan, np.random.default_rng(0)))
    signal, noise = scales(LINEAR.sigmas[int(plan.timesteps[1])])
    assert ((steps[0].latents - signal * 0.7) / noise).var() == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("name", ["dmd", "lcm", "dpm++", "unipc", "ddim"])
def test_one_step_from_timestep_400_is_dmd_sampling(name):
    scheduler = scheduler_named(name)
    plan = scheduler.plan(1) if name == "dmd" else scheduler.plan(timesteps=[400])
    (step,) = scheduler.steps(analytic, unit_noise(), plan)
    alpha = LINEAR.alphas_cumprod[400]
    expected = (unit_noise() - np.sqrt(1 - alpha) * analytic(unit_noise(), 400.0).noise) / np.sqrt(alpha)
    assert step.timestep == 400
    assert relative_error(step.latents, expected) < 1e-7


@pytest.mark.parametrize("scheduler", [DDIMScheduler(clip_sample=True), LCMScheduler(clip_sample=True)])
def test_the_predicted_picture_is_clipped_if_asked(scheduler):
    plan = scheduler.plan(2)
    steps = scheduler.steps(lambda x, t: Prediction(np.zeros_like(x)), 9 * unit_noise(), plan)
    assert abs(next(steps).denoised).max() == pytest.approx(1, abs=1e-5)
