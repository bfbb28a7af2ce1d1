"""Small data sets in the published forms of diffusiondb-pixelart: the same columns, archives and names of files.

    python -m pixart_nb.pixelart.published_sample FOLDER [COUNT [SIDE]]

writes all forms below FOLDER, with COUNT (120) scenes that this project draws in place of the pictures, SIDE (128)
pixels high. Two thirds of them show an object that the embedded model was never trained on. The last quarter, to be
kept aside for testing, is drawn once; the others four times, never alike.
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pixart_nb.pixelart.captions import short_caption
from pixart_nb.pixelart.sprites import COLOURS, SETTINGS, UNSEEN_OBJECTS, Scene, draw, split_scenes

TABLE, METADATA = "2k_all/train/0000.parquet", "metadata.parquet"
#: What a part's JSON calls the columns of the table.
ABOUT = {"p": "text", "se": "seed", "c": "cfg", "st": "step", "sa": "sampler"}
_KINDS = {
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

Row = dict[str, str | int | float | bytes]


def sample_rows(
    count: int, seed: int = 0, side: int = 64, scenes: Sequence[Scene] | None = None
) -> list[Row]:
    """Rows of the table, each with its picture as PNG bytes under ``png`` and that file's ``name``.

    Pictures are ``side`` pixels high and as wide, every third half as wide again. ``scenes``: what they show, in
    turn; without it, chosen by ``seed`` from all that training may show.
    """
    rng = np.random.default_rng(seed)
    shown = split_scenes()[0]
    scenes = scenes or [shown[i] for i in rng.permutation(len(shown))]
    return [_row(number, scenes[number % len(scenes)], rng, side) for number in range(count)]


def finetuning_scenes(count: int, seed: int = 0, objects: Sequence[str] = UNSEEN_OBJECTS[:1]) -> list[Scene]:
    """``count`` scenes in chance order, each once: two thirds show new ``objects``, as far as there are as many.

    So the last of them ask for combinations that the others do not show. Known things keep a model from forgetting.
    """
    rng = np.random.default_rng(seed)
    new = [Scene(*parts) for parts in product(objects, COLOURS, SETTINGS)]
    chosen = [new[k] for k in rng.permutation(len(new))[: 2 * count // 3]]
    old = split_scenes()[0]
    chosen += [old[k] for k in rng.permutation(len(old))[: count - len(chosen)]]
    return [chosen[k] for k in rng.permutation(len(chosen))]


def drawn_anew(scenes: Sequence[Scene], test_count: int, drawings: int) -> list[Scene]:
    """What the rows of a table show: every scene but the last ``test_count`` ``drawings`` times, then those once."""
    first = max(0, len(scenes) - test_count)
    return [*scenes[:first]] * drawings + [*scenes[first:]]


def _row(number: int, scene: Scene, rng: np.random.Generator, side: int) -> Row:
    width = 3 * side // 2 if number % 3 == 1 else side
    file = io.BytesIO()
    Image.fromarray(draw(scene, rng, side, width)).save(file, "PNG")
    values = (int(rng.integers(2**32)), 50, 7.0, "k_lms", width, side, f"user-{number % 3}")
    scores = (1000 * (_FIRST_SECOND + number), float(0.3 * rng.random()), float(0.1 * rng.random()))
    named = {"name": f"{rng.bytes(4).hex()}-4{number:07d}.png", "text": short_caption(scene)}
    return {"png": file.getvalue(), **named} | dict(zip(_KINDS, values + scores, strict=True))


def write_table(path: Path, rows: Sequence[Row], drop: Sequence[str] = ()) -> Path:
    """The table with the pictures inside, without the columns ``drop``."""
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pictures = pa.array([{"bytes": row["png"], "path": row["name"]} for row in rows], kind)
    texts = pa.array([row["text"] for row in rows], pa.string())
    return _write(path, {"image": pictures, "text": texts} | _columns(rows), drop, max(len(rows) // 3, 1))


def write_metadata(path: Path, rows: Sequence[Row], part: int = 1, others: int = 100) -> Path:
    """``metadata.parquet``: the rows, among ``others`` of pictures that are elsewhere."""
    elsewhere = [
        {**rows[0], "name": f"elsewhere-{number}.png", "part": 3 + number} for number in range(others)
    ]
    here = [{**row, "part": part} for row in rows]
    every = elsewhere[: others // 2] + here + elsewhere[others // 2 :]
    named = {"image_name": [row["name"] for row in every], "prompt": [row["text"] for row in every]}
    parts = pa.array([row["part"] for row in every], pa.uint16())
    return _write(path, named | {"part_id": parts} | _columns(every), (), 40)


def write_part(path: Path, rows: Sequence[Row]) -> Path:
    """A zip part: the pictures, and a JSON file of the same name that describes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for row in rows:
            archive.writestr(row["name"], row["png"])
        archive.writestr(f"{path.stem}.json", json.dumps(about(rows)))
    return path


def about(rows: Sequence[Row]) -> dict[str, dict[str, str | int | float | bytes]]:
    """What a part's JSON says: picture name -> prompt, seed, steps, guidance and sampler."""
    return {row["name"]: {short: row[column] for short, column in ABOUT.items()} for row in rows}


def write_published(
    folder: Path, count: int = 20, seed: int = 0, side: int = 64, scenes: Sequence[Scene] | None = None
) -> list[Row]:
    """The whole published layout: the table, two zip parts and the metadata. Returns the rows in order."""
    rows, half = sample_rows(count, seed, side, scenes), count // 2
    write_table(folder / TABLE, rows)
    write_part(folder / "images/part-000001.zip", rows[:half])
    write_part(folder / "images/part-000002.zip", rows[half:])
    write_metadata(folder / METADATA, rows)
    return rows


def _columns(rows: Sequence[Row]) -> dict[str, pa.Array]:
    return {name: pa.array([row[name] for row in rows], kind) for name, kind in _KINDS.items()}


def _write(path: Path, columns: dict, drop: Sequence[str], group: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).drop_columns(list(drop)), path, row_group_size=group)
    return path


if __name__ == "__main__":
    place, pictures, pixels = (*sys.argv[1:], *("120", "128")[len(sys.argv) - 2 :])
    scenes = drawn_anew(finetuning_scenes(int(pictures)), int(pictures) // 4, 4)
    write_published(Path(place), len(scenes), side=int(pixels), scenes=scenes)
