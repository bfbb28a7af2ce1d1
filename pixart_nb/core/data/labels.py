"""Label files: which picture has which captions, checked as a whole before anything is trained on them."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm.auto import tqdm

from pixart_nb.core.data.errors import DataError, ProblemsError, shortened
from pixart_nb.core.data.images import ImageError, load_image, read_image_size

#: Characters of the longest caption that is read; the text encoder reads some hundred words of it.
MOST_CHARACTERS = 20_000


class LabelError(ProblemsError):
    """Labels that cannot be trained on."""


@dataclass(frozen=True)
class Label:
    """A picture and its captions: an entry of ``labels.json``.

    ``path`` is relative to the folder of pictures, ``file`` where it lies. ``prompt`` is the original caption,
    ``sharegpt4v`` a described one, empty if there is none. ``height`` and ``width`` are those of the upright picture.
    """

    path: str
    file: Path
    prompt: str
    sharegpt4v: str
    height: int
    width: int

    @property
    def ratio(self) -> float:
        """Height divided by width."""
        return self.height / self.width

    def as_json(self) -> dict[str, str | int | float]:
        """The entry as the official label files have it."""
        return {
            "path": self.path,
            "prompt": self.prompt,
            "sharegpt4v": self.sharegpt4v,
            "height": self.height,
            "width": self.width,
            "ratio": self.ratio,
        }


def load_labels(
    json_path: str | os.PathLike[str], image_dir: str | os.PathLike[str], decode: bool = False
) -> list[Label]:
    """Read and check a label file and the pictures that it names, in the order of the file.

    The file is a list of ``{"path", "prompt", "sharegpt4v", "height", "width", "ratio"}``; ``path`` and ``prompt``
    are required, other keys are left alone. Sizes are taken from the pictures, upright; a warning counts the entries
    that say another one. ``decode`` reads every picture whole, which finds those that are cut.

    Raises:
        LabelError: lists all problems at once: a file that is no such list, entries with missing or mistyped keys,
            captions that are empty or not text, paths that leave ``image_dir``, are named twice or have no
            readable picture.
    """
    entries = _read_entries(Path(json_path))
    folder = Path(image_dir)
    if not folder.is_dir():
        raise LabelError(json_path, [f"the folder of its pictures, image_dir {folder}, does not exist"])
    labels, problems, elsewhere = check_entries(entries, folder, decode, f"checking {Path(json_path).name}")
    if problems:
        raise LabelError(json_path, problems)
    if elsewhere:
        warnings.warn(
            f"{json_path}: {elsewhere} entries say another height or width than their picture has; "
            "the picture's is used",
            stacklevel=2,
        )
    return labels


def read_prompts(json_path: str | os.PathLike[str]) -> list[str]:
    """The prompts of a label file alone, in its order; its pictures need not be there.

    Raises ``LabelError`` with all that is wrong with them.
    """
    entries = _read_entries(Path(json_path))
    prompts = [entry.get("prompt") if isinstance(entry, dict) else entry for entry in entries]
    found = [(number, caption_problem("prompt", prompt)) for number, prompt in enumerate(prompts)]
    problems = [f"entry {number}: {problem}" for number, problem in found if problem]
    if problems:
        raise LabelError(json_path, problems)
    return prompts


def check_entries(
    entries: Sequence[object],
    folder: Path,
    decode: bool,
    description: str,
    places: Sequence[str] | None = None,
) -> tuple[list[Label], list[str], int]:
    """Labels of those entries that are sound, the problems of the others, and how many say another size.

    ``places`` names each entry in its problems; ``entry 0``, ``entry 1`` and so on unless told.
    """
    labels, problems, elsewhere = [], [], 0
    names = places or [f"entry {number}" for number in range(len(entries))]
    seen: dict[Path, str] = {}
    checks = each_on_threads(_Check(folder, decode), entries, description)
    for name, (label, found, same_size) in zip(names, checks, strict=True):
        problems += [f"{name}: {problem}" for problem in found]
        if label is None:
            continue
        if (first := seen.setdefault(label.file, name)) != name:
            problems.append(f"{name}: path {label.path!r} is that of {first} too")
            continue
        labels.append(label)
        elsewhere += not same_size
    return labels, problems, elsewhere


def caption_problem(key: str, value: object) -> str | None:
    """What is wrong with a caption; None if nothing is."""
    if not isinstance(value, str):
        return f"{key} is {shortened(value)}; expected a text"
    if not any(character.isprintable() and not character.isspace() for character in value):
        return f"{key} is empty; expected a caption"
    if len(value) > MOST_CHARACTERS:
        return f"{key} has {len(value)} characters; at most {MOST_CHARACTERS} are read"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return f"{key} is {shortened(value)}: half of a character, which is no text"
    return None


def inside(folder: Path, path: object) -> Path:
    """Where a path relative to ``folder`` leads, links followed.

    Raises:
        DataError: it is no text or no relative path, or leads out of the folder.
    """
    if not isinstance(path, str) or not path.strip() or "\0" in path or Path(path).is_absolute():
        raise DataError(f"path is {shortened(path)}; expected a path relative to the folder of pictures")
    base = folder.resolve()
    try:
        place = (base / path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, names too long, half characters
        raise DataError(f"path {shortened(path)} cannot be followed: {error}") from None
    if not place.is_relative_to(base):
        raise DataError(
            f"path {shortened(path)} leaves the folder of pictures {folder}; expected one within it"
        )
    return place


def _read_entries(path: Path) -> list[object]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise LabelError(path, [f"cannot be read ({error.strerror}); expected a label file"]) from None
    except (ValueError, RecursionError) as error:  # no JSON, not UTF-8, nested without end
        raise LabelError(path, [f"is not JSON: {error or 'nested too deeply'}"]) from None
    if not isinstance(entries, list):
        raise LabelError(
            path, [f"holds a {type(entries).__name__}; expected a list of labels, [{{...}}, ...]"]
        )
    if not entries:
        raise LabelError(path, ["is an empty list; expected at least one label"])
    return entries


class _Check:
    """Label of an entry, its problems, and whether it says the picture's own size."""

    def __init__(self, folder: Path, decode: bool):
        self.folder, self.decode = folder, decode

    def __call__(self, entry: object) -> tuple[Label | None, list[str], bool]:
        if not isinstance(entry, dict):
            return None, [f"is {shortened(entry)}; expected a label, {{...}}"], True
        problems = [problem for problem in self._captions(entry) + self._numbers(entry) if problem]
        try:
            file = inside(self.folder, entry.get("path"))
            size = load_image(file).shape[:2] if self.decode else read_image_size(file)
        except ImageError as error:
            return None, [*problems, f"path {entry['path']!r}: {error}"], True
        except DataError as error:
            return None, [*problems, str(error)], True
        if problems:
            return None, problems, True
        said = tuple(entry.get(key, have) for key, have in zip(("height", "width"), size, strict=True))
        label = Label(entry["path"], file, entry["prompt"], entry.get("sharegpt4v") or "", *size)
        return label, [], said == size

    def _captions(self, entry: dict) -> list[str | None]:
        found = [caption_problem("prompt", entry["prompt"])] if "prompt" in entry else ["prompt is missing"]
        described = entry.get("sharegpt4v")
        if described not in (None, ""):  # so an absent description is written, too
            found.append(caption_problem("sharegpt4v", described))
        return found

    def _numbers(self, entry: dict) -> list[str | None]:
        return [
            f"{key} is {shortened(entry[key])}; expected a number above 0"
            for key in ("height", "width", "ratio")
            if key in entry and not _positive(entry[key])
        ]


def _positive(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and value > 0 and math.isfinite(value)


def each_on_threads(function: Callable, items: Sequence, description: str) -> Iterator:
    """``function`` of every item, in order, on several threads (reading files waits); a bar if it takes long."""
    with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 2)) as pool:
        # a window at a time: `map` on everything would hold all results and not stop at an error
        progress = tqdm(total=len(items), desc=description, delay=3, unit="picture", leave=False)
        with progress:
            for part in _windows(items, 256):
                for result in pool.map(function, part):
                    progress.update()
                    yield result


def _windows(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
