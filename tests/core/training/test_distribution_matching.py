"""Distribution matching: a Gaussian case with a known solution, and a training of a small model that resumes."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from mindspore import nn, ops
from small_pipeline import CONFIG, training_config, write_training_data

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.config import ConfigError, check_config
from pixart_nb.core.backend import ms
from pixart_nb.core.sampling.noise_schedule import LINEAR
from pixart_nb.core.sampling.schedulers import DMDScheduler
from pixart_nb.core.training.distribution_matching import START, DistributionObjective, distribution_loss
from pixart_nb.core.training.run import Training, train
from pixart_nb.core.training.trainer import Trainer, TrainerOptions

SPREAD, ROWS = 0.7, 32


class Gaussian(nn.Cell):
    """Exact noise prediction for normal pixels of standard deviation ``spread``, which can be trained."""

    def __init__(self, spread, name):
        super().__init__()
        self.spread = ms.Parameter(ms.Tensor(np.array([spread], np.float32)), name=name)
        self.signal = ms.Tensor(LINEAR.alphas_cumprod.astype(np.float32))

    def forward(self, x, timesteps, embeddings, mask, positions, micro=None):
        a = self.signal[timesteps.astype(ms.int32)]
        return (ops.sqrt(1 - a) / (a * self.spread * self.spread + 1 - a)).reshape(-1, 1, 1, 1) * x


class Generator(nn.Cell):
    """Noise prediction with one gain to be learned."""

    def __init__(self, gain):
        super().__init__()
        self.gain = ms.Parameter(ms.Tensor(np.array([gain], np.float32)), name="gain")

    def forward(self, x, timesteps, embeddings, mask, positions, micro=None):
        return self.gain * x

    def spread(self):
        """Standard deviation of what it draws from noise of unit variance."""
        a = LINEAR.alphas_cumprod[START]
        return float((1 - np.sqrt(1 - a) * self.gain.asnumpy()[0]) / np.sqrt(a))


def batch(number):
    objective = type("Seeded", (), {"config": check_config(VALUES, "train")})()
    noise = np.random.default_rng((5, number)).standard_normal((ROWS, 4, 4, 4), dtype=np.float32)
    times = np.zeros(ROWS, np.float32)
    extras = DistributionObjective.extras(objective, number, 0, times, noise.shape)
    embeds, mask = np.ones((ROWS, 2, 6), np.float32), np.ones((ROWS, 2), bool)
    table, positions = np.zeros((ROWS, 9), np.float32), np.zeros((1, 4, 8), np.float32)
    return 0 * noise, noise, table, times, embeds, mask, times, positions, *extras


VALUES = {"model": "m", "json_path": "l", "image_dir": "i"}


@pytest.mark.parametrize("gain", [0.9, 0.2])
def test_the_generator_of_a_gaussian_teacher_draws_its_distribution(tmp_path, gain):
    """The second network starts as the teacher. Without momentum both do not swing around the solution."""
    generator, fake = Generator(gain), Gaussian(SPREAD, "fake")
    before = generator.spread()
    loss = distribution_loss(generator, Gaussian(SPREAD, "real"), fake, np.zeros((1, 6), np.float32))
    parameters = {"gain": generator.gain, "fake": fake.spread}
    options = {"schedule": "cosine", "betas": (0.0, 0.9), "max_grad_norm": None, "ema_rate": None, "save_every": 1000}
    options = TrainerOptions(240, 0.03, **options)
    Trainer(loss, parameters, batch, options, tmp_path, ("matching", "fake")).run()
    assert abs(before - SPREAD) > 0.15
    assert generator.spread() == pytest.approx(SPREAD, abs=0.04)
    assert abs(float(fake.spread.asnumpy()[0])) == pytest.approx(SPREAD, abs=0.04)


@pytest.fixture(scope="module")
def config(project, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dmd")
    write_training_data(folder, project, 4, final_layer=0.1, config=replace(CONFIG, depth=1))

    def make(output, **changes):
        values = {"objective": "dmd", "steps": 3}
        return training_config(folder, project, output, **values | changes)

    return make


def losses(rows):
    return [(row["matching"], row["fake"]) for row in rows]


def test_both_networks_are_trained_and_an_interrupted_training_resumes_bit_for_bit(config, tmp_path):
    whole = Training(config(tmp_path / "whole"))
    networks = {name: getattr(whole.objective, name) for name in ("teacher", "fake", "net")}
    weights = {name: net.blocks[0].mlp.fc1.weight for name, net in networks.items()}
    before = {name: weight.asnumpy().copy() for name, weight in weights.items()}
    expected = losses(whole.steps())
    moved = {name: not np.array_equal(weight.asnumpy(), before[name]) for name, weight in weights.items()}
    assert moved == {"teacher": False, "fake": True, "net": True}
    parts = losses(islice(Training(config(tmp_path / "parts")).steps(), 2))
    parts += losses(Training(config(tmp_path / "parts")).steps())
    assert parts == expected


def test_the_result_is_a_pipeline_of_one_step(config, tmp_path):
    changes = {"visualize": True, "visualize_steps": 3, "validation_prompts": ["a cup"], "sampling_steps": 1}
    result = train(config(tmp_path / "out", guidance_scale=1.0, **changes))
    pipe = PixArtSigmaPipeline.from_pretrained(result)
    assert isinstance(pipe.scheduler, DMDScheduler)
    image = pipe("a red cup", num_inference_steps=1, guidance_scale=1.0, height=64, width=64)[0][0]
    assert image.size == (64, 64) and len(list((tmp_path / "out" / "samples").rglob("*.png"))) == 2


@pytest.mark.slow
def test_a_compiled_step_distils_as_an_eager_one(config, tmp_path):
    eager, compiled = (losses(Training(config(tmp_path / str(mode), mode=mode)).steps()) for mode in (1, 0))
    np.testing.assert_allclose(compiled, eager, rtol=1e-3)


def test_a_lora_and_a_noise_offset_are_refused(config, tmp_path):
    for changes in ({"lora_rank": 2}, {"noise_offset": 0.1}):
        with pytest.raises(ConfigError, match="goes neither with lora_rank nor with noise_offset"):
            config(tmp_path / "out", **changes)
