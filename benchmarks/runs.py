"""Speed and memory of PixArt-Sigma with random weights: runs of the benchmarks and the rows of their table."""

from __future__ import annotations

import csv
import io
import itertools
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median

import psutil

from benchmarks.shapes import Shapes
from benchmarks.worker import Worker
from pixart_nb.core.io import write_text

#: Name of diffusers with networks that ``torch.compile`` has compiled.
COMPILED = "compiled"
#: Name of diffusers with prompts that are not padded.
TRIMMED = "trimmed"
#: Name of this kit with gradient checkpointing.
RECOMPUTE = "recompute"
#: Denoising steps of an image in the published table.
PUBLISHED_STEPS = 20
#: CPU time of all threads, which other programs on the machine change less than the wall clock.
CPU_TIME = "CPU time of a run"
#: Side in pixels from which a step of the table takes so long that none is repeated.
FEW_REPEATS_FROM = 1024


@dataclass(frozen=True)
class Row:
    """One measurement: benchmark, size in pixels, system, with the versions that ran."""

    benchmark: str
    size: int
    system: str
    measure: str
    value: float
    unit: str
    versions: str

    def __str__(self) -> str:
        work = f"{self.benchmark} {self.size}"
        return f"{work:<18}{self.system:<32}{self.measure:<40}{self.value:>12.4g} {self.unit}"


def run(
    benchmark: str, shapes: Shapes, repeats: int, peers: Sequence[str] = (), dtypes: Sequence[str] = ()
) -> list[Row]:
    """Run one benchmark at one size.

    Args:
        benchmark: ``denoise``, ``encode``, ``decode``, ``decode-tiled``, ``image``, ``train``, ``block``, ``pipeline``.
        repeats: Runs that count, after one that does not.
        peers: Other ``SYSTEMS`` that run it too, in turns, where they have the same benchmark.
        dtypes: Run each system in each of these; by default in that of ``shapes``.
    """
    if benchmark == "encode" and "diffusers" in peers:
        peers = *peers, TRIMMED
    runners = systems(shapes, () if benchmark == "decode-tiled" else peers, dtypes)
    if benchmark == "denoise":
        return denoise(runners, shapes, repeats)
    repeats = max(1, repeats)
    if benchmark == "block":
        return block(shapes, repeats)
    if benchmark == "pipeline":
        return pipeline(shapes)
    if benchmark == "train":
        return train(runners, shapes, repeats)
    # one system in memory at a time leaves room for more layers of T5
    return compare_systems(benchmark, runners, shapes, repeats, one_at_a_time=benchmark == "image")


def alternate(workers: Sequence[Worker], repeats: int, warm_up: bool = True) -> dict[str, list[dict]]:
    """Return every worker's answers by system: the workers run in turns, ``repeats`` times after one warm-up."""
    if warm_up:
        for worker in workers:
            worker.run()
    answers: dict[str, list[dict]] = {worker.system: [] for worker in workers}
    for _ in range(repeats):
        for worker in workers:
            answers[worker.system].append(worker.run())
    return answers


def systems(shapes: Shapes, peers: Sequence[str] = (), dtypes: Sequence[str] = ()) -> dict[str, Shapes]:
    """Return the name of each system that runs, with its dtype if there are several, and its shapes."""
    dtypes = dtypes or [shapes.dtype]
    return {
        f"{system} {dtype}" if len(dtypes) > 1 else system: replace(
            shapes, dtype=dtype, compiled=system == COMPILED, trimmed=system == TRIMMED, recompute=system == RECOMPUTE
        )
        for dtype in dtypes
        for system in ("mindspore", *peers)
    }


def start_workers(stack: ExitStack, work: str, runners: Mapping[str, Shapes]) -> list[Worker]:
    """Start a process for each of ``systems``, which ends with ``stack``."""
    workers = []
    for name, shapes in runners.items():
        system = name.split()[0]
        program = {COMPILED: "diffusers", TRIMMED: "diffusers", RECOMPUTE: "mindspore"}.get(system, system)
        worker = stack.enter_context(Worker(program, work, shapes))
        worker.system = name
        workers.append(worker)
    return workers


def table(shapes: Shapes, sizes: Sequence[int], training_sizes: Sequence[int], repeats: int) -> list[Row]:
    """Return the rows of the published table on this device: steps/s and training images/s at several sizes."""
    rows: list[Row] = []
    for size in sizes:
        few = size >= FEW_REPEATS_FROM
        sized = replace(shapes, size=size)
        rows += denoise(systems(sized), sized, 0 if few else repeats, profile=False)
    for size in training_sizes:
        sized = replace(shapes, size=size)
        rows += train(systems(sized), sized, repeats)
    return rows


def speedup(rows: list[Row], measure: str) -> list[Row]:
    """Return the seconds of each system divided by those of one before it, as rows.

    Of systems in several dtypes, only those are compared that share the system or the dtype.
    """
    own = [row for row in rows if row.measure == measure]
    return [
        replace(row, system=f"{other.system} / {row.system}", value=other.value / row.value, unit="x")
        for row, other in itertools.combinations(own, 2)
        if " " not in row.system or set(row.system.split()) & set(other.system.split())
    ]


def compare_systems(
    work: str, runners: Mapping[str, Shapes], shapes: Shapes, repeats: int, one_at_a_time: bool = False
) -> list[Row]:
    """Return medians of alternating repeats, and the ratios of the systems.

    Args:
        runners: What ``systems`` returns.
        one_at_a_time: Run each repeat in a new process, so that only one system is in memory.
    """
    answers: dict[str, list[dict]] = {}
    about: dict[str, tuple[str, float]] = {}
    groups = [{name: own} for name, own in runners.items()] if one_at_a_time else [runners]
    for _ in range(repeats if one_at_a_time else 1):
        for group in groups:
            with ExitStack() as stack:
                workers = start_workers(stack, work, group)
                for system, runs in alternate(workers, 1 if one_at_a_time else repeats).items():
                    answers.setdefault(system, []).extend(runs)
                about |= {worker.system: (worker.ready["versions"], worker.peak()) for worker in workers}
    rows = [
        Row(work, shapes.size, system, name, value, unit, versions)
        for system, (versions, peak) in about.items()
        for name, value, unit in (
            ("seconds", median(a["seconds"] for a in answers[system]), "s"),
            (CPU_TIME, median(a["cpu_seconds"] for a in answers[system]), "s"),
            ("peak memory", peak, "GB"),
        )
    ]
    return rows + speedup(rows, "seconds") + speedup(rows, CPU_TIME)


def denoise(runners: Mapping[str, Shapes], shapes: Shapes, repeats: int, profile: bool = True) -> list[Row]:
    """Return steps/s, seconds of 20 steps and, with ``profile``, the share of matrix products.

    A run takes ``shapes.steps`` steps; the median step stands for those that are missing to 20. With 0 ``repeats``
    the first run counts without its first step: for sizes at which a step takes minutes.
    """
    rows: list[Row] = []
    with ExitStack() as stack:
        workers = start_workers(stack, "denoise", runners)
        first = {worker.system: [worker.run()] for worker in workers}
        answers = alternate(workers, repeats, warm_up=False) if repeats else first
        for worker in workers:
            rows += _denoise_rows(worker, shapes, answers[worker.system])
        rows += speedup(rows, f"{PUBLISHED_STEPS} steps") + speedup(rows, CPU_TIME)
        for worker in workers:
            delay = first[worker.system][0]["steps"][0] - median_step(answers[worker.system])
            measure, versions = "first step minus a later one", worker.ready["versions"]
            rows.append(Row("denoise", shapes.size, worker.system, measure, delay, "s", versions))
        rows += _profile_rows(workers[0], shapes) if profile else []
    return rows


def median_step(answers: list[dict]) -> float:
    """Return the median seconds of a step, without the first step of each run."""
    return median(seconds for a in answers for seconds in a["steps"][1:] or a["steps"])


def _denoise_rows(worker: Worker, shapes: Shapes, answers: list[dict]) -> list[Row]:
    step = median_step(answers)
    whole = median(a["seconds"] for a in answers) + max(0, PUBLISHED_STEPS - shapes.steps) * step
    values = [
        (f"{PUBLISHED_STEPS} steps", whole, "s"),
        (CPU_TIME, median(a["cpu_seconds"] for a in answers), "s"),
        ("step", step, "s"),
        ("steps per second", 1 / step, "1/s"),
        ("peak memory", worker.peak(), "GB"),
    ]
    return [Row("denoise", shapes.size, worker.system, *value, worker.ready["versions"]) for value in values]


def _profile_rows(worker: Worker, shapes: Shapes) -> list[Row]:
    """Return the share of matrix products in the time, their rate, and the rate of one large product."""
    profile, versions = worker.profile(), worker.ready["versions"]
    share = profile["product_seconds"] / profile["seconds"]
    rate = profile["operations"] / profile["product_seconds"]
    values = [
        ("share of matrix products", share, ""),
        ("rate of matrix products", rate / 1e9, "GFLOP/s"),
        ("rate of the machine", profile["limit"] / 1e9, "GFLOP/s"),
        ("rate of matrix products / rate of the machine", rate / profile["limit"], ""),
        ("share of everything else", 1 - share, ""),
    ]
    return [Row(worker.work, shapes.size, "mindspore", *value, versions) for value in values]


def train(runners: Mapping[str, Shapes], shapes: Shapes, repeats: int) -> list[Row]:
    """Return seconds of a training step of one image, and training images/s.

    Weights, gradients and optimizer moments of XL/2 take 12 GB, so only one system is in memory at a time.
    """
    rows = compare_systems("train", runners, shapes, repeats, one_at_a_time=True)
    speed = [
        replace(row, measure="images per second", value=1 / row.value, unit="1/s")
        for row in rows
        if row.measure == "seconds" and row.unit == "s"
    ]
    return rows + speed


def block(shapes: Shapes, repeats: int) -> list[Row]:
    """Return seconds and memory of one block, plain and compressed by ``ratio`` (at least 2)."""
    rows, seconds = [], {}
    for ratio in (1, max(2, shapes.ratio)):
        with Worker("mindspore", "block", replace(shapes, ratio=ratio)) as worker:
            answers = alternate([worker], repeats, repeats > 1)["mindspore"]
            seconds[ratio] = median(answer["seconds"] for answer in answers)
            row = Row("block", shapes.size, "mindspore", "", 0.0, "", worker.ready["versions"])
            rows += [
                replace(row, measure=f"ratio {ratio}: seconds", value=seconds[ratio], unit="s"),
                replace(row, measure=f"ratio {ratio}: peak memory", value=worker.peak(), unit="GB"),
            ]
    share = seconds[max(seconds)] / seconds[1]
    return [*rows, replace(rows[0], measure="compressed / plain", value=share, unit="")]


def pipeline(shapes: Shapes) -> list[Row]:
    """Return the peak memory up to the end of each stage of a whole run, with T5 streamed."""
    with Worker("mindspore", "pipeline", shapes) as worker:
        prepared, answer = worker.peak(), worker.run()
        versions = worker.ready["versions"]
    rows = [Row("pipeline", shapes.size, "mindspore", "seconds", answer["seconds"], "s", versions)]
    stages = {"files written": prepared} | answer["peaks"]
    return rows + [
        Row("pipeline", shapes.size, "mindspore", f"peak memory after {stage}", value, "GB", versions)
        for stage, value in stages.items()
    ]


def processor() -> str:
    """Return the name of the processor, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def machine() -> str:
    """Return processor, cores, memory and system in one line."""
    memory = psutil.virtual_memory().total / 1e9
    return f"{processor()}, {os.cpu_count()} cores, {memory:.0f} GB, {platform.platform()}"


def write_csv(path: str | Path, rows: Iterable[Row]) -> Path:
    """Write the rows as a CSV file with a header."""
    text = io.StringIO()
    names = [*(field.name for field in fields(Row)), "machine"]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(asdict(row) | {"machine": machine()})
    write_text(path, text.getvalue())
    return Path(path)


def read_csv(path: str | Path) -> list[Row]:
    """Read the rows of a file that ``write_csv`` wrote."""
    with Path(path).open(newline="") as file:
        lines = [{name: line[name] for name in line if name != "machine"} for line in csv.DictReader(file)]
    return [Row(**line | {"size": int(line["size"]), "value": float(line["value"])}) for line in lines]
