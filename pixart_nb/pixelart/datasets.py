"""Data sets of drawn scenes: a labelled folder of images, and the published forms of diffusiondb-pixelart."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import atomic_write, folder_lock, write_text
from pixart_nb.pixelart.captions import as_captioned, long_caption, short_caption, silent_caption
from pixart_nb.pixelart.objects import OBJECTS, UNSEEN_OBJECTS
from pixart_nb.pixelart.scenes import COLOURS, POSITIONS, Scene, draw, one
from pixart_nb.pixelart.scenes import SIZES as THING_SIZES
from pixart_nb.pixelart.settings import SETTINGS
from pixart_nb.pixelart.split import training_scene

#: (height, width) in pixels, taken in turn: mostly square, with some wide, high and large images.
SIZES = ((256, 256),) * 3 + ((256, 384),) + ((256, 256),) * 3 + ((384, 256), (512, 512))
#: Files of the published layout.
TABLE, METADATA = "2k_all/train/0000.parquet", "metadata.parquet"
#: Key in the JSON of a zip part -> column of the table.
JSON_COLUMNS = {"p": "text", "se": "seed", "c": "cfg", "st": "step", "sa": "sampler"}
_COLUMN_TYPES = {
    "seed": pa.int64(),
    "step": pa.int64(),
    "cfg": pa.float32(),
    "sampler": pa.string(),
    "width": pa.int64(),
    "height": pa.int64(),
    "user_name": pa.string(),
    "timestamp": pa.timestamp("ms", tz="UTC"),
    "image_nsfw": pa.float32(),
    "prompt_nsfw": pa.float32(),
}
_FIRST_SECOND = 1_660_000_000

PublishedRow = dict[str, str | int | float | bytes]


# ---- a folder of PNG files with labels.json


def write_dataset(folder: str | os.PathLike[str], count: int = 36, seed: int = 0) -> Path:
    """Write ``count`` images of balanced scenes and their ``labels.json``; return the path of the latter.

    In wide images the thing is in the middle, so that a training on squares keeps it.
    """
    if count < 1:
        raise PixArtNBError(f"count must be at least 1, got {count}")
    rng = np.random.default_rng(seed)
    names = zip(*(_balanced(part, count, rng) for part in map(tuple, (OBJECTS, COLOURS, SETTINGS))), strict=True)
    where = zip(*(_balanced(tuple(part), count, rng) for part in (THING_SIZES, POSITIONS)), strict=True)
    scenes = [one(*parts, *chosen) for parts, chosen in zip(names, where, strict=True)]
    wide = [width > height for height, width in SIZES]
    scenes = [replace(s, position="middle") if wide[k % len(SIZES)] else s for k, s in enumerate(scenes)]
    return write_scenes(folder, scenes, rng, SIZES)


def write_scenes(
    folder: str | os.PathLike[str],
    scenes: Sequence[Scene],
    rng: np.random.Generator,
    sizes: Sequence[tuple[int, int]] = SIZES[:1],
    labels_name: str = "labels.json",
    prompt_of: Callable[[Scene], str] = short_caption,
) -> Path:
    """Write an image of each scene, of ``sizes`` (height, width) in turn, and a label file; return the latter's path.

    The label file is replaced only when all images are complete. Another ``labels_name`` adds other scenes to a folder,
    for validation.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    labels = [
        _write_image(folder, number, scene, prompt_of(scene), rng, sizes[number % len(sizes)])
        for number, scene in enumerate(scenes)
    ]
    write_text(folder / labels_name, json.dumps(labels, indent=1) + "\n")
    return folder / labels_name


def _write_image(
    folder: Path, number: int, scene: Scene, prompt: str, rng: np.random.Generator, size: tuple[int, int]
) -> dict[str, str | int | float]:
    """Draw and save one scene; return its entry of ``labels.json``."""
    height, width = size
    words = [word for thing in scene.things for word in (thing.colour, thing.object)]
    name = f"{'_'.join([f'{number:03d}', *words, scene.setting])}.png"
    Image.fromarray(draw(scene, rng, height, width)).save(folder / name, optimize=True)
    return {
        "path": name,
        "prompt": prompt,
        "sharegpt4v": long_caption(scene, rng),
        "height": height,
        "width": width,
        "ratio": height / width,
    }


def write_training_scenes(
    folder: str | os.PathLike[str],
    count: int,
    side: int,
    pair_share: float = 0.5,
    seed: int = 0,
    silent_prompts: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write training scenes of ``side`` x ``side`` pixels with a label file, and return its path.

    The captions leave out a usual size or position as often as in the training of the bundled model.
    ``silent_prompts`` leave out all sizes and positions; the long captions do not.
    """
    rng = np.random.default_rng(seed)
    shown = [as_captioned(training_scene(rng, pair_share), rng) for _ in range(count)]
    with folder_lock(folder) as folder:
        if (folder / "labels.json").exists() and not overwrite:
            raise PixArtNBError(f"{folder / 'labels.json'} exists; choose another folder, or give --overwrite")
        bar = tqdm(shown, desc="draw", unit="image")
        prompt_of = silent_caption if silent_prompts else short_caption
        return write_scenes(folder, bar, rng, [(side, side)], prompt_of=prompt_of)


def _balanced(names: tuple[str, ...], count: int, rng: np.random.Generator) -> list[str]:
    """Return ``count`` names in random order, each as often as any other, plus or minus one."""
    rounds = -(-count // len(names))
    return [name for _ in range(rounds) for name in rng.permutation(names).tolist()][:count]


# ---- the published forms of diffusiondb-pixelart


def write_sample(folder: str | os.PathLike[str], count: int = 120, side: int = 256, overwrite: bool = False) -> int:
    """Write a sample in all published forms: ``count`` scenes, ``side`` pixels high; return the number of images.

    Two thirds of the scenes show an object that the bundled model was never trained on. The last quarter, meant for
    testing, is drawn once; each of the others four times, with different random details.
    """
    if count < 4 or side < 128:
        raise PixArtNBError(f"count is {count} and side is {side}; expected at least 4 scenes of 128 pixels")
    scenes = repeat_scenes(finetuning_scenes(count), count // 4, 4)
    with folder_lock(folder) as folder:
        existing = next((path for path in (folder / TABLE, folder / METADATA) if path.exists()), None)
        if existing and not overwrite:
            raise PixArtNBError(f"{existing} exists; choose another folder, or replace the data set with --overwrite")
        return len(write_published(folder, len(scenes), side=side, scenes=scenes))


def finetuning_scenes(count: int, seed: int = 0, objects: Sequence[str] = tuple(UNSEEN_OBJECTS)[:1]) -> list[Scene]:
    """Return ``count`` different scenes in random order; two thirds show new ``objects``, as far as they suffice.

    The last scenes ask for combinations that the others do not show. The known objects keep a model from forgetting.
    """
    rng = np.random.default_rng(seed)
    new = [one(*parts) for parts in product(objects, COLOURS, SETTINGS)]
    chosen = [new[k] for k in rng.permutation(len(new))[: 2 * count // 3]]
    chosen += _old_scenes(count - len(chosen), rng)
    return [chosen[k] for k in rng.permutation(len(chosen))]


def _old_scenes(count: int, rng: np.random.Generator) -> list[Scene]:
    """Return ``count`` different scenes of one thing that the bundled model was trained with, without their sizes."""
    chosen: dict[Scene, None] = {}
    while len(chosen) < count:
        scene = training_scene(rng, 0)
        chosen[replace(scene, size="", position="")] = None
    return list(chosen)


def repeat_scenes(scenes: Sequence[Scene], test_count: int, repeats: int) -> list[Scene]:
    """Return all scenes but the last ``test_count``, ``repeats`` times, followed by the last ones once."""
    first = max(0, len(scenes) - test_count)
    return [*scenes[:first]] * repeats + [*scenes[first:]]


def sample_rows(
    count: int, seed: int = 0, side: int = 128, scenes: Sequence[Scene] | None = None
) -> list[PublishedRow]:
    """Rows of the table, each with its image as PNG bytes under ``png`` and that file's ``name``.

    Images are ``side`` pixels high and wide; every third is half as wide again. They show ``scenes`` in turn, by
    default training scenes chosen by ``seed``.
    """
    rng = np.random.default_rng(seed)
    scenes = scenes or _old_scenes(count, rng)
    return [_row(number, scenes[number % len(scenes)], rng, side) for number in range(count)]


def _row(number: int, scene: Scene, rng: np.random.Generator, side: int) -> PublishedRow:
    width = 3 * side // 2 if number % 3 == 1 else side
    file = io.BytesIO()
    Image.fromarray(draw(scene, rng, side, width)).save(file, "PNG")
    values = (int(rng.integers(2**32)), 50, 7.0, "k_lms", width, side, f"user-{number % 3}")
    scores = (1000 * (_FIRST_SECOND + number), float(0.3 * rng.random()), float(0.1 * rng.random()))
    named = {"name": f"{rng.bytes(4).hex()}-4{number:07d}.png", "text": short_caption(scene)}
    return {"png": file.getvalue(), **named} | dict(zip(_COLUMN_TYPES, values + scores, strict=True))


def write_published(
    folder: Path, count: int = 20, seed: int = 0, side: int = 128, scenes: Sequence[Scene] | None = None
) -> list[PublishedRow]:
    """Write the whole published layout: the table, two zip parts and the metadata. Return the rows in order."""
    rows, half = sample_rows(count, seed, side, scenes), count // 2
    write_table(folder / TABLE, rows)
    write_part(folder / "images/part-000001.zip", rows[:half])
    write_part(folder / "images/part-000002.zip", rows[half:])
    write_metadata(folder / METADATA, rows)
    return rows


def write_table(path: Path, rows: Sequence[PublishedRow], drop: Sequence[str] = ()) -> Path:
    """Write the table that holds the images, without the columns ``drop``."""
    image_type = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    images = pa.array([{"bytes": row["png"], "path": row["name"]} for row in rows], image_type)
    texts = pa.array([row["text"] for row in rows], pa.string())
    return _write(path, {"image": images, "text": texts} | _columns(rows), drop, max(len(rows) // 3, 1))


def write_metadata(path: Path, rows: Sequence[PublishedRow], part: int = 1, others: int = 100) -> Path:
    """Write ``metadata.parquet``: the rows, among ``others`` of images that are in other parts."""
    fillers = [{**rows[0], "name": f"elsewhere-{n}.png", "part": 3 + n} for n in range(others)]
    own = [{**row, "part": part} for row in rows]
    every = fillers[: others // 2] + own + fillers[others // 2 :]
    named = {"image_name": [row["name"] for row in every], "prompt": [row["text"] for row in every]}
    parts = pa.array([row["part"] for row in every], pa.uint16())
    return _write(path, named | {"part_id": parts} | _columns(every), (), 40)


def write_part(path: Path, rows: Sequence[PublishedRow]) -> Path:
    """Write a zip part: the images, and a JSON file of the same name that describes them."""
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for row in rows:
            archive.writestr(row["name"], row["png"])
        archive.writestr(f"{path.stem}.json", json.dumps(part_json(rows)))
    return path


def part_json(rows: Sequence[PublishedRow]) -> dict[str, dict[str, str | int | float | bytes]]:
    """Content of a part's JSON: image name -> prompt, seed, steps, guidance and sampler."""
    return {row["name"]: {key: row[column] for key, column in JSON_COLUMNS.items()} for row in rows}


def _columns(rows: Sequence[PublishedRow]) -> dict[str, pa.Array]:
    return {name: pa.array([row[name] for row in rows], type_) for name, type_ in _COLUMN_TYPES.items()}


def _write(path: Path, columns: dict, drop: Sequence[str], group: int) -> Path:
    with atomic_write(path) as temporary:
        pq.write_table(pa.table(columns).drop_columns(list(drop)), temporary, row_group_size=group)
    return path
