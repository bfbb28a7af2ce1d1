"""LoRA and DoRA of a transformer: layers, adapters and files.

Names are imported on first use: a pipeline without LoRAs does not need them.
"""

from __future__ import annotations

from pixart_nb import lazy_names

_MODULES = {"adapters": ("Adapter", "Adapters"), "config": ("LoraConfig",)}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
