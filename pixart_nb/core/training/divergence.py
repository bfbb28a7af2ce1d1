"""Search for the first tensor that is not finite, for the message of a diverged training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from mindspore import nn

from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError, first_few
from pixart_nb.core.fast.cpu_training import layer_by_layer


class DivergenceError(PixArtNBError):
    """The loss or a gradient is not finite. The weights were not updated."""

    exit_code = 1


def find_divergence(
    loss: Callable,
    tensors: Sequence[ms.Tensor],
    parameters: Mapping[str, ms.Parameter],
    gradients: Mapping[str, ms.Tensor],
    network: nn.Cell | None = None,
) -> str:
    """Name the first tensor that is not finite: an input, a weight, the output of a layer, or a gradient.

    ``loss`` is computed again on ``tensors`` with hooks on the layers of ``network``.
    """
    for name, tensor in zip(inspect.signature(loss).parameters, tensors, strict=False):
        if rows := _bad_rows(tensor):
            return f"{name} of the batch is not finite in rows {rows[:8]}"
    if weights := [name for name, parameter in parameters.items() if _bad_rows(parameter)]:
        return f"the weights {first_few(weights, 3)} are not finite"
    if network is not None and (layer := _first_layer(loss, tensors, network)):
        return f"the first output that is not finite is that of layer {layer}"
    if wrong := [name for name, gradient in gradients.items() if _bad_rows(gradient)]:
        # gradients are computed from the last layer to the first
        return f"every layer's output is finite, the gradients of {first_few(wrong[::-1], 3)} are not"
    return "every layer's output and every gradient is finite, their sums are not"


def _bad_rows(tensor: ms.Tensor) -> list[int]:
    values = (tensor.astype(ms.float32) if tensor.dtype == ms.bfloat16 else tensor).asnumpy()
    rows = values.reshape(len(values), -1) if values.ndim else values.reshape(1, 1)
    return np.flatnonzero(~np.isfinite(rows).all(1)).tolist()


def _first_layer(loss: Callable, tensors: Sequence[ms.Tensor], network: nn.Cell) -> str:
    """Return name, class and rows of the first layer whose output is not finite; empty if there is none.

    The hook of an inner layer runs before that of the layer around it.
    """
    layers: list[str] = []

    def watch(name: str):
        def hook(cell, inputs, output):
            for part in output if isinstance(output, (tuple, list)) else (output,):
                if not layers and isinstance(part, ms.Tensor) and (rows := _bad_rows(part)):
                    layers.append(f"{name} ({type(cell).__name__}), in rows {rows[:8]}")

        return hook

    cells = network.cells_and_names()
    handles = [cell.register_forward_hook(watch(name or "the network")) for name, cell in cells]
    try:
        with layer_by_layer(network):
            loss(*tensors)
    finally:
        for handle in handles:
            handle.remove()
    return layers[0] if layers else ""
