"""Import of diffusiondb-pixelart as ``labels.json`` and images, without user names and unsafe images."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from tqdm.auto import tqdm

from pixart_nb.core.data.files import DataError, ImportReport, ProblemsError
from pixart_nb.core.data.images import check_image
from pixart_nb.core.data.labels import caption_problem
from pixart_nb.core.data.sources import SourceRow, open_source
from pixart_nb.core.io import atomic_write_together, folder_lock, write_once

LABELS, TEST_LABELS, IMAGES = "labels.json", "labels_test.json", "images"
#: Paths that an import gives to images. No other file is removed, whatever a label file in the target names.
_IMPORTED = re.compile(rf"{IMAGES}/[0-9a-f]{{16}}\.\w+")

Entry = dict[str, object]


def import_diffusiondb(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    max_nsfw: float = 0.5,
    test_count: int = 400,
    overwrite: bool = False,
) -> ImportReport:
    """Convert a published form of the data set (see ``open_source``) into the folder ``target``.

    It gets ``labels.json``, ``labels_test.json`` and the folder ``images`` with the unchanged image files;
    ``image_dir`` is ``target`` itself. The last ``test_count`` rows of the source are for testing, as usual (1,600 and
    400), regardless of the filter. Left out are images whose image or prompt score is above ``max_nsfw`` (0 to 1; an
    image that its service blurred has 2) or unknown while others are known, images that an earlier row has too, and,
    named one by one, rows that cannot be used. Only images, prompts and scores are read.

    An interrupted import leaves the labels of before or none; the same call completes it. ``overwrite`` replaces the
    labels of another import, and removes its images that the new labels do not name.

    Raises:
        DataError: the source cannot be used, nothing is left of it, or ``target`` holds another import.
        FolderInUseError, WriteError: another process writes into ``target``, or it cannot be written.
    """
    target = Path(target)
    if target.resolve().is_relative_to(Path(source).resolve()):
        raise DataError(f"{target} is in {source}; choose a target outside of the source")
    data = open_source(source)
    if not 0 <= test_count < max(data.count, 1):
        raise DataError(
            f"test_count is {test_count}, and {source} has {data.count} images; expected a --test_count of 0 to "
            f"{data.count - 1}"
        )
    if not 0 <= max_nsfw <= 2:
        raise DataError(f"max_nsfw is {max_nsfw}; expected 0 to 2")
    with folder_lock(target):
        before = _labels_of(target)
        writer = _ImageWriter(target, max_nsfw if data.scored else None, None if overwrite else before)
        for number, row in enumerate(tqdm(data.rows, data.form, data.count, unit="image")):
            if number == data.count - test_count:
                writer.first_test = len(writer.entries)
            writer.add(row)
        report = writer.report()
        if not report.training:
            raise ProblemsError(f"{source}: no image to train on is left ({dict(report.left_out)})", report.problems)
        if not data.scored:
            report.notes.append("the source has no NSFW scores, so nothing was filtered by them; look at the images")
        writer.write_labels(report)
        if overwrite:
            for path in filter(_IMPORTED.fullmatch, before.keys() - writer.entries.keys()):
                (target / path).unlink(missing_ok=True)
    return report


class _ImageWriter:
    """Images of the rows of a source, written into ``target``, and their entries of the label files by path.

    ``expected``: entries of the label files in ``target``, which the new ones must equal; all are new if it is empty.
    Where ``labels.json`` is missing, an import was killed between its two label files, or they are someone else's: the
    new entries must hold the expected ones.
    """

    def __init__(self, target: Path, max_nsfw: float | None, expected: dict[str, Entry] | None):
        self.target, self.max_nsfw, self.expected = target, max_nsfw, expected
        self.complete = (target / LABELS).is_file()
        self.entries: dict[str, Entry] = {}
        self.first_test: int | None = None
        self._report = ImportReport([])

    def add(self, row: SourceRow) -> None:
        """Write the image of a row and add its label, or note why not."""
        report = self._report
        if self.max_nsfw is not None and (reason := _unsafe(row, self.max_nsfw)):
            report.left_out[reason] += 1
            return
        prompts = row.prompt if isinstance(row.prompt, list) and row.prompt else [row.prompt]
        try:
            if problem := next(filter(None, (caption_problem("prompt", prompt) for prompt in prompts)), None):
                raise DataError(problem)
            content = row.content()
            ending, height, width = check_image(content, "its image")
        except DataError as error:
            report.left_out["that cannot be used:"] += 1
            report.problems.append(f"{row.where}: {error}")
            return
        # named after its content, so that an import that is run again recognises it
        path = f"{IMAGES}/{hashlib.sha256(content).hexdigest()[:16]}{ending}"
        if path in self.entries:
            report.left_out["that an earlier row has too"] += 1
            return
        size = {"height": height, "width": width, "ratio": height / width}
        entry = {"path": path, "prompt": prompts[0], "sharegpt4v": "", **size}
        entry |= {"captions": prompts} if len(prompts) > 1 else {}
        if self.expected and self.expected.get(path, None if self.complete else entry) != entry:
            self._refuse()
        write_once(self.target / path, content)
        self.entries[path] = entry

    def report(self) -> ImportReport:
        """Count the images that were written."""
        report = self._report
        report.training = len(self.entries) if self.first_test is None else self.first_test
        report.testing = len(self.entries) - report.training
        has_test = self.first_test is not None
        report.files = [self.target / name for name in (LABELS, TEST_LABELS)[: 1 + has_test]]
        return report

    def write_labels(self, report: ImportReport) -> None:
        """Write the label files, once all images are on the disk."""
        entries = list(self.entries.values())
        parts = [entries[: report.training], entries[report.training :]]
        texts = [json.dumps(part, indent=1) + "\n" for part in parts]
        before = (self.target / LABELS).read_text(encoding="utf-8") if self.complete else texts[0]
        if self.expected and (before != texts[0] or not self.expected.keys() <= self.entries.keys()):
            self._refuse()
        if hasattr(os, "sync"):
            os.sync()
        with atomic_write_together(*report.files) as temporaries:
            for temporary, text in zip(temporaries, texts, strict=False):
                temporary.write_text(text, encoding="utf-8")
        if len(report.files) == 1:
            (self.target / TEST_LABELS).unlink(missing_ok=True)

    def _refuse(self) -> None:
        raise DataError(
            f"{self.target} holds the labels of another import; choose another target, or replace them with --overwrite"
        )


def _unsafe(row: SourceRow, max_nsfw: float) -> str:
    if None in row.scores:
        return "without an NSFW score"
    return f"with an NSFW score above {max_nsfw:g}" if max(row.scores) > max_nsfw else ""


def _labels_of(target: Path) -> dict[str, Entry]:
    """Return the entries of the label files in ``target`` by path; those of other programs count by their paths too."""
    entries: list[object] = []
    for path in (target / LABELS, target / TEST_LABELS):
        if path.is_file():
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                raise DataError(f"{path} cannot be read; remove it, or choose another target") from None
            entries += content if isinstance(content, list) else [content]
    return {str(e.get("path", i) if isinstance(e, dict) else i): e for i, e in enumerate(entries)}
