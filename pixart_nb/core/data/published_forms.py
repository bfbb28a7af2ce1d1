"""diffusiondb-pixelart in each of its published forms, and any data set of the same columns, as labelled pictures."""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pixart_nb.core.data.errors import DataError
from pixart_nb.core.data.images import ENDINGS

#: Bytes of the largest picture file that is unpacked from an archive or a table.
MOST_BYTES = 256 * 2**20
#: Columns that are read. User names and times never are.
PICTURE, NAME, SCORES = "image", "image_name", ("image_nsfw", "prompt_nsfw")
TEXTS = ("text", "prompt")


@dataclass(frozen=True)
class Row:
    """A row of the data set: where it stands, how its picture file is read, its prompt, and its NSFW scores.

    The scores are (image, prompt), None where they are not known. ``prompt`` is what the source holds, of any type.
    """

    where: str
    content: Callable[[], bytes]
    prompt: object
    scores: tuple[float | None, float | None]


@dataclass(frozen=True)
class Source:
    """What was found: the number of rows, the rows in published order, and whether there are scores to filter by."""

    form: str
    count: int
    rows: Iterator[Row]
    scored: bool


def open_source(source: str | os.PathLike[str]) -> Source:
    """Recognise the form of a downloaded data set.

    It is one of: a parquet file with the pictures inside (columns ``image``, ``text``); a zip part
    ``part-000001.zip`` (pictures, and a JSON file of their prompts); ``metadata.parquet``; a folder with any of them,
    as published, or with unpacked parts. Prompts and NSFW scores of parts are looked up by picture name in the
    ``metadata.parquet`` that lies beside them or in the folder above.

    Raises:
        DataError: nothing of the kind is there, or it cannot be read.
    """
    source = Path(source)
    if not source.exists():
        raise DataError(f"{source} does not exist; expected a parquet file, a zip part or a folder with them")
    tables = _find(source, ".parquet")
    columns = {path: _columns(path) for path in tables}
    with_pictures = [path for path, names in columns.items() if PICTURE in names]
    if with_pictures:
        return _from_tables(with_pictures)
    metadata = [path for path, names in columns.items() if NAME in names]
    if source.is_file() and not metadata and source.suffix.lower() == ".parquet":
        raise DataError(
            f"{source} has the columns {', '.join(columns[source])}; expected {PICTURE} and text, or {NAME}"
        )
    folder = source.parent if metadata and source.is_file() else source
    parts = [_Archive(path) for path in _find(folder, ".zip")] or _folders(folder)
    if not parts:
        raise DataError(f"{source} holds no parquet file with pictures, no zip part and no pictures")
    return _from_parts(parts, metadata or _metadata_above(source))


# ---- tables with the pictures inside


def _from_tables(paths: Sequence[Path]) -> Source:
    columns = [_columns(path) for path in paths]
    texts = [next((name for name in TEXTS if name in names), None) for names in columns]
    if None in texts:
        path, names = paths[texts.index(None)], columns[texts.index(None)]
        raise DataError(
            f"{path} has the columns {', '.join(names)}; expected one of {', '.join(TEXTS)} for the prompt"
        )
    scored = all(set(SCORES) <= set(names) for names in columns)
    rows = chain.from_iterable(map(_table_rows, paths, texts, columns))
    return Source(
        "parquet with pictures", sum(pq.read_metadata(path).num_rows for path in paths), rows, scored
    )


def _table_rows(path: Path, text: str, columns: Sequence[str]) -> Iterator[Row]:
    wanted = [name for name in (PICTURE, text, *SCORES) if name in columns]
    number = 0
    for batch in _batches(path, wanted, 32):
        for values in batch.to_pylist():
            where, picture = f"{path.name} row {number}", values[PICTURE]
            content = picture.get("bytes") if isinstance(picture, Mapping) else picture
            yield Row(where, lambda content=content: _as_bytes(content), values[text], _scores(values))
            number += 1


def _as_bytes(content: object) -> bytes:
    if not isinstance(content, bytes) or not content:
        raise DataError("holds no picture")
    if len(content) > MOST_BYTES:
        raise DataError(f"has a picture of {len(content)} bytes; at most {MOST_BYTES} are read")
    return content


# ---- parts: archives or folders with pictures and a JSON file


@dataclass
class _Folder:
    """An unpacked part: pictures by name, and the JSON file of their prompts."""

    path: Path
    files: dict[str, Path] = field(default_factory=dict)
    described: list[Path] = field(default_factory=list)

    def names(self) -> list[str]:
        return sorted(self.files)

    def read(self, name: str) -> bytes:
        size = self.files[name].stat().st_size
        if size > MOST_BYTES:
            raise DataError(f"has {size} bytes; at most {MOST_BYTES} are read")
        return self.files[name].read_bytes()

    def about(self) -> dict[str, object]:
        texts = [path.read_bytes() for path in self.described]
        return {} if not texts else _prompts(texts[0], self.described[0])


class _Archive:
    """A zip part. Nothing is unpacked to the disk, so the names in it lead nowhere."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{path} is no zip archive, or cut: {error}. Download it again.") from error
        entries = [entry for entry in self.archive.infolist() if not entry.is_dir()]
        self.entries = {PurePosixPath(entry.filename).name: entry for entry in entries}

    def names(self) -> list[str]:
        return sorted(name for name in self.entries if name.lower().endswith(ENDINGS))

    def read(self, name: str) -> bytes:
        entry = self.entries[name]
        if entry.file_size > MOST_BYTES:
            raise DataError(f"unpacks to {entry.file_size} bytes; at most {MOST_BYTES} are read")
        try:
            return self.archive.read(entry)
        except (
            zipfile.BadZipFile,
            zlib.error,
            OSError,
            EOFError,
            RuntimeError,
            NotImplementedError,
        ) as error:
            raise DataError(f"cannot be unpacked: {error}") from error

    def about(self) -> dict[str, object]:
        described = sorted(name for name in self.entries if name.lower().endswith(".json"))
        return _prompts(self.read(described[0]), f"{self.path}: {described[0]}") if described else {}


def _prompts(content: bytes, where: object) -> dict[str, object]:
    """Picture name -> prompt, from a part's JSON ``{"name.png": {"p": prompt, "se": seed, ...}}``."""
    try:
        about = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}. Download it again.") from error
    if not isinstance(about, dict):
        raise DataError(
            f'{where} holds a {type(about).__name__}; expected {{"name.png": {{"p": prompt}}, ...}}'
        )
    return {name: values.get("p") if isinstance(values, dict) else values for name, values in about.items()}


def _from_parts(parts: Sequence[_Archive | _Folder], metadata: Sequence[Path]) -> Source:
    prompts = [part.about() for part in parts]
    names = [list(about) or part.names() for part, about in zip(parts, prompts, strict=True)]
    known = _look_up(metadata, set(chain.from_iterable(names)))
    if not known and not any(prompts):
        raise DataError(
            f"{parts[0].path} has pictures but no JSON of their prompts, and no metadata.parquet with their names lies "
            "beside it; bring one of the two"
        )

    def rows() -> Iterator[Row]:
        for part, about, members in zip(parts, prompts, names, strict=True):
            for name in members:
                found = known.get(name, {})
                prompt = about.get(name, found.get("prompt"))
                yield Row(f"{part.path.name}: {name}", _reading(part, name), prompt, _scores(found))

    form = "zip parts" if isinstance(parts[0], _Archive) else "unpacked parts"
    return Source(form, sum(map(len, names)), rows(), bool(metadata))


def _reading(part: _Archive | _Folder, name: str) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            return part.read(name)
        except KeyError:
            raise DataError("is named in the JSON, but not there") from None
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}") from None

    return read


def _look_up(metadata: Sequence[Path], names: set[str]) -> dict[str, dict[str, object]]:
    """Prompt and scores of the named pictures, from tables of millions of rows, read a piece at a time."""
    wanted, found = pa.array(sorted(names), pa.string()), {}
    for path in metadata:
        columns = [name for name in (NAME, *TEXTS, *SCORES) if name in _columns(path)]
        for batch in _batches(path, columns, 65_536):
            chosen = batch.filter(pc.is_in(batch[NAME].cast(pa.string()), wanted))
            found |= {
                row[NAME]: {**row, "prompt": row.get("prompt", row.get("text"))} for row in chosen.to_pylist()
            }
    return found


def _scores(values: Mapping[str, object]) -> tuple[float | None, float | None]:
    image, prompt = (values.get(name) for name in SCORES)
    return _number(image), _number(prompt)


def _number(value: object) -> float | None:
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None


# ---- files


def _find(source: Path, ending: str) -> list[Path]:
    """The file itself, or the files in a folder and below it, that have this ending; in order of their paths."""
    if source.is_file():
        return [source] if source.suffix.lower() == ending else []
    return sorted(path for path in source.rglob(f"*{ending}") if path.is_file())


def _folders(folder: Path) -> list[_Folder]:
    """Folders with pictures, as unpacked parts; in order of their paths."""
    found: dict[Path, _Folder] = {}
    if folder.is_dir():
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in ENDINGS and path.is_file():
                found.setdefault(path.parent, _Folder(path.parent)).files[path.name] = path
    for part in found.values():
        part.described = sorted(part.path.glob("*.json"))
    return [found[path] for path in sorted(found)]


def _metadata_above(source: Path) -> list[Path]:
    places = [folder / "metadata.parquet" for folder in (source.parent, source.parent.parent)]
    return [path for path in places if path.is_file() and NAME in _columns(path)][:1]


def _columns(path: Path) -> list[str]:
    try:
        return pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as parquet: {error}. Download it again.") from error


def _batches(path: Path, columns: list[str], size: int) -> Iterator[pa.RecordBatch]:
    try:
        yield from pq.ParquetFile(path).iter_batches(batch_size=size, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is cut or damaged: {error}. Download it again.") from error
