"""LoRA and DoRA of a transformer: layers, adapters, files, and their loading into a pipeline."""

from pixart_nb.core.lora.adapters import Adapter, Adapters
from pixart_nb.core.lora.config import LoraConfig

__all__ = ["Adapter", "Adapters", "LoraConfig"]
