"""Downloaded data sets: diffusiondb-pixelart in each of its published forms, and any other with the same columns."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pixart_nb.core.data.files import PROMPTS, DataError, is_hidden, list_files, parse_json
from pixart_nb.core.data.images import ENDINGS, MAX_BYTES

#: Bytes of the largest JSON file that is read.
MAX_JSON_BYTES = 64 * 2**20
#: A column chunk of a table that unpacks to more than so many bytes and so many times its size is refused.
_BOMB_BYTES, _BOMB_RATIO = 64 * 2**20, 200
#: Archives that are open at once: a data set has thousands of parts.
OPEN_ARCHIVES = 4
#: Columns that are read. User names and times never are.
IMAGE, NAME, SCORES = "image", "image_name", ("image_nsfw", "prompt_nsfw")

Reader = Callable[[], bytes]


@dataclass(frozen=True)
class SourceRow:
    """A row of a data set: its place for error messages, a function that reads its image file, its prompt and scores.

    ``prompt`` may be of any type. ``scores`` are the NSFW scores of (image, prompt), None if unknown.
    """

    where: str
    content: Reader
    prompt: object
    scores: tuple[float | None, float | None]


@dataclass(frozen=True)
class DataSource:
    """A data set: its form, number of rows, the rows in published order, and whether there are scores to filter by."""

    form: str
    count: int
    rows: Iterator[SourceRow]
    scored: bool


def open_source(source: str | os.PathLike[str]) -> DataSource:
    """Recognise the form of a downloaded data set.

    It is one of: a parquet file that holds the images (columns ``image`` and ``text``); a zip part
    ``part-000001.zip`` (images, and a JSON file of their prompts); ``metadata.parquet``; a folder with any of them,
    as published, or with unpacked parts. Prompts and NSFW scores of parts are looked up by image name in the
    ``metadata.parquet`` beside them or in the folder above.

    Raises:
        DataError: the source is none of these, or cannot be read.
    """
    source = Path(source)
    if not source.exists():
        raise DataError(f"{source} does not exist; expected a parquet file, a zip part or a folder with them")
    columns = {path: _columns(path) for path in _list(source, ".parquet")}
    with_images = [path for path, names in columns.items() if IMAGE in names]
    if with_images:
        return _from_tables(with_images)
    metadata = [path for path, names in columns.items() if NAME in names]
    if source.is_file() and not metadata and source.suffix.lower() == ".parquet":
        raise DataError(f"{source} has the columns {', '.join(columns[source])}; expected {IMAGE} and text, or {NAME}")
    folder = source.parent if metadata and source.is_file() else source
    opened = lru_cache(maxsize=OPEN_ARCHIVES)(zipfile.ZipFile)
    parts = [_read_part(path.stem, _zip_files(path, opened)) for path in _list(folder, ".zip")]
    if not parts and folder.is_dir():
        parts = [_read_part(folder.name, _folder_files(folder))]
    parts = [part for part in parts if any(path.lower().endswith(ENDINGS) for path in part.files)]
    if not parts:
        raise DataError(f"{source} holds no parquet file with images, no zip part and no images")
    return _from_parts(source, parts, metadata or _metadata_above(source))


# ---- tables that hold the images


def _from_tables(paths: Sequence[Path]) -> DataSource:
    columns = [_columns(path) for path in paths]
    for path, names in zip(paths, columns, strict=True):
        if not set(PROMPTS) & set(names):
            raise DataError(
                f"{path} has the columns {', '.join(names)}; expected one of {', '.join(PROMPTS)} for the prompt"
            )
    rows = chain.from_iterable(map(_table_rows, paths, columns))
    count = sum(pq.read_metadata(path).num_rows for path in paths)
    return DataSource("parquet with images", count, rows, all(set(SCORES) <= set(names) for names in columns))


def _table_rows(path: Path, columns: Sequence[str]) -> Iterator[SourceRow]:
    text = next(name for name in ("text", *PROMPTS) if name in columns)
    used, number = [name for name in (IMAGE, text, *SCORES) if name in columns], 0
    with _arrow_errors(path):
        for values in chain.from_iterable(batch.to_pylist() for batch in _batches(path, used, 8)):
            image = values[IMAGE]
            content = image.get("bytes") if isinstance(image, Mapping) else image
            yield SourceRow(f"{path.name} row {number}", partial(_as_bytes, content), values[text], _scores(values))
            number += 1


def _as_bytes(content: object) -> bytes:
    if not isinstance(content, bytes) or not content:
        raise DataError("holds no image; expected the bytes of an image file")
    if len(content) > MAX_BYTES:
        raise DataError(f"has an image of {len(content)} bytes; expected at most {MAX_BYTES}")
    return content


# ---- parts: archives or folders with images and JSON files


@dataclass(frozen=True)
class _Part:
    """Archive or folder: its files, and the images that each row may mean with its prompt, None if unknown."""

    name: str
    files: dict[str, Reader]
    rows: dict[str, tuple[list[str], object]]
    described: bool
    problems: list[str]


def _read_part(name: str, files: dict[str, Reader]) -> _Part:
    """Read the JSON files of a part, ``{"name.png": {"p": prompt, ...}}``; a JSON of anything else is left alone."""
    images = sorted((p for p in files if p.lower().endswith(ENDINGS)), key=PurePosixPath)
    by_name: dict[str, list[str]] = {}
    for path in images:
        by_name.setdefault(PurePosixPath(path).name, []).append(path)
    rows, problems = {}, []
    for path in sorted(p for p in files if p.lower().endswith(".json")):
        folder = PurePosixPath(path).parent
        try:
            content = parse_json(files[path]())
        except (ValueError, RecursionError, OSError) as error:
            problems.append(f"{path} is not JSON: {error or 'nested too deeply'}. Download it again.")
            continue
        if not isinstance(content, dict):
            problems.append(f'{path} holds a {type(content).__name__}; expected {{"name.png": {{"p": prompt}}}}')
            continue
        exact = {n: [p for p in (f"{folder / n}", n) if p in files and p.lower().endswith(ENDINGS)] for n in content}
        meant = {n: paths[:1] or by_name.get(PurePosixPath(n).name, []) for n, paths in exact.items()}
        if not any(meant.values()) and not any(n.lower().endswith(ENDINGS) for n in content):
            problems.append(f"{path} names no images")
            continue
        for n, values in content.items():
            rows.setdefault(f"{folder / n}", (meant[n], values.get("p") if isinstance(values, dict) else values))
    described, named = bool(rows), {path for paths, _ in rows.values() for path in paths}
    rows |= {path: ([path], None) for path in images if path not in named}
    return _Part(name, files, rows, described, problems)


def _from_parts(source: Path, parts: Sequence[_Part], metadata: Sequence[Path]) -> DataSource:
    names = {PurePosixPath(where).name for part in parts for where in part.rows}
    metadata_rows = _look_up(metadata, names)
    if not metadata_rows and not any(part.described for part in parts):
        problems = [f"{part.name}: {problem}" for part in parts for problem in part.problems]
        raise DataError(
            f"{source} has images but no JSON of their prompts, and no metadata.parquet with their names is beside "
            f"it; add one of the two{'. ' * bool(problems)}{'; '.join(problems[:3])}"
        )

    def rows() -> Iterator[SourceRow]:
        for part in parts:
            for where, (images, prompt) in part.rows.items():
                values = metadata_rows.get(PurePosixPath(where).name, {})
                prompt = values.get("prompt") if prompt is None else prompt
                yield SourceRow(f"{part.name}: {where}", partial(_content, part, images), prompt, _scores(values))

    return DataSource("parts", sum(len(part.rows) for part in parts), rows(), bool(metadata))


def _content(part: _Part, images: list[str]) -> bytes:
    """Return the image file of a row."""
    if not images:
        raise DataError("is named in the JSON, but does not exist")
    if len(images) > 1:
        raise DataError(f"may mean {' or '.join(images)}; expected its path in the JSON")
    return part.files[images[0]]()


def _zip_files(path: Path, opened: Callable[[Path], zipfile.ZipFile]) -> dict[str, Reader]:
    """Return the files of a zip archive by their path in it. Nothing is unpacked to the disk."""
    try:
        archive = opened(path)
    except Exception as error:  # on damaged files zipfile raises nearly anything
        if getattr(error, "filename", None):  # the system's, which did not open it
            raise DataError(f"{path} cannot be read ({error.strerror})") from error
        raise DataError(f"{path} is no zip archive, or cut off: {error}. Download it again.") from error

    def read(entry: zipfile.ZipInfo) -> bytes:
        _check_size(entry.filename, entry.file_size)
        try:
            return opened(path).read(entry)
        except Exception as error:  # zlib, lzma and zipfile have errors of their own
            raise DataError(f"cannot be unpacked: {error}") from error

    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    visible = [entry for entry in entries if not any(map(is_hidden, PurePosixPath(entry.filename).parts))]
    return {entry.filename: partial(read, entry) for entry in visible}


def _folder_files(folder: Path) -> dict[str, Reader]:
    def read(path: Path) -> bytes:
        try:
            _check_size(path.name, path.stat().st_size)
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}") from None

    files = list_files(folder, (*ENDINGS, ".json"))
    return {path.relative_to(folder).as_posix(): partial(read, path) for path in files}


def _check_size(name: str, size: int) -> None:
    limit = MAX_JSON_BYTES if name.lower().endswith(".json") else MAX_BYTES
    if size > limit:
        raise DataError(f"unpacks to {size} bytes; expected at most {limit}")


def _look_up(metadata: Sequence[Path], names: set[str]) -> dict[str, dict[str, object]]:
    """Return prompt and scores of the named images, from tables of millions of rows that are read in batches."""
    name_array, rows = pa.array(sorted(names), pa.string()), {}
    for path in metadata:
        columns = [name for name in (NAME, *PROMPTS, *SCORES) if name in _columns(path)]
        with _arrow_errors(path):
            for batch in _batches(path, columns, 65_536):
                chosen = batch.filter(pc.is_in(batch[NAME].cast(pa.string()), name_array)).to_pylist()
                rows |= {r[NAME]: r | {"prompt": next((r[k] for k in PROMPTS if k in r), None)} for r in chosen}
    return rows


def _scores(values: Mapping[str, object]) -> tuple[float | None, float | None]:
    image, prompt = (values.get(name) for name in SCORES)
    return _number(image), _number(prompt)


def _number(value: object) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


# ---- files


def _list(source: Path, ending: str) -> list[Path]:
    """Return the file itself, or the files in a folder and below it, that have this ending."""
    if source.is_file():
        return [source] if source.suffix.lower() == ending else []
    return list_files(source, (ending,))


def _metadata_above(source: Path) -> list[Path]:
    paths = [folder / "metadata.parquet" for folder in (source.parent, source.parent.parent)]
    return [path for path in paths if path.is_file() and NAME in _columns(path)][:1]


def _columns(path: Path) -> list[str]:
    with _arrow_errors(path):
        return pq.read_schema(path).names


def _batches(path: Path, columns: list[str], size: int) -> Iterator[pa.RecordBatch]:
    file = pq.ParquetFile(path)
    _refuse_bombs(path, file.metadata)
    yield from file.iter_batches(batch_size=size, columns=columns)


@contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).rstrip(".")
        raise DataError(f"{path} cannot be read as parquet: {reason}. Download it again.") from error


def _refuse_bombs(path: Path, metadata: pq.FileMetaData) -> None:
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            size = chunk.total_uncompressed_size
            if size > max(_BOMB_BYTES, _BOMB_RATIO * chunk.total_compressed_size):
                raise DataError(
                    f"{path}: {chunk.path_in_schema} unpacks from {chunk.total_compressed_size} to {size} bytes; "
                    "expected a table of image files, which are compressed already"
                )
