"""Components of a pipeline: found in a folder or on a hub, loaded, and written in the layout of diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.config import bundled_path
from pixart_nb.core.backend import dtype_from_name, ms
from pixart_nb.core.checkpoints import key_maps
from pixart_nb.core.checkpoints.configuration import diffusers_config
from pixart_nb.core.checkpoints.files import ENDINGS, STEMS, WEIGHTS, write_safetensors
from pixart_nb.core.checkpoints.key_maps import to_layout
from pixart_nb.core.checkpoints.lazy_tensor import LazyTensor
from pixart_nb.core.checkpoints.load import StreamedT5Encoder, load_t5, load_transformer, load_vae
from pixart_nb.core.errors import PixArtNBError, ignore_options, parameters_of
from pixart_nb.core.io import CheckpointError, atomic_write, read_json, save_tensors, write_json
from pixart_nb.core.models import vae
from pixart_nb.core.models.low_precision import BFloat16Linear, QuantizedLinear
from pixart_nb.core.models.t5 import T5Encoder
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.sampling.schedulers import Scheduler, scheduler_from_config
from pixart_nb.core.sampling.text import TextTokenizer

#: Options of ``from_pretrained`` that go to the hub.
HUB_OPTIONS = ("revision", "cache_dir", "local_files_only", "force_download", "token")


def source_of(folder_or_hub_id: str | Path | None, other_name: str | Path | None) -> str | Path:
    """Return the folder or hub id, which diffusers calls ``pretrained_model_name_or_path``."""
    source = other_name if folder_or_hub_id is None else folder_or_hub_id
    if not isinstance(source, str | Path) or not str(source):
        raise PixArtNBError(f"the model is {source!r}; give its folder, or the id of a model on a hub, owner/name")
    return source


def component_paths(
    source: str | Path, names: Sequence[str], formats: Mapping[str, Any] | None = None, **hub: Any
) -> dict[str, Path]:
    """Return the paths of the components of a pipeline.

    ``source``: a folder in the layout of diffusers, or in that of mindone's example (a checkpoint beside the folders
    vae, text_encoder and tokenizer, or in a folder ``models`` with or beside them); the checkpoint in such a folder, if
    there are several; or a hub id, with options of it, and ``formats``, the options ``variant`` and
    ``use_safetensors`` of ``open_checkpoint``, which choose the files to fetch. mindone's layout has no scheduler,
    which is then left out; so are components of which ``model_index.json`` says that the pipeline has none.
    Raises ``CheckpointError``.
    """
    path = bundled_path(source)
    if path.is_file():
        return _mindone_paths(path.parent, names, path)
    folder = path if path.is_dir() else _pipeline_from_hub(source, names, hub, formats or {})
    index = folder / "model_index.json"
    if not index.is_file():
        if (trained := folder / "pipeline" / index.name).is_file():
            raise CheckpointError(f"{folder} is the folder of a training; its result is {trained.parent}")
        return _mindone_paths(folder, names)
    absent = [name for name, value in read_json(index).items() if value == [None, None]]
    names = [name for name in names if name not in absent or (folder / name).is_dir()]
    missing = [name for name in names if not (folder / name).is_dir()]
    if missing:
        raise CheckpointError(f"{folder} lacks the folders {missing}; give those components, or None if not needed")
    return {name: folder / name for name in names}


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the hub, and take them out of ``options``."""
    return {name: options.pop(name) for name in HUB_OPTIONS if name in options}


def component_path(
    source: str | Path, subfolder: str | None, options: dict[str, Any], formats: Mapping[str, Any] | None = None
) -> Path:
    """Return the path of a component: that of the ``subfolder`` of a pipeline, or the folder, file or hub id itself.

    Takes the options of the hub out of ``options``; ``formats`` as in ``component_paths``.
    """
    hub = hub_options(options)
    if subfolder:
        paths = component_paths(source, [subfolder], formats, **hub)
        if subfolder not in paths:
            raise CheckpointError(f"{source} has no {subfolder}, as its model_index.json says")
        return paths[subfolder]
    path = bundled_path(source)
    if path.exists():
        return path
    from pixart_nb.core.checkpoints.hub import from_hub  # needed only for a hub id

    patterns = ["config.json", *(f"{stem}*" for stem in STEMS)]
    return from_hub(source, patterns, "config.json and weights", hub, formats or {})


def pipeline_class(source: str | Path) -> str:
    """Return the class name in the ``model_index.json`` of a folder or hub id; empty if there is none."""
    path = bundled_path(source)
    folder = path.parent if path.is_file() else path if path.is_dir() else _pipeline_from_hub(source, [], {})
    index = folder / "model_index.json"
    return str(read_json(index).get("_class_name", "")) if index.is_file() else ""


def _mindone_paths(folder: Path, names: Sequence[str], checkpoint: Path | None = None) -> dict[str, Path]:
    roots = (folder, folder / "models")
    files = [path for root in roots for path in sorted(root.glob("*")) if path.suffix in ENDINGS and path.is_file()]
    checkpoints = [checkpoint] if checkpoint else files
    if "transformer" in names and len(checkpoints) > 1:
        raise CheckpointError(
            f"{folder} holds several checkpoints ({', '.join(p.name for p in checkpoints[:6])}); give the path of the "
            "one to load"
        )
    folders = [name for name in names if name != "transformer"]
    paths = {name: root / name for root in reversed(roots) for name in folders if (root / name).is_dir()}
    paths |= {"transformer": checkpoints[0]} if checkpoints else {}
    missing = [name for name in names if name not in (*paths, "scheduler")]
    if missing and (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is one component, not a pipeline: give a transformer as the checkpoint")
    if missing:
        raise CheckpointError(
            f"{folder} has no model_index.json, so it is no pipeline in diffusers' layout; and it lacks {missing} "
            "for the layout of mindone, a checkpoint and the folders vae, text_encoder and tokenizer. It holds "
            f"{sorted(part.name for part in folder.iterdir())[:10]}. Give those components, or None if not needed."
        )
    return {name: paths[name] for name in names if name in paths}


def _pipeline_from_hub(
    source: str | Path, names: Sequence[str], hub: Mapping[str, Any], formats: Mapping[str, Any] | None = None
) -> Path:
    from pixart_nb.core.checkpoints.hub import from_hub  # needed only for a hub id

    patterns = ["model_index.json", *(f"{name}/*" for name in names)]
    return from_hub(source, patterns, " and ".join(["model_index.json", *names]), hub, formats)


# ---- loading


def load_components(
    source: str | Path, names: Sequence[str], dtype: ms.Type, hub: Mapping[str, Any] | None = None, **options
) -> dict[str, Any]:
    """Load components of a pipeline, networks in ``dtype``.

    ``source`` and ``hub`` as in ``component_paths``; components that the pipeline lacks are None. ``options``:
    ``variant`` and ``use_safetensors`` of ``open_checkpoint``.
    """
    paths = component_paths(source, names, options, **(hub or {}))
    absent = {name: None for name in names if name not in paths and name != "scheduler"}
    return absent | {name: LOADERS[name](path, dtype, **options) for name, path in paths.items()}


def _load_scheduler(folder: Path, dtype: ms.Type, **options) -> Scheduler:
    values = read_json(folder / "scheduler_config.json")
    try:
        return scheduler_from_config(values)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise CheckpointError(f"{folder / 'scheduler_config.json'}: {error}") from error


#: Component -> function of its own folder and the dtype.
LOADERS = {
    "transformer": lambda path, dtype, **options: load_transformer(path, dtype=dtype, **options),
    "text_encoder": load_t5,
    "vae": load_vae,
    "scheduler": _load_scheduler,
    "tokenizer": lambda folder, dtype, **options: TextTokenizer(folder),
}


def chosen_dtype(mindspore_dtype: Any, torch_dtype: Any, options: dict[str, Any]) -> ms.Type:
    """Return the dtype of ``mindspore_dtype``, ``torch_dtype`` or ``dtype``; float32 for None and ``auto``.

    ``dtype`` is taken out of ``options``.
    """
    names = (mindspore_dtype, torch_dtype, options.pop("dtype", None))
    dtype = next((name for name in names if name is not None), None)
    return ms.float32 if dtype is None or str(dtype) == "auto" else dtype_from_name(dtype)


class PretrainedComponent:
    """Loads a component of a pipeline by the name of its class in diffusers."""

    def __init__(self, component: str):
        self.component = component

    def from_pretrained(
        self,
        folder_or_hub_id: str | Path | None = None,
        subfolder: str | None = "",
        mindspore_dtype: Any = None,
        torch_dtype: Any = None,
        pretrained_model_name_or_path: str | Path | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        **options: Any,
    ) -> Any:
        """Load the network of its own folder, file or hub id, or of the ``subfolder`` of a pipeline's.

        ``mindspore_dtype``, or ``torch_dtype``: float32 by default. Options as in ``PixArtSigmaPipeline``.
        """
        source = source_of(folder_or_hub_id, pretrained_model_name_or_path)
        files = {"variant": variant, "use_safetensors": use_safetensors}
        path = component_path(source, subfolder, options, files)
        dtype = chosen_dtype(mindspore_dtype, torch_dtype, options)
        ignore_options("from_pretrained", options, parameters_of(self.from_pretrained))
        return LOADERS[self.component](path, dtype, **files)


#: Under the name that the class has since diffusers 0.30, and under its earlier name.
PixArtTransformer2DModel = Transformer2DModel = PretrainedComponent("transformer")
AutoencoderKL = PretrainedComponent("vae")


class T5EncoderModel:
    """Loader of T5 under the name of transformers' class."""

    @staticmethod
    def from_pretrained(
        folder_or_hub_id: str | Path | None = None,
        subfolder: str | None = "",
        mindspore_dtype: Any = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        stream: bool = False,
        device_map: str | None = None,
        torch_dtype: Any = None,
        pretrained_model_name_or_path: str | Path | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        **options: Any,
    ) -> T5Encoder | StreamedT5Encoder:
        """Load the T5 encoder of its own folder, file or hub id, or of the ``subfolder`` of a pipeline's.

        ``mindspore_dtype``, or ``torch_dtype``: float32 by default. ``load_in_8bit`` keeps the projections of every
        layer as int8 with a scale for each row, ``load_in_4bit`` as NF4 with a scale for 64 weights; both are computed
        in float32. ``stream`` reads a layer when it is computed and drops it afterwards: memory of one layer, but the
        files are read for every prompt. ``device_map`` has no effect, as there is one device. Other options as in
        ``PixArtSigmaPipeline``.
        """
        source = source_of(folder_or_hub_id, pretrained_model_name_or_path)
        files = {"variant": variant, "use_safetensors": use_safetensors}
        folder = component_path(source, subfolder, options, files)
        dtype = chosen_dtype(mindspore_dtype, torch_dtype, options)
        ignore_options("from_pretrained", options, parameters_of(T5EncoderModel.from_pretrained))
        if load_in_8bit + load_in_4bit + stream > 1:
            raise PixArtNBError("expected at most one of load_in_8bit, load_in_4bit and stream")
        if stream:
            return StreamedT5Encoder(folder, dtype, **files)
        return load_t5(folder, dtype, load_in_8bit, load_in_4bit, **files)


# ---- writing


def weights_of(net: Any, dtype: type[np.floating]) -> dict[str, np.ndarray]:
    """Return the weights of a network by name, bfloat16 ones of its linear layers too."""
    cells = {f"{name}.weight": cell for name, cell in net.cells_and_names() if isinstance(cell, BFloat16Linear)}
    return {
        name: (cells[name].plain_weight() if name in cells else p.asnumpy()).astype(dtype)
        for name, p in net.parameters_and_names()
    }


def weights_path(folder: Path, name: str = "transformer") -> Path:
    """Return the path that the weights of a component are written to.

    Raises ``CheckpointError`` for a folder with the index of other weights, which would be read in place of them.
    """
    if indices := sorted(path.name for path in folder.glob("*.safetensors.index.json")):
        raise CheckpointError(f"{folder} holds other weights ({indices[0]} and its files); choose an empty folder")
    return folder / ("model.safetensors" if name == "text_encoder" else WEIGHTS)


def write_transformer(
    folder: Path, net: PixArt, dtype: type[np.floating] = np.float32, weights: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write a transformer in the diffusers layout, without the learned empty caption, which sampling does not use.

    ``weights`` are written in place of those of ``net``, by the same names.
    """
    weights = weights_of(net, dtype) if weights is None else weights
    tensors = {n: LazyTensor.of(value, n) for n, value in weights.items() if n not in key_maps.OPTIONAL}
    with atomic_write(weights_path(folder)) as temporary:
        write_safetensors(temporary, to_layout(tensors, "diffusers"))
    write_json(folder / "config.json", diffusers_config(net.config))


def write_vae(folder: Path, net: vae.AutoencoderKL, dtype: type[np.floating] = np.float32) -> None:
    """Write an autoencoder in the diffusers layout."""
    save_tensors(weights_path(folder), weights_of(net, dtype), {"format": "pt"})
    config = asdict(net.config)
    blocks = len(net.config.block_out_channels)
    extra = {"down_block_types": ["DownEncoderBlock2D"] * blocks, "up_block_types": ["UpDecoderBlock2D"] * blocks}
    write_json(folder / "config.json", {"_class_name": "AutoencoderKL", "act_fn": "silu", **config, **extra})


def write_text_encoder(folder: Path, net: T5Encoder, dtype: type[np.floating] = np.float32) -> None:
    """Write a T5 encoder in the layout of transformers."""
    save_tensors(weights_path(folder, "text_encoder"), weights_of(net, dtype), {"format": "pt"})
    extra = {"architectures": ["T5EncoderModel"], "model_type": "t5", "is_encoder_decoder": False}
    extra |= {"dense_act_fn": "gelu_new", "is_gated_act": True, "eos_token_id": 1, "pad_token_id": 0}
    write_json(folder / "config.json", {**extra, **asdict(net.config)})


#: Component -> function that writes it into its own folder, in a NumPy dtype.
WRITERS = {"transformer": write_transformer, "vae": write_vae, "text_encoder": write_text_encoder}


def saved_dtype(net: Any) -> type[np.floating]:
    """Return the dtype that the weights of a network are written in: float16 if they are, else float32."""
    return np.float16 if next(iter(net.get_parameters())).dtype == ms.float16 else np.float32


def is_whole(net: Any) -> bool:
    """Return whether a network is in memory in floating point, so that it can be written."""
    cells = net.cells_and_names() if hasattr(net, "cells_and_names") else [("", None)]
    return not any(cell is None or isinstance(cell, QuantizedLinear) for _, cell in cells)


def write_index(
    folder: Path, scheduler: Scheduler | None, class_name: str = "PixArtSigmaPipeline", absent: Sequence[str] = ()
) -> None:
    """Write ``model_index.json`` and the scheduler's configuration of a pipeline without the ``absent`` components."""
    parts = {
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    parts |= {name: [None, None] for name in absent}
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", {"_class_name": class_name, **parts})
