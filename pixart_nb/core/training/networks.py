"""The networks of a training that are not trained: where they lie, loaded when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from pixart_nb.config import TrainConfig
from pixart_nb.core.backend import dtype_from_name, ms
from pixart_nb.core.checkpoints.components import LOADERS, component_places
from pixart_nb.core.data.features import fingerprint, text_embedder
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.models.transformer import PixArtConfig
from pixart_nb.core.models.vae import AutoencoderKL
from pixart_nb.core.sampling.scheduler import Scheduler
from pixart_nb.core.sampling.schedulers import scheduler_named


class Networks:
    """The networks that are not trained, loaded when they are first asked for."""

    def __init__(self, config: TrainConfig):
        self.config, self.places = config, places_of(config)

    @cached_property
    def vae(self) -> AutoencoderKL:
        """The autoencoder, in float32: in half precision SDXL's overflows."""
        vae = LOADERS["vae"](self.places["vae"], ms.float32)
        if self.config.sd_scale_factor:
            vae.config = replace(vae.config, scaling_factor=self.config.sd_scale_factor)
        return vae

    def check_latents(self, net: PixArtConfig) -> None:
        """Refuse an autoencoder whose latents the transformer does not take."""
        channels = self.vae.config.latent_channels
        if channels != net.in_channels:
            raise CheckpointError(
                f"the latents of the autoencoder {self.places['vae']} have {channels} channels; the transformer takes "
                f"{net.in_channels}"
            )

    @cached_property
    def embed(self) -> Callable:
        """Captions -> embeddings and mask."""
        tokenizer = LOADERS["tokenizer"](self.places["tokenizer"], ms.float32)
        encoder = LOADERS["text_encoder"](self.places["text_encoder"], dtype_from_name(self.config.dtype))
        return text_embedder(tokenizer, encoder, self.config.t5_max_length, self.config.clean_caption)

    def fingerprints(self) -> dict[str, str]:
        """Short texts that tell the autoencoder, and the text encoder with its tokenizer, from others."""
        places = self.places
        return {
            "vae": fingerprint(places["vae"]),
            "text_encoder": fingerprint(places["text_encoder"], places["tokenizer"]),
        }


def places_of(config: TrainConfig) -> dict[str, Path]:
    """Where the components lie: ``model``'s, with those replaced that are given one by one."""
    given = {
        "transformer": config.checkpoint,
        "vae": config.vae_root,
        "text_encoder": config.text_encoder_root,
        "tokenizer": config.tokenizer_root,
    }
    wanted = [name for name, place in given.items() if not place]
    found = component_places(config.model, wanted) if wanted else {}
    places = found | {name: Path(place) for name, place in given.items() if place}
    lost = [f"{name} {place}" for name, place in places.items() if not place.exists()]
    if lost:
        raise CheckpointError(f"not found: {', '.join(lost)}; expected files or folders there")
    return places


def scheduler_of(config: TrainConfig) -> Scheduler:
    """The scheduler of ``model``, or the published models' own."""
    found = component_places(config.model, ["scheduler"]) if config.model else {}
    return LOADERS["scheduler"](found["scheduler"], ms.float32) if found else scheduler_named("dpm++")
