"""Networks that a training uses and does not train: VAE, text encoder and tokenizer."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from pixart_nb.config import TrainConfig
from pixart_nb.core.backend import dtype_from_name, ms, to_numpy
from pixart_nb.core.checkpoints.components import LOADERS, T5EncoderModel, pipeline_class
from pixart_nb.core.checkpoints.components import component_paths as pipeline_paths
from pixart_nb.core.checkpoints.load import vae_config
from pixart_nb.core.data.control import ControlImages
from pixart_nb.core.data.features import Embed, Encode, FeatureCache, MadeBy, fingerprint
from pixart_nb.core.data.labels import Label
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig
from pixart_nb.core.sampling.planning import max_sequence_length
from pixart_nb.core.sampling.schedulers import Scheduler, scheduler_named
from pixart_nb.core.sampling.text import embed as embed_captions
from pixart_nb.core.training.distributed import SINGLE, Workers
from pixart_nb.core.training.options import trained_edges

#: Class of a pipeline by the family of its transformer.
PIPELINES = {"alpha": "PixArtAlphaPipeline", "sigma": "PixArtSigmaPipeline"}


class FrozenNetworks:
    """VAE and text encoder of a training, loaded at the first use and freed by ``release``.

    ``stream`` keeps one layer of T5 in memory at a time.
    """

    def __init__(self, config: TrainConfig, stream: bool = False):
        self.config, self.paths, self.stream = config, component_paths(config), stream

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The VAE in float32; in half precision SDXL's overflows."""
        vae = LOADERS["vae"](self.paths["vae"], ms.float32)
        vae.config = self.vae_config
        return vae

    @cached_property
    def vae_config(self) -> VAEConfig:
        """Configuration of the VAE, with the scaling factor of the training configuration if that has one."""
        config, factor = vae_config(self.paths["vae"]), self.config.sd_scale_factor
        return replace(config, scaling_factor=factor) if factor else config

    @cached_property
    def embed(self) -> Embed:
        """Function from captions to embeddings (N, T, C) and mask (N, T). Captions are cleaned as prompts are."""
        tokenizer, path = LOADERS["tokenizer"](self.paths["tokenizer"], ms.float32), self.paths["text_encoder"]
        if self.stream:
            encoder = T5EncoderModel.from_pretrained(path, stream=True)
        else:
            encoder = LOADERS["text_encoder"](path, dtype_from_name(self.config.dtype))
        return text_embedder(tokenizer, encoder, self.max_length, self.config.clean_caption)

    @property
    def max_length(self) -> int:
        """Number of caption tokens: ``t5_max_length``, or that of the model's pipeline class."""
        return max_sequence_length(self.config)

    @property
    def control(self) -> ControlImages | None:
        """Condition images of the ControlNet that is trained, if one is."""
        config = self.config
        if not config.copy_blocks_num:
            return None
        return ControlImages(Path(config.control_dir) if config.control_dir else None, trained_edges(config))

    def release(self, *names: str) -> None:
        """Free the networks ``vae`` and ``embed``, or those named; they are loaded again when they are used."""
        for name in names or ("vae", "embed"):
            vars(self).pop(name, None)

    def check_latents(self, net: PixArtConfig) -> None:
        """Refuse a VAE whose latents have another number of channels than the transformer takes."""
        channels = self.vae_config.latent_channels
        if channels != net.in_channels:
            raise CheckpointError(
                f"the latents of the autoencoder {self.paths['vae']} have {channels} channels; the transformer takes "
                f"{net.in_channels}"
            )

    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the VAE, and of the text encoder with its tokenizer."""
        paths = self.paths
        text_encoder = fingerprint(paths["text_encoder"], paths["tokenizer"])
        return {"vae": fingerprint(paths["vae"]), "text_encoder": text_encoder}

    def feature_cache(self, labels: list[Label], sizes: list[tuple[int, int]]) -> FeatureCache:
        """Return the feature cache of the configuration, whether or not it is filled."""
        config, prints = self.config, self.fingerprints()
        made_by = MadeBy(*prints.values(), self.max_length, config.clean_caption, config.feature_dtype)
        return FeatureCache(config.feature_cache, labels, sizes, made_by, self.control)

    def fill(self, cache: FeatureCache, batch_size: int = 8, workers: Workers = SINGLE) -> dict[str, int]:
        """Compute this worker's share of what is missing in a feature cache, and wait for that of the others.

        Returns the number of shards that it made, by reason. The VAE is released before the text encoder is loaded.
        """

        def embed(captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
            self.release("vae")  # latents are computed first
            return self.embed(captions)

        encode = lambda pixels: vae_encoder(self.vae)(pixels)  # noqa: E731
        made = cache.write(encode, embed, batch_size, workers.rank, workers.size)
        cache.wait()
        return made

    def scheduler(self) -> Scheduler:
        """Return the scheduler of ``model``, or that of the published models."""
        paths = pipeline_paths(self.config.model, ["scheduler"]) if self.config.model else {}
        return LOADERS["scheduler"](paths["scheduler"], ms.float32) if paths else scheduler_named("dpm++")

    def pipeline_class(self, family: str) -> str:
        """Return the class name of the pipeline to write: that of ``model``, or that of the transformer's family."""
        name = pipeline_class(self.config.model) if self.config.model else ""
        return name if name in PIPELINES.values() else PIPELINES.get(family, PIPELINES["sigma"])


def component_paths(config: TrainConfig) -> dict[str, Path]:
    """Return the paths of the components: those of ``model``, replaced by those that are given one by one."""
    roots = {
        "transformer": config.checkpoint,
        "vae": config.vae_root,
        "text_encoder": config.text_encoder_root,
        "tokenizer": config.tokenizer_root,
    }
    rest = [name for name, path in roots.items() if not path]
    paths = pipeline_paths(config.model, rest) if rest else {}
    paths |= {name: Path(path) for name, path in roots.items() if path}
    missing = [f"{name} {path}" for name, path in paths.items() if not path.exists()]
    if missing:
        raise CheckpointError(f"not found: {', '.join(missing)}; expected files or folders there")
    return paths


def vae_encoder(vae: AutoencoderKL) -> Encode:
    """Return the encoder of a VAE as a function for ``FeatureCache.write``."""

    def encode(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        latents = vae.encode(ms.Tensor(pixels))[0]
        mean, logvar = (to_numpy(part) for part in (latents.mean, latents.logvar))
        return mean, np.exp(0.5 * logvar)

    return encode


def text_embedder(tokenizer, text_encoder, max_length: int, clean_caption: bool = True) -> Embed:
    """Return tokenizer and T5 encoder as a function for ``FeatureCache.write``."""

    def embed(captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        embeds, mask = embed_captions(tokenizer, text_encoder, captions, clean_caption, max_length, trim=True)
        return to_numpy(embeds), mask

    return embed
