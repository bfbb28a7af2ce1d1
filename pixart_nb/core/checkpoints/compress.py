"""Conversion of a checkpoint into one that compresses keys and values: same weights, compression as an average."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pixart_nb.core.checkpoints.configuration import explicit_values, shown_by
from pixart_nb.core.checkpoints.convert import ConversionPlan, plan_conversion, transformer_folder
from pixart_nb.core.checkpoints.files import open_checkpoint
from pixart_nb.core.checkpoints.key_maps import to_official_names
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.models.transformer import PixArtConfig

_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


def plan_compression(
    source: str | Path,
    target: str | Path,
    layers: str | Sequence[int] = "deep",
    ratio: int = 2,
    operator: str = "conv",
    config: PixArtConfig | None = None,
    sample_size: int | None = None,
    dtype: str = "keep",
) -> ConversionPlan:
    """Plan the conversion of a checkpoint into one whose ``layers`` compress by ``ratio`` with ``operator``.

    Convolutions start as the average of each cell, their norm as ones (PixArt-Sigma, section 3.2); nothing else
    changes. ``layers``: numbers, or a text as in ``layer_numbers``. The other arguments are ``plan_conversion``'s.

    Raises ``CheckpointError`` for a source that compresses already, and ``PixArtNBError`` for layers that do not exist
    and for a ratio below 2.
    """
    if ratio < 2:
        raise PixArtNBError(f"compression ratio {ratio} compresses nothing; expected 2 or more")
    source = transformer_folder(Path(source).expanduser())
    shown = shown_by(to_official_names(open_checkpoint(source)).tensors, source)
    if "kv_compress_config" in shown:
        compressed = shown["kv_compress_config"]
        raise CheckpointError(
            f"{source} compresses layers {compressed['kv_compress_layer']} by {compressed['scale_factor']} already; "
            "give a checkpoint without compression"
        )
    numbers = layer_numbers(layers, shown["depth"]) if isinstance(layers, str) else list(map(int, layers))
    compression = {"sampling": operator, "scale_factor": ratio, "kv_compress_layer": numbers}
    values = {"depth": shown["depth"], "kv_compress_config": compression}
    target_config = PixArtConfig(**explicit_values(config) | values)
    return plan_conversion(source, target, target_config, sample_size, dtype)


def layer_numbers(text: str, depth: int) -> list[int]:
    """Parse layers of a model of ``depth`` layers: ``14-27``, ``0,2,5-7``, ``deep``, ``shallow`` or ``all``.

    >>> layer_numbers("0,2,4-5", 6), layer_numbers("deep", 6)
    ([0, 2, 4, 5], [3, 4, 5])
    """
    named = {"all": range(depth), "deep": range(depth // 2, depth), "shallow": range((depth + 1) // 2)}
    if text in named:
        return list(named[text])
    parts = [_RANGE.fullmatch(part.strip()) for part in text.split(",")]
    if None in parts:
        raise PixArtNBError(
            f"layers are {text!r}; expected numbers and ranges, such as 14-27 or 0,2,5-7, or {', '.join(named)}"
        )
    numbers = sorted({n for part in parts for n in range(int(part[1]), int(part[2] or part[1]) + 1)})
    if not numbers or numbers[-1] >= depth:
        raise PixArtNBError(f"layers are {text!r}; this model has layers 0 to {depth - 1}, and a range rises")
    return numbers
