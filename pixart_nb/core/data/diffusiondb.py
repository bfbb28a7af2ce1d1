"""diffusiondb-pixelart as ``labels.json`` and pictures, without user names and without what is not safe for work."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from tqdm.auto import tqdm

from pixart_nb.core.data.errors import DataError, ProblemsError
from pixart_nb.core.data.images import check_image
from pixart_nb.core.data.labels import caption_problem
from pixart_nb.core.data.published_forms import Row, open_source
from pixart_nb.core.data.writing import Report
from pixart_nb.core.io import atomic_write_together, remove_temporaries, write_once

LABELS, TEST_LABELS, IMAGES = "labels.json", "labels_test.json", "images"
#: Pictures are named after what is in them, so that what was written before an interruption is known again.
_WRITTEN = re.compile(r"[0-9a-f]{16}\.[a-z]+")

Entry = dict[str, str | int | float]


def import_diffusiondb(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    max_nsfw: float = 0.5,
    test_count: int = 400,
) -> Report:
    """Turn a published form of the data set (see ``open_source``) into ``target``.

    It gets ``labels.json``, ``labels_test.json`` and the folder ``images`` with the pictures' files as they are;
    ``image_dir`` is ``target`` itself. The last ``test_count`` rows of the source are for testing, as is usual
    (1,600 and 400), whatever the filter leaves out. Left out are: pictures whose image or prompt score is above
    ``max_nsfw`` (0 to 1; a picture that its service blurred has 2) or unknown while others' are known, and pictures
    that a former row has too; and, named one by one, what cannot be read. Only pictures, prompts and scores are read.

    Stopped at any moment, it leaves the labels of before or none; the same command goes on. Pictures of a former
    import that the new labels do not name are removed.

    Raises:
        DataError: the source cannot be used, nothing is left of it, or the disk is full.
    """
    target = Path(target)
    if target.resolve().is_relative_to(Path(source).resolve()):
        raise DataError(f"{target} lies in {source}; choose a target outside of the source")
    found = open_source(source)
    if not 0 <= test_count < max(found.count, 1):
        raise DataError(
            f"test_count is {test_count}, and {source} has {found.count} pictures; expected fewer"
        )
    if not 0 <= max_nsfw <= 2:
        raise DataError(f"max_nsfw is {max_nsfw}; expected 0 to 2")
    for folder in (target, target / IMAGES):
        remove_temporaries(folder)
    report = Report([target / name for name in (LABELS, TEST_LABELS)[: 1 + bool(test_count)]])
    entries: dict[str, Entry] = {}
    last = found.count - test_count
    for number, row in enumerate(tqdm(found.rows, total=found.count, desc=found.form, unit="picture")):
        if number == last:
            report.training = len(entries)
        _take(row, target, entries, report, max_nsfw if found.scored else None)
    labels = list(entries.values())
    report.training = report.training if test_count else len(labels)
    report.testing = len(labels) - report.training
    if not report.training:
        raise ProblemsError(
            f"{source}: no picture to train on is left ({dict(report.left_out)})", report.problems
        )
    if not found.scored:
        report.notes.append(
            "the source has no NSFW scores, so nothing was filtered by them; look at the pictures"
        )
    _write_labels(report.files, [labels[: report.training], labels[report.training :]])
    if not test_count:
        (target / TEST_LABELS).unlink(missing_ok=True)
    _remove_unnamed(target / IMAGES, labels)
    return report


def _take(row: Row, target: Path, entries: dict[str, Entry], report: Report, max_nsfw: float | None) -> None:
    """Write the picture of a row and add its label, or note why not."""
    if max_nsfw is not None and (reason := _unsafe(row, max_nsfw)):
        report.left_out[reason] += 1
        return
    try:
        if problem := caption_problem("prompt", row.prompt):
            raise DataError(problem)
        content = row.content()
        ending, height, width = check_image(content, "its picture")
    except DataError as error:
        report.left_out["that cannot be used:"] += 1
        report.problems.append(f"{row.where}: {error}")
        return
    path = f"{IMAGES}/{hashlib.sha256(content).hexdigest()[:16]}{ending}"
    if path in entries:
        report.left_out["that an earlier row has too"] += 1
        return
    write_once(target / path, content)
    ratio = height / width
    entries[path] = dict(path=path, prompt=row.prompt, sharegpt4v="", height=height, width=width, ratio=ratio)


def _unsafe(row: Row, max_nsfw: float) -> str:
    if None in row.scores:
        return "without an NSFW score"
    return f"with an NSFW score above {max_nsfw:g}" if max(row.scores) > max_nsfw else ""


def _write_labels(paths: list[Path], parts: list[list[Entry]]) -> None:
    os.sync()  # the pictures are on the disk before the labels name them
    with atomic_write_together(*paths) as temporaries:
        for temporary, part in zip(temporaries, parts, strict=False):
            temporary.write_text(json.dumps(part, indent=1) + "\n", encoding="utf-8")


def _remove_unnamed(folder: Path, labels: list[Entry]) -> None:
    """Remove pictures of a former import that was filtered less or had another source."""
    named = {Path(label["path"]).name for label in labels}
    for path in folder.iterdir():
        if _WRITTEN.fullmatch(path.name) and path.name not in named:
            path.unlink()
