"""Loading of T5, in little memory if requested: 8-bit weights, or layers that are read one at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from pixart_nb.core.backend import ms, supported_dtype
from pixart_nb.core.checkpoints.files import read_tensors
from pixart_nb.core.checkpoints.load import init_empty, load_into
from pixart_nb.core.checkpoints.pipeline_folder import component_paths
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import read_json
from pixart_nb.core.models.layers import Linear
from pixart_nb.core.models.operators import check_finite
from pixart_nb.core.models.quantization import Int8Linear
from pixart_nb.core.models.t5 import T5Config, T5Encoder

#: Prefixes of T5's tensors outside of its layers; its files hold the embedding table twice, once under another name.
TABLE, LAST_NORM = "shared.", "encoder.final_layer_norm."
POSITIONS = "SelfAttention.relative_attention_bias.weight"


class T5EncoderModel:
    """Loader of T5 under the name of transformers' class."""

    @staticmethod
    def from_pretrained(
        folder_or_hub_id: str | Path,
        subfolder: str = "",
        mindspore_dtype: ms.Type | None = None,
        load_in_8bit: bool = False,
        stream: bool = False,
        device_map: str | None = None,
        revision: str | None = None,
        **options,
    ) -> T5Encoder | StreamedT5Encoder:
        """Load the T5 encoder of a folder, or of the ``subfolder`` of a pipeline's folder or hub id.

        ``mindspore_dtype``: float32 by default. ``load_in_8bit`` keeps the projections of every layer as int8 with a
        scale for each row; they are computed in float32. ``stream`` reads a layer when it is computed and drops it
        afterwards: memory of one layer, but the files are read for every prompt. ``device_map`` has no effect, as
        there is one device. ``options``: ``variant`` and ``use_safetensors``.
        """
        folder = Path(folder_or_hub_id).expanduser()
        if subfolder:
            folder = component_paths(folder_or_hub_id, [subfolder], revision)[subfolder]
        if load_in_8bit and stream:
            raise PixArtNBError("load_in_8bit and stream are both on; expected at most one of them")
        dtype = supported_dtype(mindspore_dtype or ms.float32)
        if stream:
            return StreamedT5Encoder(folder, dtype, **options)
        return load_t5(folder, dtype, load_in_8bit, **options)


def load_t5(folder: Path, dtype: ms.Type, load_in_8bit: bool = False, **options) -> T5Encoder:
    """Load the encoder of a folder in the published layout, part by part, without a second copy of all weights."""
    config = T5Config.from_dict(read_json(folder / "config.json"), folder / "config.json")
    net = init_empty(lambda: T5Encoder(config, Int8Linear if load_in_8bit else Linear), dtype)
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
        self.folder, self.dtype, self.options = Path(folder), dtype, options
        path = self.folder / "config.json"
        self.config = T5Config.from_dict(read_json(path), path)
        self.net = init_empty(lambda: T5Encoder(replace(self.config, num_layers=1)), dtype)
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
