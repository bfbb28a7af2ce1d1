"""Weak-to-strong training (PixArt-Sigma, section 4): each stage starts from the checkpoint of the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pixart_nb.config import TrainConfig
from pixart_nb.core.backend import as_tensor, ms
from pixart_nb.core.checkpoints.configuration import Description, describe, positions_of
from pixart_nb.core.checkpoints.files import open_checkpoint
from pixart_nb.core.checkpoints.key_maps import init_compression, to_official_names
from pixart_nb.core.checkpoints.lazy_tensor import LazyTensor
from pixart_nb.core.checkpoints.load import build_transformer
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.models.embeddings import sincos_positions
from pixart_nb.core.models.transformer import PixArt, PixArtConfig, compression_kept
from pixart_nb.core.training.loss import POSITIONS, add_noise
from pixart_nb.core.training.validation import mean_loss

#: Embedding of the empty caption, which replaces dropped captions.
EMPTY = "y_embedder.y_embedding"
#: Batches over which the loss before the first step is measured.
START_BATCHES = 4


@dataclass(frozen=True)
class TrainingStage:
    """Changes of a stage to the model before it; what is not given stays.

    Args:
        sample_size: latent side of the training size.
        pe_interpolation: interpolation of the positions; 0 keeps the span of coordinates, whatever the size.
        compression: a ``kv_compress_config``.
        compression_init: new convolutions start as the ``average`` (section 3.2) or at ``random``.
    """

    sample_size: int = 0
    pe_interpolation: float = 0.0
    compression: dict | None = None
    compression_init: str = "average"

    def config(self, previous: PixArtConfig) -> PixArtConfig:
        """Return the model configuration of this stage."""
        side = self.sample_size or previous.input_size
        interpolation = self.pe_interpolation or previous.pe_interpolation * side / previous.input_size
        changes = {"input_size": side, "pe_interpolation": interpolation}
        if side != previous.input_size:
            changes["class_name"] = "PixArtMS"
        if self.compression:
            changes["kv_compress_config"] = self.compression
        return replace(previous, **changes)


@dataclass(frozen=True)
class Start:
    """Model at the start of a stage, configuration of the model before, and newly compressed layers.

    ``family`` is ``alpha``, ``sigma`` or empty; ``notes`` say where values were taken from.
    """

    net: PixArt
    previous: PixArtConfig
    new_layers: tuple[int, ...]
    family: str
    notes: tuple[str, ...]


def start_from_config(config: TrainConfig, checkpoint: Path, tokens: int) -> Start:
    """Return the start of the stage that a training configuration describes, with ``tokens`` per caption."""
    compression = config.kv_compress_config
    stage = TrainingStage(config.sample_size, config.pe_interpolation, compression, config.kv_compress_init)
    if config.from_scratch:
        return start_from_scratch(checkpoint, stage, tokens, config.seed, config.zero_cross_attention)
    return start_stage(checkpoint, stage, tokens, config.seed)


def start_stage(checkpoint: str | Path, stage: TrainingStage, tokens: int | None = None, seed: int = 0) -> Start:
    """Load the transformer of the stage before as that of this stage, in float32.

    Args:
        tokens: caption tokens, if the checkpoint does not show them.
        seed: seed of ``random`` convolutions.

    Raises ``CheckpointError`` if checkpoint and stage contradict each other. A checkpoint that does not show its
    training size is taken to be of this stage's size.
    """
    view, before = _previous(checkpoint, stage, tokens)
    config = stage.config(before.config)
    _check_compression(before.config, config, checkpoint)
    learned = before.config.kv_layers if before.config.kv_ratio > 1 else ()
    new = tuple(layer for layer in config.kv_layers if config.kv_ratio > 1 and layer not in learned)
    added = init_compression(view.tensors, new, config.kv_ratio) if config.kv_operator == "conv" else {}
    rng, bound = np.random.default_rng((seed, 5)), 1 / config.kv_ratio  # 1 / sqrt(fan in)
    for name, part in added.items() if stage.compression_init == "random" else ():
        if ".attn.sr." in name:
            added[name] = LazyTensor.of(rng.uniform(-bound, bound, part.shape).astype(np.float32), name)
    net = build_transformer(view.complete | view.rest | added, config, checkpoint, ms.float32)
    return Start(net, before.config, new, before.family, tuple(before.notes))


def start_from_scratch(
    checkpoint: str | Path,
    stage: TrainingStage,
    tokens: int | None = None,
    seed: int = 0,
    zero_cross_attention: bool = True,
) -> Start:
    """Return the architecture of ``start_stage`` with new weights; the embedding of the empty caption is kept."""
    view, before = _previous(checkpoint, stage, tokens)
    net = PixArt(stage.config(before.config))
    net.initialize(np.random.default_rng((seed, 4)), zero_cross_attention)
    if EMPTY in view.tensors:
        net.y_embedder.y_embedding.set_data(ms.Tensor(np.asarray(view.tensors[EMPTY], np.float32)))
    return Start(net, before.config, (), before.family, tuple(before.notes))


def _previous(checkpoint: str | Path, stage: TrainingStage, tokens: int | None) -> tuple:
    """Return the tensors of a checkpoint under official names, and the description of its model."""
    view = to_official_names(open_checkpoint(checkpoint))
    before: Description = describe(view, checkpoint, PixArtConfig(model_max_length=tokens) if tokens else None)
    if stage.sample_size and not before.is_certain("input_size"):
        note = f"{checkpoint} does not say its size; taken to be latents of {stage.sample_size}."
        config = replace(before.config, **positions_of(stage.sample_size, before.family))
        before = replace(before, config=config, notes=[*before.notes, note])
    return view, before


def _check_compression(previous: PixArtConfig, config: PixArtConfig, source: str | Path) -> None:
    """Refuse a stage that changes or drops the compression of layers that have learned it."""
    if previous.kv_operator != "conv" or not previous.kv_layers:
        return
    lost = sorted(set(previous.kv_layers) - set(config.kv_layers))
    if lost or (config.kv_operator, config.kv_ratio) != ("conv", previous.kv_ratio):
        raise CheckpointError(
            f"{source} compresses layers {list(previous.kv_layers)} by {previous.kv_ratio} with 'conv'; this stage "
            f"says layers {list(config.kv_layers)} by {config.kv_ratio} with {config.kv_operator!r}. Keep those layers "
            "and that ratio; further layers may be added"
        )


def start_report(start: Start, loss: Callable, batches: Sequence[Sequence]) -> dict[str, float]:
    """Measure the loss before the first step, with and without what is new in the stage.

    Args:
        loss: loss function of the model at its start.
        batches: batches of ``DiffusionBatches``.

    Returns:
        ``loss``, mean over the batches, and ``latent_std``, about 1 with the VAE that the model was trained with. If
        the size is new, ``loss_interpolated`` and ``loss_not_interpolated``: with positions that keep their span, or
        continue beyond. If layers are newly compressed, ``loss_without_compression``, and ``compression_error``:
        ||a - b|| / ||b|| of the outputs with and without compression.
    """
    net, previous = start.net, start.previous
    tensors = [list(map(as_tensor, batch)) for batch in batches]
    report = {"loss": mean_loss(loss, tensors)}
    report["latent_std"] = float(np.std(np.concatenate([b[0].asnumpy().reshape(-1) for b in tensors])))
    if net.config.input_size != previous.input_size:
        span = previous.pe_interpolation * net.config.input_size / previous.input_size
        for name, interpolation in (("", span), ("not_", previous.pe_interpolation)):
            moved = [_with_positions(net, batch, interpolation) for batch in tensors]
            report[f"loss_{name}interpolated"] = mean_loss(loss, moved)
    if start.new_layers:
        latents, noise, table, timesteps, embeddings, mask, _, positions, *rest = tensors[0]
        micro = rest[-1] if net.config.micro_condition else None
        inputs = (add_noise(latents, noise, table), timesteps, embeddings, mask, positions, micro)
        compressed = net.forward(*inputs).asnumpy()
        with uncompressed(net, start.new_layers):
            report["loss_without_compression"] = mean_loss(loss, tensors)
            exact = net.forward(*inputs).asnumpy()
        report["compression_error"] = float(np.linalg.norm(compressed - exact) / np.linalg.norm(exact))
    return report


@contextmanager
def uncompressed(net: PixArt, layers: Sequence[int]) -> Iterator[None]:
    """Let some layers attend to all keys and values for a while. Not inside compiled graphs."""
    with compression_kept(net):
        for layer in layers:
            net.blocks[layer].attn.ratio = 1
        yield


def _with_positions(net: PixArt, batch: Sequence[ms.Tensor], interpolation: float) -> list[ms.Tensor]:
    """Return a batch with positions of another interpolation."""
    config, patch = net.config, net.config.patch_size
    height, width = (side // patch for side in batch[0].shape[2:])
    grid = sincos_positions(config.hidden_size, height, width, config.input_size // patch, interpolation)
    return [*batch[:POSITIONS], ms.Tensor(grid[None]), *batch[POSITIONS + 1 :]]
