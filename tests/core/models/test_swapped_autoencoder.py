"""Another autoencoder is one configuration key: the transformer goes on with its latents."""

import json
from dataclasses import replace

import numpy as np
import pytest
from small_pipeline import write_small_pipeline

from pixart_nb import PixArtSigmaPipeline
from pixart_nb.config import check_config
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import components
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig
from pixart_nb.core.training.run import Training

SMALL = VAEConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2, sample_size=64)


@pytest.fixture(scope="module")
def model(project, tmp_path_factory):
    return write_small_pipeline(tmp_path_factory.mktemp("model"), project)


@pytest.fixture
def training(project, model):
    """A training of two steps with some keys changed."""

    def begun(output, **changes):
        values = {
            "model": str(model),
            "json_path": str(project / "data/pixelart/labels.json"),
            "image_dir": str(project / "data/pixelart"),
            "steps": 2,
            "batch_size": 2,
            "warmup_steps": 0,
            "optim": "adamw",
            "auto_lr": "",
            "clip_grad": False,
            "use_ema": False,
            "tensorboard": False,
            "output_path": str(output),
        }
        return Training(check_config(values | changes, "train"))

    return begun


def write_vae(folder, **changes):
    net = AutoencoderKL(replace(SMALL, **changes))
    rng = np.random.default_rng(0)
    for parameter in net.get_parameters():
        parameter.set_data(ms.Tensor(rng.normal(0, 0.3, parameter.shape).astype(np.float32)))
    components.write_vae(folder, net)
    return folder


def test_it_trains_with_the_latents_of_the_other_one_and_leaves_it_in_the_pipeline(training, tmp_path):
    other = write_vae(tmp_path / "vae", scaling_factor=0.5)
    before, after = training(tmp_path / "before"), training(tmp_path / "after", vae_root=str(other))
    with before.session():
        assert list(before.report)
    assert [row["step"] for row in after.steps()] == [1, 2]
    assert before.report["latent_std"] != pytest.approx(after.report["latent_std"], rel=0.05)
    pipe = PixArtSigmaPipeline.from_pretrained(after.finish())
    assert pipe.vae.config.block_out_channels == SMALL.block_out_channels
    assert pipe.vae.config.scaling_factor == 0.5


def test_a_scaling_factor_that_is_given_goes_into_the_pipeline(training, tmp_path):
    other = write_vae(tmp_path / "vae", scaling_factor=0.5)
    twice = training(tmp_path / "twice", vae_root=str(other), sd_scale_factor=1.0)
    once = training(tmp_path / "once", vae_root=str(other))
    for run in (once, twice):
        list(run.steps())
    report = json.loads((once.folder / "start.json").read_text())
    assert twice.report["latent_std"] == pytest.approx(2 * report["latent_std"], rel=1e-4)
    assert PixArtSigmaPipeline.from_pretrained(twice.finish()).vae.config.scaling_factor == 1.0


def test_one_whose_latents_have_other_channels_is_refused(training, tmp_path):
    other = write_vae(tmp_path / "vae", latent_channels=8)
    with pytest.raises(CheckpointError, match=r"8 channels.*takes 4"):
        training(tmp_path / "out", vae_root=str(other))
    assert not (tmp_path / "out").exists()
