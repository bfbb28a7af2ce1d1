"""LoRAs of a pipeline, with the interface of diffusers, which has none for PixArt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.lora import Adapters
from pixart_nb.core.lora.files import read_lora


class LoraLoaderMixin:
    """What a pipeline with a ``transformer`` can do with LoRAs and DoRAs."""

    @property
    def _adapters(self) -> Adapters:
        if self.transformer is None:
            raise PixArtNBError(
                "this pipeline has no transformer, so there is nothing that a LoRA could change"
            )
        return Adapters.of(self.transformer)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Any],
        adapter_name: str | None = None,
        weight_name: str | None = None,
    ) -> None:
        """Load a LoRA or DoRA and let it alone be active; ``set_adapters`` combines several.

        From a file, a folder (``weight_name`` is the file in it) or a mapping of tensors, in the layout of diffusers,
        of PEFT or of kohya's scripts. It is called ``default_0``, ``default_1``, ... unless ``adapter_name`` is given.
        One that is damaged or made for another model is refused with a ``CheckpointError``, and nothing is changed.
        """
        adapters = self._adapters
        if adapter_name is None:
            count = range(len(adapters.adapters) + 1)
            adapter_name = next(n for k in count if (n := f"default_{k}") not in adapters.adapters)
        adapters.load(adapter_name, read_lora(pretrained_model_name_or_path_or_dict, weight_name))

    def save_lora_weights(
        self, save_directory: str | Path, adapter_name: str | None = None, layout: str = "diffusers"
    ) -> Path:
        """Write an adapter (by default the active one) as ``diffusers`` or ``peft`` do; the path of its weights."""
        adapters = self._adapters
        if adapter_name is None:
            if len(adapters.active) != 1:
                raise PixArtNBError(
                    f"active adapters are {adapters.active}; say which to save as adapter_name"
                )
            adapter_name = adapters.active[0]
        return adapters.named(adapter_name).save(save_directory, layout)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Let these adapters be active, each with its weight (1 unless told), and no others."""
        self._adapters.activate(_as_list(adapter_names), adapter_weights)

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that take part in drawing."""
        return self._adapters.active

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all adapters of each component that has any."""
        names = list(self._adapters.adapters)
        return {"transformer": names} if names else {}

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters."""
        self._adapters.delete(_as_list(adapter_names))

    def disable_lora(self) -> None:
        """Draw without adapters until ``enable_lora``."""
        self._adapters.enable(False)

    def enable_lora(self) -> None:
        """Draw with the active adapters again."""
        self._adapters.enable(True)

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """Put the active adapters (or ``adapter_names`` of them) into the weights: sampling then costs nothing more.

        With ``unload_lora_weights`` afterwards the fused weights stay for good.
        """
        self._adapters.fuse(lora_scale, None if adapter_names is None else _as_list(adapter_names))

    def unfuse_lora(self) -> None:
        """Take fused adapters out again: the weights are bit for bit what they were."""
        self._adapters.unfuse()

    def unload_lora_weights(self) -> None:
        """Forget all adapters. Those that are fused stay in the weights."""
        self._adapters.clear()


def _as_list(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
