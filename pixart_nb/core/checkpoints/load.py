"""Networks from checkpoints of any layout, matched by exact name and shape, T5 in little memory if requested."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
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
from pixart_nb.core.errors import counted, named_source
from pixart_nb.core.io import CheckpointError, read_json
from pixart_nb.core.models.layers import Linear
from pixart_nb.core.models.low_precision import (
    Int8Linear,
    NF4Linear,
    QuantizedLinear,
    for_inference,
    inference_dtype,
    use_blocks,
)
from pixart_nb.core.models.operators import check_finite
from pixart_nb.core.models.t5 import T5Block, T5Config, T5Encoder
from pixart_nb.core.models.transformer import PixArt, PixArtConfig
from pixart_nb.core.models.vae import AutoencoderKL, VAEConfig

#: Prefixes of T5's tensors outside of its layers; its files hold the embedding table twice, once under another name.
TABLE, LAST_NORM = "shared.", "encoder.final_layer_norm."
POSITIONS = "SelfAttention.relative_attention_bias.weight"


def init_empty(build: Callable[[], nn.Cell], dtype: ms.Type) -> nn.Cell:
    """Build a network whose parameters have no memory yet, to be loaded without a second set of weights.

    Their dtype is that in which this device keeps ``dtype`` for inference. Graph mode is left.
    """
    backend.leave_graph_mode()
    with no_init_parameters():
        net = build()
    for parameter in net.get_parameters():
        if parameter.has_init and parameter.dtype != ms.bfloat16:  # those of bfloat16 layers stay
            parameter.set_dtype(backend.supported_dtype(inference_dtype(dtype)))
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

    Names in ``optional`` may be missing. Weights are cast to the parameter's dtype; those of ``QuantizedLinear``
    are quantized. Raises ``CheckpointError`` for missing and unexpected tensors and wrong shapes; then nothing changes.
    """
    quantized = {f"{name}.weight": cell for name, cell in net.cells_and_names() if isinstance(cell, QuantizedLinear)}
    scales = {name.removesuffix("weight") + "scale" for name in quantized}
    parameters = {name: p for name, p in net.parameters_and_names() if name.startswith(prefix) and name not in scales}
    shapes = {name: quantized[name].shape if name in quantized else tuple(p.shape) for name, p in parameters.items()}
    problems = {
        "missing": sorted(set(parameters) - set(tensors) - set(optional)),
        "unexpected": sorted(set(tensors) - set(parameters)),
        "of another shape": [
            f"{name}: checkpoint {tensors[name].shape}, model {shape}"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        ],
    }
    if parts := counted(problems):
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
    path: str | Path,
    config: PixArtConfig | None = None,
    dtype: ms.Type = ms.float32,
    *,
    sample_size: int | None = None,
    **options,
) -> PixArt:
    """Load the transformer of a ``.pth``, ``.ckpt``, ``.safetensors``, diffusers folder or training state of this kit.

    ``config`` may leave open what the checkpoint shows: width, depth, caption size, tokens, micro conditions and
    compressed layers. ``sample_size``: latent side of the training size. ``options``: ``variant`` and
    ``use_safetensors`` of ``open_checkpoint``. It is loaded tensor by tensor. Raises ``CheckpointError`` for a
    contradiction.
    """
    path = Path(path).expanduser()
    view = to_official_names(open_checkpoint(path, **options))
    description = describe(view, path, config, sample_size)
    return build_transformer(view.complete | view.rest, description.config, path, dtype)


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


def load_vae(path: Path, dtype: ms.Type, **options) -> AutoencoderKL:
    """Load the autoencoder of a folder in the diffusers layout, or of one file with diffusers' or LDM's names."""
    tensors = key_maps.rename_vae(read_tensors(path, **options))
    config = vae_config(path, tensors)
    chosen = inference_dtype(config.compute_dtype(dtype))
    net = init_empty(lambda: AutoencoderKL(config), chosen)
    net.multiplies_bfloat16 = chosen == ms.bfloat16 and not backend.on_ascend()
    load_into(net, tensors, path)
    return net.set_train(False)


def vae_config(path: Path, tensors: Mapping[str, np.ndarray] | None = None) -> VAEConfig:
    """Return the configuration of an autoencoder's folder or file, whose ``tensors`` (diffusers' names) may be given.

    A file has it beside it (config.json), or shows it but for ``scaling_factor``: with a warning, that is alpha's for
    published names of its autoencoder and SDXL's for others.
    """
    beside = (path if path.is_dir() else path.parent) / "config.json"
    if path.is_dir() or (beside.is_file() and "block_out_channels" in read_json(beside)):
        return VAEConfig.from_dict(read_json(beside), beside)
    return _vae_config_shown(key_maps.rename_vae(read_tensors(path)) if tensors is None else tensors, path)


def _vae_config_shown(tensors: Mapping[str, np.ndarray], path: Path) -> VAEConfig:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    levels = [name for name in shapes if re.fullmatch(r"encoder\.down_blocks\.\d+\.resnets\.0\.conv1\.weight", name)]
    try:
        first = [name for name in shapes if re.fullmatch(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight", name)]
        values = {
            "in_channels": shapes["encoder.conv_in.weight"][1],
            "out_channels": shapes["decoder.conv_out.weight"][0],
            "latent_channels": shapes["decoder.conv_in.weight"][1],
            "block_out_channels": tuple(shapes[name][0] for name in sorted(levels)),
            "layers_per_block": len(first),
            "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
            "use_quant_conv": "quant_conv.weight" in shapes,
            "use_post_quant_conv": "post_quant_conv.weight" in shapes,
            "scaling_factor": 0.18215 if re.search(r"ft-?(mse|ema)|kl-?f8|sd-?v?1", path.name, re.I) else 0.13025,
        }
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{path} is no autoencoder of Stable Diffusion or SDXL: it lacks {error}") from error
    warnings.warn(
        f"{path} does not show its scaling_factor; {values['scaling_factor']} is used. Set sd_scale_factor (or a "
        "config.json beside the file) if it is another autoencoder than SDXL's (0.13025; Stable Diffusion 1: 0.18215)",
        stacklevel=3,
    )
    with named_source(path):
        return VAEConfig.from_dict(values, path)


# ---- T5


class _T5Files:
    """Tensors and configuration of a T5 encoder: a folder in the published layout, or one file that ComfyUI can read.

    A file may hold decoder and other networks too, under other names. Its configuration is read from its shapes.
    """

    def __init__(self, path: str | Path, **options):
        self.path, self.options, self.prefix, self.table = Path(path), options, "", TABLE
        if not self.path.is_file():
            self.config = T5Config.from_dict(read_json(self.path / "config.json"), self.path / "config.json")
            return
        shapes = {name: t.shape for name, t in open_checkpoint(self.path, **options).tensors.items()}
        ends = [name for name in shapes if name.endswith(f"{LAST_NORM}weight")]
        self.prefix = ends[0].removesuffix(f"{LAST_NORM}weight") if ends else ""
        shapes = {n.removeprefix(self.prefix): s for n, s in shapes.items() if n.startswith(self.prefix)}
        self.table = TABLE if f"{TABLE}weight" in shapes else "encoder.embed_tokens."
        layer = "encoder.block.0.layer."
        try:
            (buckets, heads), (vocabulary, width) = shapes[f"{layer}0.{POSITIONS}"], shapes[f"{self.table}weight"]
            values = {
                "vocab_size": vocabulary,
                "d_model": width,
                "d_kv": shapes[f"{layer}0.SelfAttention.q.weight"][0] // heads,
                "d_ff": shapes[f"{layer}1.DenseReluDense.wi_0.weight"][0],
                "num_heads": heads,
                "num_layers": sum(name.endswith("SelfAttention.q.weight") for name in shapes if "encoder." in name),
                "relative_attention_num_buckets": buckets,
            }
        except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{self.path} is no T5 v1.1 encoder: {error} is missing or of another form"
            ) from error
        with named_source(self.path):
            self.config = T5Config(**values)

    def read(self, start: str) -> dict[str, np.ndarray]:
        """Return the tensors whose names begin with ``start``."""
        stored = self.prefix + (self.table if start == TABLE else start)
        tensors = read_tensors(self.path, keep=lambda name: name.startswith(stored), **self.options)
        return {start + name.removeprefix(stored): value for name, value in tensors.items()}

    def fill(self, net: T5Encoder, source: str, target: str, optional: tuple[str, ...] = ()) -> None:
        """Load the tensors whose names begin with ``source`` into the parameters whose names begin with ``target``."""
        tensors = {target + name.removeprefix(source): value for name, value in self.read(source).items()}
        load_into(net, tensors, self.path, optional=optional, prefix=target)

    def fill_layer(self, net: T5Encoder, layer: int, index: int) -> None:
        """Load a layer into the layer ``index`` of the network, first its attention, then its feed-forward."""
        for half in (0, 1):
            source, target = (f"encoder.block.{number}.layer.{half}." for number in (layer, index))
            self.fill(net, source, target, () if layer == 0 else (f"{target}{POSITIONS}",))


def t5_config(path: str | Path) -> T5Config:
    """Return the configuration of the folder or file of a T5 encoder."""
    return _T5Files(path).config


def load_t5(path: Path, dtype: ms.Type, load_in_8bit: bool = False, load_in_4bit: bool = False, **options) -> T5Encoder:
    """Load a T5 encoder part by part, without a second copy of all weights.

    ``path``: a folder in the published layout, or one file with these names, such as ComfyUI's ``t5xxl_fp16``; its
    tensors may be stored in 8-bit floats. ``load_in_8bit``, ``load_in_4bit``: see ``T5EncoderModel``.
    """
    files = _T5Files(path, **options)
    linear = NF4Linear if load_in_4bit else Int8Linear if load_in_8bit else Linear
    net = init_empty(lambda: for_inference(T5Encoder(files.config, linear), dtype), dtype)
    for prefix in (TABLE, LAST_NORM):
        files.fill(net, prefix, prefix)
    for layer in range(files.config.num_layers):
        files.fill_layer(net, layer, layer)
        use_blocks(net.encoder.block[layer])
    return net.set_train(False)


class StreamedT5Encoder:
    """T5 encoder that keeps one layer: each is read from its file, computed, and replaced by the next.

    It is called as ``T5Encoder`` is and returns the same values, in bfloat16 up to the order of sums.
    """

    def __init__(self, path: Path, dtype: ms.Type, **options):
        self.files, self.dtype = _T5Files(path, **options), inference_dtype(dtype)
        self.config = self.files.config
        self.net = init_empty(lambda: for_inference(T5Encoder(replace(self.config, num_layers=1)), dtype), dtype)
        self.files.fill(self.net, LAST_NORM, LAST_NORM)
        self.net.set_train(False)

    def __call__(self, input_ids, mask) -> ms.Tensor:
        """Encode. input_ids (N, T) integers, mask (N, T) bool, True = token -> (N, T, d_model)."""
        ids, seen = self.net.validated(input_ids, mask)
        out = self.net.encode(self._embedded(ids), seen, self._layers())
        check_finite(out, "the text encoder")
        return out

    def _layers(self) -> Iterator[T5Block]:
        """Yield the layers one after the other, in the memory of one."""
        for layer in tqdm(range(self.config.num_layers), desc="T5 layers", leave=False):
            self.files.fill_layer(self.net, layer, 0)
            yield self.net.encoder.block[0]

    def _embedded(self, ids: np.ndarray) -> ms.Tensor:
        """Return the rows of the embedding table for these tokens, (N, T, d_model) float32; no others are kept."""
        used, index = np.unique(ids, return_inverse=True)
        table = self.files.read(TABLE)[f"{TABLE}weight"]
        rows = ms.Tensor(np.asarray(table[used])).astype(self.dtype).astype(ms.float32)
        return rows[ms.Tensor(index.reshape(ids.shape).astype(np.int32))]
