"""LoRA and DoRA: small changes beside the weights of a transformer, trained, saved, loaded, combined, merged.

To train one, give ``Trainer`` the parameters of ``Adapters.of(net).add(name, LoraConfig(...), seed)`` in place of the
network's, and its ``with_dropout(batch, seed)`` in place of the batches, as ``pixart-nb train`` does.
"""

from pixart_nb.core.lora.adapter import Adapter
from pixart_nb.core.lora.adapters import Adapters
from pixart_nb.core.lora.config import LoraConfig

__all__ = ["Adapter", "Adapters", "LoraConfig"]
