"""Import of a folder of images with captions (text files, a table, or names) as ``labels.json``."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from pixart_nb.core.data.files import DataError, ImportReport, PlacedEntry, list_files, read_entries, read_text
from pixart_nb.core.data.images import ENDINGS
from pixart_nb.core.data.labels import LabelError, check_entries, path_of
from pixart_nb.core.io import folder_lock, write_text

#: Tables that are looked for in the folder and in folders below it.
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_ENDINGS = (".txt", ".caption")
#: Bytes of the largest text file with a caption.
MAX_TEXT_BYTES = 2**20
CAPTION_SOURCES = ("text", "file", "folder")


def import_folder(
    source: str | os.PathLike[str],
    captions: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    skip: bool = False,
    overwrite: bool = False,
    caption_from: str = "text",
) -> ImportReport:
    """Write the label file of a folder of images; ``image_dir`` is the folder itself.

    Captions come from ``captions``, a table (see ``read_entries``) with paths relative to the folder or to its own;
    else from ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet`` in the folder or, one for each, in folders
    below it, with paths relative to theirs; else from text files, ``cat.txt`` beside ``cat.png``. ``caption_from``:
    ``file`` or ``folder`` takes the name of the image file or of its folder instead, with spaces for underscores and
    hyphens. Every image is decoded. ``output``: the label file, by default ``labels.json`` in the folder.

    Raises:
        LabelError: lists all problems; nothing is written. With ``skip`` these images are left out and reported.
        DataError: the folder has no images, the table lacks columns, or another label file exists and ``overwrite``
            is off.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; expected one with images and their captions")
    if caption_from not in CAPTION_SOURCES or (captions and caption_from != "text"):
        raise DataError(
            f"caption_from is {caption_from!r}{' beside a table of captions' * bool(captions)}; expected one of "
            f"{', '.join(CAPTION_SOURCES)}, and text with a table"
        )
    target = Path(output) if output else folder / "labels.json"
    images = list_files(folder, ENDINGS)
    tables = [Path(captions)] if captions else _tables(folder) if caption_from == "text" else []
    entries = _entries(folder, images, tables, caption_from)
    labels, problems, notes = check_entries(entries, folder, True, "reading images")
    if (problems and not skip) or not labels:
        raise LabelError(tables[0] if len(tables) == 1 else folder, problems)
    _write(target, json.dumps([label.as_json() for label in labels], indent=1) + "\n", overwrite)
    named = {os.path.normpath(folder / str(path_of(entry))) for _, entry in entries if isinstance(entry, dict)}
    if tables and (unnamed := [image for image in images if os.path.normpath(image) not in named]):
        notes.append(f"{len(unnamed)} images of {folder} are not in {', '.join(map(str, tables))}")
    return ImportReport([target], len(labels), problems=problems, notes=notes)


def _tables(folder: Path) -> list[Path]:
    """Return the first of ``TABLES`` in the folder, or else in each folder below it. A table covers its subfolders."""
    tables: dict[Path, Path] = {}
    files = [path for path in list_files(folder, TABLES) if path.name in TABLES]
    for path in sorted(files, key=lambda path: (len(path.parts), TABLES.index(path.name))):
        if not any(parent in tables for parent in path.parents):
            tables[path.parent] = path
    return sorted(tables.values())


def _of_table(table: Path, folder: Path) -> list[PlacedEntry]:
    """Read the entries of a table; paths that exist beside it become relative to ``folder``, which it is in."""
    try:
        entries = read_entries(table)
    except DataError as error:
        raise DataError(f"{table} {error}") from None
    if table.parent == folder or not table.resolve().is_relative_to(folder.resolve()):
        return entries
    beside = table.resolve().parent.relative_to(folder.resolve())
    for _, entry in entries:
        path = path_of(entry) if isinstance(entry, dict) else None
        if isinstance(path, str) and (folder / beside / path).is_file():
            entry.update(path=(beside / path).as_posix())
    return entries


def _entries(folder: Path, images: list[Path], tables: list[Path], caption_from: str) -> list[PlacedEntry]:
    if tables:
        entries = [entry for table in tables for entry in _of_table(table, folder)]
    elif caption_from == "text":
        entries = list(_from_texts(folder, images))
    else:
        entries = [_from_name(image.relative_to(folder), caption_from, folder) for image in images]
    if not entries:
        raise DataError(
            f"{tables[0] if tables else folder}: no images; expected files that end in {', '.join(ENDINGS)}"
        )
    return entries


def _from_texts(folder: Path, images: list[Path]) -> Iterator[PlacedEntry]:
    texts = {str(path).lower(): path for path in list_files(folder, CAPTION_ENDINGS)}
    if images and not texts:
        raise DataError(
            f"{folder}: none of its {len(images)} images has a caption; expected cat.txt beside cat.png, "
            f"{' or '.join(TABLES)}, a table given with --captions, or "
            "--caption_from file (or folder) for captions from names"
        )
    for image in images:
        path = image.relative_to(folder).as_posix()
        names = [str(image.with_suffix(ending)).lower() for ending in CAPTION_ENDINGS]
        text = next((texts[name] for name in names if name in texts), None)
        if text is None:
            yield path, DataError(f"has no {image.with_suffix('.txt').name} beside it")
            continue
        try:
            entry: object = {"path": path, "prompt": " ".join(read_text(text, MAX_TEXT_BYTES).split())}
        except DataError as error:
            entry = error
        except (OSError, UnicodeDecodeError) as error:
            entry = DataError(f"is no text in UTF-8: {error}")
        yield text.relative_to(folder).as_posix(), entry


def _from_name(path: Path, caption_from: str, folder: Path) -> PlacedEntry:
    name = path.stem if caption_from == "file" else path.parent.name or folder.resolve().name
    words = " ".join(re.sub(r"[_\W]+", " ", name).split())
    if not any(character.isalpha() for character in words):
        return path.as_posix(), DataError(f"has the {caption_from} name {name!r}, which has no words")
    return path.as_posix(), {"path": path.as_posix(), "prompt": words}


def _write(target: Path, text: str, overwrite: bool) -> None:
    with folder_lock(target.parent, name=f".{target.name}.lock"):
        if target.exists() and not overwrite:
            if target.is_file() and target.read_bytes() == text.encode():
                return
            raise DataError(f"{target} exists and has other content; --overwrite replaces it")
        write_text(target, text)
