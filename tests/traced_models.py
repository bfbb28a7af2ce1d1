"""Small models and what their attention really computes, for tests of tracing."""

from __future__ import annotations

import numpy as np
from test_transformer import small_net

from pixart_nb.core.backend import ms
from pixart_nb.core.hooks.hook_points import attention_layers
from pixart_nb.core.models import attention as layers

NAMES = ["blocks.0.attn", "blocks.0.cross_attn", "blocks.1.attn", "blocks.1.cross_attn"]
CALL = dict(
    prompt=["a red mushroom on grass", "blue cat"],
    height=64,
    width=96,
    num_inference_steps=3,
    output_type="latent",
    max_sequence_length=32,
    use_resolution_binning=False,
)
MASK = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], bool)


def compressing(operator: str | None, ratio: int = 2, kept=(0, 1)):
    """A net with small random weights, whose layers ``kept`` compress if there is an operator."""
    said = dict(sampling=operator, scale_factor=ratio, kv_compress_layer=list(kept))
    return small_net(kv_compress_config=said if operator else None)


def inputs(height=8, width=12):
    """Latents, timesteps, captions and masks of two pictures, whose captions have four and two tokens."""
    rng = np.random.default_rng(4)
    latents = ms.Tensor(rng.standard_normal((2, 4, height, width), dtype=np.float32))
    caption = ms.Tensor(rng.standard_normal((2, 6, 12), dtype=np.float32))
    return latents, ms.Tensor(np.array([500.0, 500.0], np.float32)), caption, MASK


def watched(monkeypatch, run) -> list[dict]:
    """Every attention that ``run()`` computes without being traced: q, k, v (float64), mask or None, and output."""
    calls, original = [], layers.attention

    def attention(q, k, v, mask=None, *rest, **options):
        out = original(q, k, v, mask, *rest, **options)
        arrays = [part.asnumpy().astype(np.float64) for part in (q, k, v, out)]
        seen = None if mask is None else mask.asnumpy().astype(bool)
        calls.append(dict(zip(("q", "k", "v", "out"), arrays, strict=True)) | {"mask": seen})
        return out

    with monkeypatch.context() as patch:
        patch.setattr(layers, "attention", attention)
        run()
    return calls


def direct_maps(call: dict) -> np.ndarray:
    """softmax(q k^T / sqrt(d)) in float64: (B, H, N, M)."""
    scores = call["q"] @ call["k"].swapaxes(-1, -2) * call["q"].shape[-1] ** -0.5
    if call["mask"] is not None:
        scores = np.where(call["mask"][:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def draw(pipe, **changes):
    rngs = [np.random.default_rng(seed) for seed in range(2)]
    return pipe(**CALL | {"generator": rngs} | changes)[0]


def never(*args, **options):
    raise AssertionError("the model was called")


def assert_untouched(net, names):
    assert net.hook_manager is None
    assert all(layer.hook_point is None for _, layer in attention_layers(net))
    assert [name for name, _ in net.parameters_and_names()] == names
