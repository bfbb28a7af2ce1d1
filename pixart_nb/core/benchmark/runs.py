"""The benchmarks: what is run, how often, and the rows of the table that come out."""

from __future__ import annotations

import csv
import io
import os
import platform
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from pixart_nb.core.benchmark.shapes import Shapes
from pixart_nb.core.benchmark.worker import Worker
from pixart_nb.core.io import write_text

#: Steps of a picture, as the published table has them.
PUBLISHED_STEPS = 20
#: Seconds of all threads together: other programs on the machine change them less than the seconds that pass.
PROCESSOR = "processor seconds of a run"
#: Pixels a side from which a table's step takes so long that none is repeated.
FEW_REPEATS_FROM = 1024


@dataclass(frozen=True)
class Row:
    """One number: of which benchmark, at which size in pixels, of which system, with the versions that ran."""

    benchmark: str
    size: int
    system: str
    measure: str
    value: float
    unit: str
    versions: str

    def __str__(self) -> str:
        place = f"{self.benchmark} {self.size}"
        return f"{place:<18}{self.system:<6}{self.measure:<34}{self.value:>12.4g} {self.unit}"


def alternated(workers: Sequence[Worker], repeats: int, warm: bool = True) -> dict[str, list[dict]]:
    """Every worker's answers: once each in turn, ``repeats`` times, after one turn that does not count."""
    if warm:
        for worker in workers:
            worker.run()
    answers: dict[str, list[dict]] = {worker.system: [] for worker in workers}
    for _ in range(repeats):
        for worker in workers:
            answers[worker.system].append(worker.run())
    return answers


def _systems(peer: bool) -> tuple[str, ...]:
    return ("ours", "peer") if peer else ("ours",)


def _started(stack: ExitStack, work: str, shapes: Shapes, systems: Iterable[str]) -> list[Worker]:
    return [stack.enter_context(Worker(system, work, shapes)) for system in systems]


def table(shapes: Shapes, sizes: Sequence[int], training_sizes: Sequence[int], repeats: int) -> list[Row]:
    """The published table on this device: steps a second, and training images a second, at several sizes."""
    rows: list[Row] = []
    for size in sizes:
        rows += denoise(replace(shapes, size=size), repeats if size < FEW_REPEATS_FROM else 0, False, False)
    for size in training_sizes:
        rows += train(replace(shapes, size=size), repeats, False)
    return rows


def _ratio(rows: list[Row], measure: str) -> list[Row]:
    """How many times as fast ours is as the peer: the peer's seconds divided by ours."""
    found = {row.system: row for row in rows if row.measure == measure}
    if set(found) != {"ours", "peer"}:
        return []
    ours, peer = found["ours"], found["peer"]
    return [replace(ours, system="ratio", measure=measure, value=peer.value / ours.value, unit="x")]


def compare(work: str, shapes: Shapes, repeats: int, peer: bool, apart: bool = False) -> list[Row]:
    """Seconds of some work, medians of alternating repeats, and the ratio to the peer; processor seconds too.

    ``apart``: each repeat in a new process, so that only one system is in memory at a time.
    """
    answers: dict[str, list[dict]] = {}
    about: dict[str, tuple[str, float]] = {}
    for _ in range(repeats if apart else 1):
        for systems in [(system,) for system in _systems(peer)] if apart else [_systems(peer)]:
            with ExitStack() as stack:
                workers = _started(stack, work, shapes, systems)
                for system, found in alternated(workers, 1 if apart else repeats).items():
                    answers.setdefault(system, []).extend(found)
                about |= {worker.system: (worker.ready["versions"], worker.peak()) for worker in workers}
    rows = [
        Row(work, shapes.size, system, name, value, unit, versions)
        for system, (versions, peak) in about.items()
        for name, value, unit in (
            ("seconds", median(a["seconds"] for a in answers[system]), "s"),
            (PROCESSOR, median(a["processor"] for a in answers[system]), "s"),
            ("peak memory", peak, "GB"),
        )
    ]
    return rows + _ratio(rows, "seconds") + _ratio(rows, PROCESSOR)


def denoise(shapes: Shapes, repeats: int, peer: bool, shares: bool = True) -> list[Row]:
    """Steps a second and seconds of 20 steps, with what is done once a prompt, and ours by operators.

    A run takes ``shapes.steps`` steps; the median step counts for those that are missing to 20. With 0 ``repeats`` the
    first run counts, its first step apart: for sizes at which a step takes minutes.
    """
    rows: list[Row] = []
    with ExitStack() as stack:
        workers = _started(stack, "denoise", shapes, _systems(peer))
        first = {worker.system: [worker.run()] for worker in workers}
        answers = alternated(workers, repeats, warm=False) if repeats else first
        for worker in workers:
            rows += _denoising_rows(worker, shapes, answers[worker.system])
        rows += _ratio(rows, f"{PUBLISHED_STEPS} steps") + _ratio(rows, PROCESSOR)
        rows += _first_step(workers[0], shapes, first["ours"][0]["steps"], answers["ours"])
        rows += _shares(workers[0], shapes) if shares else []
    return rows


def _denoising_rows(worker: Worker, shapes: Shapes, answers: list[dict]) -> list[Row]:
    step = median(s for a in answers for s in a["steps"][1:] or a["steps"])
    missing = max(0, PUBLISHED_STEPS - shapes.steps)
    whole = median(a["seconds"] for a in answers) + missing * step
    values = [
        (f"{PUBLISHED_STEPS} steps", whole, "s"),
        (PROCESSOR, median(a["processor"] for a in answers), "s"),
        ("step", step, "s"),
        ("steps a second", 1 / step, "1/s"),
    ]
    values.append(("peak memory", worker.peak(), "GB"))
    return [Row("denoise", shapes.size, worker.system, *v, worker.ready["versions"]) for v in values]


def _first_step(worker: Worker, shapes: Shapes, first: list[float], answers: list[dict]) -> list[Row]:
    """How much longer the first step of a fresh process, with what is done once a prompt, takes than a later one."""
    later = median(s for a in answers for s in a["steps"][1:] or a["steps"])
    versions = worker.ready["versions"]
    return [
        Row("denoise", shapes.size, "ours", "first step, over a later one", first[0] - later, "s", versions)
    ]


def _shares(worker: Worker, shapes: Shapes) -> list[Row]:
    """The share of matrix products in our time, their rate, and the machine's own limit."""
    found, versions = worker.profile(), worker.ready["versions"]
    share = found["product_seconds"] / found["seconds"]
    rate = found["operations"] / found["product_seconds"]
    values = [
        ("share of matrix products", share, ""),
        ("rate of matrix products", rate / 1e9, "GFLOP/s"),
        ("rate of the machine", found["limit"] / 1e9, "GFLOP/s"),
        ("matrix products, of the machine's rate", rate / found["limit"], ""),
        ("everything else", 1 - share, ""),
    ]
    return [Row(worker.work, shapes.size, "ours", *value, versions) for value in values]


def train(shapes: Shapes, repeats: int, peer: bool) -> list[Row]:
    """Seconds of a training step of one picture, and training images a second.

    Weights, gradients and moments of XL/2 take 12 GB, so the systems are in memory one after the other.
    """
    rows = compare("train", shapes, repeats, peer, apart=True)
    speed = [
        replace(row, measure="images a second", value=1 / row.value, unit="1/s")
        for row in rows
        if row.measure == "seconds" and row.unit == "s"
    ]
    return rows + speed


def block(shapes: Shapes, repeats: int) -> list[Row]:
    """Seconds and memory of one block, plain and with its keys and values compressed by ``ratio`` (2 unless told)."""
    ratio = max(2, shapes.ratio)
    rows, seconds = [], {}
    for r in (1, ratio):
        with Worker("ours", "block", replace(shapes, ratio=r)) as worker:
            seconds[r] = median(a["seconds"] for a in alternated([worker], repeats, repeats > 1)["ours"])
            name, versions = f"ratio {r}", worker.ready["versions"]
            rows.append(Row("block", shapes.size, "ours", f"{name}: seconds", seconds[r], "s", versions))
            rows.append(
                Row("block", shapes.size, "ours", f"{name}: peak memory", worker.peak(), "GB", versions)
            )
    shared = Row("block", shapes.size, "ours", "", 0.0, "", rows[0].versions)
    return [*rows, replace(shared, measure="compressed / plain", value=seconds[ratio] / seconds[1])]


def decode(shapes: Shapes, repeats: int, peer: bool, tiled: bool) -> list[Row]:
    """Seconds and memory of decoding; by tiles it is ours alone."""
    rows = (
        compare("decode-tiled", shapes, repeats, False) if tiled else compare("decode", shapes, repeats, peer)
    )
    return [replace(row, benchmark="decode by tiles" if tiled else "decode") for row in rows]


def pipeline(shapes: Shapes) -> list[Row]:
    """Peak memory up to the end of each stage of a whole picture, with T5 streamed."""
    with Worker("ours", "pipeline", shapes) as worker:
        made, found = worker.peak(), worker.run()
        versions = worker.ready["versions"]
    rows = [Row("pipeline", shapes.size, "ours", "seconds", found["seconds"], "s", versions)]
    stages = {"files written": made} | found["peaks"]
    return rows + [
        Row("pipeline", shapes.size, "ours", f"peak memory after {stage}", value, "GB", versions)
        for stage, value in stages.items()
    ]


def machine() -> str:
    """Processor cores, memory and system, in a line."""
    import psutil

    return f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 1e9:.0f} GB, {platform.platform()}"


def write_csv(path: str | Path, rows: Iterable[Row]) -> Path:
    """The rows as a CSV file with a header, whole or not at all."""
    text = io.StringIO()
    names = [*asdict(Row("", 0, "", "", 0.0, "", "")), "machine"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(asdict(row) | {"machine": machine()})
    write_text(path, text.getvalue())
    return Path(path)


def read_csv(path: str | Path) -> list[Row]:
    """The rows of a file that ``write_csv`` wrote."""
    with Path(path).open(newline="") as file:
        return [
            Row(
                r["benchmark"],
                int(r["size"]),
                r["system"],
                r["measure"],
                float(r["value"]),
                r["unit"],
                r["versions"],
            )
            for r in csv.DictReader(file)
        ]
