"""Networks from checkpoints of any layout, matched by exact name and shape."""

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
from pixart_nb.core.checkpoints.layouts import to_official_names
from pixart_nb.core.checkpoints.lazy_tensor import LazyTensor
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.models.quantization import Int8Linear
from pixart_nb.core.models.transformer import PixArt, PixArtConfig


def init_empty(build: Callable[[], nn.Cell], dtype: ms.Type) -> nn.Cell:
    """Build a network whose parameters have a dtype but no memory yet, to be loaded without a second set of weights."""
    with no_init_parameters():
        net = build()
    for parameter in net.get_parameters():
        if parameter.has_init:
            parameter.set_dtype(backend.supported_dtype(dtype))
    return net


def shapes_of(config: PixArtConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a transformer, by official name."""
    net = init_empty(lambda: PixArt(config), ms.float32)
    return {name: tuple(parameter.shape) for name, parameter in net.parameters_and_names()}


def load_into(
    net: nn.Cell,
    tensors: Mapping[str, np.ndarray | LazyTensor],
    source: str | Path,
    optional: tuple[str, ...] = (),
    prefix: str = "",
) -> None:
    """Load every parameter of ``net`` whose name begins with ``prefix``, by exact name and shape.

    Names in ``optional`` may be missing. Weights are cast to the parameter's dtype; those of ``Int8Linear`` are
    quantized. Raises ``CheckpointError`` for missing and unexpected tensors and wrong shapes; nothing is changed then.
    """
    quantized = {f"{name}.weight": cell for name, cell in net.cells_and_names() if isinstance(cell, Int8Linear)}
    scales = {name.removesuffix("weight") + "scale" for name in quantized}
    parameters = {name: p for name, p in net.parameters_and_names() if name.startswith(prefix) and name not in scales}
    problems = {
        "missing": sorted(set(parameters) - set(tensors) - set(optional)),
        "unexpected": sorted(set(tensors) - set(parameters)),
        "of another shape": [
            f"{name}: checkpoint {tensors[name].shape}, model {tuple(p.shape)}"
            for name, p in parameters.items()
            if name in tensors and tensors[name].shape != tuple(p.shape)
        ],
    }
    if any(problems.values()):
        raise CheckpointError(_misfit(source, problems))
    for name, parameter in parameters.items():
        if name in quantized:
            quantized[name].take(np.asarray(tensors[name]))
        elif name in tensors:
            parameter.set_data(ms.Tensor(np.asarray(tensors[name])).astype(parameter.dtype))
        elif parameter.has_init:
            parameter.init_data()


def _misfit(source: str | Path, problems: Mapping[str, list[str]]) -> str:
    parts = [
        f"{len(names)} {problem} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for problem, names in problems.items()
        if names
    ]
    return f"{source} does not fit the model: {'; '.join(parts)}. Check that the configuration is this checkpoint's."


def load_transformer(
    path: str | Path, config: PixArtConfig | None = None, dtype: ms.Type = ms.float32, **options
) -> PixArt:
    """Load the transformer of a ``.pth``, ``.ckpt``, ``.safetensors``, diffusers folder or training state of this kit.

    ``config`` may leave open what the checkpoint shows: width, depth, caption size, tokens, micro conditions and
    compressed layers. ``options``: ``variant`` and ``use_safetensors`` of ``open_checkpoint``. It is loaded tensor by
    tensor. Raises ``CheckpointError`` for a contradiction.
    """
    path = Path(path).expanduser()
    view = to_official_names(open_checkpoint(path, **options))
    return build_transformer(view.complete | view.rest, describe(view, path, config).config, path, dtype)


def build_transformer(
    tensors: Mapping[str, np.ndarray | LazyTensor], config: PixArtConfig, source: str | Path, dtype: ms.Type
) -> PixArt:
    """Build a transformer of tensors under official names, all of which must belong to it."""
    unlearned = [n for n in config.kv_layers if f"blocks.{n}.attn.sr.weight" not in tensors]
    if config.kv_operator == "conv" and config.kv_ratio > 1 and unlearned:
        raise CheckpointError(
            f"{source} holds no weights for the compressed layers {unlearned}. `pixart-nb convert` with this "
            "configuration as --config writes a checkpoint in which they start as averages."
        )
    net = init_empty(lambda: PixArt(config), dtype)
    load_into(net, tensors, source, optional=key_maps.OPTIONAL)
    return net.set_train(False)
