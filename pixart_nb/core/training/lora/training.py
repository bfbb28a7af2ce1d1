"""Training an adapter with the project's trainer: only the adapter's parameters, everything else as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.training import loss as diffusion
from pixart_nb.core.training.lora.adapter import Adapter
from pixart_nb.core.training.lora.adapters import Adapters
from pixart_nb.core.training.lora.config import LoraConfig
from pixart_nb.core.training.trainer import Batch, Trainer, TrainerOptions


def train_lora(
    net: PixArt,
    config: LoraConfig,
    batch: Batch,
    options: TrainerOptions,
    folder: str | Path,
    name: str = "default",
    seed: int = 0,
) -> Adapter:
    """Train a new adapter of ``net`` and leave it active; its checkpoints and curve lie in ``folder``.

    ``batch(step)`` gives latents, noise, loss coefficients, timesteps, caption embeddings and mask, as
    ``diffusion_batches`` does. Called again after an interruption, it goes on from the newest checkpoint.
    """
    adapters = Adapters.of(net)
    adapter = adapters.add(name, config, seed)
    loss = diffusion_loss(net, *batch(0)[0].shape[-2:])
    net.set_train(True)
    try:
        trainer = Trainer(
            loss,
            adapter.parameters(),
            adapter.with_dropout(batch, seed),
            options,
            folder,
            names=("mse", "vb"),
        )
        trainer.run()
    except BaseException:
        adapters.delete([name])
        raise
    finally:
        net.set_train(False)
    return adapter


def diffusion_loss(net: PixArt, height: int, width: int) -> Callable:
    """The training loss of batches of latents height x width: (loss, mse, vb), means over the batch."""
    positions = net.positions(height, width)

    def loss(latents, noise, table, timesteps, embeddings, mask):
        x_t = diffusion.add_noise(latents, noise, table)
        output = net.forward(x_t, timesteps, embeddings, mask, positions)
        mse, vb = diffusion.loss_terms(output, latents, x_t, noise, table)
        return (mse + vb).mean(), mse.mean(), vb.mean()

    return loss
