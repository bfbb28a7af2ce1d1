"""Consistency distillation: its solver, its boundary, a case with a known solution, and trainings of a small model."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from mindspore import nn
from small_pipeline import CONFIG, training_config, write_training_data

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.config import ConfigError
from pixart_nb.core.backend import ms
from pixart_nb.core.sampling.noise_schedule import LINEAR
from pixart_nb.core.sampling.samplers import Prediction, StepSchedule, boundary_scalings, ddim, image_generators
from pixart_nb.core.sampling.schedulers import LCMScheduler
from pixart_nb.core.training.consistency import consistency_loss, solver_steps
from pixart_nb.core.training.loss import add_noise, clean_latents, coefficients
from pixart_nb.core.training.run import Training, train
from pixart_nb.core.training.trainer import Trainer, TrainerOptions

SPACING = 20
GRID = np.arange(SPACING - 1, 1000, SPACING)
EMPTY = np.zeros((1, 6), np.float32)


def arrays(timesteps, guidance=0.0, seed=0, spread=0.7):
    """Arguments of the loss for images of normal pixels."""
    rng = np.random.default_rng(seed)
    latents, noise = rng.standard_normal((2, len(timesteps), 4, 4, 4), dtype=np.float32)
    steps, ends = solver_steps(timesteps, SPACING, np.full(len(timesteps), guidance))
    embeds, mask = np.ones((len(timesteps), 2, 6), np.float32), np.ones((len(timesteps), 2), bool)
    weights, positions = np.ones(len(timesteps), np.float32), np.zeros((1, 4, 8), np.float32)
    table = coefficients(timesteps)
    return spread * latents, noise, table, timesteps.astype(np.float32), embeds, mask, weights, positions, steps, ends


class Gaussian(nn.Cell):
    """Exact noise prediction for normal pixels of standard deviation ``spread``; its caption scales it."""

    def __init__(self, spread=0.7):
        super().__init__()
        a = LINEAR.alphas_cumprod
        self.gain = ms.Tensor((np.sqrt(1 - a) / (a * spread**2 + 1 - a)).astype(np.float32))

    def forward(self, x, timesteps, embeddings, mask, positions, micro=None):
        gain = self.gain[timesteps.astype(ms.int32)] * embeddings.mean((1, 2))
        return gain.reshape(-1, 1, 1, 1) * x


class Student(nn.Cell):
    """Noise prediction with a gain to be learned for each timestep of the grid, and a zero below it."""

    def __init__(self, gains, name="gains"):
        super().__init__()
        self.gains = ms.Parameter(ms.Tensor(gains.astype(np.float32)), name=name)

    def forward(self, x, timesteps, embeddings, mask, positions, micro=None):
        index = ((timesteps + 1) / SPACING - 1).astype(ms.int32).clip(0, len(GRID) - 1)
        return self.gains[index].reshape(-1, 1, 1, 1) * x


def test_a_step_of_the_solver_is_that_of_ddim():
    timesteps = np.array([19, 499, 999])
    latents, _, table, *_, ends = arrays(timesteps)
    noise = np.random.default_rng(1).standard_normal(latents.shape, dtype=np.float32)
    denoised = clean_latents(ms.Tensor(latents), ms.Tensor(noise), ms.Tensor(table))
    stepped = add_noise(denoised, ms.Tensor(noise), ms.Tensor(ends)).asnumpy()
    for row, timestep in enumerate(timesteps):
        end = max(timestep - SPACING, 0)
        schedule = StepSchedule.chained(np.array([timestep]), LINEAR.sigmas[[timestep, end]])
        predict = lambda x, t, row=row: Prediction(noise[row : row + 1])  # noqa: E731
        expected = next(ddim(predict, latents[row : row + 1], schedule)).latents
        np.testing.assert_allclose(stepped[row : row + 1], expected, rtol=1e-3, atol=2e-3)


def test_the_steps_go_along_the_timesteps_of_the_scheduler():
    assert LCMScheduler().spaced(50).timesteps.tolist() == GRID[::-1].tolist()
    steps, _ = solver_steps(GRID, SPACING, np.zeros(50))
    assert steps[:, 0].tolist() == [0, *GRID[:-1]]


def test_at_timestep_zero_a_consistency_function_is_the_identity():
    assert boundary_scalings(0.0) == (1.0, 0.0)
    skip, out = boundary_scalings(GRID)
    assert (skip < 1e-4).all() and (out > 0.9999).all()


def test_the_loss_is_zero_for_the_solution_of_the_solver_and_guidance_is_that_of_the_paper():
    """Teacher: noise of the caption and none without it, so that w scales it by 1 + w."""
    timesteps, scale = np.array([19, 19, 19]), 1.5
    values = list(map(ms.Tensor, arrays(timesteps, guidance=scale)))
    x, table, ends = add_noise(*values[:3]), values[2], values[9]
    guided = (1 + scale) * Gaussian().forward(x, *values[3:8])
    end = add_noise(clean_latents(x, guided, table), guided, ends)
    gain = (clean_latents(x, 0 * x, table) - end).asnumpy() / (x.asnumpy() * table.asnumpy()[:, 3, None, None, None])
    solved = Student(np.full(50, np.median(gain)))
    loss = consistency_loss(solved, Gaussian(), solved, EMPTY)
    assert float(loss(*values)[0].asnumpy()) < 1e-5
    wrong = Student(np.full(50, 2 * np.median(gain)))
    assert float(consistency_loss(wrong, Gaussian(), wrong, EMPTY)(*values)[0].asnumpy()) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("huber", [0.0, 0.001])
def test_the_student_of_a_gaussian_teacher_learns_the_solution_of_its_ode(tmp_path, huber):
    """Along the probability-flow ODE a pixel keeps its ratio to the standard deviation of its timestep."""
    spread, a = 0.7, LINEAR.alphas_cumprod
    gains = np.sqrt(1 - a[GRID]) / (a[GRID] * spread**2 + 1 - a[GRID])
    student, target = Student(gains), Student(gains, "average")
    loss = consistency_loss(student, Gaussian(spread), target, EMPTY + 1, huber)
    options = {"schedule": "cosine", "betas": (0.0, 0.99), "max_grad_norm": None, "ema_rate": 0.5, "save_every": 1000}
    options = TrainerOptions(150, 0.02, **options)
    batches = lambda step: arrays(GRID, seed=step)  # noqa: E731
    parameters, averages = {"gains": student.gains}, {"gains": target.gains}
    trainer = Trainer(loss, parameters, batches, options, tmp_path, ("mse",), averages=averages)

    ends = np.append(0, GRID[:-1])
    steps = np.sqrt(a[ends]) * (1 - np.sqrt(1 - a[GRID]) * gains) / np.sqrt(a[GRID]) + np.sqrt(1 - a[ends]) * gains
    deviation = np.sqrt(a * spread**2 + 1 - a)
    by_ddim, exact = np.cumprod(steps), deviation[0] / deviation[GRID]

    def learned():
        """Consistency function of x = 1 at the timesteps of the grid."""
        return (1 - np.sqrt(1 - a[GRID]) * target.gains.asnumpy()) / np.sqrt(a[GRID])

    before = learned()
    trainer.run()
    assert np.abs(by_ddim / exact - 1).max() < 0.05
    assert np.abs(before / exact - 1).max() > 0.9
    assert np.abs(learned() / by_ddim - 1).max() < 0.05
    assert np.abs(learned() / exact - 1).max() < 0.08


# ---- a small model


@pytest.fixture(scope="module")
def config(project, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lcm")
    write_training_data(folder, project, 6, final_layer=0.1, config=replace(CONFIG, depth=1))

    def make(output, **changes):
        values = {"objective": "lcm", "steps": 4, "w_max": 8.0, "ema_rate": 0.9}
        return training_config(folder, project, output, **values | changes)

    return make


def losses(rows):
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("changes", [{}, {"use_ema": False, "loss_type": "l2"}, {"lora_rank": 2}])
def test_an_interrupted_distillation_resumes_bit_for_bit_and_leaves_the_teacher(config, tmp_path, changes):
    whole = Training(config(tmp_path / "whole", **changes))
    teacher = whole.objective.teacher
    before = {name: p.asnumpy().copy() for name, p in teacher.parameters_and_names()}
    expected = losses(whole.steps())
    assert all(np.array_equal(p.asnumpy(), before[name]) for name, p in teacher.parameters_and_names())
    parts = losses(islice(Training(config(tmp_path / "parts", **changes)).steps(), 2))
    resumed = Training(config(tmp_path / "parts", **changes))
    parts += losses(resumed.steps())
    assert parts == expected
    for name, weight in whole.trainer.weights().items():
        assert np.array_equal(weight, resumed.trainer.weights()[name]), name


def test_the_target_is_the_moving_average(config, tmp_path):
    training = Training(config(tmp_path / "out"))
    list(training.steps())
    for name, parameter in training.objective.target.parameters_and_names():
        if name in training.trainer.parameters:
            assert np.array_equal(parameter.asnumpy(), training.trainer.ema.averages[name].asnumpy()), name
    assert not np.array_equal(
        training.objective.target.final_layer.linear.weight.asnumpy(), training.net.final_layer.linear.weight.asnumpy()
    )


def test_the_result_is_a_pipeline_with_the_scheduler_it_was_distilled_for(config, tmp_path):
    changes = {"visualize": True, "visualize_steps": 4, "validation_prompts": ["a cup"], "sampling_steps": 2}
    result = train(config(tmp_path / "out", num_ddim_timesteps=25, guidance_scale=1.0, start_report=True, **changes))
    pipe = PixArtSigmaPipeline.from_pretrained(result)
    assert isinstance(pipe.scheduler, LCMScheduler) and pipe.scheduler.original_inference_steps == 25
    image = pipe("a red cup", num_inference_steps=4, guidance_scale=1.0, height=64, width=64)[0][0]
    assert image.size == (64, 64) and len(list((tmp_path / "out" / "samples").rglob("*.png"))) == 2


def test_a_distilled_lora_is_a_lora_file(config, tmp_path):
    result = train(config(tmp_path / "out", lora_rank=2))
    assert result.name == "lora" and any(result.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}])
def test_a_compiled_step_distils_as_an_eager_one(config, tmp_path, changes):
    eager, compiled = (losses(Training(config(tmp_path / str(m), mode=m, **changes)).steps()) for m in (1, 0))
    np.testing.assert_allclose(compiled, eager, rtol=1e-3)


PROMPTS = [
    "a red mushroom in a forest",
    "a blue fish in the snow",
    "an orange rocket on grass",
    "a white cat on a beach",
]


def latents_of(pipe, steps, guidance):
    """Latents of the prompts, from the same noise every time."""
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "latent"}
    return np.asarray(pipe(PROMPTS, generator=image_generators(0, range(4)), **options, height=128, width=128)[0])


@pytest.mark.long
def test_a_short_distillation_brings_four_steps_closer_to_twenty_steps_of_the_teacher(config, project, tmp_path):
    """The bundled model, with guidance; its own four steps are those of the scheduler, and those of DPM-Solver++."""
    changes = {"model": str(project / "data/tiny-sigma"), "feature_cache": "", "w_min": 3.5, "w_max": 3.5}
    changes |= {"json_path": str(project / "data/pixelart/labels.json"), "class_dropout_prob": 0.0, "auto_lr": ""}
    changes |= {"steps": 40, "batch_size": 8, "start_learning_rate": 5e-4, "ema_rate": 0.9, "max_grad_norm": 1.0}
    teacher = PixArtSigmaPipeline.from_pretrained(project / "data/tiny-sigma")
    reference = latents_of(teacher, 20, 4.5)
    student = PixArtSigmaPipeline.from_pretrained(train(config(tmp_path / "out", **changes)))

    def error(latents):
        return np.linalg.norm(latents - reference) / np.linalg.norm(reference)

    before = [error(latents_of(teacher, 4, 4.5))]
    teacher.scheduler = "lcm"
    before.append(error(latents_of(teacher, 4, 4.5)))
    after = error(latents_of(student, 4, 1.0))
    print(f"error of four steps: before {before}, after {after}")
    assert after < 0.95 * min(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_ddim_timesteps": 30}, "expected a divisor of 1000"),
        ({"w_min": 9.0}, "expected w_min up to w_max"),
        ({"snr_gamma": 5.0}, "goes neither with copy_blocks_num nor from_scratch nor snr_gamma"),
        ({"objective": "lcn"}, "did you mean 'lcm'?"),
    ],
)
def test_options_of_a_distillation_that_do_not_go_together_are_refused(config, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(tmp_path / "out", **changes)
