"""Classifier-free guidance: the model as the samplers call it."""

from __future__ import annotations

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.fast import denoiser
from pixart_nb.core.models.operators import check_finite
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.sampling.samplers import Predict, Prediction
from pixart_nb.core.sampling.text import Conditioning, stack_rows


def classifier_free_guidance(
    net: PixArt, condition: Conditioning, guidance_scale: float, height: int, width: int, guidance_rescale: float = 0.0
) -> Predict:
    """Return ``predict(latents, timestep)`` for images of height x width pixels (Ho and Salimans 2022).

    Both halves of the batch go through one forward pass. The noise is ``unconditional + guidance_scale *
    (conditional - unconditional)``, the raw variance that of the conditional rows. Everything that all steps share is
    computed here, once. ``guidance_rescale`` is phi of Lin et al. 2023, section 3.4.
    """
    guided, channels = condition.negative_embeds is not None, net.config.in_channels
    if net.hook_manager is not None:
        net.hook_manager.on_prompts(condition, height // 8, width // 8)
    caption, mask = stack_rows(condition) if guided else (condition.prompt_embeds, condition.prompt_attention_mask)

    def batch(latents: np.ndarray) -> ms.Tensor:
        return ms.Tensor(np.concatenate([latents, latents]) if guided else latents)

    def guide(out: ms.Tensor, timestep: float) -> Prediction:
        out = out.astype(ms.float32).asnumpy()  # (N or 2N, C or 2C, H, W)
        check_finite(out, f"the transformer at timestep {timestep:g}")
        noise = out[:, :channels]
        variance = out[-len(out) // (1 + guided) :, channels:] if out.shape[1] > channels else None
        if guided:
            unconditional, conditional = np.split(noise, 2)
            noise = unconditional + np.float32(guidance_scale) * (conditional - unconditional)
            if guidance_rescale:
                noise = _rescaled(noise, conditional, guidance_rescale)
        return Prediction(noise, variance)

    return denoiser(net, caption, mask, batch, guide)


def _rescaled(noise: np.ndarray, conditional: np.ndarray, share: float) -> np.ndarray:
    """Return guided noise whose standard deviation is partly that of the conditional prediction."""
    axes = tuple(range(1, noise.ndim))
    ratio = conditional.std(axes, keepdims=True) / noise.std(axes, keepdims=True)
    return np.float32(share) * (noise * ratio) + np.float32(1 - share) * noise
