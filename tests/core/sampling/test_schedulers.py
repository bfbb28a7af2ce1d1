"""Schedulers read and write configurations, plan timesteps, and refuse what they cannot do."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_data import diffusers

import pixart_nb
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import components
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.sampling.noise_schedule import LINEAR, NoiseSchedule
from pixart_nb.core.sampling.samplers import Prediction
from pixart_nb.core.sampling.schedulers import (
    CLASSES,
    SAMPLING_METHODS,
    DDIMScheduler,
    DMDScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
    scheduler_from_config,
    scheduler_named,
)

# ---- configurations


def full(**changes) -> dict:
    """The configuration of the reference's folder as diffusers wrote it, with changes."""
    folder = diffusers("sigma")[0]
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text()) | changes


def test_the_published_configuration_is_read():
    assert scheduler_from_config(full()) == DPMSolverMultistepScheduler()
    changed = scheduler_from_config(full(beta_end=0.01, use_karras_sigmas=True, final_sigmas_type="sigma_min"))
    assert changed.schedule == NoiseSchedule(1e-4, 0.01)
    assert (changed.use_karras_sigmas, changed.final_sigmas_type) == (True, "sigma_min")


@pytest.mark.parametrize("name", SAMPLING_METHODS)
def test_a_configuration_makes_the_same_scheduler_again(name, tmp_path):
    scheduler = scheduler_named(name, NoiseSchedule(2e-4, 0.01))
    assert scheduler_from_config(json.loads(json.dumps(dict(scheduler.config)))) == scheduler
    assert type(scheduler).from_config(scheduler.config) == scheduler
    components.write_index(tmp_path, scheduler)
    assert components.LOADERS["scheduler"](tmp_path / "scheduler", ms.float32) == scheduler
    assert type(scheduler).from_pretrained(tmp_path, subfolder="scheduler") == scheduler
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", type(scheduler).__name__]


def test_a_configuration_of_another_class_gives_the_options_that_it_chose_as_in_diffusers():
    source = scheduler_from_config(full(beta_end=0.01, timestep_spacing="linspace"))
    other = DDIMScheduler.from_config(source.config, steps_offset=1)
    assert other == DDIMScheduler(beta_end=0.01, timestep_spacing="linspace", steps_offset=1)
    by_default = DDIMScheduler.from_config(DPMSolverMultistepScheduler(beta_end=0.01).config)
    assert by_default == DDIMScheduler(beta_end=0.01, timestep_spacing="leading")
    trailing = DPMSolverMultistepScheduler(timestep_spacing="trailing", use_karras_sigmas=True)
    assert UniPCMultistepScheduler.from_config(trailing.config) == UniPCMultistepScheduler(
        timestep_spacing="trailing", use_karras_sigmas=True
    )
    foreign = {"_class_name": "DDPMScheduler", "beta_end": 0.01, "timestep_spacing": "trailing", "variance": 3}
    assert EulerDiscreteScheduler.from_config(foreign).timestep_spacing == "trailing"


@pytest.mark.parametrize("cls", [LCMScheduler, DMDScheduler])
def test_options_of_another_scheduler_are_left_out_without_a_warning(cls):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls.from_config(DPMSolverMultistepScheduler(timestep_spacing="trailing").config)
    with pytest.warns(UserWarning, match="did you mean 'timestep_scaling'"):
        cls.from_config({"timestep_scalings": 5.0})


def test_a_configuration_is_read_only():
    config = DPMSolverMultistepScheduler().config
    assert config.beta_end == config["beta_end"] == 0.02
    assert config["prediction_type"] == "epsilon"
    with pytest.raises(AttributeError, match="use from_config"):
        config.beta_end = 0.5
    with pytest.raises(TypeError):
        config["beta_end"] = 0.5
    with pytest.raises(AttributeError, match="no 'gamma'"):
        _ = config.gamma
    with pytest.raises(ValueError, match="frozen"):
        DPMSolverMultistepScheduler().beta_end = 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta_schedule": "scaled_linear"}, "beta_schedule is 'scaled_linear'.*supported: 'linear'"),
        ({"prediction_type": "v_prediction"}, "prediction_type is 'v_prediction'.*'epsilon'"),
        ({"algorithm_type": "dpmsolver"}, r"algorithm_type is 'dpmsolver'.*'dpmsolver\+\+' or 'sde-dpmsolver\+\+'"),
        ({"solver_type": "rk"}, "solver_type is 'rk'.*'midpoint' or 'heun'"),
        ({"solver_order": 4}, "solver_order is 4.*supported: 1, 2 or 3"),
        ({"timestep_spacing": "log"}, "'linspace', 'leading' or 'trailing'"),
        ({"final_sigmas_type": "none"}, "'zero' or 'sigma_min'"),
        ({"thresholding": True}, "thresholding is True.*supported: False"),
        ({"use_lu_lambdas": True, "use_beta_sigmas": True}, "use_beta_sigmas and use_lu_lambdas exclude each other"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas is True.*supported: False"),
        ({"lambda_min_clipped": -5.1}, "lambda_min_clipped is -5.1.*-inf"),
        ({"use_karras_sigmas": "yes"}, "expected True or False"),
        ({"steps_offset": 0.5}, "steps_offset is 0.5; expected a whole number"),
        ({"beta_end": 2}, "0 < start <= end < 1"),
        ({"beta_end": "0.02"}, "beta_end is '0.02'; expected a number"),
        ({"beta_start": float("nan")}, "beta_start is nan; expected a number"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps is '1000'"),
        ({"_class_name": "PNDMSchedulr"}, "_class_name is 'PNDMSchedulr'; .*did you mean 'PNDMScheduler'"),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": False}, "skip_prk_steps is False.*supported: True"),
        ({"_class_name": None}, "expected one of DPMSolver"),
    ],
)
def test_an_option_that_is_not_implemented_is_named(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        scheduler_from_config(full(**changes))
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(full(**changes)))
    with pytest.raises(CheckpointError, match=rf"scheduler_config.json: .*{message}"):
        components.LOADERS["scheduler"](tmp_path / "scheduler", ms.float32)


def test_options_of_a_newer_diffusers_that_are_off_are_passed_over():
    assert scheduler_from_config(full(use_new_trick=False, trick_rate=None)) == DPMSolverMultistepScheduler()
    with pytest.raises(ValueError, match="no option 'use_new_trick'"):
        DDIMScheduler.from_config(full(), use_new_trick=False)
    with pytest.raises(ValueError, match="supported: 1, 2 or 3"):
        DPMSolverMultistepScheduler(solver_order=4)
    with pytest.raises(ValueError, match="original_inference_steps is 0; expected 1 to 1000"):
        LCMScheduler(original_inference_steps=0)
    with pytest.raises(ValueError, match=r"timestep_scaling is '10'; expected a number, by default 10\.0"):
        LCMScheduler(timestep_scaling="10")
    with pytest.raises(ValueError, match=r"tau_func is 1, .*; supported: callable"):
        scheduler_from_config({"_class_name": "SASolverScheduler", "tau_func": 1})
    with pytest.raises(ValueError, match="_class_name is None"):
        scheduler_from_config(["DDIMScheduler"])


@pytest.mark.parametrize(
    ("name", "hint"), [("dpm+", "did you mean 'dpm++'?"), ("Euler", "did you mean 'euler'?"), ("", "DDPMScheduler")]
)
def test_an_unknown_name_lists_all_and_the_nearest(name, hint):
    with pytest.raises(ValueError, match="is not known; expected one of") as caught:
        scheduler_named(name)
    assert str(caught.value).endswith(hint)
    assert all(f" {known}" in str(caught.value) for known in SAMPLING_METHODS)


def test_every_scheduler_can_be_imported_from_the_package():
    assert {name: getattr(pixart_nb, name) for name in CLASSES} == CLASSES
    assert pixart_nb.scheduler_named("dpm++") == DPMSolverMultistepScheduler()


# ---- timesteps


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(list(SAMPLING_METHODS)), st.integers(1, 999), st.sampled_from(["linspace", "leading", "trailing"])
)
def test_every_plan_has_the_steps_asked_for_and_falls(name, count, spacing):
    scheduler = scheduler_named(name)
    if "timestep_spacing" in scheduler.config:
        scheduler = type(scheduler).from_config(scheduler.config, timestep_spacing=spacing)
    count = {"dmd": 1, "lcm": 1 + count % 50}.get(name, count)
    plan = scheduler.plan(count)
    assert len(plan) == count
    assert (np.diff(plan.timesteps) < 0).all() or name == "dpm++karras"  # whose timesteps are rounded
    assert plan.timesteps[-1] >= 0
    assert plan.timesteps[0] <= 999
    assert (plan.sigmas[:, 0] >= plan.sigmas[:, 1]).all()
    whole = plan.timesteps[plan.timesteps == plan.timesteps.round()].astype(int)
    if name != "dpm++karras":
        matching = plan.sigmas[plan.timesteps == plan.timesteps.round(), 0]
        assert np.allclose(matching, LINEAR.sigmas[whole], rtol=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(set(SAMPLING_METHODS) - {"dpm++karras"})),
    st.lists(st.integers(0, 999), min_size=1, max_size=30, unique=True),
)
def test_given_timesteps_are_visited_in_turn(name, timesteps):
    falling = sorted(timesteps, reverse=True)
    plan = scheduler_named(name).plan(timesteps=falling)
    assert plan.timesteps.tolist() == falling
    assert np.allclose(plan.sigmas[1:, 0], plan.sigmas[:-1, 1])
    if len(falling) > 1:
        with pytest.raises(ValueError, match="each smaller than the one before"):
            scheduler_named(name).plan(timesteps=falling[::-1])


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(["dpm++", "dpm++karras", "unipc", "euler"]),
    st.lists(st.floats(0.0101, 157), min_size=1, max_size=10, unique=True),
)
def test_given_sigmas_are_the_levels_of_the_plan(name, sigmas):
    falling = [*sorted(sigmas, reverse=True), 0.0]
    scheduler = scheduler_named(name)
    plan = scheduler.plan(sigmas=falling)
    assert plan.sigmas[:, 0].tolist() == falling[:-1]
    assert plan.sigmas[:, 1].tolist() == falling[1:]
    steps = list(scheduler.steps(lambda x, t: Prediction(np.sin(x)), np.ones((1, 1, 1, 1)), plan))
    assert np.isfinite(steps[-1].latents).all()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dpm++", {}, "give num_inference_steps, timesteps or sigmas"),
        ("dpm++", {"num_inference_steps": 0}, "num_inference_steps is 0; expected 1 to 999"),
        ("ddim-diffusers", {"num_inference_steps": 1001}, "expected 1 to 1000"),
        ("euler", {"num_inference_steps": 2.5}, "num_inference_steps is 2.5; expected 1 to 1000"),
        ("lcm", {"num_inference_steps": 51}, "expected 1 to 50, the number that the model was distilled with"),
        ("dmd", {"num_inference_steps": 20}, "take one step, so give 1"),
        ("dpm++", {"timesteps": [400], "sigmas": [1.0, 0.0]}, "both timesteps and sigmas were given"),
        ("unipc", {"timesteps": []}, "timesteps are .*; expected a list of at least 1"),
        ("unipc", {"timesteps": [1, 2]}, "timesteps are .*; expected each smaller than the one before"),
        ("unipc", {"timesteps": [500, 500]}, "each smaller"),
        ("iddpm", {"timesteps": [1000, 1]}, r"timesteps go from 1000 to 1; expected them in 999\.\.0"),
        ("iddpm", {"timesteps": [10, -1]}, "timesteps go from 10 to -1"),
        ("lcm", {"timesteps": [10.5]}, "this scheduler takes whole numbers"),
        ("lcm", {"timesteps": ["a"]}, "expected a list of numbers"),
        ("lcm", {"timesteps": 400}, "expected a list of at least 1"),
        ("lcm", {"timesteps": [float("nan")]}, "finite numbers"),
        ("dpm++karras", {"timesteps": [400]}, "use_karras_sigmas chooses its own"),
        ("ddim-diffusers", {"sigmas": [1.0, 0.0]}, "DDIMScheduler takes no sigmas"),
        ("dpm", {"sigmas": [1.0, 0.0]}, "DPMSolverContinuousScheduler takes no sigmas"),
        ("euler", {"sigmas": [1.0]}, "at least 2 finite numbers; the last is the sigma at which"),
        ("euler", {"sigmas": [1.0, 2.0]}, "sigmas are .*; expected each smaller"),
        ("euler", {"sigmas": [1.0, 0.001, 0.0]}, r"expected them in 157.4\.\.0.01, the last alone down to 0"),
        ("euler", {"sigmas": [200.0, 0.0]}, "expected them in 157.4"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        scheduler_named(name).plan(**arguments)


def test_an_offset_that_leaves_the_table_is_refused():
    with pytest.raises(ValueError, match=r"steps_offset 300 moves 5 timesteps out of 0\.\.999"):
        DDIMScheduler(steps_offset=300).plan(5)
    assert DDIMScheduler(steps_offset=1).plan(5).timesteps.tolist() == [801, 601, 401, 201, 1]


def test_spacings_are_those_of_the_paper_that_compares_them():
    """Lin et al. 2023, table 2, for ten of a thousand; DPM-Solver++ leaves out the last of eleven."""
    plans = {
        spacing: (
            DDIMScheduler(timestep_spacing=spacing).plan(10).timesteps.tolist(),
            DPMSolverMultistepScheduler(timestep_spacing=spacing).plan(10).timesteps.tolist(),
        )
        for spacing in ("leading", "trailing", "linspace")
    }
    assert plans["leading"] == ([*range(900, -1, -100)], [*range(900, 89, -90)])
    assert plans["trailing"] == ([*range(999, 0, -100)],) * 2
    assert plans["linspace"][0] == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]
    assert plans["linspace"][1] == [999, 899, 799, 699, 599, 500, 400, 300, 200, 100]


def test_lcm_visits_timesteps_of_its_distillation():
    assert LCMScheduler().plan(4).timesteps.tolist() == [999, 759, 499, 259]
    assert LCMScheduler(original_inference_steps=4).plan(4).timesteps.tolist() == [999, 749, 499, 249]


def test_final_sigmas_may_stop_at_the_least_noise_of_the_table():
    for cls in (DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler):
        assert cls(final_sigmas_type="sigma_min").plan(3).sigmas[-1, 1] == LINEAR.sigmas[0]
        assert cls().plan(3).sigmas[-1, 1] == 0


# ---- configurations with options of other classes


LEFTOVERS = {
    "algorithm_type": "sde-dpmsolver++",
    "solver_order": 3,
    "solver_type": "heun",
    "thresholding": True,
    "lower_order_final": False,
    "use_lu_lambdas": True,
    "variance_type": "fixed_large",
    "skip_prk_steps": True,
    "clip_sample_range": 9.0,
    "interpolation_type": "log_linear",
    "original_inference_steps": 7,
    "predict_x0": False,
}


@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
    ],
)
def test_options_of_other_classes_are_ignored_as_diffusers_ignores_them(name):
    own = {*CLASSES[name].model_fields, *CLASSES[name].fixed.split()}
    leftovers = {key: value for key, value in LEFTOVERS.items() if key not in own}
    assert len(leftovers) > 3
    written = {"_class_name": name, "beta_end": 0.01} | leftovers
    assert scheduler_from_config(written) == CLASSES[name](beta_end=0.01)
    assert CLASSES[name].from_config(full(beta_end=0.01) | leftovers).beta_end == 0.01


def test_solver_types_of_other_classes_are_replaced_as_diffusers_replaces_them():
    assert UniPCMultistepScheduler.from_config(full()) == UniPCMultistepScheduler()
    assert DPMSolverMultistepScheduler.from_config(full(solver_type="bh2", algorithm_type="deis"))


def test_a_misspelt_option_of_a_file_is_ignored_with_a_warning_and_one_of_a_call_is_an_error():
    with pytest.warns(UserWarning, match="'solver_ordre' and ignores it; did you mean 'solver_order'"):
        scheduler_from_config(full(solver_ordre=1))
    with pytest.raises(ValueError, match=r"no option 'solver_ordre' .given 1.; did you mean 'solver_order'"):
        DPMSolverMultistepScheduler.from_config(full(), solver_ordre=1)


def test_the_defaults_of_ddim_are_those_of_diffusers_and_mindones_name_means_the_official_one():
    assert DDIMScheduler.from_config({}) == DDIMScheduler(clip_sample=True, set_alpha_to_one=True)
    assert type(scheduler_named("ddim")).__name__ == "OfficialDDIMScheduler"
    assert scheduler_named("DDIMScheduler") == DDIMScheduler()
    assert scheduler_named("ddim-diffusers") == DDIMScheduler(clip_sample=False, set_alpha_to_one=False)


def test_a_schedule_of_any_length_that_a_file_asks_for_is_not_built():
    with pytest.raises(ValueError, match="num_train_timesteps is 2147483648; expected 2 to 100000"):
        scheduler_from_config(full(num_train_timesteps=2**31))
