"""Writes drawn scenes as a folder of PNG files with a ``labels.json`` that names their captions and sizes."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.pixelart.captions import long_caption, short_caption
from pixart_nb.pixelart.sprites import COLOURS, OBJECTS, SETTINGS, Scene, draw

# (height, width) in image pixels, taken in turn: mostly square, with some wide, high and large ones.
SIZES = ((128, 128),) * 3 + ((128, 192),) + ((128, 128),) * 3 + ((192, 128), (256, 256))


def _balanced(names: tuple[str, ...], count: int, rng: np.random.Generator) -> list[str]:
    """``count`` names in chance order, every name as often as any other, give or take one."""
    rounds = -(-count // len(names))
    return [name for _ in range(rounds) for name in rng.permutation(names).tolist()][:count]


def _label(
    folder: Path, number: int, scene: Scene, rng: np.random.Generator, size: tuple[int, int]
) -> dict[str, str | int | float]:
    """Draw and save one scene; its entry of ``labels.json``."""
    height, width = size
    name = f"{number:03d}_{scene.colour}_{scene.object}_{scene.setting}.png"
    Image.fromarray(draw(scene, rng, height, width)).save(folder / name, optimize=True)
    return {
        "path": name,
        "prompt": short_caption(scene),
        "sharegpt4v": long_caption(scene, rng),
        "height": height,
        "width": width,
        "ratio": height / width,
    }


def write_dataset(folder: str | os.PathLike[str], count: int = 36, seed: int = 0) -> Path:
    """Write ``count`` pictures and ``labels.json`` into a folder, made if need be; the path of the latter.

    ``labels.json`` appears under its name only when it and all pictures are complete.
    """
    if count < 1:
        raise PixArtNBError(f"count must be at least 1, got {count}")
    rng = np.random.default_rng(seed)
    names = zip(*(_balanced(part, count, rng) for part in (OBJECTS, COLOURS, SETTINGS)), strict=True)
    return write_scenes(folder, [Scene(*parts) for parts in names], rng, SIZES)


def write_scenes(
    folder: str | os.PathLike[str],
    scenes: Sequence[Scene],
    rng: np.random.Generator,
    sizes: Sequence[tuple[int, int]] = SIZES[:1],
) -> Path:
    """Write a picture of each scene, of ``sizes`` (height, width) in turn, and ``labels.json``; the path of the latter.

    ``labels.json`` appears under its name only when it and all pictures are complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    labels = [
        _label(folder, number, scene, rng, sizes[number % len(sizes)]) for number, scene in enumerate(scenes)
    ]
    path = folder / "labels.json"
    unfinished = folder / f".labels.{os.getpid()}.json"
    unfinished.write_text(json.dumps(labels, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path
