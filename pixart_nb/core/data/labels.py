"""Label files: images and their captions, validated as a whole before a training starts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from tqdm.auto import tqdm

from pixart_nb.core.data.files import (
    DESCRIPTIONS,
    PATHS,
    PROMPTS,
    DataError,
    PlacedEntry,
    ProblemsError,
    path_inside,
    read_entries,
    shortened,
)
from pixart_nb.core.data.images import ImageError, load_image, read_image_size

#: Longest caption in characters; the text encoder reads some hundred words of it.
MAX_CHARACTERS = 20_000
#: Largest height, width or ratio that an entry may state.
_MAX_NUMBER = 1e9
_AT_ONCE = 256


class LabelError(ProblemsError):
    """Labels that cannot be trained on."""


@dataclass(frozen=True)
class Label:
    """An image and its captions: an entry of ``labels.json``.

    ``path`` is relative to the folder of images, ``file`` is its path on the disk. ``prompt`` is the original caption
    and ``more_prompts`` are further ones; ``sharegpt4v`` is a generated description, empty if there is none.
    ``height`` and ``width`` are those of the upright image.
    """

    path: str
    file: Path
    prompt: str
    sharegpt4v: str
    height: int
    width: int
    more_prompts: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Height divided by width."""
        return self.height / self.width

    @property
    def prompts(self) -> tuple[str, ...]:
        """All original captions."""
        return (self.prompt, *self.more_prompts)

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions; the description, if there is one, is the last."""
        return self.prompts + (self.sharegpt4v,) * bool(self.sharegpt4v)

    def as_json(self) -> dict[str, object]:
        """Return the entry as official label files have it; several prompts are in ``captions`` too."""
        entry = {key: getattr(self, key) for key in ("path", "prompt", "sharegpt4v", "height", "width", "ratio")}
        return entry | ({"captions": list(self.prompts)} if self.more_prompts else {})


def load_labels(
    json_path: str | os.PathLike[str], image_dir: str | os.PathLike[str], decode: bool = False
) -> list[Label]:
    """Read and validate a label file and the images that it names, in the order of the file.

    The file is a list of ``{"path", "prompt", "sharegpt4v", "height", "width", "ratio"}``, as JSON, JSON Lines or CSV.
    ``path`` and ``prompt`` are required (or ``file_name`` and ``text`` or ``caption``); a prompt may be a list, and an
    image that is named again gets further prompts. Sizes are those of the images; a warning counts the entries that
    state others. ``decode`` decodes every image, which finds those that are cut off.

    Raises:
        LabelError: lists all problems: no such list, entries with missing or mistyped keys, captions that are empty
            or no text, paths that leave ``image_dir`` or have no readable image.
    """
    folder = Path(image_dir)
    entries = _entries(json_path)
    if not folder.is_dir():
        raise LabelError(json_path, [f"the folder of its images, image_dir {folder}, does not exist"])
    labels, problems, notes = check_entries(entries, folder, decode, f"checking {Path(json_path).name}")
    if problems:
        raise LabelError(json_path, problems)
    for note in notes:
        warnings.warn(f"{json_path}: {note}", stacklevel=2)
    return labels


def read_prompts(json_path: str | os.PathLike[str]) -> list[str]:
    """Return the first prompt of each entry of a label file; its images need not exist.

    Raises ``LabelError`` with all problems of the prompts.
    """
    prompts, problems = [], []
    for where, entry in _entries(json_path):
        values = prompts_of(entry) if isinstance(entry, dict) else [entry]
        problem = caption_problem("prompt", values[0]) if values else "prompt is missing"
        problems += [f"{where}: {problem}"] * bool(problem)
        prompts += values[:1]
    if problems:
        raise LabelError(json_path, problems)
    return prompts


def check_entries(
    entries: Sequence[PlacedEntry], folder: Path, decode: bool, description: str
) -> tuple[list[Label], list[str], list[str]]:
    """Return the labels of the valid entries, the problems of the others, and notes on what was changed."""
    labels: dict[Path, Label] = {}
    problems, other_size, repeated = [], 0, 0
    for (where, entry), (label, wrong) in zip(entries, _check_all(entries, folder, decode, description), strict=True):
        problems += [f"{where}: {problem}" for problem in wrong]
        if label is None:
            continue
        size = (label.height, label.width)
        other_size += tuple(entry.get(key, n) for key, n in zip(("height", "width"), size, strict=True)) != size
        if label.file in labels:
            repeated += 1
            label = _merged(labels[label.file], label)
        labels[label.file] = label
    notes = {
        f"{other_size} entries state another height or width than their image has; the image's is used": other_size,
        f"{repeated} entries name an image again; their captions were added to its first entry": repeated,
    }
    return list(labels.values()), problems, [note for note, count in notes.items() if count]


def path_of(entry: dict) -> object:
    """Return the path of the image of an entry, of any type; None without one."""
    return next((entry[key] for key in PATHS if key in entry), None)


def prompts_of(entry: dict) -> list[object]:
    """Return the prompts of an entry, of any type: those of the first key for a prompt, and of its plurals."""
    values = [entry[key] for key in PROMPTS if entry.get(key) is not None][:1]
    values += [entry[f"{key}s"] for key in PROMPTS if isinstance(entry.get(f"{key}s"), list)]
    prompts: list[object] = []
    for prompt in chain.from_iterable(value if isinstance(value, list) else [value] for value in values):
        if prompt not in prompts:
            prompts.append(prompt)
    return prompts


def caption_problem(key: str, value: object) -> str | None:
    """Return what is wrong with a caption, or None."""
    if not isinstance(value, str):
        return f"{key} is {shortened(value)}; expected a text"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return f"{key} is {shortened(value)}, with half of a character; save the file as UTF-8"
    if not any(character.isprintable() and not character.isspace() for character in value):
        return f"{key} is empty; expected a caption"
    if len(value) > MAX_CHARACTERS:
        return f"{key} has {len(value)} characters; expected at most {MAX_CHARACTERS}"
    return None


def _entries(json_path: str | os.PathLike[str]) -> list[PlacedEntry]:
    try:
        entries = read_entries(Path(json_path))
    except DataError as error:
        raise LabelError(json_path, [str(error)]) from None
    if not entries:
        raise LabelError(json_path, ["is an empty list; expected at least one label"])
    return entries


def _check_all(
    entries: Sequence[PlacedEntry], folder: Path, decode: bool, description: str
) -> Iterator[tuple[Label | None, list[str]]]:
    """Check entries on several threads, as reading files waits for the disk; yield the results in order."""
    with (
        ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 2)) as pool,
        tqdm(total=len(entries), desc=description, delay=3, unit="image", leave=False) as progress,
    ):
        for start in range(0, len(entries), _AT_ONCE):  # `map` of everything would not stop at an interrupt
            part = entries[start : start + _AT_ONCE]
            yield from pool.map(lambda placed: _check(placed[1], folder, decode), part)
            progress.update(len(part))


def _check(entry: object, folder: Path, decode: bool) -> tuple[Label | None, list[str]]:
    """Return the label of an entry, or None and its problems."""
    if not isinstance(entry, dict):
        text = str(entry) if isinstance(entry, DataError) else f"is {shortened(entry)}; expected a label, {{...}}"
        return None, [text]
    prompts = prompts_of(entry)
    described = next((entry[key] for key in DESCRIPTIONS if entry.get(key) not in (None, "")), "")
    problems = [caption_problem("prompt", prompt) for prompt in prompts] or ["prompt is missing"]
    problems += [caption_problem("sharegpt4v", described)] if described != "" else []
    problems += [
        f"{key} is {shortened(entry[key])}; expected a number above 0"
        for key in ("height", "width", "ratio")
        if key in entry and not _is_positive(entry[key])
    ]
    path, size = path_of(entry), (0, 0)
    try:
        file = path_inside(folder, path)
        size = load_image(file).shape[:2] if decode else read_image_size(file)
    except ImageError as error:
        problems.append(f"path {path!r}: {error}")
    except DataError as error:
        problems.append(str(error))
    problems = [problem for problem in problems if problem]
    if problems:
        return None, problems
    return Label(path, file, prompts[0], described, *size, tuple(prompts[1:])), []


def _merged(first: Label, other: Label) -> Label:
    """Return a label with the captions of two entries of the same image."""
    described = first.sharegpt4v or other.sharegpt4v
    new = [text for text in other.captions if text not in (*first.prompts, described)]
    return replace(first, sharegpt4v=described, more_prompts=(*first.more_prompts, *new))


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _MAX_NUMBER
