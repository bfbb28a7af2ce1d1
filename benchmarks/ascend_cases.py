"""Work on the Ascend path whose operators ``ascend_audit`` counts: ``python -m benchmarks.ascend_cases CASE ...``.

Each case is a kind and its options, such as "denoise depth=2 size=256". Stand-ins take the place of Ascend's operators,
and each leaves a line in the log. **No time is measured.**
"""

from __future__ import annotations

import inspect
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
from mindspore import nn, ops

from benchmarks.ascend_stand_ins import STAND_INS, ascend
from pixart_nb.core.backend import ms
from pixart_nb.core.hooks.recorder import trace
from pixart_nb.core.lora import Adapters, LoraConfig
from pixart_nb.core.models.controlnet import Controlled, PixArtControlNet
from pixart_nb.core.models.layers import Linear
from pixart_nb.core.models.low_precision import Int8Linear, NF4Linear
from pixart_nb.core.models.t5 import T5Config, T5Encoder
from pixart_nb.core.models.transformer import PixArt, PixArtConfig
from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig
from pixart_nb.core.sampling.guidance import Perturbation, guided_model
from pixart_nb.core.sampling.text import Conditioning
from pixart_nb.core.training import optimizers
from pixart_nb.core.training.loss import NAMES, coefficients, diffusion_loss
from pixart_nb.core.training.trainer import Trainer, TrainerOptions


def mark(text: str) -> None:
    """Write a line into the log."""
    os.write(2, f"##{text}\n".encode())


def recorded(name: str, stand_in: Callable) -> Callable:
    """Return a stand-in that stands in the log as one operator, and as one more in the gradient."""
    forward, backward = KERNELS[name]

    class Recorded(nn.Cell):
        def construct(self, *inputs):
            mark(f"KERNEL {forward}")
            out = ops.zeros_like(inputs[0]) if name in SAME_SHAPE else stand_in(*inputs)
            mark("END")
            return out

        def bprop(self, *inputs):
            mark(f"KERNEL {backward}")
            zeros = tuple(ops.zeros_like(x) if hasattr(x, "asnumpy") else 0 for x in inputs[:-2])
            mark("END")
            return zeros

    cell, signature = Recorded(), inspect.signature(STAND_INS[name])

    def call(*arguments, **options):
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        return cell(*bound.args)

    return call


#: Kernels of each function of ``models.ascend_operators`` and of its gradient.
KERNELS = {
    "layer_norm": ("LayerNormExt", "LayerNormGradExt"), "rms_norm": ("RmsNorm", "RmsNormGrad"),
    "gelu_tanh": ("GeluExt", "GeluGradExt"), "addcmul": ("AddcmulExt", "AddcmulExt"),
    "conv2d": ("Conv2DExt", "ConvolutionGrad"), "pad": ("ConstantPadND", "ConstantPadND"),
    "embedding": ("Embedding", "EmbeddingDenseBackward"),
    "flash_attention_score": ("FlashAttentionScore", "FlashAttentionScoreGrad"),
}  # fmt: skip


#: Functions whose result has the shape of their first argument: zeros are enough to count.
SAME_SHAPE = ("layer_norm", "rms_norm", "gelu_tanh", "flash_attention_score")


def _small_net(depth: int, side: int = 16, operator: str | None = None, ratio: int = 1, dtype: str = "float16"):
    compression = dict(sampling=operator, scale_factor=ratio, kv_compress_layer=list(range(depth)))
    config = PixArtConfig(
        hidden_size=72, num_heads=1, depth=depth, caption_channels=64, input_size=side,
        kv_compress_config=compression if operator else None,
    )  # fmt: skip
    net = PixArt(config)
    net.initialize(np.random.default_rng(0))
    for parameter in net.get_parameters():
        parameter.set_dtype(getattr(ms, dtype))
    return net


#: A case prepares its work, yields, works, yields, and cleans up.
Case = Iterator[None]


def _denoise(
    depth: int = 1, size: int = 256, operator: str | None = None, ratio: int = 1, dtype: str = "float16",
    copies: int = 0, perturbed: int = 0, traced: int = 0,
) -> Case:  # fmt: skip
    """The second denoising step with guidance.

    With a ControlNet of some copies, with perturbed attention in some blocks, or with all attentions traced.
    """
    rng = np.random.default_rng(0)
    prompt, negative = (ms.Tensor(rng.standard_normal((1, n, 64)).astype(np.float32)) for n in (20, 1))
    condition = Conditioning(prompt, np.ones((1, 20), bool), negative, np.ones((1, 1), bool))
    latents = rng.standard_normal((1, 4, size // 8, size // 8)).astype(np.float32)
    net = model = _small_net(depth, size // 8, operator, ratio, dtype)
    if copies:
        model = PixArtControlNet(net, copies)
        for parameter in model.controlnet.get_parameters():
            parameter.set_dtype(getattr(ms, dtype))
        model = Controlled(model, ms.Tensor(latents), np.array([999]), np.ones(1))
    perturbation = Perturbation(tuple(range(perturbed)), 3.0) if perturbed else None
    with trace(net, announce=None) if traced else nullcontext():
        predict = guided_model(model, condition, 4.5, size, size, perturbation=perturbation)
        predict(latents, 900.0)
        yield
        predict(latents, 500.0)
        yield


def _encode_text(layers: int, load: str = "whole") -> Case:
    linear = {"whole": Linear, "int8": Int8Linear, "4bit": NF4Linear}[load]
    t5 = T5Encoder(T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=128, num_heads=4, num_layers=layers), linear)
    for name, parameter in t5.parameters_and_names():
        if "layer_norm" in name:
            parameter.set_data(ms.Tensor(np.ones(parameter.shape, np.float32)))
        if load == "whole":
            parameter.set_dtype(ms.float16)
    yield
    t5(np.arange(40).reshape(2, 20), np.ones((2, 20), bool))


def _autoencoder(part: str, tile: int = 0, dtype: str = "float32") -> Case:
    vae = AutoencoderKL(VAEConfig(block_out_channels=(8, 16, 512, 512), norm_num_groups=8))  # SDXL's layers and head
    vae.initialize(np.random.default_rng(0))
    for parameter in vae.get_parameters():
        parameter.set_dtype(getattr(ms, dtype))
    if tile:
        vae.enable_tiling(tile)
    yield
    if part == "decoder":
        vae.decode(np.ones((1, 4, 16, 16), np.float32))
    else:
        vae.encode(ms.Tensor(np.ones((1, 3, 128, 128), np.float32)))


def _train(depth: int = 1, optimizer: str = "adamw", dtype: str = "float16", lora: int = 0, dora: int = 0) -> Case:
    """The second step of a trainer: loss, gradients, clipping, update, averages; of all weights or of a LoRA."""
    optimizers._fused_adamw = lambda *arguments: [mark("KERNEL AdamW"), mark("END")]  # not registered on a CPU
    rng, net = np.random.default_rng(0), _small_net(depth, dtype=dtype)
    parameters = {k: p for k, p in net.parameters_and_names() if k != "y_embedder.y_embedding"}
    if lora:
        parameters = Adapters.of(net).add("style", LoraConfig(r=4, use_dora=bool(dora))).parameters()
    net.set_train(True)
    x, caption = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 4, 16, 16), (2, 20, 64)))
    mask, timesteps = np.arange(20)[None] < np.array([[20], [5]]), np.array([5.0, 7.0], np.float32)
    table, weights = coefficients(np.array([5, 7])), np.ones(2, np.float32)
    batch = x, x, table, timesteps, caption, mask, weights, net.positions(16, 16)
    options = TrainerOptions(
        steps=3, optimizer=optimizer, betas=(0.9, 0.999, 0.9999)[: 3 if optimizer == "came" else 2],
        eps=(1e-30, 1e-16) if optimizer == "came" else 1e-8, loss_scale=1024.0, dynamic_loss_scale=True,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            diffusion_loss(net), parameters, lambda n: batch, options, folder, NAMES, dtype=getattr(ms, dtype)
        )
        with closing(trainer.steps()) as steps:
            next(steps)
            yield
            next(steps)
            yield


CASES: dict[str, Callable[..., Case]] = {
    "denoise": _denoise, "T5": _encode_text, "VAE": _autoencoder, "training": _train
}  # fmt: skip


def run_cases(names: list[str]) -> None:
    """Run cases, a kind and its options each, with the Ascend path; the log has a mark before and after each."""
    read = ms.Tensor.asnumpy

    def asnumpy(tensor):
        caller = sys._getframe(1)
        if "mindspore" not in caller.f_code.co_filename:
            mark(f"READ {Path(caller.f_code.co_filename).name}:{caller.f_lineno}")
        return read(tensor)

    ms.Tensor.asnumpy = asnumpy
    with ascend(wrap=recorded):
        for name in names:
            kind, *words = name.split()
            options = dict(word.split("=") for word in words)
            case = CASES[kind](**{key: int(v) if v.isdigit() else v for key, v in options.items()})
            next(case)
            mark(f"SECTION {name}")
            next(case, None)
            mark("SECTION end")
            next(case, None)


if __name__ == "__main__":
    run_cases(sys.argv[1:])
