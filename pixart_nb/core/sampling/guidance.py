"""Guidance: the model as the samplers call it, with classifier-free and perturbed-attention guidance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import mint

from pixart_nb.core.backend import ms, to_numpy
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.fast import Denoiser, denoiser
from pixart_nb.core.models.attention import IdentityAttention
from pixart_nb.core.models.operators import check_finite
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.sampling.samplers import Predict, Prediction
from pixart_nb.core.sampling.text import Conditioning, stack_rows


def guided_model(
    net: PixArt,
    condition: Conditioning,
    guidance_scale: float,
    height: int,
    width: int,
    guidance_rescale: float = 0.0,
    perturbation: Perturbation | None = None,
) -> Predict:
    """Return ``predict(latents, timestep)`` for images of height x width pixels.

    Classifier-free guidance (Ho and Salimans 2022): both halves of the batch go through one forward pass. The noise is
    ``unconditional + guidance_scale * (conditional - unconditional)``, the raw variance that of the conditional rows.
    Everything that all steps share is computed here, once. ``guidance_rescale`` is phi of Lin et al. 2023, section 3.4.
    ``perturbation`` adds perturbed-attention guidance. In the guess mode of a ControlNet (``Controlled``), the halves
    are predicted one after the other.
    """
    guided, channels = condition.negative_embeds is not None, net.config.in_channels
    if net.hook_manager is not None:
        net.hook_manager.on_prompts(condition, height // 8, width // 8)
    caption, mask = stack_rows(condition) if guided else (condition.prompt_embeds, condition.prompt_attention_mask)

    def batch(latents: np.ndarray) -> ms.Tensor:
        return ms.Tensor(np.concatenate([latents, latents]) if guided else latents)

    def split(out: ms.Tensor, timestep: float) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        out = to_numpy(out)  # (N or 2N, C or 2C, H, W)
        check_finite(out, f"the transformer at timestep {timestep:g}")
        unconditional, conditional = np.split(out, 2) if guided else (out, out)
        variance = conditional[:, channels:] if out.shape[1] > channels else None
        return unconditional[:, :channels], conditional[:, :channels], variance

    def guide(unconditional: np.ndarray, conditional: np.ndarray) -> np.ndarray:
        if not guided:
            return conditional
        noise = unconditional + np.float32(guidance_scale) * (conditional - unconditional)
        return _rescaled(noise, conditional, guidance_rescale) if guidance_rescale else noise

    def finish(out: ms.Tensor, timestep: float) -> Prediction:
        *parts, variance = split(out, timestep)
        return Prediction(guide(*parts), variance)

    if guided and getattr(net, "guess_mode", False):
        half_by_half = _guess_mode_denoiser(net, condition)
        return lambda latents, timestep: finish(half_by_half(latents, timestep), timestep)
    if perturbation is None:
        return denoiser(net, caption, mask, batch, finish)
    first = denoiser(net, caption, mask, batch, split)
    with identity_attention(net, perturbation.layers):
        second = denoiser(net, condition.prompt_embeds, condition.prompt_attention_mask, ms.Tensor)

    def predict(latents: np.ndarray, timestep: float) -> Prediction:
        unconditional, conditional, variance = first(latents, timestep)
        with identity_attention(net, perturbation.layers):
            perturbed = to_numpy(second(latents, timestep))[:, :channels]
        check_finite(perturbed, f"the transformer with perturbed attention at timestep {timestep:g}")
        scale = np.float32(perturbation.scale_at(timestep))
        return Prediction(guide(unconditional, conditional) + scale * (conditional - perturbed), variance)

    return predict


def _guess_mode_denoiser(net: Any, condition: Conditioning) -> Denoiser:
    """Return the denoiser of a ``Controlled`` in guess mode: rows without a prompt by its base model, then the others.

    Raises an error if the transformer has hooks, which expect both halves in one batch.
    """
    if net.hook_manager is not None:
        raise PixArtNBError("traces and hooks read both halves of a batch together; switch guess_mode off for them")
    halves = (
        denoiser(net.net.base_model, condition.negative_embeds, condition.negative_mask, ms.Tensor),
        denoiser(net, condition.prompt_embeds, condition.prompt_attention_mask, ms.Tensor),
    )
    return lambda latents, timestep: mint.cat([half(latents, timestep) for half in halves])


def _rescaled(noise: np.ndarray, conditional: np.ndarray, share: float) -> np.ndarray:
    """Return guided noise whose standard deviation is partly that of the conditional prediction."""
    axes = tuple(range(1, noise.ndim))
    ratio = conditional.std(axes, keepdims=True) / noise.std(axes, keepdims=True)
    return np.float32(share) * (noise * ratio) + np.float32(1 - share) * noise


# ---- perturbed-attention guidance


@dataclass(frozen=True)
class Perturbation:
    """Perturbed-attention guidance (PAG; Ahn et al. 2024, equation 13): adds scale * (conditional - perturbed).

    In the perturbed prediction the self-attention of ``layers`` (block numbers) is the identity. ``adaptive`` lowers
    the scale with time, to 0 at the least, as in diffusers.
    """

    layers: tuple[int, ...]
    scale: float
    adaptive: float = 0.0

    def scale_at(self, timestep: float) -> float:
        """Return the scale at a timestep of 0..999."""
        return max(0.0, self.scale - self.adaptive * (1000 - timestep)) if self.adaptive > 0 else self.scale


def perturbed_layers(depth: int, names: Sequence[str]) -> tuple[int, ...]:
    """Return the numbers of the blocks, of ``depth``, whose self-attention has one of ``names`` in its own.

    A name is a part of ``transformer_blocks.N.attn1``, as in diffusers, where ``blocks.1`` also names the blocks 10 to
    19; ``blocks.1.`` is the second one alone. Raises an error for a name without a layer.
    """
    layers: set[int] = set()
    for name in names:
        matching = {n for n in range(depth) if name in f"transformer_blocks.{n}.attn1"} if name else set()
        if not matching:
            raise PixArtNBError(
                f"pag_applied_layers: there is no layer {name!r}; expected names such as blocks.0 to blocks.{depth - 1}"
            )
        layers |= matching
    return tuple(sorted(layers))


class _NoHooks:
    """Hook manager of the perturbed pass: hooks read and change the other one."""

    changed = False

    def on_step(self, *step) -> None:
        """Ignore the step."""


@contextmanager
def identity_attention(net: PixArt, layers: Sequence[int]) -> Iterator[None]:
    """Replace the self-attention of blocks by the identity, without other hooks, inside the ``with`` block."""
    attentions = [layer for block in net.blocks for layer in (block.attn, block.cross_attn)]
    manager, points = net.hook_manager, [layer.hook_point for layer in attentions]
    try:
        net.hook_manager = _NoHooks()
        for layer in attentions:
            layer.hook_point = None
        for number in layers:
            net.blocks[number].attn.hook_point = IdentityAttention()
        yield
    finally:
        net.hook_manager = manager
        for layer, point in zip(attentions, points, strict=True):
            layer.hook_point = point
