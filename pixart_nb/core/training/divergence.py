"""Where a training went wrong: the first layer, or else the gradient, in which numbers stopped being numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from mindspore import nn

from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError


class DivergenceError(PixArtNBError, FloatingPointError):
    """The loss or a gradient is not finite. The weights were not updated."""


def find_divergence(
    loss: Callable,
    tensors: Sequence[ms.Tensor],
    parameters: Mapping[str, ms.Parameter],
    gradients: Mapping[str, ms.Tensor],
    network: nn.Cell | None = None,
) -> str:
    """Say where the first number that is not finite appears: inputs, weights, a layer's output, or a gradient.

    ``loss`` is computed again on ``tensors``, layer by layer, and ``network``'s layers are watched.
    """
    for name, tensor in zip(inspect.signature(loss).parameters, tensors, strict=False):
        if rows := _bad_rows(tensor):
            return f"{name} of the batch is not finite in rows {rows[:8]}"
    weights = [name for name, parameter in parameters.items() if not _finite(parameter)]
    if weights:
        return f"the weights {_few(weights)} are not finite"
    if network is not None and (layer := _first_layer(loss, tensors, network)):
        return f"the first output that is not finite is that of layer {layer}"
    wrong = [name for name, gradient in gradients.items() if not _finite(gradient)]
    if wrong:  # gradients are computed from the last layer to the first
        return f"every layer's output is finite, the gradients of {_few(wrong[::-1])} are not"
    return "every layer's output and every gradient is finite, their sums are not"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _array(tensor: ms.Tensor) -> np.ndarray:
    wide = tensor.astype(ms.float32) if tensor.dtype == ms.bfloat16 else tensor
    return wide.asnumpy()


def _finite(tensor: ms.Tensor) -> bool:
    return bool(np.isfinite(_array(tensor)).all())


def _bad_rows(tensor: ms.Tensor) -> list[int]:
    values = _array(tensor)
    if values.ndim == 0:
        return [] if np.isfinite(values) else [0]
    return np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(1)).tolist()


def _first_layer(loss: Callable, tensors: Sequence[ms.Tensor], network: nn.Cell) -> str:
    """Name of the layer whose output is the first that is not finite, with the rows; empty if there is none.

    A layer without layers of its own ends before the one that holds it, so the innermost is the first to be seen.
    """
    found: list[str] = []

    def watch(name: str):
        def hook(cell, inputs, output):
            parts = output if isinstance(output, (tuple, list)) else (output,)
            for part in parts:
                if not found and isinstance(part, ms.Tensor) and (rows := _bad_rows(part)):
                    found.append(f"{name} ({type(cell).__name__}), in rows {rows[:8]}")

        return hook

    handles = [
        cell.register_forward_hook(watch(name or "the network")) for name, cell in network.cells_and_names()
    ]
    try:
        loss(*tensors)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""
