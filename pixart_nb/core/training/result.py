"""What a training leaves: a pipeline in the diffusers layout, whose other parts are those that it was trained with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from mindspore import ops

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints import components
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.models.vae import AutoencoderKL
from pixart_nb.core.sampling.scheduler import Scheduler


def write_pipeline(
    folder: str | Path,
    net: PixArt,
    weights: Mapping[str, np.ndarray],
    others: Mapping[str, Path],
    scheduler: Scheduler,
    vae: AutoencoderKL | None = None,
) -> Path:
    """Write ``net`` with these weights, float32, into a folder that ``from_pretrained`` loads; the folder.

    ``others``: where the other components lie; the folder gets links to them (copies, where links cannot be made).
    ``vae`` is written in place of a link, if its configuration is not that of its folder.
    """
    folder = Path(folder)
    for name, parameter in net.parameters_and_names():
        if name in weights:
            parameter.set_dtype(ms.float32)
            ops.assign(parameter, ms.Tensor(weights[name]))
    components.write_transformer(folder / "transformer", net)
    for name, place in others.items():
        _link(Path(place).resolve(), folder / name)
    if vae is not None:
        components.write_vae(folder / "vae", vae)
    components.write_index(folder, scheduler)
    return folder


def _link(place: Path, link: Path) -> None:
    if link.is_symlink():
        link.unlink()
    elif link.is_dir():
        shutil.rmtree(link)
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.symlink(place, link, target_is_directory=True)
    except OSError:  # some file systems have no links
        shutil.copytree(place, link)
