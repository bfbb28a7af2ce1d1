"""T5 in little memory: weights in eight bits, or layers that are read from their files one at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from pixart_nb.core.backend import ms, supported_dtype
from pixart_nb.core.checkpoints.files import read_tensors
from pixart_nb.core.checkpoints.load import load_into, unfilled
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import read_json
from pixart_nb.core.models.layers import Linear
from pixart_nb.core.models.quantization import Int8Linear
from pixart_nb.core.models.t5 import T5Config, T5Encoder

#: The parts of T5; its files hold the embedding table twice, and the copy's name begins with none of these.
TABLE, LAST_NORM = "shared.", "encoder.final_layer_norm."
POSITIONS = "SelfAttention.relative_attention_bias.weight"


class T5EncoderModel:
    """Ways of loading T5, under the name that transformers gives the encoder."""

    @staticmethod
    def from_pretrained(
        folder_or_hub_id: str | Path,
        subfolder: str = "",
        mindspore_dtype: ms.Type | None = None,
        load_in_8bit: bool = False,
        stream: bool = False,
        device_map: str | None = None,
    ) -> T5Encoder | StreamedT5Encoder:
        """The T5 encoder of a folder, or of the ``subfolder`` of a pipeline's folder or hub id.

        ``mindspore_dtype`` is float32 unless told. ``load_in_8bit`` keeps the projections of every layer as int8 with
        a scale for each row; they are computed in float32. ``stream`` reads a layer when it is computed and drops it
        after it: memory of one layer, at the price of reading the files for every prompt. ``device_map`` is there for
        calls written for transformers; there is one device.
        """
        from pixart_nb.core.checkpoints.components import component_places

        folder = Path(folder_or_hub_id)
        if subfolder:
            folder = component_places(folder_or_hub_id, [subfolder])[subfolder]
        if load_in_8bit and stream:
            raise PixArtNBError("load_in_8bit and stream are both on; expected at most one of them")
        dtype = supported_dtype(mindspore_dtype or ms.float32)
        return StreamedT5Encoder(folder, dtype) if stream else load_t5(folder, dtype, load_in_8bit)


def load_t5(folder: Path, dtype: ms.Type, load_in_8bit: bool = False) -> T5Encoder:
    """The encoder of a folder in the published layout, read part by part: no second copy of all the weights."""
    config = T5Config.from_dict(read_json(folder / "config.json"))
    net = unfilled(lambda: T5Encoder(config, Int8Linear if load_in_8bit else Linear), dtype)
    for prefix in (TABLE, LAST_NORM):
        _fill(net, folder, prefix, prefix)
    for layer in range(config.num_layers):
        _fill_layer(net, folder, layer, layer)
    return net.set_train(False)


def _fill_layer(net: T5Encoder, folder: Path, layer: int, place: int) -> None:
    """Load a layer of the files into the layer at ``place``, attention and feed-forward one after the other."""
    for half in (0, 1):
        source, target = (f"encoder.block.{number}.layer.{half}." for number in (layer, place))
        _fill(net, folder, source, target, () if layer == 0 else (f"{target}{POSITIONS}",))


def _fill(net: T5Encoder, folder: Path, source: str, target: str, optional: tuple[str, ...] = ()) -> None:
    """Load the tensors whose names begin with ``source`` into the parameters whose names begin with ``target``."""
    tensors = read_tensors(folder, keep=lambda name: name.startswith(source))
    named = {target + name.removeprefix(source): value for name, value in tensors.items()}
    load_into(net, named, folder, optional=optional, part=target)


class StreamedT5Encoder:
    """A T5 encoder that keeps one layer: each is read from its file, computed and replaced by the next.

    It is called as ``T5Encoder`` is, and its numbers are the same.
    """

    def __init__(self, folder: Path, dtype: ms.Type):
        self.folder, self.dtype = Path(folder), dtype
        self.config = T5Config.from_dict(read_json(self.folder / "config.json"))
        self.net = unfilled(lambda: T5Encoder(replace(self.config, num_layers=1)), dtype)
        _fill(self.net, self.folder, LAST_NORM, LAST_NORM)
        self.net.set_train(False)

    def __call__(self, input_ids, mask) -> ms.Tensor:
        """Encode. input_ids (N, T) integers, mask (N, T) bool, True = token -> (N, T, d_model)."""
        ids, seen = self.net.checked(input_ids, mask)
        x, bias, seen = self._embedded(ids), None, ms.Tensor(seen)
        for layer in tqdm(range(self.config.num_layers), desc="T5 layers", leave=False):
            _fill_layer(self.net, self.folder, layer, 0)
            if bias is None:  # the first layer's table serves all
                bias = self.net.position_bias(self.net.buckets(ids.shape[1]))
            x = self.net.encoder.block[0](x, seen, bias)
        return self.net.encoder.final_layer_norm(x).astype(self.dtype)

    def _embedded(self, ids: np.ndarray) -> ms.Tensor:
        """Rows of the embedding table, of which only those of these tokens are kept: (N, T, d_model) float32."""
        used, places = np.unique(ids, return_inverse=True)
        table = read_tensors(self.folder, keep=lambda name: name == "shared.weight")["shared.weight"]
        rows = ms.Tensor(np.asarray(table[used])).astype(self.dtype).astype(ms.float32)
        return rows[ms.Tensor(places.reshape(ids.shape).astype(np.int32))]
