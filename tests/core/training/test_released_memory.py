"""Memory of a training whose features are cached: text encoder and VAE are not in it."""

import os
from dataclasses import replace

import numpy as np
import pytest
from small_pipeline import CONFIG, training_config, write_training_data

from pixart_nb.core import memory
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import components
from pixart_nb.core.models.t5 import T5Config, T5Encoder
from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig
from pixart_nb.core.training.run import Training

T5 = T5Config(vocab_size=356, d_model=1024, d_kv=64, d_ff=2816, num_heads=16, num_layers=4)
VAE = VAEConfig(block_out_channels=(64, 128, 256, 256), layers_per_block=1)


def write_large_networks(model) -> int:
    """Replace the text encoder and the VAE of a pipeline by larger ones with random weights; return their bytes."""
    rng, size = np.random.default_rng(0), 0
    parts = {"text_encoder": (T5Encoder(T5), components.write_text_encoder)}
    parts["vae"] = (AutoencoderKL(VAE), components.write_vae)
    for name, (net, write) in parts.items():
        net.initialize(rng)
        (model / name).unlink()
        write(model / name, net, np.float32)
        size += sum(4 * parameter.size for parameter in net.get_parameters())
    return size


def memory_of_training(config) -> list[int]:
    """Bytes in use: while a training runs, with its networks loaded once more, and after they are released."""
    training = Training(config)
    for row in training.steps():
        if row["step"] == 2:
            break
    memory.release()
    measured = [memory.in_use()]
    training.networks.embed(["a red cup"])
    training.networks.vae.encode(ms.Tensor(np.zeros((1, 3, 64, 64), np.float32)))
    measured.append(memory.in_use())
    training.networks.release()
    memory.release()
    return [*measured, memory.in_use()]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc"), reason="runs where pages of mapped files are told from memory")
def test_a_training_with_cached_features_holds_neither_text_encoder_nor_autoencoder(project, tmp_path):
    write_training_data(tmp_path, project, 4, config=replace(CONFIG, caption_channels=T5.d_model))
    size = write_large_networks(tmp_path / "model")
    config = training_config(tmp_path, project, tmp_path / "out", steps=3)
    running, loaded, released = memory.run_in_subprocess("trains", memory_of_training, config)
    print(f"weights {size / 1e6:.0f} MB; in use {running / 1e6:.0f}, {loaded / 1e6:.0f}, {released / 1e6:.0f} MB")
    assert loaded - running > 0.8 * size
    assert released - running < 0.2 * size
