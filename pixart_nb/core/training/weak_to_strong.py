"""From weak to strong (PixArt-Sigma, section 4): a stage of training starts from the checkpoint of the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.configuration import describe, positions_of
from pixart_nb.core.checkpoints.files import open_checkpoint
from pixart_nb.core.checkpoints.layouts import official_view, started_compression
from pixart_nb.core.checkpoints.lazy_tensor import Stored
from pixart_nb.core.checkpoints.load import transformer_of
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.models.embeddings import sincos_positions
from pixart_nb.core.models.transformer import PixArt, PixArtConfig
from pixart_nb.core.training.loss import add_noise
from pixart_nb.core.training.objective import POSITIONS

#: The empty caption's embedding, which training drops captions to.
EMPTY = "y_embedder.y_embedding"
#: Batches over which the loss before the first step is measured.
START_BATCHES = 4


@dataclass(frozen=True)
class Stage:
    """What a stage changes of the model before it; each is left as it was unless given.

    ``sample_size``: latent side of the training size. ``pe_interpolation``: stretch of the positions; 0 lets a picture
    span the coordinates that it spanned before, whatever its size. ``compression``: a ``kv_compress_config``;
    ``compression_init``: new convolutions start as ``average`` (section 3.2) or at ``random``.
    """

    sample_size: int = 0
    pe_interpolation: float = 0.0
    compression: dict | None = None
    compression_init: str = "average"

    def config(self, previous: PixArtConfig) -> PixArtConfig:
        """The model of this stage."""
        side = self.sample_size or previous.input_size
        stretch = self.pe_interpolation or previous.pe_interpolation * side / previous.input_size
        changes = {"input_size": side, "pe_interpolation": stretch}
        if side != previous.input_size:
            changes["class_name"] = "PixArtMS"
        if self.compression:
            changes["kv_compress_config"] = self.compression
        return replace(previous, **changes)


@dataclass(frozen=True)
class Start:
    """A stage that can begin: its model, the one before, and which layers are newly compressed."""

    net: PixArt
    previous: PixArtConfig
    new_layers: tuple[int, ...]
    notes: tuple[str, ...]


def start_stage(checkpoint: str | Path, stage: Stage, tokens: int | None = None, seed: int = 0) -> Start:
    """Load the transformer of the stage before as that of this one, in float32.

    ``tokens``: of a caption, where the checkpoint does not show them. A checkpoint that does not say the size that it
    was trained at is taken to be of this stage's size.

    Raises ``CheckpointError`` where checkpoint and stage contradict each other.
    """
    view, previous, notes = _previous(checkpoint, stage, tokens)
    config = stage.config(previous)
    _check_compression(previous, config, checkpoint)
    new = _new_layers(previous, config)
    added = started_compression(view.tensors, new, config.kv_ratio) if config.kv_operator == "conv" else {}
    if stage.compression_init == "random":
        added = _at_random(added, config.kv_ratio, np.random.default_rng((seed, 5)))
    net = transformer_of(view.complete | view.rest | added, config, checkpoint, ms.float32)
    return Start(net, previous, new, notes)


def start_afresh(
    checkpoint: str | Path,
    stage: Stage,
    tokens: int | None = None,
    seed: int = 0,
    zero_cross_attention: bool = True,
) -> Start:
    """The architecture of ``start_stage`` with fresh weights; the embedding of the empty caption is kept."""
    view, previous, notes = _previous(checkpoint, stage, tokens)
    net = PixArt(stage.config(previous))
    net.initialize(np.random.default_rng((seed, 4)), zero_cross_attention)
    if EMPTY in view.tensors:
        net.y_embedder.y_embedding.set_data(ms.Tensor(np.asarray(view.tensors[EMPTY], np.float32)))
    return Start(net, previous, (), notes)


def _previous(checkpoint: str | Path, stage: Stage, tokens: int | None):
    view = official_view(open_checkpoint(checkpoint))
    known = describe(view, checkpoint, PixArtConfig(model_max_length=tokens) if tokens else None)
    if known.knows("input_size") or not stage.sample_size:
        return view, known.config, tuple(known.notes)
    note = f"{checkpoint} does not say its size; taken to be latents of {stage.sample_size}."
    previous = replace(known.config, **positions_of(stage.sample_size, known.family))
    return view, previous, (*known.notes, note)


def _new_layers(previous: PixArtConfig, config: PixArtConfig) -> tuple[int, ...]:
    before = previous.kv_layers if previous.kv_ratio > 1 else ()
    return tuple(n for n in config.kv_layers if config.kv_ratio > 1 and n not in before)


def _check_compression(previous: PixArtConfig, config: PixArtConfig, source: str | Path) -> None:
    """Layers that learned to compress keep their ratio, and go on compressing."""
    if previous.kv_operator != "conv" or not previous.kv_layers:
        return
    lost = sorted(set(previous.kv_layers) - set(config.kv_layers))
    if lost or (config.kv_operator, config.kv_ratio) != ("conv", previous.kv_ratio):
        raise CheckpointError(
            f"{source} compresses layers {list(previous.kv_layers)} by {previous.kv_ratio} with 'conv'; this stage "
            f"says layers {list(config.kv_layers)} by {config.kv_ratio} with {config.kv_operator!r}. Keep those layers "
            "and that ratio; further layers may be added"
        )


def _at_random(added: dict[str, Stored], ratio: int, rng: np.random.Generator) -> dict[str, Stored]:
    """Convolutions as any other would start: uniform within 1 / sqrt(fan in), which is 1 / ratio."""
    return {
        name: Stored.of(rng.uniform(-1 / ratio, 1 / ratio, part.shape).astype(np.float32), name)
        if ".attn.sr." in name
        else part
        for name, part in added.items()
    }


# ---- the error at step 0


def start_report(start: Start, loss: Callable, batches: Sequence[Sequence]) -> dict[str, float]:
    """The loss before the first step, mean over batches of ``DiffusionBatches``, and what it is without what is new.

    ``loss``: of the model as it starts. Where the size is new, ``loss_interpolated`` and ``loss_not_interpolated``:
    positions that span what they spanned before, or that go on beyond. Where layers are newly compressed,
    ``loss_without_compression``, and ``compression_error``, ||a - b|| / ||b|| of the outputs with and without.
    ``latent_std``: about 1 for latents as the published models know them; it tells of a swapped autoencoder.
    """
    net, previous = start.net, start.previous
    tensors = [[part if isinstance(part, ms.Tensor) else ms.Tensor(part) for part in b] for b in batches]
    report = {"loss": _mean_loss(loss, tensors)}
    report["latent_std"] = float(np.std(np.concatenate([b[0].asnumpy().reshape(-1) for b in tensors])))
    if net.config.input_size != previous.input_size:
        span = previous.pe_interpolation * net.config.input_size / previous.input_size
        for name, stretch in (("", span), ("not_", previous.pe_interpolation)):
            moved = [_with_positions(net, batch, stretch) for batch in tensors]
            report[f"loss_{name}interpolated"] = _mean_loss(loss, moved)
    if start.new_layers:
        found = _outputs(net, tensors[0])
        with uncompressed(net, start.new_layers):
            report["loss_without_compression"] = _mean_loss(loss, tensors)
            exact = _outputs(net, tensors[0])
        report["compression_error"] = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    return report


def _mean_loss(loss: Callable, batches: Sequence[Sequence[ms.Tensor]]) -> float:
    return float(np.mean([loss(*batch)[0].asnumpy() for batch in batches]))


def _with_positions(net: PixArt, batch: Sequence[ms.Tensor], stretch: float) -> list[ms.Tensor]:
    """A batch whose positions are stretched otherwise."""
    config, patch = net.config, net.config.patch_size
    height, width = (side // patch for side in batch[0].shape[2:])
    grid = sincos_positions(config.hidden_size, height, width, config.input_size // patch, stretch)
    return [*batch[:POSITIONS], ms.Tensor(grid[None]), *batch[POSITIONS + 1 :]]


def _outputs(net: PixArt, batch: Sequence[ms.Tensor]) -> np.ndarray:
    latents, noise, table, timesteps, embeddings, mask, _, positions, *micro = batch
    out = net.forward(add_noise(latents, noise, table), timesteps, embeddings, mask, positions, *micro)
    return out.asnumpy()


@contextmanager
def uncompressed(net: PixArt, layers: Sequence[int]) -> Iterator[None]:
    """Let some layers look at all keys and values for a while. Not inside compiled graphs."""
    ratios = [net.blocks[layer].attn.ratio for layer in layers]
    try:
        for layer in layers:
            net.blocks[layer].attn.ratio = 1
        yield
    finally:
        for layer, ratio in zip(layers, ratios, strict=True):
            net.blocks[layer].attn.ratio = ratio
