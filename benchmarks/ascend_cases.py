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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mindspore import nn, ops

from benchmarks.ascend_stand_ins import STAND_INS, ascend
from pixart_nb.config import check_config
from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.data.reader import FeatureBatch
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
from pixart_nb.core.training.batches import DiffusionBatches, Noise
from pixart_nb.core.training.objectives import ControlObjective
from pixart_nb.core.training.optimizers import EMA, STACK_ELEMENTS, clip_by_norm, global_norm
from pixart_nb.core.training.run import OBJECTIVES
from pixart_nb.core.training.trainer import OPTIMIZERS, Trainer, TrainerOptions
from pixart_nb.core.training.weak_to_strong import EMPTY


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
    "embedding": ("Embedding", "EmbeddingDenseBackward"), "copy_into": ("InplaceCopy", "InplaceCopy"),
    "fused_adamw": ("AdamW", ""),
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
    width = 32 if tile else 512  # SDXL's head has 512, which matters in half precision; the layers are SDXL's
    vae = AutoencoderKL(VAEConfig(block_out_channels=(8, 16, width, width), norm_num_groups=8))
    vae.initialize(np.random.default_rng(0))
    for parameter in vae.get_parameters():
        parameter.set_dtype(getattr(ms, dtype))
    side = 16 if tile else 8  # of the latents: three by three tiles that overlap, or few pixels
    if tile:
        vae.enable_tiling(tile)
    yield
    if part == "decoder":
        vae.decode(np.ones((1, 4, side, side), np.float32))
    else:
        vae.encode(ms.Tensor(np.ones((1, 3, 8 * side, 8 * side), np.float32)))


@dataclass
class _Features:
    """Two rows of features, with a control image for a ControlNet."""

    control: bool

    def batch(self, number: int) -> FeatureBatch:
        mean, std, control = np.random.default_rng(number).random((3, 2, 4, 16, 16), dtype=np.float32)
        mask = np.arange(20)[None] < np.array([[20], [5]])
        embeds = np.ones((2, 20, 64), np.float32)
        return FeatureBatch(mean, std, embeds, mask, np.arange(2), control if self.control else None)


def _options(optimizer: str) -> dict:
    came = optimizer == "came"
    return {"betas": (0.9, 0.999, 0.9999)[: 3 if came else 2], "eps": (1e-30, 1e-16) if came else 1e-8}


def _train(
    depth: int = 1, optimizer: str = "adamw", dtype: str = "float16", objective: str = "diffusion", copies: int = 0,
    lora: int = 0, dora: int = 0,
) -> Case:  # fmt: skip
    """The second step of a trainer: loss, gradients, clipping, update, averages.

    All weights are trained, or a LoRA, or a ControlNet of some copies.
    """
    values = {"model": "-", "json_path": "-", "image_dir": "-", "objective": objective, "copy_blocks_num": copies}
    config, net = check_config(values | {"lora_rank": 4 * lora}, "train"), _small_net(depth, dtype="float32")
    task = (ControlObjective if copies else OBJECTIVES[objective])(config, net)
    parameters = task.parameters()
    if lora:
        parameters = Adapters.of(net).add("style", LoraConfig(r=4, use_dora=bool(dora))).parameters()
    task.network.set_train(True)
    for cell in (*task.frozen, *([net] if lora else [])):
        for parameter in cell.get_parameters():
            parameter.set_dtype(getattr(ms, dtype))
    empty = np.ones((3, 64), np.float32)
    noise = Noise(0, spacing=task.spacing)
    batches = DiffusionBatches(_Features(copies > 0), noise, net, 1.0, empty, extras=task.extras)
    options = TrainerOptions(
        steps=3, optimizer=optimizer, loss_scale=1024.0, dynamic_loss_scale=True, **_options(optimizer)
    )
    dtype = ms.float32 if lora else getattr(ms, dtype)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            task.loss(empty), parameters, batches, options, folder, task.names, dtype=dtype, averages=task.averages
        )
        with closing(trainer.steps()) as steps:
            next(steps)
            yield
            next(steps)
            yield


def _update(optimizer: str = "adamw") -> Case:
    """What follows the gradients of XL/2 in a step: norm, clipping, update, averages, of tensors 16 times narrower.

    CAME's stacks have as many tensors as those of XL/2.
    """
    rng, more = np.random.default_rng(0), {}
    parameters = {name: p for name, p in _small_net(28, dtype="float32").parameters_and_names() if name != EMPTY}
    gradients = [ms.Tensor(rng.standard_normal(p.shape).astype(np.float32)) for p in parameters.values()]
    if optimizer == "came":
        more["stack_elements"] = STACK_ELEMENTS // 16**2
    own, average = OPTIMIZERS[optimizer](parameters, **_options(optimizer), **more), EMA(parameters, 0.9999)
    yield
    clipped = clip_by_norm(gradients, global_norm(gradients), 1.0, 1 / 1024)
    own.update(dict(zip(parameters, clipped, strict=True)), 1e-4)
    average.update()


CASES: dict[str, Callable[..., Case]] = {
    "denoise": _denoise, "T5": _encode_text, "VAE": _autoencoder, "training": _train,
    "update": _update,
}  # fmt: skip


def run_cases(names: list[str]) -> None:
    """Run cases, a kind and its options each, with the Ascend path; the log has a mark before and after each."""
    read = ms.Tensor.asnumpy

    def asnumpy(tensor):
        caller = sys._getframe(1)
        if Path(caller.f_code.co_filename) == Path(backend.__file__):  # the conversion that everything uses
            caller = caller.f_back
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
