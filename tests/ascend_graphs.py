"""Compile graphs with the branches of Ascend on a CPU and print the error of each: ``ascend_graphs.py CASE ...``.

The front end (parsing, types, shapes, gradients) must pass. The CPU's back end then has no kernel for the operators of
Ascend or for bfloat16, which is the expected end.
"""

import sys

import numpy as np

from pixart_nb.core import backend
from pixart_nb.core.backend import dtype_from_name, ms
from pixart_nb.core.fast.ascend import BlockOptions, block_function, block_tensors
from pixart_nb.core.lora import Adapters, LoraConfig
from pixart_nb.core.models.transformer import PixArt, PixArtConfig
from pixart_nb.core.training.loss import coefficients, diffusion_loss

#: Dtype, then KV compression, recomputation and LoRA where they are named.
CASES = (
    "fp32 plain",
    "fp16 recompute",
    "bf16 plain",
    "fp32 kv recompute lora",
    "fp16 kv lora",
    "bf16 kv recompute lora",
)


def network(dtype: ms.Type, operator: str | None) -> PixArt:
    """A transformer of one block with heads of 72."""
    compression = dict(sampling=operator, scale_factor=2, kv_compress_layer=[0])
    config = PixArtConfig(
        hidden_size=144, num_heads=2, depth=1, caption_channels=64, input_size=16,
        kv_compress_config=compression if operator else None,
    )  # fmt: skip
    net = PixArt(config)
    for parameter in net.get_parameters():
        parameter.set_dtype(dtype)
    return net


def train(dtype: str, *options: str) -> None:
    """Compile loss and gradients of a training step."""
    net, rng = network(dtype_from_name(dtype), "conv" if "kv" in options else None), np.random.default_rng(0)
    parameters = [p for name, p in net.parameters_and_names() if name != "y_embedder.y_embedding"]
    if "lora" in options:
        adapter = Adapters.of(net).add("style", LoraConfig(r=4))
        parameters = list(adapter.parameters().values())
    if "recompute" in options:
        for block in net.blocks:
            block.recompute()
    net.set_train(True)
    latents, caption = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 4, 16, 16), (2, 20, 64)))
    mask, timesteps = np.arange(20)[None] < np.array([[20], [5]]), np.array([5.0, 7.0], np.float32)
    arrays = latents, latents, coefficients(np.array([5, 7])), timesteps, caption, mask, np.ones(2, np.float32)
    loss = diffusion_loss(net)

    def scaled(*arguments):
        losses = loss(*arguments[:-1])
        return losses[0] * arguments[-1], *losses

    gradient = ms.value_and_grad(scaled, None, parameters, has_aux=True)
    arguments = [*(ms.Tensor(array) for array in arrays), net.positions(16, 16), ms.Tensor(np.float32(65536))]
    ms.jit(gradient, jit_level="O0")(*arguments)


def infer(dtype: str, operator: str) -> None:
    """Compile a block of the inference path, with weights and caption as arguments.

    ``operator`` is that of the KV compression, or none, or identity for perturbed attention.
    """
    compressed = operator not in ("none", "identity")
    net = network(ms.float16, operator if compressed else None)
    caption = ms.Tensor(np.zeros((2, 20, 144), np.float16))
    tensors = [ms.Tensor(np.zeros((2, 64, 144), np.float16)), *[ms.Tensor(np.zeros(144, np.float16))] * 6]
    weights = block_tensors(net.blocks[0], caption, True, operator == "identity")
    dtype = dtype_from_name(dtype)
    tensors, weights = ([x if x is None else x.astype(dtype) for x in part] for part in (tensors, weights))
    function = block_function(BlockOptions.of(net.blocks[0], (8, 8), True), True)
    function(*tensors, ms.Tensor(np.zeros((2, 1, 64, 20), np.uint8)), *weights)


if __name__ == "__main__":
    backend._DEVICE = "Ascend"
    for case in sys.argv[1:]:
        kind, *options = case.split()
        try:
            {"train": train, "infer": infer}[kind](*options)
            message = "it ran"
        except (RuntimeError, TypeError, ValueError) as error:
            message = " ".join(str(error).split())
        print(f"{case}: {message[:4000]}", flush=True)
