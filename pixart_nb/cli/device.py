"""The device of a command: chosen before MindSpore is imported, and named in one line."""

from __future__ import annotations

import os
import warnings

import typer

from pixart_nb.config.keys import ModelKeys, TrainConfig


def start(settings: ModelKeys | None = None) -> None:
    """Open the device, and print it with the dtype and MindSpore's version on one line of stderr.

    Raises ``PixArtNBError`` for a device that cannot be opened, that is not supported, or that differs from
    ``device_target``.
    """
    target = settings.device_target if settings else ""
    if target:
        os.environ.setdefault("PIXART_NB_DEVICE", target)
    from pixart_nb.core import backend

    backend.check_device(target)
    backend.set_graph_mode(settings is not None and settings.mode == 0)
    cann, accepted = backend.cann_versions()
    if backend.on_ascend() and cann and accepted and cann not in accepted:
        expected = f"MindSpore {backend.ms.__version__} accepts {', '.join(accepted)}"
        warnings.warn(f"CANN is {cann}, and {expected}; install one of them", stacklevel=2)
    parts = f"Device: {backend.device_name()}", _dtype(settings), f"MindSpore {backend.ms.__version__}"
    typer.echo(", ".join(filter(None, parts)), err=True)


def _dtype(settings: ModelKeys | None) -> str:
    """Return the dtype and, where it differs, what is computed in: a CPU trains bf16 in fp32, and may sample in it."""
    from pixart_nb.core import backend

    if settings is None or settings.dtype != "bf16" or backend.on_ascend():
        return settings.dtype if settings else ""
    from pixart_nb.core.models import bfloat16

    return "bf16 computed in fp32" if isinstance(settings, TrainConfig) or bfloat16.unsupported() else "bf16"
