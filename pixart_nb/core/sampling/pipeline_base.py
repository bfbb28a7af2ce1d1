"""Common part of the pipelines: loading and saving, and the methods that code written for diffusers calls."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspore import nn
from tqdm.auto import tqdm

from pixart_nb.core.backend import device_name, ms
from pixart_nb.core.checkpoints import components
from pixart_nb.core.errors import PixArtNBError, check_number, ignore_options, parameters_of
from pixart_nb.core.models.low_precision import inference_dtype
from pixart_nb.core.models.t5 import T5Encoder
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.models.vae import AutoencoderKL
from pixart_nb.core.sampling.images import ImageProcessor
from pixart_nb.core.sampling.schedulers import Scheduler, as_scheduler
from pixart_nb.core.sampling.text import TextTokenizer

if TYPE_CHECKING:
    from pixart_nb.core.lora.adapters import Adapters

COMPONENTS = ("tokenizer", "text_encoder", "transformer", "scheduler", "vae")
_LOAD = object()


class LoraLoaderMixin:
    """Loads and combines the LoRAs and DoRAs of a pipeline with a ``transformer``."""

    @property
    def _adapters(self) -> Adapters:
        if self.transformer is None:
            raise PixArtNBError("this pipeline has no transformer, so there is nothing that a LoRA could change")
        from pixart_nb.core.lora.adapters import Adapters  # needed only with a LoRA

        return Adapters.of(self.transformer)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Any],
        adapter_name: str | None = None,
        weight_name: str | None = None,
        subfolder: str | None = None,
        **options: Any,
    ) -> None:
        """Load a LoRA or DoRA and activate it alone; ``set_adapters`` combines several.

        From a file, a folder or a hub id (``subfolder`` and ``weight_name``: the file in it) or a mapping of tensors,
        in the layout of diffusers, of PEFT or of kohya's scripts. Its name is ``default_0``, ``default_1``, ... by
        default. Parts of a text encoder and bundled embeddings are left out with a warning. Raises ``CheckpointError``
        for a file that is damaged or made for another model; nothing is changed then.
        """
        adapters = self._adapters
        if adapter_name is None:
            names = (f"default_{number}" for number in range(len(adapters.adapters) + 1))
            adapter_name = next(name for name in names if name not in adapters.adapters)
        from pixart_nb.core.lora.files import lora_path, read_lora

        hub = components.hub_options(options)
        ignore_options("load_lora_weights", options, parameters_of(self.load_lora_weights))
        source = pretrained_model_name_or_path_or_dict
        if not isinstance(source, Mapping):
            source = lora_path(source, weight_name, subfolder, **hub)
        adapters.load(adapter_name, read_lora(source, weight_name))

    def save_lora_weights(
        self, save_directory: str | Path, adapter_name: str | None = None, layout: str = "diffusers"
    ) -> Path:
        """Write an adapter (the active one by default) in the layout ``diffusers`` or ``peft``; returns the file."""
        adapters = self._adapters
        if adapter_name is None:
            if len(adapters.active) != 1:
                raise PixArtNBError(f"active adapters are {adapters.active}; give the one to save as adapter_name")
            adapter_name = adapters.active[0]
        return adapters.adapters[adapters.checked([adapter_name])[0]].save(save_directory, layout)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Activate these adapters, each with its weight (1 by default), and no others.

        A weight may be a mapping of components to weights, as in diffusers; that of ``transformer`` counts.
        """
        self._adapters.activate(_as_list(adapter_names), adapter_weights)

    def get_active_adapters(self) -> list[str]:
        """Return the names of the active adapters."""
        return self._adapters.active

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of all adapters of each component that has any."""
        names = list(self._adapters.adapters)
        return {"transformer": names} if names else {}

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Delete adapters. When no other is active, the first one that is left becomes active, as in PEFT."""
        was_active = bool(self._adapters.active)
        self._adapters.delete(_as_list(adapter_names))
        if was_active and not self._adapters.active and (left := list(self._adapters.adapters)):
            warnings.warn(f"the active adapter was deleted; {left[0]!r} is active now", stacklevel=2)
            self._adapters.activate(left[:1])

    def disable_lora(self) -> None:
        """Sample without adapters until ``enable_lora``."""
        self._adapters.enable(False)

    def enable_lora(self) -> None:
        self._adapters.enable(True)

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None, **options: Any) -> None:
        """Add the active adapters (or ``adapter_names`` of them) to the weights: sampling then costs nothing more.

        After ``unload_lora_weights`` the fused weights stay for good.
        """
        ignore_options("fuse_lora", options, parameters_of(self.fuse_lora))
        check_number("lora_scale", lora_scale)
        self._adapters.fuse(lora_scale, None if adapter_names is None else _as_list(adapter_names))

    def unfuse_lora(self, **options: Any) -> None:
        """Take fused adapters out again: the weights are restored bit for bit."""
        ignore_options("unfuse_lora", options, ())
        self._adapters.unfuse()

    def unload_lora_weights(self) -> None:
        """Delete all adapters. Those that are fused stay in the weights."""
        self._adapters.clear()


def _as_list(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _check_parts(tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any) -> None:
    """Refuse components of the wrong kind, which would fail after all steps, or with an error of MindSpore."""
    encodes = callable(text_encoder) and not hasattr(text_encoder, "decode") and not hasattr(text_encoder, "denoise")
    kinds = {
        "tokenizer": (tokenizer, hasattr(tokenizer, "tokenize"), "T5Tokenizer"),
        "text_encoder": (text_encoder, encodes, "T5EncoderModel"),
        "vae": (vae, hasattr(vae, "decode"), "AutoencoderKL"),
        "transformer": (transformer, hasattr(transformer, "denoise"), "PixArtTransformer2DModel"),
    }
    for name, (part, fits, loader) in kinds.items():
        if part is not None and not fits:
            raise PixArtNBError(
                f"{name} is {repr(part).splitlines()[0][:60]}, of {type(part).__name__}; expected what "
                f"{loader}.from_pretrained(folder) returns, or None"
            )


class PipelineBase(LoraLoaderMixin):
    """Components of a pipeline, any of which may be None."""

    image_processor = ImageProcessor()
    max_sequence_length = 300

    def __init__(
        self,
        tokenizer: TextTokenizer | None = None,
        text_encoder: T5Encoder | None = None,
        vae: AutoencoderKL | None = None,
        transformer: PixArt | None = None,
        scheduler: Scheduler | str | None = None,
    ):
        if hasattr(tokenizer, "convert_ids_to_tokens") and not isinstance(tokenizer, TextTokenizer):
            tokenizer = TextTokenizer(tokenizer)  # one of transformers
        _check_parts(tokenizer, text_encoder, vae, transformer)
        if transformer is not None:
            self.max_sequence_length = min(self.max_sequence_length, transformer.config.model_max_length)
        self.tokenizer, self.text_encoder, self.vae = tokenizer, text_encoder, vae
        self.transformer, self._scheduler = transformer, as_scheduler(scheduler)
        self._progress_bar_config: dict[str, Any] = {}
        self._interrupt = False

    @property
    def scheduler(self) -> Scheduler | None:
        """Scheduler of the steps. Set it to a scheduler, or to a name, which keeps the noise schedule."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, value: Scheduler | str | None) -> None:
        self._scheduler = as_scheduler(value, self._scheduler)

    # ---- loading and saving

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path | None = None,
        mindspore_dtype: Any = None,
        *,
        pretrained_model_name_or_path: str | Path | None = None,
        transformer: PixArt | None = _LOAD,
        text_encoder: T5Encoder | None = _LOAD,
        tokenizer: TextTokenizer | None = _LOAD,
        vae: AutoencoderKL | None = _LOAD,
        scheduler: Scheduler | str | None = _LOAD,
        torch_dtype: Any = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        **options: Any,
    ):
        """Load a pipeline from a folder or the hub.

        Reads the layout that diffusers publishes, and that of mindone's example: a checkpoint and the folders vae,
        text_encoder and tokenizer (of several checkpoints, give the path of one). A component that is given is used as
        it is; None leaves it out: a pipeline without a text encoder takes embeddings, one without a transformer only
        encodes, one without a VAE returns latents. ``pretrained_model_name_or_path`` is another name of the first
        argument. Weights are cast to ``mindspore_dtype``, float32 by default (``torch_dtype`` is its other name). With
        float16 or bfloat16 on a CPU the linear layers of transformer and text encoder keep bfloat16 weights, and the
        rest is float32; on a processor without bfloat16 products all is. ``variant``, such as fp16, chooses the files;
        ``revision``, ``cache_dir``, ``local_files_only``, ``force_download`` and ``token`` go to the hub.

        Raises ``CheckpointError`` for a folder that is missing or incomplete and for a hub that cannot be reached.
        """
        parts = dict(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )
        names = [name for name, part in parts.items() if part is _LOAD]
        dtype = components.chosen_dtype(mindspore_dtype, torch_dtype, options)
        hub = components.hub_options(options)
        ignore_options("from_pretrained", options, parameters_of(PipelineBase.from_pretrained))
        files = {"variant": variant, "use_safetensors": use_safetensors}
        loaded = {}
        if names:
            source = components.source_of(folder_or_hub_id, pretrained_model_name_or_path)
            loaded = components.load_components(source, names, dtype, hub, **files)
        if "scheduler" in names:
            loaded.setdefault("scheduler", "dpm++")  # mindone's layout has none
        return cls(**parts | loaded)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the components that are loaded into a folder that ``from_pretrained`` and diffusers read.

        Weights are written in float16 if they are float16, else in float32: bfloat16 exactly. Raises ``PixArtNBError``
        for a text encoder in 8 or 4 bits or one that is streamed and for a folder with other weights in shards, and
        ``WriteError``. An adapter is written only if it is fused; a warning names those that are left out.
        """
        ignore_options("save_pretrained", options, ())
        folder = Path(save_directory).expanduser()
        if self.text_encoder is not None and not components.is_whole(self.text_encoder):
            raise PixArtNBError("the text encoder is streamed or in 8 or 4 bits, so it cannot be saved; load it whole")
        loaded = {name: write for name, write in components.WRITERS.items() if getattr(self, name) is not None}
        absent = [name for name, part in self.components.items() if part is None]
        for name in loaded:
            components.weights_path(folder / name, name)  # before anything is written
        if self.transformer is not None and self._adapters.active and not self._adapters.originals:
            warnings.warn(
                f"the weights are saved without the adapters {self._adapters.active}: fuse_lora first, or keep their "
                "files",
                stacklevel=2,
            )
        if left := [name for name in absent if (folder / name).is_dir()]:
            raise PixArtNBError(f"{folder} holds {', '.join(left)}, which this pipeline lacks; choose an empty folder")
        if self.scheduler is not None:
            self.scheduler.check_savable()
        for name, write in loaded.items():
            net = getattr(self, name)
            write(folder / name, net, components.saved_dtype(net))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder / "tokenizer")
        components.write_index(folder, self.scheduler, type(self).__name__, absent)

    @property
    def components(self) -> dict[str, Any]:
        """Components by name, as the arguments of another pipeline."""
        return {name: getattr(self, name) for name in COMPONENTS}

    @classmethod
    def from_pipe(cls, pipeline: PipelineBase, **components: Any):
        """Make a pipeline of this class that shares the components of another one, with replacements.

        Options of diffusers without a meaning here are named; another dtype than that of the weights is an error.
        """
        own = {*COMPONENTS, *parameters_of(cls.__init__)} - {"self", "components", "named"}
        dtypes = [components.pop(name) for name in ("mindspore_dtype", "torch_dtype") if name in components]
        options = {name: components.pop(name) for name in [*components] if name not in own}
        ignore_options("from_pipe", options, own)
        pipe = cls(**{name: part for name, part in pipeline.components.items() if name in own} | components)
        if pipe.transformer is pipeline.transformer:
            pipe.max_sequence_length = min(cls.max_sequence_length, pipeline.max_sequence_length)
        return pipe.to(*(dtype for dtype in dtypes if dtype is not None))

    # ---- progress

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set options of tqdm for the progress bar, such as ``disable=True``."""
        self._progress_bar_config = options

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> tqdm:
        """Return the progress bar of an iterable, or of ``total`` steps."""
        return tqdm(iterable, total=total, **self._progress_bar_config)

    @property
    def interrupt(self) -> bool:
        """True if a callback has set ``_interrupt``, which ends the run after the current step."""
        return self._interrupt

    # ---- devices and memory, as diffusers names them

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of an image to a side of a latent cell: 8 for the published VAE."""
        return 8 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def device(self) -> str:
        """Name of the device in use, "CPU" or "Ascend"; ``PIXART_NB_DEVICE`` chooses it."""
        return device_name()

    @property
    def dtype(self) -> ms.Type:
        """Dtype of the weights of the transformer, or of the text encoder without one (see ``from_pretrained``)."""
        parts = (getattr(self, name, None) for name in ("transformer", "text_encoder", "vae"))
        net = next((part for part in parts if part is not None), None)
        if net is None:
            return ms.float32
        if isinstance(net, nn.Cell):
            dtypes = [parameter.dtype for parameter in net.get_parameters()]
            return ms.bfloat16 if ms.bfloat16 in dtypes else dtypes[0]
        return net.dtype

    def to(self, *args: Any, **options: Any):
        """Return the pipeline. Devices have no meaning here; another dtype than that of the weights is an error."""
        for value in (*args, *options.values()):
            if value is None or isinstance(value, bool):
                continue
            if _is_device(value):
                if str(value).split(":")[0].lower() != self.device.lower():
                    warnings.warn(f"to({value!r}) has no effect: this is {self.device}", stacklevel=2)
            elif inference_dtype(value) != self.dtype:
                raise PixArtNBError(
                    f"to({value!r}): the weights are {self.dtype}; use from_pretrained(..., mindspore_dtype=)"
                )
        return self

    def enable_vae_tiling(self, *args: Any, **options: Any) -> None:
        """Decode in tiles (``vae.enable_tiling``)."""
        self._present_vae.enable_tiling(*args, **options)

    def disable_vae_tiling(self) -> None:
        self._present_vae.disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Decode the images of a batch one by one."""
        self._present_vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        self._present_vae.disable_slicing()

    @property
    def _present_vae(self) -> AutoencoderKL:
        if self.vae is None:
            raise PixArtNBError("this pipeline has no VAE; load it with one")
        return self.vae

    def __getattr__(self, name: str) -> Any:
        """Return a method that says why it does nothing, for those of diffusers that have no meaning here."""
        if name.startswith("__") or not name.startswith(tuple(_NO_EFFECT)):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        reason = next(reason for start, reason in _NO_EFFECT.items() if name.startswith(start))
        return lambda *args, **options: warnings.warn(f"{name}: {reason}", stacklevel=2)


_CHUNKS = "attention is always computed in chunks"
_OFFLOADING = "resumable stages (`pixart-nb sample --stages_path FOLDER`) hold one network at a time instead"
#: First letters of methods of diffusers that do nothing here, and the reason.
_NO_EFFECT = {
    "enable_attention_slicing": _CHUNKS,
    "disable_attention_slicing": _CHUNKS,
    "enable_xformers": _CHUNKS,
    "disable_xformers": _CHUNKS,
    "enable_model_cpu_offload": _OFFLOADING,
    "enable_sequential_cpu_offload": _OFFLOADING,
    "enable_group_offload": _OFFLOADING,
    "reset_device_map": "there is one device",
    "set_lora_device": "there is one device",
    "maybe_free_model_hooks": "there are no offloading hooks to remove",
    "remove_all_hooks": "there are no offloading hooks to remove",
}


@contextmanager
def hidden_progress_bar(pipe: Any) -> Iterator[None]:
    """Hide the progress bar of a pipeline while another one counts its images; any other function is left alone."""
    before = getattr(pipe, "_progress_bar_config", None)
    if before is not None:
        pipe.set_progress_bar_config(**before | {"disable": True})
    try:
        yield
    finally:
        if before is not None:
            pipe.set_progress_bar_config(**before)


def _is_device(value: Any) -> bool:
    name = str(value).split(":")[0].lower()
    return name in ("cpu", "cuda", "npu", "ascend", "gpu", "mps")
