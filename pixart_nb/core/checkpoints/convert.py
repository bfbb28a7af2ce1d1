"""Conversion of PixArt transformers between layouts, tensor by tensor, with an audit; and its verification.

Sources: whatever ``open_checkpoint`` reads. Targets, by their ending: ``.safetensors``, ``.ckpt`` and ``.pth`` with
official names, or a folder in diffusers' transformer layout. Either way the same numbers: a tensor is renamed, split
or stacked, never computed with, unless another dtype is asked for.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.audit import Audit
from pixart_nb.core.checkpoints.configuration import diffusers_config
from pixart_nb.core.checkpoints.files import WRITERS
from pixart_nb.core.checkpoints.load import load_transformer, transformer_of
from pixart_nb.core.checkpoints.plan import Plan
from pixart_nb.core.checkpoints.store import CheckpointError, write_json, written_together
from pixart_nb.core.models.transformer import PixArt

#: Largest relative error of one forward pass with which a conversion counts as verified.
TOLERANCE = 1e-4
#: Tokens that verification computes: the sides of the picture (or the next multiples of the compression), the caption.
_HEIGHT, _WIDTH, _CAPTION = 8, 12, 10


def convert(plan: Plan) -> Audit:
    """Do a conversion; the target, its configuration and its audit appear together, or, on any error, not at all."""
    audit = plan.audit
    if not audit.complete:
        names = [name for e in (*audit.of("missing"), *audit.of("misfit")) for name in (*e.source, *e.target)]
        raise CheckpointError(
            f"{plan.source} is not whole: {len(names)} tensors are missing or of another shape "
            f"({', '.join(names[:4])}). Nothing was written."
        )
    needed = sum(tensor.nbytes for tensor in plan.tensors.values())
    try:
        _check_space(plan.target, needed)
        with written_together(*plan.files) as paths:
            WRITERS.get(plan.target.suffix, WRITERS[".safetensors"])(paths[0], plan.tensors)
            if len(paths) == 3:
                write_json(paths[1], _folder_config(plan))
            write_json(paths[-1], audit.to_dict())
    except OSError as error:
        raise CheckpointError(
            f"{plan.target} could not be written ({error.strerror or error}); it needs {needed / 1e9:.2f} GB. Nothing "
            "half-written was left. Free space or choose another place."
        ) from error
    return audit


def _folder_config(plan: Plan) -> dict:
    """``config.json`` of the target; a number of caption tokens that nobody said is left out."""
    values = diffusers_config(plan.config)
    return {
        key: value for key, value in values.items() if key != "model_max_length" or key in plan.audit.config
    }


def verify(plan: Plan, seed: int = 0) -> float:
    """Relative error of one forward pass: the target as it is read back, against the source in the target's dtype.

    Random latents, timestep and caption, in float32. The weights should be the same bits, so this should be 0.
    """
    first = transformer_of(plan.official, plan.config, plan.source, ms.float32)
    expected = _forward(first, seed)
    del first  # one network at a time
    found = _forward(load_transformer(plan.target, plan.config), seed)
    distance = np.linalg.norm(found - expected)
    return float(distance / np.linalg.norm(expected)) if distance else 0.0


def _forward(net: PixArt, seed: int) -> np.ndarray:
    config, rng = net.config, np.random.default_rng(seed)
    height, width = (
        -(-side // config.kv_ratio) * config.kv_ratio * config.patch_size for side in (_HEIGHT, _WIDTH)
    )
    latents = rng.standard_normal((1, config.in_channels, height, width)).astype(np.float32)
    caption = rng.standard_normal((1, _CAPTION, config.caption_channels)).astype(np.float32)
    timestep = np.array([500.0], np.float32)
    return net(*(ms.Tensor(part) for part in (latents, timestep, caption))).asnumpy().astype(np.float64)


def _check_space(target: Path, needed: int) -> None:
    place = next(folder for folder in (target.parent, *target.parent.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(
            f"{target} needs {needed / 1e9:.2f} GB and {place} has {free / 1e9:.2f} GB free; choose another place"
        )
