"""Checkpoint in, network out: whatever the layout, matched by exact name and shape, and nothing left unsaid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from mindspore import nn
from mindspore.nn.utils import no_init_parameters

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import key_maps
from pixart_nb.core.checkpoints.configuration import describe
from pixart_nb.core.checkpoints.files import open_checkpoint
from pixart_nb.core.checkpoints.layouts import official_view
from pixart_nb.core.checkpoints.lazy_tensor import Stored
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.models.quantization import Int8Linear
from pixart_nb.core.models.transformer import PixArt, PixArtConfig


def unfilled(build: Callable[[], nn.Cell], dtype: ms.Type) -> nn.Cell:
    """A network whose parameters have their dtype but no memory yet, to be loaded: no second set of weights."""
    with no_init_parameters():
        net = build()
    for parameter in net.get_parameters():
        if parameter.has_init:
            parameter.set_dtype(backend.supported_dtype(dtype))
    return net


def shapes_of(config: PixArtConfig) -> dict[str, tuple[int, ...]]:
    """Official name -> shape of every parameter of a transformer."""
    net = unfilled(lambda: PixArt(config), ms.float32)
    return {name: tuple(parameter.shape) for name, parameter in net.parameters_and_names()}


def load_into(
    net: nn.Cell,
    tensors: Mapping[str, np.ndarray | Stored],
    source: str | Path,
    optional: tuple[str, ...] = (),
    part: str = "",
) -> None:
    """Load every parameter of ``net`` whose name begins with ``part`` by exact name and shape.

    On a misfit it raises and changes nothing. Names in ``optional`` may be missing. What the net has no place for is
    an error too. Weights take the parameter's dtype; those of ``Int8Linear`` are quantized.
    """
    quantized = {
        f"{name}.weight": cell for name, cell in net.cells_and_names() if isinstance(cell, Int8Linear)
    }
    scales = {name.removesuffix("weight") + "scale" for name in quantized}
    parameters = {
        name: p for name, p in net.parameters_and_names() if name.startswith(part) and name not in scales
    }
    missing = sorted(set(parameters) - set(tensors) - set(optional))
    unexpected = sorted(set(tensors) - set(parameters))
    wrong = [
        f"{name}: checkpoint {tensors[name].shape}, model {tuple(p.shape)}"
        for name, p in parameters.items()
        if name in tensors and tensors[name].shape != tuple(p.shape)
    ]
    if missing or unexpected or wrong:
        raise CheckpointError(_misfit(source, missing, unexpected, wrong))
    for name, parameter in parameters.items():
        if name in quantized:
            quantized[name].take(np.asarray(tensors[name]))
        elif name in tensors:
            parameter.set_data(ms.Tensor(np.asarray(tensors[name])).astype(parameter.dtype))
        elif parameter.has_init:
            parameter.init_data()


def _misfit(source, missing: list[str], unexpected: list[str], wrong: list[str]) -> str:
    parts = [
        f"{len(names)} {what} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", wrong))
        if names
    ]
    return f"{source} does not fit the model: {'; '.join(parts)}. Check that the configuration is this checkpoint's."


def load_transformer(
    path: str | Path, config: PixArtConfig | None = None, dtype: ms.Type = ms.float32
) -> PixArt:
    """The transformer of an official ``.pth``, a ``.ckpt``, a ``.safetensors`` or a diffusers transformer folder.

    What the checkpoint itself shows (width, depth, caption size, tokens, micro conditions, compressed layers) is read
    from it where ``config`` is silent; a contradiction is a ``CheckpointError``. It is loaded tensor by tensor.
    """
    view = official_view(open_checkpoint(path))
    return transformer_of(view.complete | view.rest, describe(view, path, config).config, path, dtype)


def transformer_of(
    tensors: Mapping[str, np.ndarray | Stored], config: PixArtConfig, source: str | Path, dtype: ms.Type
) -> PixArt:
    """The transformer of tensors under official names, all of which must have their place in it."""
    unlearned = [n for n in config.kv_layers if f"blocks.{n}.attn.sr.weight" not in tensors]
    if config.kv_operator == "conv" and config.kv_ratio > 1 and unlearned:
        raise CheckpointError(
            f"{source} holds no weights for the compressed layers {unlearned}. `pixart-nb convert` with this "
            "configuration as --config writes a checkpoint in which they start as averages."
        )
    net = unfilled(lambda: PixArt(config), dtype)
    load_into(net, tensors, source, optional=key_maps.OPTIONAL)
    return net.set_train(False)
