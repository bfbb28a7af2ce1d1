"""Files of a data set: paths in folders, lists of captions as JSON, JSON Lines or CSV, and errors about them."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pixart_nb.core.errors import PixArtNBError, pluralized

#: Keys or columns for the path of an image, its prompt and its long description; the first that exists is used.
PATHS = ("path", "file_name", "filename", "file", "image", "image_path", "dir")
PROMPTS = ("prompt", "text", "caption")
DESCRIPTIONS = ("sharegpt4v", "long_caption", "description")
_STRING_OR_LAST_COMMA = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*"?)|,(?=\s*[\]}])', re.DOTALL)

#: Place of an entry in its file, for error messages, and the entry: a dict if the file is sound.
PlacedEntry = tuple[str, object]


#: Problems that the message of an error lists; the others are counted.
SHOWN = 20


class DataError(PixArtNBError):
    """Data that cannot be used; the message names the file, what is wrong with it and what to do."""


class ProblemsError(DataError):
    """Several problems at once. ``problems`` has a sentence for each; the message lists the first ones."""

    def __init__(self, source: str | os.PathLike[str], problems: Sequence[str]):
        self.problems = list(problems)
        self.heading = f"{source}: {pluralized(len(self.problems), 'problem')}"
        super().__init__(f"{self.heading}\n{listed(self.problems)}")

    def whole(self) -> str:
        """Return the message with all problems."""
        return f"{self.heading}\n{listed(self.problems, len(self.problems))}"


@dataclass
class ImportReport:
    """Result of an import: files that were written, numbers of images, and what was left out and why."""

    files: list[Path]
    training: int = 0
    testing: int = 0
    left_out: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.training} training images" + f", {self.testing} test images" * bool(self.testing)]
        lines += [f"left out: {count} {reason}" for reason, count in self.left_out.items()]
        lines += [listed(self.problems, len(self.problems))] * bool(self.problems)
        return "\n".join([*lines, *self.notes, *map(str, self.files)])


def listed(problems: Sequence[str], shown: int = SHOWN) -> str:
    """Return problems as indented lines, the first ``shown`` of them, and the number of the others."""
    lines = [f"  {problem}" for problem in problems[:shown]]
    more = len(problems) - shown
    return "\n".join(lines + [f"  and {more} more"] * (more > 0))


def shortened(value: object) -> str:
    """Return a value and its type on one printable line, for an error message."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return f"{text if len(text) <= 80 else text[:80] + '...'} ({type(value).__name__})"


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is hidden, or is what macOS adds to archives."""
    return name == "__MACOSX" or (name.startswith(".") and name not in (".", ".."))


def list_files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Return the files in a folder and below it that have one of these endings, sorted by path.

    Links to files and folders are followed, as caches of the hub, DVC and git-annex consist of them; each folder is
    read once. Hidden files are left out. Raises ``DataError`` for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read ({error.strerror})") from None

    files, visited = [], set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        files += [Path(root, n) for n in names if n.lower().endswith(endings) and not is_hidden(n)]
    return sorted(path for path in files if path.is_file())


def path_inside(folder: Path, path: object) -> Path:
    """Return the path of a file of a data set, which is relative to its ``folder``.

    The path itself stays in the folder; a link there may lead elsewhere. Raises ``DataError``.
    """
    usable = isinstance(path, str) and path.strip() and "\0" not in path
    if not usable or Path(path).is_absolute() or Path(path).drive:
        raise DataError(f"path is {shortened(path)}; expected a path relative to the folder of images")
    normal = os.path.normpath(path)
    if normal.split(os.sep)[0] == "..":
        raise DataError(f"path {shortened(path)} leaves the folder of images {folder}; expected one within it")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise DataError(f"path is {shortened(path)}, which no file can be named") from None
    file = folder / normal
    if not normal.isascii() and not os.path.exists(file):
        # macOS writes the names of files decomposed, label files hold them composed, or the reverse
        others = (folder / unicodedata.normalize(form, normal) for form in ("NFC", "NFD"))
        file = next((other for other in others if os.path.exists(other)), file)
    return file


def read_text(path: Path, max_bytes: int = 2**30) -> str:
    """Read a text file in UTF-8, or in UTF-16 with a byte order mark.

    Raises OSError, UnicodeDecodeError, and ``DataError`` for a larger file.
    """
    if (size := path.stat().st_size) > max_bytes:
        raise DataError(f"has {size} bytes; expected at most {max_bytes}")
    content = path.read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if utf16 else "utf-8-sig")


def parse_json(text: str | bytes) -> object:
    """Parse JSON in which a comma may stand before a closing bracket. Raises ValueError and RecursionError."""
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    try:
        return json.loads(text)
    except ValueError as error:
        without = _STRING_OR_LAST_COMMA.sub(lambda match: match[1] or "", text)
        if len(without) == len(text):
            raise
        try:
            return json.loads(without)
        except ValueError:
            raise error from None  # its position is that in the file


def read_entries(path: Path) -> list[PlacedEntry]:
    """Read a label file or table: JSON, JSON Lines, parquet, or CSV with commas, semicolons or tabs.

    JSON is a list of objects, or an object of captions by file, ``{"cat.png": {"caption": "a cat"}}``. An entry is what
    the file holds, of any type. Raises ``DataError`` for a file that is none of these.
    """
    if path.suffix.lower() == ".parquet":
        return list(_parquet_entries(path))
    try:
        text = read_text(path)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror}); expected a label file or table") from None
    except UnicodeDecodeError as error:
        raise DataError(f"is not JSON or CSV in UTF-8: {error}; save it as UTF-8") from None
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv"):
        return list(_csv_entries(path.name, text))
    lines = ending == ".jsonl"
    if not lines:
        try:
            entries = parse_json(text)
        except (ValueError, RecursionError) as error:
            if not text.lstrip().startswith("{"):
                raise DataError(f"is not JSON: {error or 'nested too deeply'}") from None
            lines = True
    if lines:
        numbered = enumerate(text.split("\n"), 1)
        return [(f"{path.name} line {n}", _json_line(line)) for n, line in numbered if line.strip()]
    if isinstance(entries, dict) and set(PATHS) & set(entries):
        entries = [entries]
    elif isinstance(entries, dict) and entries and all(isinstance(value, dict | str) for value in entries.values()):
        captions = {name: value if isinstance(value, dict) else {"prompt": value} for name, value in entries.items()}
        entries = [{"path": name} | value for name, value in captions.items()]
    if not isinstance(entries, list):
        raise DataError(f"holds a {type(entries).__name__}; expected a list of labels, [{{...}}, ...]")
    return [(f"entry {number}", entry) for number, entry in enumerate(entries)]


def _json_line(line: str) -> object:
    try:
        return parse_json(line)
    except (ValueError, RecursionError):
        return line


def _csv_entries(name: str, text: str) -> Iterator[PlacedEntry]:
    header = text.split("\n", 1)[0]
    separator = max(",;\t", key=header.count)
    lines = io.StringIO(text, newline="")
    reader = csv.DictReader(lines, delimiter=separator, strict=True, skipinitialspace=True)
    try:
        if reader.fieldnames:
            _check_columns(reader.fieldnames)
        for row in reader:
            used = {key: row[key] for key in PATHS + PROMPTS + DESCRIPTIONS if row.get(key) is not None}
            extra = DataError("has more fields than the header; quote captions that contain the separator")
            yield f"{name} line {reader.line_num}", extra if None in row else used
    except csv.Error as error:
        raise DataError(f"is no CSV table: {error}") from None


def _parquet_entries(path: Path) -> Iterator[PlacedEntry]:
    import pyarrow as pa  # needed only for such a table
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            texts = [field.name for field in table.schema_arrow if field.type in (pa.string(), pa.large_string())]
            _check_columns(texts)
            used = [name for name in PATHS + PROMPTS + DESCRIPTIONS if name in texts]
            for number, row in enumerate(table.read(used).to_pylist(), 1):
                yield f"{path.name} row {number}", {key: value for key, value in row.items() if value is not None}
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot be read as parquet: {error}") from None


def _check_columns(columns: Sequence[str]) -> None:
    if not (set(PATHS) & set(columns) and set(PROMPTS) & set(columns)):
        raise DataError(
            f"has the columns {', '.join(map(shortened, columns[:10]))}; expected one of {', '.join(PATHS)} "
            f"and one of {', '.join(PROMPTS)}"
        )
