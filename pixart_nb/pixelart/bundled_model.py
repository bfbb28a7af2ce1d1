"""Training of the bundled model from scratch, from weak to strong. Every stage can be stopped and resumes.

An image has a cell of 8 x 8 pixels at every size, so that a latent cell of the VAE of factor 8 is a cell of the scene:
16 cells at 128 pixels, 32 at 256, 64 at 512 and 128 at 1024. A scene gains detail with its size, and the VAE has one
colour to keep per latent cell, not several. Positions are interpolated over the same span at every size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import components
from pixart_nb.core.data.images import to_signed
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import copy_file, ensure_writable, folder_lock, load_tensors, save_tensors
from pixart_nb.core.models.embeddings import sincos_positions
from pixart_nb.core.models.t5 import T5Encoder
from pixart_nb.core.models.transformer import PixArt, PixArtConfig
from pixart_nb.core.models.vae import AutoencoderKL
from pixart_nb.core.sampling.schedulers import DPMSolverMultistepScheduler
from pixart_nb.core.sampling.text import TextTokenizer
from pixart_nb.core.training.trainer import Batch, Trainer, TrainerOptions
from pixart_nb.pixelart.autoencoder import train_autoencoder
from pixart_nb.pixelart.batches import caption_pool, diffusion_batches, generator, set_weights, trained_parameters
from pixart_nb.pixelart.model_card import bundled_card
from pixart_nb.pixelart.object_loss import (
    MOST_WEIGHT,
    NAMES,
    OBJECT_WEIGHT,
    cell_weights,
    cut,
    draw_timesteps,
    name_head,
    object_loss,
    object_windows,
    timestep_weights,
    token_names,
)
from pixart_nb.pixelart.pool import SHARD, coded_scene, scene_shard, write_pool
from pixart_nb.pixelart.scenes import CELL
from pixart_nb.pixelart.text_encoder import train_text_encoder, train_tokenizer

#: Position coordinates run from 0 to 16 at every size: ``pe_interpolation`` is 1 at 256 pixels, as it is 0.5 in the
#: published models, whose sizes are twice as large.
BASE = PixArtConfig(hidden_size=192, num_heads=6, depth=6, caption_channels=128, input_size=16, pe_interpolation=0.5)
COMPRESSION = {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": [3, 4, 5]}
OPTIONS = TrainerOptions(
    steps=1_500,
    start_learning_rate=1.2e-3,
    warmup_steps=200,
    schedule="cosine",
    betas=(0.9, 0.95),
    ema_rate=0.998,
    save_every=100,
    log_every=10,
)
CAPTION_DROP = 0.1
#: Padded caption lengths: few, so that few graphs are compiled.
CAPTION_LENGTHS = (14, 20, 34)
CAPTIONS_PER_IMAGE = 2


@dataclass(frozen=True)
class Stage:
    """A stage of the transformer: cells of its scenes, shards of scenes, images per batch, options of the trainer.

    ``deciding`` is the share of timesteps at which objects are decided; the others give the settings their texture.
    ``object_weight`` and ``most_weight`` go to ``cell_weights`` and ``timestep_weights``. A stage with a ``window``
    sees squares of so many tokens, each near an object, with their positions in the image. Objects are learned from
    less than half of the tokens (Wang et al. 2023, Patch Diffusion, arXiv 2304.12526).
    """

    name: str
    cells: int
    shards: int
    batch: int
    options: TrainerOptions
    compression: dict | None = None
    window: int = 0
    deciding: float = 0.4
    object_weight: float = OBJECT_WEIGHT
    most_weight: float = MOST_WEIGHT

    def config(self) -> PixArtConfig:
        """Return the configuration of the transformer, whose latents have one cell per cell of the scene."""
        changes = {"input_size": self.cells, "pe_interpolation": self.cells / 32}
        return replace(BASE, **changes, kv_compress_config=self.compression)


_WHOLE = replace(OPTIONS, start_learning_rate=5e-4, warmup_steps=100)
_LATER = replace(OPTIONS, start_learning_rate=4e-4, warmup_steps=50)
#: Weights of the stages that learn textures: objects are there, and every timestep counts.
_TEXTURES = {"deciding": 0.2, "object_weight": 2.0, "most_weight": 4.0}
STAGES = (
    Stage("128", 16, 48, 32, OPTIONS, deciding=0.7),
    Stage("objects", 32, 48, 40, replace(OPTIONS, steps=4200, start_learning_rate=1e-3), window=10, deciding=0.7),
    Stage("layout", 32, 48, 16, replace(_WHOLE, steps=1200)),
    Stage("256", 32, 48, 16, replace(_WHOLE, steps=4500), **_TEXTURES),
    Stage("objects-512", 64, 8, 16, replace(_LATER, steps=1100, start_learning_rate=7e-4), window=16, deciding=0.7),
    Stage("512", 64, 8, 4, replace(_LATER, steps=700, start_learning_rate=3e-4), **_TEXTURES),
    Stage("objects-1024", 128, 1, 4, replace(_LATER, steps=1000), COMPRESSION, window=32, deciding=0.7),
    Stage("1024", 128, 1, 1, replace(_LATER, steps=400, start_learning_rate=2e-4), COMPRESSION, **_TEXTURES),
)


def train_tiny(folder: Path, work: Path, last: str = "256", seed: int = 0, processes: int = 2) -> Path:
    """Train the stages up to ``last`` and write the model to ``folder`` as a diffusers pipeline; return ``folder``.

    Everything in between is stored in ``work``: run again to resume, or to add further stages to finished ones.
    """
    names = [stage.name for stage in STAGES]
    if last not in names:
        raise PixArtNBError(f"stage is {last!r}; expected one of {', '.join(names)}")
    folder, work = ensure_writable(folder), Path(work)
    with folder_lock(work):
        tokenizer = TextTokenizer(train_tokenizer(work / "tokenizer", seed))
        encoder = train_text_encoder(tokenizer, work / "text_encoder", seed)
        vae = train_autoencoder(work / "vae", seed, processes)
        weights: dict[str, np.ndarray] = {}
        used = STAGES[: names.index(last) + 1]
        for number, stage in enumerate(used):
            scenes = cached_latents(vae, work / f"latents-{CELL * stage.cells}", stage, seed, processes)
            batch = stage_batches(stage, *scenes, tokenizer, encoder, seed + number)
            net = train_stage(stage, batch, work / stage.name, weights, seed)
            weights = {name: p.asnumpy().copy() for name, p in trained_parameters(net).items()}
        write_model(folder, work, used, vae, encoder, net)
    return folder


def train_stage(stage: Stage, batch: Batch, work: Path, weights: dict[str, np.ndarray], seed: int) -> PixArt:
    """Train, resume or load a stage that starts from ``weights``; return the transformer with its EMA weights.

    Without weights it starts at random. Compression that they do not have starts as the average of R x R keys.
    """
    net, head = PixArt(stage.config()), name_head(BASE.hidden_size, seed)
    net.initialize(generator(seed, 5), zero_cross_attention=False)
    parameters = trained_parameters(net)
    set_weights(parameters, weights)
    loss = object_loss(net, head, net.positions(stage.cells, stage.cells))
    both = parameters | {f"head.{name}": p for name, p in head.parameters_and_names()}
    trainer = Trainer(loss, both, batch, stage.options, work, names=NAMES, network=net)
    trainer.run()
    set_weights(both, trainer.weights())
    return net


def cached_latents(
    vae: AutoencoderKL, folder: Path, stage: Stage, seed: int, processes: int = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return scaled latents of drawn scenes (N, C, cells, cells) float16, and their codes and objects.

    ``scene_codes`` are (N, 8); objects (N, cells, cells) int8, see ``scene_shard``. Scenes are drawn by several
    processes. What exists in ``folder`` is not computed again.
    """
    draw = partial(scene_shard, cells=stage.cells, seed=seed)
    drawn = write_pool(folder / "scenes", stage.shards, draw, processes)
    means, codes, objects = [], [], []
    for number, path in enumerate(tqdm(drawn, desc=folder.name, unit="shard")):
        encoded = folder / f"latents-{number:04d}.safetensors"
        if not encoded.is_file():
            shard = np.load(path)
            save_tensors(encoded, {"mean": _encode(vae, shard["cells"])} | {k: shard[k] for k in ("scene", "objects")})
        tensors = load_tensors(encoded)
        means.append(vae.config.to_model(tensors["mean"].astype(np.float32)).astype(np.float16))
        codes.append(tensors["scene"])
        objects.append(tensors["objects"])
    return np.concatenate(means), np.concatenate(codes), np.concatenate(objects)


def _encode(vae: AutoencoderKL, cells: np.ndarray) -> np.ndarray:
    count = max(1, 4096 // cells.shape[1] ** 2)
    parts = [cells[i : i + count] for i in range(0, len(cells), count)]
    images = (to_signed(part.repeat(CELL, 1).repeat(CELL, 2)) for part in parts)
    return np.concatenate([vae.encode(ms.Tensor(i))[0].mean.asnumpy().astype(np.float16) for i in images])


def stage_batches(
    stage: Stage,
    latents: np.ndarray,
    codes: np.ndarray,
    objects: np.ndarray,
    tokenizer: TextTokenizer,
    encoder: T5Encoder,
    seed: int,
) -> Batch:
    """Return the batches of a stage: latents, noise, timesteps, and captions in several wordings."""
    scenes = [coded_scene(row) for row in codes]
    pool = caption_pool(scenes, tokenizer.tokenize, CAPTION_LENGTHS, CAPTIONS_PER_IMAGE, generator(seed, 6))
    empty = tokenizer.tokenize([""], CAPTION_LENGTHS[-1])

    def embed(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        return encoder(ids, mask).asnumpy()

    times_of = partial(draw_timesteps, share=stage.deciding)
    whole = diffusion_batches(
        latents, pool, embed, empty, stage.batch, CAPTION_DROP, seed, times_of, lambda *numbers: numbers
    )
    config = stage.config()
    positions = sincos_positions(
        config.hidden_size, stage.cells // 2, stage.cells // 2, stage.cells // 2, config.pe_interpolation
    ).reshape(stage.cells // 2, stage.cells // 2, -1)

    def batch(step: int) -> tuple[np.ndarray, ...]:
        start, noise, *rest, images, times = whole(step)
        shown, side, weights = objects[images], stage.window, timestep_weights(times, stage.most_weight)
        if not side:
            return start, noise, *rest, weights, cell_weights(shown, stage.object_weight), token_names(shown)
        corners = object_windows(shown, side, generator(seed, step, 17))
        start, noise, shown = (cut(grid, 2 * corners, 2 * side) for grid in (start, noise, shown))
        own = np.stack([positions[y : y + side, x : x + side].reshape(side * side, -1) for y, x in corners])
        return start, noise, *rest, weights, cell_weights(shown, stage.object_weight), token_names(shown), own

    return batch


def write_model(
    folder: Path, work: Path, stages: Sequence[Stage], vae: AutoencoderKL, encoder: T5Encoder, transformer: PixArt
) -> None:
    """Write the networks (float16 weights), the tokenizer, the scheduler, the training curves and the model card."""
    components.write_vae(folder / "vae", vae, np.float16)
    components.write_text_encoder(folder / "text_encoder", encoder, np.float16)
    components.write_transformer(folder / "transformer", transformer, np.float16)
    for name in ("spiece.model", "tokenizer_config.json"):
        copy_file(work / "tokenizer" / name, folder / "tokenizer" / name)
    for part in ("vae", "decoder", "text_encoder", *(stage.name for stage in stages)):
        copy_file(work / part / "curve.csv", folder / "curves" / f"{part}.csv")
    components.write_index(folder, DPMSolverMultistepScheduler())
    bundled_card(stages[-1].name, CELL * stages[-1].cells, recipe(stages)).write(folder)
    tqdm.write(f"wrote {folder}")


def recipe(stages: Sequence[Stage]) -> str:
    """Return the sizes, steps, images and scenes of stages as a table in Markdown."""
    head = ["| image | steps | images of a step | seen of each image | scenes |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*head, *map(_table_row, stages)])


def _table_row(stage: Stage) -> str:
    size, window = CELL * stage.cells, stage.window
    seen = f"a square of {window} x {window} tokens" if window else "all"
    return f"| {size} x {size} | {stage.options.steps:,} | {stage.batch} | {seen} | {stage.shards * SHARD:,} |"
