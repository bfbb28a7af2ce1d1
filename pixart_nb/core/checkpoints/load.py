"""Networks from checkpoints of any layout, matched by exact name and shape, T5 in little memory if requested."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from mindspore import nn
from mindspore.nn.utils import no_init_parameters
from tqdm.auto import tqdm

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import key_maps
from pixart_nb.core.checkpoints.configuration import describe
from pixart_nb.core.checkpoints.files import open_checkpoint, read_tensors
from pixart_nb.core.checkpoints.key_maps import to_official_names
from pixart_nb.core.checkpoints.lazy_tensor import LazyTensor
from pixart_nb.core.io import CheckpointError, read_json
from pixart_nb.core.models.bfloat16 import for_inference
from pixart_nb.core.models.layers import Linear
from pixart_nb.core.models.operators import check_finite
from pixart_nb.core.models.quantization import Int8Linear
from pixart_nb.core.models.t5 import T5Config, T5Encoder
from pixart_nb.core.models.transformer import PixArt, PixArtConfig
from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig

#: Prefixes of T5's tensors outside of its layers; its files hold the embedding table twice, once under another name.
TABLE, LAST_NORM = "shared.", "encoder.final_layer_norm."
POSITIONS = "SelfAttention.relative_attention_bias.weight"


def init_empty(build: Callable[[], nn.Cell], dtype: ms.Type) -> nn.Cell:
    """Build a network whose parameters have a dtype but no memory yet, to be loaded without a second set of weights."""
    with no_init_parameters():
        net = build()
    for parameter in net.get_parameters():
        if parameter.has_init and parameter.dtype != ms.bfloat16:  # those of bfloat16 layers stay
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
    parts = [
        f"{len(names)} {problem} ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})"
        for problem, names in problems.items()
        if names
    ]
    if parts:
        raise CheckpointError(
            f"{source} does not fit the model: {'; '.join(parts)}. Check that the configuration is this checkpoint's."
        )
    for name, parameter in parameters.items():
        if name in quantized:
            quantized[name].take(np.asarray(tensors[name]))
        elif name in tensors:
            parameter.set_data(ms.Tensor(np.asarray(tensors[name])).astype(parameter.dtype))
        elif parameter.has_init:
            parameter.init_data()


# ---- transformer and autoencoder


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
    net = init_empty(lambda: for_inference(PixArt(config), dtype), dtype)
    load_into(net, tensors, source, optional=key_maps.OPTIONAL)
    return net.set_train(False)


def load_vae(folder: Path, dtype: ms.Type, **options) -> AutoencoderKL:
    """Load the autoencoder of a folder in the diffusers layout."""
    path = folder / "config.json"
    config = VAEConfig.from_dict(read_json(path), path)
    net = init_empty(lambda: AutoencoderKL(config), config.compute_dtype(dtype))
    load_into(net, key_maps.rename_former_vae(read_tensors(folder, **options)), folder)
    return net.set_train(False)


# ---- T5


def load_t5(folder: Path, dtype: ms.Type, load_in_8bit: bool = False, **options) -> T5Encoder:
    """Load the encoder of a folder in the published layout, part by part, without a second copy of all weights."""
    config = T5Config.from_dict(read_json(folder / "config.json"), folder / "config.json")
    linear = Int8Linear if load_in_8bit else Linear
    net = init_empty(lambda: for_inference(T5Encoder(config, linear), dtype), dtype)
    for prefix in (TABLE, LAST_NORM):
        _fill(net, folder, prefix, prefix, **options)
    for layer in range(config.num_layers):
        _fill_layer(net, folder, layer, layer, **options)
    return net.set_train(False)


def _fill_layer(net: T5Encoder, folder: Path, layer: int, index: int, **options) -> None:
    """Load a layer of the files into the layer ``index`` of the network, first its attention, then its feed-forward."""
    for half in (0, 1):
        source, target = (f"encoder.block.{number}.layer.{half}." for number in (layer, index))
        _fill(net, folder, source, target, () if layer == 0 else (f"{target}{POSITIONS}",), **options)


def _fill(net: T5Encoder, folder: Path, source: str, target: str, optional: tuple[str, ...] = (), **options) -> None:
    """Load the tensors whose names begin with ``source`` into the parameters whose names begin with ``target``."""
    tensors = read_tensors(folder, keep=lambda name: name.startswith(source), **options)
    renamed = {target + name.removeprefix(source): value for name, value in tensors.items()}
    load_into(net, renamed, folder, optional=optional, prefix=target)


class StreamedT5Encoder:
    """T5 encoder that keeps one layer: each is read from its file, computed, and replaced by the next.

    It is called as ``T5Encoder`` is and returns the same values.
    """

    def __init__(self, folder: Path, dtype: ms.Type, **options):
        self.folder, self.dtype, self.options = Path(folder), backend.supported_dtype(dtype), options
        path = self.folder / "config.json"
        self.config = T5Config.from_dict(read_json(path), path)
        self.net = init_empty(lambda: for_inference(T5Encoder(replace(self.config, num_layers=1)), dtype), dtype)
        _fill(self.net, self.folder, LAST_NORM, LAST_NORM, **options)
        self.net.set_train(False)

    def __call__(self, input_ids, mask) -> ms.Tensor:
        """Encode. input_ids (N, T) integers, mask (N, T) bool, True = token -> (N, T, d_model)."""
        ids, seen = self.net.validated(input_ids, mask)
        x, bias, seen = self._embedded(ids), None, ms.Tensor(seen)
        for layer in tqdm(range(self.config.num_layers), desc="T5 layers", leave=False):
            _fill_layer(self.net, self.folder, layer, 0, **self.options)
            if bias is None:  # the first layer's table serves all
                bias = self.net.position_bias(self.net.buckets(ids.shape[1]))
            x = self.net.encoder.block[0](x, seen, bias)
        out = self.net.encoder.final_layer_norm(x).astype(self.dtype)
        check_finite(out, "the text encoder")
        return out

    def _embedded(self, ids: np.ndarray) -> ms.Tensor:
        """Return the rows of the embedding table for these tokens, (N, T, d_model) float32; no others are kept."""
        used, index = np.unique(ids, return_inverse=True)
        tensors = read_tensors(self.folder, keep=lambda name: name == "shared.weight", **self.options)
        rows = ms.Tensor(np.asarray(tensors["shared.weight"][used])).astype(self.dtype).astype(ms.float32)
        return rows[ms.Tensor(index.reshape(ids.shape).astype(np.int32))]
