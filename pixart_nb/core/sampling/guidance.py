"""The model as the samplers see it: classifier-free guidance over one forward pass of both halves of the batch."""

from __future__ import annotations

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.fast import denoiser
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.sampling.conditioning import Conditioning, both_rows
from pixart_nb.core.sampling.step import Predict, Prediction


def guided_prediction(
    net: PixArt, condition: Conditioning, guidance_scale: float, height: int, width: int
) -> Predict:
    """``predict(latents, timestep)``: the noise, guided, and the raw variance of the conditional rows.

    Pictures have height x width pixels. Everything that all steps share is computed here, once. Guidance (Ho and
    Salimans 2022) goes from the unconditional prediction towards the conditional one, ``guidance_scale`` times as far.
    """
    guided = condition.negative_embeds is not None
    if net.hook_manager is not None:
        net.hook_manager.on_prompts(condition, height // 8, width // 8)
    caption, mask = (
        both_rows(condition) if guided else (condition.prompt_embeds, condition.prompt_attention_mask)
    )
    denoise, channels = denoiser(net, caption, mask), net.config.in_channels

    def predict(latents: np.ndarray, timestep: float) -> Prediction:
        x = ms.Tensor(np.concatenate([latents, latents]) if guided else latents)
        out = denoise(x, timestep).astype(ms.float32).asnumpy()
        noise = out[:, :channels]
        variance = out[-len(latents) :, channels:] if out.shape[1] > channels else None
        if guided:
            unconditional, conditional = np.split(noise, 2)
            noise = unconditional + np.float32(guidance_scale) * (conditional - unconditional)
        return Prediction(noise, variance)

    return predict
