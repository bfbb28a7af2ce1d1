"""Reads damaged label files, images, captions and archives by the thousand, in a process of its own.

    python tests/damaged_data.py FOLDER COUNT

Prints as JSON what came of them. Everything must be named in one list (``DataError``), with each entry that is known
to be bad in it, or be handled: then every image that is left can be decoded and cut to its training size. Anything
else ends the process: another error with its traceback, a crash with its signal, what computes for over ``PATIENCE``
seconds as a hang.
"""

import io
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from pixart_nb.core.data.buckets import training_sizes
from pixart_nb.core.data.diffusiondb import import_diffusiondb
from pixart_nb.core.data.files import DataError, ProblemsError
from pixart_nb.core.data.folder import import_folder
from pixart_nb.core.data.images import fit, load_image
from pixart_nb.core.data.labels import load_labels
from pixart_nb.pixelart.datasets import sample_rows, write_part, write_table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.mutated_files import PATIENCE, Hang, mutated, peak_megabytes

KINDS = ("label file", "entries", "images", "texts", "table", "zip part", "parquet")
#: Values that no key of an entry may have.
NOT_PATHS = (None, 7, "", "  ", [], {}, True, "../secret.png", "/etc/passwd", "a/../../secret.png",
             "missing.png", "\0", "a" * 5000, "loop", ".", "\ud800.png", "plain.txt")  # fmt: skip
NOT_PROMPTS = (None, 3, "", " \n\t", [], [""], {}, False, "\u200b", "\ud83d", "x" * 30_000, float("nan"))
NOT_NUMBERS = ("512", None, -1, 0, float("inf"), True, [512])
NOT_ENTRIES = (None, 5, "a.png", [], ["a.png", "a cat"], True)


def write_images(folder: Path) -> list[str]:
    """Sound images of every kind that is read; their names."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "rgb.png": (rgb, {}),
        "turned.jpg": (rgb, {"exif": exif}),
        "turned.png": (rgb, {"exif": exif}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "palette.png": (rgb.convert("P"), {}),
        "clear.gif": (rgb.convert("P"), {"transparency": 3}),
        "alpha.webp": (rgb.convert("RGBA"), {}),
        "grey.png": (rgb.convert("LA"), {}),
        "deep.png": (Image.fromarray(rng.integers(0, 65536, (20, 20), dtype=np.uint16)), {}),
        "bits.bmp": (rgb.convert("1"), {}),
        "dot.png": (rgb.resize((1, 1)), {}),
        "strip.tif": (rgb.resize((400, 2)), {}),
        "many.webp": (rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
        "small.avif": (rgb, {}),
    }
    for name, (image, options) in kinds.items():
        image.save(folder / name, **options)
    (folder / "plain.txt").write_text("no image")
    (folder.parent / "secret.png").write_bytes((folder / "rgb.png").read_bytes())
    (folder / "link").symlink_to("..")
    (folder / "loop").symlink_to("loop")
    return list(kinds)


def entries(names: list[str]) -> list[dict]:
    return [{"path": name, "prompt": f"an image, {name}", "sharegpt4v": "", "height": 24} for name in names]


def break_entries(sound: list[dict], rng: np.random.Generator) -> tuple[list[object], set[int]]:
    """The entries with one to five of them broken, and which."""
    broken, places = list(sound), set(rng.permutation(len(sound))[: rng.integers(1, 6)].tolist())
    for place in places:
        wound = rng.integers(5)
        if wound == 4:
            broken[place] = NOT_ENTRIES[rng.integers(len(NOT_ENTRIES))]
            continue
        key, values = [("path", NOT_PATHS), ("prompt", NOT_PROMPTS), ("height", NOT_NUMBERS), ("path", ())][wound]
        changed = dict(broken[place])
        if values:
            changed[key] = values[rng.integers(len(values))]
        else:
            del changed[key]
        broken[place] = changed
    return broken, places


def check_usable(json_path: Path, image_dir: Path) -> None:
    """Whatever was taken can be trained on."""
    labels = load_labels(json_path, image_dir, decode=True)
    for label, size in zip(labels, training_sizes(labels, 256, True), strict=True):
        assert fit(load_image(label.file), *size).shape == (*size, 3)
        assert label.file.is_relative_to(image_dir)


def problems_of(json_path: Path, image_dir: Path) -> list[str]:
    """All that is named; nothing, if it can be used."""
    try:
        check_usable(json_path, image_dir)
    except ProblemsError as error:
        return error.problems
    return []


def entries_in(problems: list[str]) -> set[int]:
    return {int(problem.split()[1].rstrip(":")) for problem in problems}


class Damage:
    """One damaged data set after the other, of each kind; ``handled`` or ``named``."""

    def __init__(self, folder: Path):
        self.folder, self.sound = folder, folder / "sound"
        self.names = write_images(self.sound)
        self.labels = entries(self.names)
        self.json = folder / "labels.json"
        self.rows = sample_rows(6, side=128)

    def run(self, kind: str, rng: np.random.Generator) -> str:
        try:
            getattr(self, kind.replace(" ", "_"))(rng)
        except DataError:
            return "named"
        return "handled"

    def label_file(self, rng: np.random.Generator) -> None:
        self.json.write_bytes(mutated(json.dumps(self.labels).encode(), rng))
        check_usable(self.json, self.sound)

    def entries(self, rng: np.random.Generator) -> None:
        broken, places = break_entries(self.labels, rng)
        self.json.write_text(json.dumps(broken))
        problems = problems_of(self.json, self.sound)
        assert entries_in(problems) == places, (places, [broken[p] for p in places], problems)
        raise DataError

    def images(self, rng: np.random.Generator) -> None:
        copy, wounded = self._copy(), set(rng.permutation(len(self.names))[: rng.integers(1, 5)].tolist())
        for place in wounded:
            path = copy / self.names[place]
            path.write_bytes(mutated(path.read_bytes(), rng))
        self.json.write_text(json.dumps(self.labels))
        problems = problems_of(self.json, copy)
        assert entries_in(problems) <= wounded, (wounded, problems)
        if problems:
            raise DataError

    def texts(self, rng: np.random.Generator) -> None:
        copy = self._copy()
        for name in self.names:
            text = (copy / name).with_suffix(".txt")
            content = [rng.bytes(20), b"", b" \n", "ein Bär\n".encode("latin-1"), b"\0"]
            wound = rng.integers(12)
            text.write_bytes(content[wound] if wound < len(content) else b"an image\nof something")
            if wound == 11:
                text.unlink()
        report = import_folder(copy, skip=bool(rng.integers(2)))
        check_usable(report.files[0], copy)

    def table(self, rng: np.random.Generator) -> None:
        copy = self._copy()
        if rng.integers(2):
            path, lines = copy / "metadata.jsonl", [json.dumps(entry) for entry in self.labels]
        else:
            path, lines = copy / "metadata.csv", ["file_name,text", *(f"{n},a {n}" for n in self.names)]
        path.write_bytes(mutated("\n".join(lines).encode(), rng))
        report = import_folder(copy, skip=bool(rng.integers(2)))
        check_usable(report.files[0], copy)

    def zip_part(self, rng: np.random.Generator) -> None:
        self._import(write_part(self.folder / "part-000001.zip", self.rows), rng)

    def parquet(self, rng: np.random.Generator) -> None:
        self._import(write_table(self.folder / "0000.parquet", self.rows), rng)

    def _import(self, path: Path, rng: np.random.Generator) -> None:
        target = self.folder / "target"
        shutil.rmtree(target, ignore_errors=True)
        path.write_bytes(mutated(path.read_bytes(), rng))
        try:
            import_diffusiondb(path, target, test_count=2)
        except DataError:
            assert not list(target.glob("*.json"))
            raise
        check_usable(target / "labels.json", target)

    def _copy(self) -> Path:
        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.sound, copy, symlinks=True)
        return copy


def main(folder: Path, count: int) -> None:
    signal.signal(signal.SIGPROF, lambda *_: (_ for _ in ()).throw(Hang()))
    os.fsync, os.sync = (lambda file: None), (lambda: None)  # a busy disk is no hang
    sys.stderr = io.StringIO() if "--quiet" in sys.argv else sys.stderr
    damage, rng = Damage(folder), np.random.default_rng(0)
    found, seconds, before = {kind: Counter() for kind in KINDS}, dict.fromkeys(KINDS, 0.0), peak_megabytes()
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        started = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, PATIENCE)  # seconds of computing, however busy the machine is
        found[kind][damage.run(kind, rng)] += 1
        signal.setitimer(signal.ITIMER_PROF, 0)
        seconds[kind] = max(seconds[kind], time.process_time() - started)
    print(json.dumps({"found": found, "slowest": seconds, "grown_megabytes": peak_megabytes() - before}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
