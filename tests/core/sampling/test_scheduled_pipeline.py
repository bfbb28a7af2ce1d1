"""Pipelines sample as the reference does with every scheduler, timesteps and noise of one's own."""

import inspect
import json
from functools import cache

import numpy as np
import pytest
from devices import DEVICES
from reference_data import TRAJECTORY, diffusers, relative_error

from pixart_nb import PixArtAlphaPipeline, PixArtSigmaPipeline
from pixart_nb.core.backend import ms
from pixart_nb.core.sampling.noise_schedule import LINEAR
from pixart_nb.core.sampling.samplers import Prediction, Step, StepSchedule
from pixart_nb.core.sampling.schedulers import (
    CLASSES,
    SAMPLING_METHODS,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    SASolverScheduler,
    Scheduler,
    scheduler_from_config,
)

PIPELINES = {"sigma": PixArtSigmaPipeline, "alpha": PixArtAlphaPipeline}
#: Name of a golden trajectory -> short name of the scheduler.
GOLDEN_NAMES = {
    "dpm++2m": "dpm++",
    "dpm++2m-karras": "dpm++karras",
    "ddim": "ddim-diffusers",
    "euler": "euler",
    "unipc": "unipc",
}
pytestmark = pytest.mark.filterwarnings("ignore:prompt has 33 tokens")


@pytest.fixture(scope="module", params=list(PIPELINES))
def reference(request):
    """A pipeline of the reference, the call that made its golden arrays, and these."""
    folder, call, golden = diffusers(request.param)
    pipe = PIPELINES[request.param].from_pretrained(folder, mindspore_dtype=ms.float32)
    arguments = {"prompt": call["prompts"], "num_inference_steps": call["steps"], "latents": golden["latents"]}
    same = ("negative_prompt", "height", "width", "guidance_scale", "max_sequence_length", "clean_caption")
    return pipe, arguments | {name: call[name] for name in same}, golden


@pytest.fixture(scope="module")
def painter():
    return PixArtSigmaPipeline.from_pretrained(diffusers("sigma")[0], text_encoder=None, tokenizer=None)


@pytest.fixture
def pipe(painter):
    painter.scheduler = DPMSolverMultistepScheduler()
    return painter


@pytest.fixture
def call():
    """Arguments of a short run without a text encoder."""
    embeds = np.random.default_rng(0).standard_normal((2, 5, 24), dtype=np.float32)
    given = {"prompt_embeds": ms.Tensor(embeds), "prompt_attention_mask": ms.Tensor(np.ones((2, 5), np.int64))}
    return given | {
        "guidance_scale": 1.0,
        "height": 32,
        "width": 48,
        "num_inference_steps": 3,
        "generator": [np.random.default_rng(1), np.random.default_rng(2)],
    }


def records(pipe, **call):
    return list(pipe.sample(**call))[1:]


# ---- the reference's numbers


@DEVICES
@pytest.mark.parametrize("golden_name", GOLDEN_NAMES)
def test_trajectories_of_diffusers_are_met(reference, golden_name, device):
    pipe, call, golden = reference
    pipe.scheduler = GOLDEN_NAMES[golden_name]
    with device():
        steps = records(pipe, **call)
    assert [step.timestep for step in steps] == golden[f"{golden_name}/timesteps"].tolist()
    error = relative_error(np.stack([step.latents for step in steps]), golden[f"{golden_name}/trajectory"])
    assert error < TRAJECTORY / 50  # 1e-6 to 5e-6 when this was written


CASES = json.loads((diffusers("sigma")[0] / "schedulers.json").read_text())


class Recorded:
    """A generator that draws recorded noise, in the shape of the latents."""

    def __init__(self, arrays):
        self.arrays = list(arrays)

    def standard_normal(self, size):
        assert self.arrays[0].shape == tuple(size)
        return self.arrays.pop(0)


@DEVICES
@pytest.mark.parametrize("name", CASES["schedulers"])
def test_every_scheduler_of_diffusers_is_met_with_its_timesteps_and_noise(name, device):
    folder, call, golden = diffusers("sigma")
    reference = {key: array for key, array in np.load(folder / "schedulers.npz").items() if key.startswith(f"{name}/")}
    pipe = sigma_pipeline()
    pipe.scheduler = scheduler_from_config(CASES["schedulers"][name])
    generator, timesteps = Recorded(reference.get(f"{name}/noise", ())), []

    def seen(predict):
        return lambda latents, timestep: timesteps.append(timestep) or predict(latents, timestep)

    same = ("negative_prompt", "guidance_scale", "height", "width", "max_sequence_length", "clean_caption")
    steps = pipe.sample(
        call["prompts"],
        num_inference_steps=CASES["steps"],
        latents=golden["latents"],
        generator=generator,
        wrap_predict=seen,
        **{key: call[key] for key in same},
    )
    with device():
        latents = np.stack([step.latents for step in list(steps)[1:]])
    assert relative_error(latents, reference[f"{name}/trajectory"]) < TRAJECTORY / 50
    assert timesteps == pytest.approx(reference[f"{name}/timesteps"].tolist(), abs=5e-3)
    assert not generator.arrays


@cache
def sigma_pipeline():
    return PixArtSigmaPipeline.from_pretrained(diffusers("sigma")[0], mindspore_dtype=ms.float32)


def test_given_timesteps_that_are_the_schedulers_own_change_nothing(reference):
    pipe, call, golden = reference
    pipe.scheduler = "unipc"
    steps = records(pipe, **call | {"timesteps": [999, 799, 599, 400, 200], "num_inference_steps": 20})
    assert relative_error(steps[-1].latents, golden["unipc/trajectory"][-1]) < TRAJECTORY / 50


def test_given_sigmas_that_are_the_schedulers_own_change_nothing(reference):
    pipe, call, golden = reference
    pipe.scheduler = "euler"
    sigmas = [*LINEAR.sigma_at(golden["euler/timesteps"]), 0.0]
    steps = records(pipe, **call | {"sigmas": sigmas})
    assert [step.timestep for step in steps] == pytest.approx(golden["euler/timesteps"].tolist(), abs=1e-2)
    assert relative_error(steps[-1].latents, golden["euler/trajectory"][-1]) < TRAJECTORY


#: Class, options, plan, eta, and where diffusers 0.42.1 ends with the model tanh(0.3 x) + t / 5000 from 0.7 and -1.3.
FINALS = [
    (
        "DPMSolverMultistepScheduler",
        {"timestep_spacing": "trailing"},
        {"num_inference_steps": 7},
        0,
        (28.7443, -144.42),
    ),
    (
        "DPMSolverMultistepScheduler",
        {"timestep_spacing": "leading", "steps_offset": 1, "final_sigmas_type": "sigma_min"},
        {"num_inference_steps": 20},
        0,
        (15.4041, -73.3481),
    ),
    (
        "DPMSolverMultistepScheduler",
        {"solver_order": 1, "euler_at_final": True},
        {"num_inference_steps": 20},
        0,
        (28.3509, -139.097),
    ),
    (
        "DPMSolverMultistepScheduler",
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"num_inference_steps": 5},
        0,
        (30.8361, -153.112),
    ),
    ("DPMSolverMultistepScheduler", {}, {"timesteps": [999, 600, 400, 31, 0]}, 0, (40.6755, -171.671)),
    ("UniPCMultistepScheduler", {"use_karras_sigmas": True}, {"num_inference_steps": 7}, 0, (21.8705, -125.553)),
    (
        "UniPCMultistepScheduler",
        {"solver_order": 1, "timestep_spacing": "leading"},
        {"num_inference_steps": 7},
        0,
        (10.1049, -43.1369),
    ),
    (
        "EulerDiscreteScheduler",
        {"timestep_spacing": "leading", "steps_offset": 1},
        {"num_inference_steps": 7},
        0,
        (9.2018, -36.9795),
    ),
    (
        "EulerDiscreteScheduler",
        {"use_karras_sigmas": True, "timestep_spacing": "trailing"},
        {"num_inference_steps": 7},
        0,
        (30.7809, -144.035),
    ),
    ("EulerDiscreteScheduler", {}, {"sigmas": [100, 14.6, 3.2, 0.5, 0.03, 0]}, 0, (23.7903, -102.105)),
    (
        "DDIMScheduler",
        {"timestep_spacing": "linspace", "set_alpha_to_one": True, "clip_sample": True},
        {"num_inference_steps": 7},
        0,
        (0.80445, -0.401574),
    ),
    (
        "DDIMScheduler",
        {"steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False},
        {"num_inference_steps": 7},
        0.6,
        (17.7937, -47.1726),
    ),
    (
        "DDIMScheduler",
        {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False},
        {"num_inference_steps": 3},
        1,
        (50.6397, -181.137),
    ),
    ("LCMScheduler", {}, {"num_inference_steps": 4}, 0, (54.4961, -184.251)),
    (
        "LCMScheduler",
        {"timestep_scaling": 5.0, "clip_sample": True},
        {"timesteps": [900, 400, 33, 0]},
        0,
        (0.99224, -0.989764),
    ),
    ("HeunDiscreteScheduler", {"clip_sample": True}, {"num_inference_steps": 7}, 0, (1.0, -1.0)),
    (
        "HeunDiscreteScheduler",
        {"use_exponential_sigmas": True, "timestep_spacing": "leading"},
        {"num_inference_steps": 7},
        0,
        (5.91656, -29.3346),
    ),
    (
        "DPMSolverSinglestepScheduler",
        {"solver_order": 3, "solver_type": "heun", "lower_order_final": True},
        {"num_inference_steps": 8},
        0,
        (26.6095, -138.023),
    ),
    (
        "DPMSolverSinglestepScheduler",
        {"final_sigmas_type": "sigma_min"},
        {"num_inference_steps": 6},
        0,
        (33.0847, -153.931),
    ),
    (
        "DPMSolverMultistepScheduler",
        {"solver_order": 3, "timestep_spacing": "trailing"},
        {"num_inference_steps": 20},
        0,
        (25.888, -133.274),
    ),
    (
        "DPMSolverMultistepScheduler",
        {"solver_type": "heun", "use_lu_lambdas": True},
        {"num_inference_steps": 7},
        0,
        (24.7481, -138.566),
    ),
    (
        "DEISMultistepScheduler",
        {"solver_order": 3, "timestep_spacing": "leading"},
        {"num_inference_steps": 20},
        0,
        (15.4097, -73.4775),
    ),
    (
        "UniPCMultistepScheduler",
        {"solver_order": 3, "use_exponential_sigmas": True},
        {"num_inference_steps": 7},
        0,
        (31.7764, -156.502),
    ),
    ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}, {"num_inference_steps": 7}, 0, (23.4941, -125.072)),
    (
        "PNDMScheduler",
        {"skip_prk_steps": True, "timestep_spacing": "linspace"},
        {"num_inference_steps": 7},
        0,
        (11.6893, -59.8458),
    ),
]


@pytest.mark.parametrize(("name", "options", "arguments", "eta", "final"), FINALS)
def test_options_do_what_they_do_in_diffusers(name, options, arguments, eta, final):
    scheduler = CLASSES[name](**options)
    latents = np.array([0.7, -1.3]).reshape(1, 1, 1, 2)
    plan, rng = scheduler.plan(**arguments), np.random.default_rng(7)
    steps = scheduler.steps(lambda x, t: Prediction(np.tanh(0.3 * x) + t / 5000), latents, plan, rng, float(eta))
    assert list(steps)[-1].latents.ravel().tolist() == pytest.approx(final, rel=3e-5)


# ---- the pipeline


def test_a_call_takes_the_documented_parameters_in_their_order():
    parameters = list(inspect.signature(PixArtSigmaPipeline.__call__).parameters.values())[1:]
    assert [parameter.name for parameter in parameters][:14] == [
        "prompt",
        "negative_prompt",
        "num_inference_steps",
        "timesteps",
        "sigmas",
        "guidance_scale",
        "num_images_per_prompt",
        "height",
        "width",
        "eta",
        "generator",
        "latents",
        "prompt_embeds",
        "prompt_attention_mask",
    ]
    defaults = {parameter.name: parameter.default for parameter in parameters}
    assert (defaults["num_inference_steps"], defaults["guidance_scale"], defaults["eta"]) == (20, 4.5, 0.0)
    assert (PixArtSigmaPipeline.max_sequence_length, PixArtAlphaPipeline.max_sequence_length) == (300, 120)


@pytest.mark.parametrize("name", SAMPLING_METHODS)
def test_every_scheduler_draws_with_the_pipeline(pipe, call, name):
    pipe.scheduler = name
    steps = records(pipe, **call | ({"num_inference_steps": 1} if name == "dmd" else {}))
    assert [step.index for step in steps] == list(range(1 if name == "dmd" else 3))
    assert all(step.latents.shape == step.denoised.shape == (2, 4, 4, 6) for step in steps)
    assert all(step.latents.dtype == np.float32 and np.isfinite(step.latents).all() for step in steps)


def test_a_name_keeps_the_noise_schedule(pipe):
    pipe.scheduler = DPMSolverMultistepScheduler(beta_end=0.01)
    pipe.scheduler = "euler"
    assert pipe.scheduler == EulerDiscreteScheduler(beta_end=0.01)
    given_by_name = PixArtSigmaPipeline(None, None, None, None, "sa-solver")
    assert given_by_name.scheduler == SASolverScheduler()


def test_eta_adds_noise_to_ddim_and_is_without_effect_elsewhere(pipe, call):
    def final(name, **changes):
        pipe.scheduler = name
        generators = [np.random.default_rng(1), np.random.default_rng(2)]
        return pipe(**call | {"generator": generators} | changes, output_type="latent")[0]

    assert not np.allclose(final("ddim"), final("ddim", eta=1.0))
    assert np.array_equal(final("ddim", eta=0.5), final("ddim", eta=0.5))
    assert np.array_equal(final("euler"), final("euler", eta=1.0))


class Probe(Scheduler):
    """One step whose latents are the predicted noise and whose picture is the variance."""

    def spaced(self, count):
        return StepSchedule.chained(np.array([400]), np.array([1.0, 0.0]))

    @staticmethod
    def sampler(predict, latents, schedule, generator):
        yield Step(0, 400.0, *predict(latents, 400.0))


def test_all_noise_is_guided_and_the_variance_is_that_of_the_conditional_rows(pipe, call):
    pipe.scheduler = Probe()
    call["latents"] = np.random.default_rng(0).standard_normal((2, 4, 4, 6), dtype=np.float32)
    blank = {"prompt_embeds": ms.Tensor(np.zeros((2, 5, 24), np.float32))}
    negative = {
        "negative_prompt_embeds": blank["prompt_embeds"],
        "negative_prompt_attention_mask": call["prompt_attention_mask"],
    }
    (conditional,) = records(pipe, **call)
    (unconditional,) = records(pipe, **call | blank)
    (guided,) = records(pipe, **call | negative | {"guidance_scale": 4.5})
    expected = unconditional.latents + 4.5 * (conditional.latents - unconditional.latents)
    assert relative_error(guided.latents, expected) < 1e-5
    assert relative_error(guided.denoised, conditional.denoised) < 1e-5
    assert relative_error(unconditional.denoised, conditional.denoised) > 0.01


def test_euler_scales_given_latents_which_are_unit_noise(pipe, call):
    pipe.scheduler = "euler"
    latents = np.random.default_rng(0).standard_normal((2, 4, 4, 6), dtype=np.float32)
    first = records(pipe, **call | {"latents": latents})[0]
    level = LINEAR.sigmas[999]
    noise = (level * latents - first.denoised) / level
    assert np.allclose(first.latents, first.denoised + LINEAR.sigma_at([499.5])[0] * noise, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timesteps": [1, 2]}, "each smaller"),
        ({"timesteps": [400], "sigmas": [1, 0]}, "both timesteps and sigmas"),
        ({"sigmas": [1, 2]}, "each smaller"),
        ({"eta": -0.1}, r"eta is -0\.1; expected 0"),
        ({"eta": "1"}, "eta is '1'"),
        ({"generator": 7}, r"generator is 7; expected a numpy\.random\.Generator"),
        ({"latents": np.zeros((2, 4, 4, 6)), "generator": [np.random.default_rng(0)]}, "1 generators for 2"),
    ],
)
def test_what_the_scheduler_cannot_do_is_said_before_anything_is_computed(pipe, call, change, message):
    pipe.scheduler = "dpm++"
    with pytest.raises(ValueError, match=message):
        pipe.sample(**call | change)


def test_a_pipeline_without_a_scheduler_says_so(pipe, call):
    pipe.scheduler = None
    with pytest.raises(ValueError, match=r"no scheduler; set pipe\.scheduler, for example"):
        pipe.sample(**call)
    with pytest.raises(ValueError, match="expected one of DPMSolverMultistepScheduler"):
        pipe.scheduler = LINEAR
