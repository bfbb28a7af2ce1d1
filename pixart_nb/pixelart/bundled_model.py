"""Training of the bundled model from nothing: VAE, text encoder, transformer, and the folder that holds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import components
from pixart_nb.core.io import copy_file, ensure_writable, folder_lock
from pixart_nb.core.models.t5 import T5Encoder
from pixart_nb.core.models.transformer import PixArt, PixArtConfig
from pixart_nb.core.models.vae import AutoencoderKL
from pixart_nb.core.sampling.schedulers import DPMSolverMultistepScheduler
from pixart_nb.core.sampling.text import TextTokenizer
from pixart_nb.core.training.loss import diffusion_loss
from pixart_nb.core.training.trainer import Trainer, TrainerOptions
from pixart_nb.pixelart.autoencoder import train_autoencoder
from pixart_nb.pixelart.batches import (
    cached_latents,
    caption_pool,
    diffusion_batches,
    generator,
    set_weights,
    trained_parameters,
)
from pixart_nb.pixelart.model_card import small_images_card
from pixart_nb.pixelart.scenes import Scene, split_scenes
from pixart_nb.pixelart.text_encoder import CAPTION_TOKENS, train_text_encoder, train_tokenizer

CONFIG = PixArtConfig(
    hidden_size=192,
    num_heads=6,
    depth=6,
    caption_channels=128,
    input_size=16,
    pe_interpolation=1.0,
    model_max_length=300,
)
#: AdamW with a high rate that falls to zero; the output of the cross-attention is initialised at random.
OPTIONS = TrainerOptions(
    steps=5000,
    start_learning_rate=1.2e-3,
    warmup_steps=200,
    schedule="cosine",
    betas=(0.9, 0.95),
    ema_rate=0.998,
    save_every=250,
    log_every=10,
)
#: Folder and options of each stage; each starts from the averages of the one before.
STAGES = {
    "transformer": OPTIONS,
    "transformer-2": replace(OPTIONS, steps=6000, start_learning_rate=8e-4, warmup_steps=100),
    "transformer-3": replace(OPTIONS, steps=5000, start_learning_rate=6e-4, warmup_steps=100),
}
BATCH = 32
IMAGES = 8 * 2160
CAPTION_DROP = 0.1
#: Padded caption lengths: few, so that few graphs are compiled.
CAPTION_LENGTHS = (14, 24, CAPTION_TOKENS)
CAPTIONS_PER_IMAGE = 2


def train_tiny(folder: Path, work: Path, seed: int = 0) -> Path:
    """Train the bundled model and write it to ``folder`` as a diffusers pipeline; return ``folder``.

    Intermediate results are stored in ``work``: an interrupted training resumes from there. Scenes held out by
    ``split_scenes`` are never shown.
    """
    folder, work = ensure_writable(folder), Path(work)
    scenes = split_scenes()[0]
    with folder_lock(work):
        vae = train_autoencoder(scenes, work / "vae", seed)
        tokenizer = TextTokenizer(train_tokenizer(scenes, work / "tokenizer", seed))
        encoder = train_text_encoder(scenes, tokenizer.tokenize, work / "text_encoder", seed)
        transformer = train_transformer(scenes, vae, tokenizer, encoder, work, seed)
        write_pipeline(folder, work, vae, encoder, transformer)
    return folder


def train_transformer(
    scenes: list[Scene], vae: AutoencoderKL, tokenizer: TextTokenizer, encoder: T5Encoder, work: Path, seed: int = 0
) -> PixArt:
    """Train, resume or load the transformer in ``work``; return it with its EMA weights."""
    means, numbers = cached_latents(
        lambda images: vae.encode(ms.Tensor(images))[0].mean.asnumpy(), scenes, work / "latents", IMAGES, seed
    )
    net = PixArt(CONFIG)
    net.initialize(generator(seed, 5), zero_cross_attention=False)
    parameters = trained_parameters(net)
    latents = vae.config.to_model(means)
    pool = caption_pool(scenes, numbers, tokenizer.tokenize, CAPTION_LENGTHS, CAPTIONS_PER_IMAGE, seed)
    empty = tokenizer.tokenize([""], CAPTION_LENGTHS[-1])
    positions = net.positions(CONFIG.input_size, CONFIG.input_size)
    for number, (name, options) in enumerate(STAGES.items()):
        batches = diffusion_batches(
            latents, pool, lambda ids, mask: encoder(ids, mask).asnumpy(), empty, BATCH, CAPTION_DROP, seed + number
        )
        trainer = Trainer(
            diffusion_loss(net, positions), parameters, batches, options, work / name, names=("mse", "vb"), network=net
        )
        trainer.run()
        set_weights(parameters, trainer.weights())
    return net


def write_pipeline(folder: Path, work: Path, vae: AutoencoderKL, encoder: T5Encoder, transformer: PixArt) -> None:
    """Write the networks (float16 weights), the tokenizer, the scheduler, the training curves and the model card."""
    components.write_vae(folder / "vae", vae, np.float16)
    components.write_text_encoder(folder / "text_encoder", encoder, np.float16)
    components.write_transformer(folder / "transformer", transformer, np.float16)
    for name in ("spiece.model", "tokenizer_config.json"):
        copy_file(work / "tokenizer" / name, folder / "tokenizer" / name)
    for part in ("vae", "text_encoder", *STAGES):
        copy_file(work / part / "curve.csv", folder / "curves" / f"{part}.csv")
    components.write_index(folder, DPMSolverMultistepScheduler())
    small_images_card().write(folder)
    tqdm.write(f"wrote {folder}")
