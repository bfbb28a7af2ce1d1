"""LoRA and DoRA: small changes beside the weights of a transformer, trained, saved, loaded, combined, merged."""

from pixart_nb.core.training.lora.adapter import Adapter
from pixart_nb.core.training.lora.adapters import Adapters
from pixart_nb.core.training.lora.config import LoraConfig
from pixart_nb.core.training.lora.training import train_lora

__all__ = ["Adapter", "Adapters", "LoraConfig", "train_lora"]
