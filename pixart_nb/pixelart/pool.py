"""Pools of images on disk, drawn by several processes, in shards that depend on their number alone."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from pixart_nb.core.io import atomic_write
from pixart_nb.pixelart.objects import OBJECTS
from pixart_nb.pixelart.scenes import COLOURS, POSITIONS, RELATIONS, SIZES, Scene, Thing, draw_cells
from pixart_nb.pixelart.settings import SETTINGS
from pixart_nb.pixelart.split import training_scene
from pixart_nb.pixelart.synthetic import synthetic_image

#: Side of the images that the VAE is trained on.
PATCH = 128
#: Cells of the drawn scenes among them, their share, and how many patches are cut from one scene.
SOURCES = ((16, 0.15, 1), (32, 0.4, 2), (64, 0.3, 4), (128, 0.15, 8))
CELL_SIDES = (8, 8, 8, 4)
SHARD = 256


def drawn_patches(rng: np.random.Generator) -> list[np.ndarray]:
    """Draw a scene of a random size and cut (PATCH, PATCH, 3) uint8 from it, most with cells of 8 x 8 pixels."""
    cells, _, count = SOURCES[rng.choice(len(SOURCES), p=[share for _, share, _ in SOURCES])]
    side = int(rng.choice(CELL_SIDES)) if cells > 16 else 8
    grid = draw_cells(training_scene(rng), rng, cells, cells).pixels
    window = PATCH // side
    corners = rng.integers(0, cells - window + 1, (count, 2))
    return [grid[y : y + window, x : x + window].repeat(side, 0).repeat(side, 1) for y, x in corners]


def autoencoder_shard(number: int, seed: int) -> dict[str, np.ndarray]:
    """Draw ``SHARD`` patches of scenes and as many synthetic images: ``drawn`` and ``synthetic``, uint8."""
    rng = np.random.default_rng((seed, number, 11))
    drawn: list[np.ndarray] = []
    while len(drawn) < SHARD:
        drawn += drawn_patches(rng)
    return {
        "drawn": np.stack(drawn[:SHARD]),
        "synthetic": np.stack([synthetic_image(PATCH, rng) for _ in range(SHARD)]),
    }


#: Names of what a scene has once; "" has the code -1.
_NAMES = tuple(list(names) for names in (RELATIONS, SETTINGS, SIZES, POSITIONS))


def scene_codes(scene: Scene) -> list[int]:
    """Return a scene as eight integers, -1 for none.

    Object and colour of both things, relation, setting, size and position.
    """
    codes = [code for t in scene.things for code in (list(OBJECTS).index(t.object), COLOURS.index(t.colour))]
    values = (scene.relation, scene.setting, scene.size, scene.position)
    once = [names.index(value) if value else -1 for names, value in zip(_NAMES, values, strict=True)]
    return [*codes, *[-1] * (4 - len(codes)), *once]


def coded_scene(codes: Sequence[int]) -> Scene:
    """Return the scene of ``scene_codes``."""
    objects = list(OBJECTS)
    things = [Thing(objects[codes[k]], COLOURS[codes[k + 1]]) for k in (0, 2) if codes[k] >= 0]
    once = zip(_NAMES, codes[4:], strict=True)
    relation, setting, size, position = (names[code] if code >= 0 else "" for names, code in once)
    return Scene(tuple(things), setting, relation, size, position)


def scene_shard(number: int, cells: int, seed: int) -> dict[str, np.ndarray]:
    """Draw ``SHARD`` training scenes.

    Returns ``cells`` (SHARD, cells, cells, 3) uint8, ``scene`` (SHARD, 8) int16, and ``objects`` (SHARD, cells, cells)
    int8, the number in ``OBJECTS`` of what each cell shows, -1 for the setting.
    """
    rng = np.random.default_rng((seed, number, cells))
    scenes = [training_scene(rng) for _ in range(SHARD)]
    drawings = [draw_cells(scene, rng, cells, cells) for scene in scenes]
    codes = np.array([scene_codes(scene) for scene in scenes], np.int16)
    objects = np.full((SHARD, cells, cells), -1, np.int8)
    for row, code, drawing in zip(objects, codes, drawings, strict=True):
        for mask, name in zip(drawing.masks, code[0:4:2], strict=False):
            row[mask] = name
    return {"cells": np.stack([drawing.pixels for drawing in drawings]), "scene": codes, "objects": objects}


def _write(path: Path, number: int, draw: Callable[[int], dict[str, np.ndarray]]) -> None:
    arrays = draw(number)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _end_with_parent() -> None:
    """End this process when the one that started it has been killed; it would wait for tasks for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_pool(
    folder: Path, count: int, draw: Callable[[int], dict[str, np.ndarray]], processes: int = 2
) -> list[Path]:
    """Write the shards that ``folder`` lacks with ``draw(number)``, by several processes; return all paths."""
    paths = [folder / f"shard-{number:04d}.npz" for number in range(count)]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(processes, initializer=_end_with_parent) as executor:
            tasks = [executor.submit(_write, paths[number], number, draw) for number in missing]
            for task in tqdm(tasks, desc=folder.name, unit="shard"):
                task.result()
    return paths


def autoencoder_pool(folder: Path, count: int, seed: int = 0, processes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return the drawn and the synthetic images of ``count`` shards, each (count * SHARD, PATCH, PATCH, 3) uint8."""
    paths = write_pool(folder, count, partial(autoencoder_shard, seed=seed), processes)
    shards = [np.load(path) for path in paths]
    return tuple(np.concatenate([shard[name] for shard in shards]) for name in ("drawn", "synthetic"))
