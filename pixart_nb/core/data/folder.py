"""A folder of pictures with captions (a text file beside each, or a table) as ``labels.json``."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path

from pixart_nb.core.data.errors import DataError, shortened
from pixart_nb.core.data.images import ENDINGS
from pixart_nb.core.data.labels import LabelError, check_entries
from pixart_nb.core.data.writing import Report
from pixart_nb.core.io import atomic_write, remove_temporaries

#: Columns of a table of captions; the first that is there is taken.
PATHS = ("path", "file_name", "filename", "file", "image", "image_path")
PROMPTS = ("prompt", "text", "caption")
DESCRIPTIONS = ("sharegpt4v", "long_caption", "description")
#: Tables that are looked for in the folder itself.
TABLES = ("metadata.jsonl", "metadata.csv")
CAPTION_ENDINGS = (".txt", ".caption")

#: Where a caption stands, and the entry of the label file that it makes.
Placed = tuple[str, dict[str, object]]


def import_folder(
    source: str | os.PathLike[str],
    captions: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    skip: bool = False,
    overwrite: bool = False,
) -> Report:
    """Write the label file of a folder of pictures; ``image_dir`` is the folder itself.

    Captions come from ``captions``, a CSV or JSONL table with a column of paths relative to the folder (``PATHS``), of
    prompts (``PROMPTS``) and, if there is one, of descriptions (``DESCRIPTIONS``); else from ``metadata.jsonl`` or
    ``metadata.csv`` in the folder; else from text files, ``cat.txt`` beside ``cat.png``, in all folders below, too.
    Every picture is decoded whole. ``output``: the label file, ``labels.json`` in the folder unless told.

    Raises:
        LabelError: lists all that is wrong at once; nothing is written. With ``skip`` it is left out and reported.
        DataError: the folder has no pictures, the table no such columns, or another label file is there and
            ``overwrite`` is off.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; expected one with pictures and their captions")
    table = (
        Path(captions) if captions else next((p for p in map(folder.joinpath, TABLES) if p.is_file()), None)
    )
    placed = list(_from_table(table) if table else _from_texts(folder))
    if not placed:
        raise DataError(f"{table or folder}: no pictures; expected files that end in {', '.join(ENDINGS)}")
    places, entries = zip(*placed, strict=True)
    labels, problems, _ = check_entries(entries, folder, True, "reading pictures", places)
    if (problems and not skip) or not labels:
        raise LabelError(table or folder, problems)
    target = Path(output) if output else folder / "labels.json"
    _write(target, json.dumps([label.as_json() for label in labels], indent=1) + "\n", overwrite)
    report = Report([target], len(labels), problems=problems)
    if unnamed := len(_pictures(folder)) - len(labels) - len(problems) if table else 0:
        report.notes += [f"{unnamed} pictures of {folder} are not in {table}"] * (unnamed > 0)
    return report


def _pictures(folder: Path) -> list[Path]:
    """Pictures in a folder and below it, hidden ones left out, in order of their paths."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    return sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def _from_texts(folder: Path) -> Iterator[Placed]:
    for picture in _pictures(folder):
        path = picture.relative_to(folder).as_posix()
        entry: dict[str, object] = {"path": path}
        text = next((t for ending in CAPTION_ENDINGS if (t := picture.with_suffix(ending)).is_file()), None)
        if text is None:
            yield f"{path} has no {picture.with_suffix('.txt').name} beside it", entry
            continue
        try:
            entry["prompt"] = " ".join(text.read_text(encoding="utf-8-sig").split())
        except (OSError, UnicodeDecodeError) as error:
            entry["prompt"] = error  # no text, and its message says why
        yield text.relative_to(folder).as_posix(), entry


def _from_table(path: Path) -> Iterator[Placed]:
    rows = _json_lines(path) if path.suffix.lower() in (".jsonl", ".json") else _csv_lines(path)
    columns: list[str | None] | None = None
    try:
        for number, row in rows:
            place = f"{path.name} line {number}"
            if not isinstance(row, dict):
                yield place, row
                continue
            columns = columns or _columns(path, row)
            values = zip(("path", "prompt", "sharegpt4v"), columns, strict=True)
            yield place, {key: row[name] for key, name in values if name and row.get(name) is not None}
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); expected a CSV or JSONL table") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no CSV or JSONL table in UTF-8: {error}") from None


def _csv_lines(path: Path) -> Iterator[tuple[int, object]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        for row in reader:
            yield reader.line_num, row


def _json_lines(path: Path) -> Iterator[tuple[int, object]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError):
                    yield number, line


def _columns(path: Path, row: dict) -> list[str | None]:
    found = [next((n for n in names if n in row), None) for names in (PATHS, PROMPTS, DESCRIPTIONS)]
    if None in found[:2]:
        have = ", ".join(map(shortened, list(row)[:10]))
        raise DataError(
            f"{path} has the columns {have}; expected one of {', '.join(PATHS)} and one of {', '.join(PROMPTS)}"
        )
    return found


def _write(target: Path, text: str, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        if target.is_file() and target.read_bytes() == text.encode():
            return
        raise DataError(f"{target} is there already and says something else; --overwrite replaces it")
    remove_temporaries(target.parent)
    with atomic_write(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
