"""LoRAs of a pipeline, with the methods of diffusers' pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart_nb.core.errors import PixArtNBError

if TYPE_CHECKING:
    from pixart_nb.core.lora.adapters import Adapters


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
    ) -> None:
        """Load a LoRA or DoRA and activate it alone; ``set_adapters`` combines several.

        From a file, a folder (``weight_name``: the file in it) or a mapping of tensors, in the layout of diffusers, of
        PEFT or of kohya's scripts. Its name is ``default_0``, ``default_1``, ... by default. Parts of a text encoder
        and bundled embeddings are left out with a warning. Raises ``CheckpointError`` for a file that is damaged or
        made for another model; nothing is changed then.
        """
        adapters = self._adapters
        if adapter_name is None:
            names = (f"default_{number}" for number in range(len(adapters.adapters) + 1))
            adapter_name = next(name for name in names if name not in adapters.adapters)
        from pixart_nb.core.lora.files import read_lora

        adapters.load(adapter_name, read_lora(pretrained_model_name_or_path_or_dict, weight_name))

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
        """Activate these adapters, each with its weight (1 by default), and no others."""
        self._adapters.activate(_as_list(adapter_names), adapter_weights)

    def get_active_adapters(self) -> list[str]:
        """Return the names of the active adapters."""
        return self._adapters.active

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of all adapters of each component that has any."""
        names = list(self._adapters.adapters)
        return {"transformer": names} if names else {}

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        self._adapters.delete(_as_list(adapter_names))

    def disable_lora(self) -> None:
        """Sample without adapters until ``enable_lora``."""
        self._adapters.enable(False)

    def enable_lora(self) -> None:
        self._adapters.enable(True)

    def fuse_lora(self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None) -> None:
        """Add the active adapters (or ``adapter_names`` of them) to the weights: sampling then costs nothing more.

        After ``unload_lora_weights`` the fused weights stay for good.
        """
        self._adapters.fuse(lora_scale, None if adapter_names is None else _as_list(adapter_names))

    def unfuse_lora(self) -> None:
        """Take fused adapters out again: the weights are restored bit for bit."""
        self._adapters.unfuse()

    def unload_lora_weights(self) -> None:
        """Delete all adapters. Those that are fused stay in the weights."""
        self._adapters.clear()


def _as_list(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
