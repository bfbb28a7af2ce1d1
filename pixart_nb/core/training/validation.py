"""Validation pictures: the same prompts from the same noise, as the training goes on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.data.features import Embed, padded
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.models.vae import AutoencoderKL
from pixart_nb.core.sampling.image_files import write_picture
from pixart_nb.core.sampling.images import to_uint8
from pixart_nb.core.sampling.pipeline import PixArtSigmaPipeline
from pixart_nb.core.sampling.randomness import picture_generators


@dataclass(frozen=True)
class Validation:
    """What is drawn. ``embeds`` (2N, T, C) and ``mask`` are those of ``embed_prompts``; height and width in pixels."""

    prompts: tuple[str, ...]
    embeds: np.ndarray
    mask: np.ndarray
    height: int
    width: int
    method: str = "dpm"
    steps: int = 20
    guidance: float = 4.5
    seed: int = 0
    told: dict[str, Any] = field(default_factory=dict)

    def draw(self, net: PixArt, vae: AutoencoderKL) -> np.ndarray:
        """Pictures of all prompts by a transformer as it is now: (N, height, width, 3) uint8."""
        count = len(self.prompts)
        pipe = PixArtSigmaPipeline(None, None, vae, net, self.method)
        images = [
            pipe(
                prompt_embeds=ms.Tensor(self.embeds[i : i + 1]),
                prompt_attention_mask=self.mask[i : i + 1],
                negative_prompt_embeds=ms.Tensor(self.embeds[count + i : count + i + 1]),
                negative_prompt_attention_mask=self.mask[count + i : count + i + 1],
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                height=self.height,
                width=self.width,
                generator=picture_generators(self.seed, [i]),
                use_resolution_binning=False,
                output_type="np",
            )[0]
            for i in range(count)  # one after the other: the memory of one
        ]
        return to_uint8(np.concatenate(images))

    def write(self, folder: str | Path, step: int, pictures: np.ndarray) -> list[Path]:
        """Write pictures of a step as ``step-00000100/000_a-red-cup.png``; their paths."""
        paths = []
        for number, (prompt, pixels) in enumerate(zip(self.prompts, pictures, strict=True)):
            words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
            path = Path(folder) / f"step-{step:08d}" / f"{number:03d}_{words}.png"
            write_picture(path, pixels, {"prompt": prompt, "step": step, **self.told})
            paths.append(path)
        return paths


def embed_prompts(
    embed: Embed, prompts: Sequence[str], negatives: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (2N, T, C) and mask (2N, T) of N prompts, then N negative prompts, one at a time."""
    rows = []
    for text in (*prompts, *negatives):
        embeds, mask = embed([text])
        rows.append(embeds[0][mask[0]])
    return padded(rows)
