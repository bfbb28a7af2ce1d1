"""LoRA and DoRA of a transformer: layers, adapters and files.

Names are imported on first use: a pipeline without LoRAs does not need them.
"""

from __future__ import annotations

from importlib import import_module

_PUBLIC = {"Adapter": "adapters", "Adapters": "adapters", "LoraConfig": "config"}
__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
