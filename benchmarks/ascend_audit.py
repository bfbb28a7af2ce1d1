"""Operators that a step dispatches on Ascend, counted on a CPU: ``make ascend-audit``.

Small networks take the Ascend path (``ascend_cases``). MindSpore's debug log names every operator that PyNative
dispatches, and MindSpore's Ascend library those that have an aclnn kernel; the others take the older, slower path of
single operators. The number for XL/2 is that of one block times 28 and the rest: the number of operators of a
block depends neither on its width nor on the size of the image. **No time is measured.**
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from rich.console import Console
from rich.table import Table

DEPTH = 28
#: Most operators of a denoising step of XL/2 with guidance, by image size.
LIMITS = {256: 900, 512: 900, 1024: 1100, 2048: 1500}
#: KV compression of all blocks: operator and ratio.
COMPRESSIONS = {
    "no compression": (None, 1),
    "conv 2": ("conv", 2),
    "conv 4": ("conv", 4),
    "mean 2": ("mean", 2),
    "ave 2": ("ave", 2),
}
#: Blocks that the published ControlNet copies.
COPIES = 13
#: Cases whose operators are listed one by one.
OTHER_CASES = (
    "T5 layers=1", "T5 layers=2", "T5 layers=1 load=int8", "T5 layers=1 load=4bit",
    "VAE part=decoder", "VAE part=decoder dtype=float16", "VAE part=decoder tile=64",
    "VAE part=encoder", "VAE part=encoder tile=64",
    "training depth=1", "training depth=2", "training optimizer=came", "training dtype=float32",
    "training lora=1 dora=1", "training objective=lcm", "training objective=lcm lora=1", "training objective=dmd",
    "training depth=2 copies=1", "update optimizer=adamw", "update optimizer=came",
    "denoise dtype=float32", "denoise traced=1",
)  # fmt: skip
#: Names in the log that are no kernel: views of a tensor, and conversions that call Cast.
VIEWS = {
    "Reshape", "ExpandDims", "Squeeze", "Transpose", "BroadcastTo", "StridedSlice", "Split", "SplitTensor", "Chunk",
}  # fmt: skip
CASTS = {"ToDtype"}
#: Operators without an aclnn kernel, and why they stay.
REASONS = {"StopGradient": "no kernel: it marks where a gradient ends, once in the loss and for each matrix of a DoRA"}
_LINE = re.compile(r"Run Pyboost_(\w+?) start|RunOp name: (\w+)|ProcessViewOp\] Start, op:(\w+)|^##(.*)")


@dataclass
class Section:
    """Operators and reads to the host between two marks."""

    operators: Counter = field(default_factory=Counter)
    reads: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Number of dispatched operators, views included."""
        return self.operators.total()

    def old_path(self) -> Counter:
        """Operators that have no aclnn kernel."""
        return Counter({name: n for name, n in self.operators.items() if path_of(name) == "old path"})

    def __sub__(self, other: Section) -> Section:
        difference = Counter(self.operators)
        difference.subtract(other.operators)
        return Section(Counter({name: n for name, n in difference.items() if n}))


def path_of(operator: str) -> str:
    """Return how Ascend runs an operator: as a ``view``, by ``aclnn`` or on the ``old path``."""
    if operator.removesuffix("View").removesuffix("Ext") in VIEWS or operator.endswith("View"):
        return "view"
    return "aclnn" if operator in aclnn_kernels() or operator in CASTS else "old path"


@cache
def aclnn_kernels() -> frozenset[str]:
    """Return the operators that MindSpore's Ascend library has an aclnn kernel for."""
    import mindspore

    library = Path(mindspore.__file__).parent / "lib/plugin/libmindspore_ops_ascend.so"
    classes = re.finditer(rb"N9mindspore6kernel7pyboost(\d+)(\w+)", library.read_bytes())
    names = {match[2][: int(match[1])].decode() for match in classes}
    return frozenset(name.removesuffix("Ascend") for name in names if name.endswith("Ascend"))


def parse(log: Iterable[str]) -> dict[str, Section]:
    """Return the sections of a log, by name, from its lines."""
    sections: dict[str, Section] = {}
    section, within = Section(), False
    for line in log:
        match = _LINE.search(line)
        if match is None:
            continue
        word, _, rest = (match[4] or "").partition(" ")
        if word == "SECTION":
            section = sections.setdefault(rest, Section())
        elif word == "READ":
            section.reads += [] if within else [rest]
        elif word in ("KERNEL", "END"):
            within = word == "KERNEL"
            section.operators.update([rest] if within else [])
        elif not within:
            section.operators.update([match[1] or match[2] or match[3]])
    return sections


def sections_of(cases: Sequence[str]) -> dict[str, Section]:
    """Run cases in a process of their own and return what each dispatched."""
    environment = os.environ | {"PIXART_NB_PIN_THREADS": "0", "PIXART_NB_DEVICE": "CPU"}
    environment |= {"GLOG_v": "3", "MS_SUBMODULE_LOG_v": "{PYNATIVE:0}"}  # the whole debug log is many times longer
    command, last = [sys.executable, "-m", "benchmarks.ascend_cases", *cases], deque(maxlen=30)

    def lines(log: Iterable[str]) -> Iterator[str]:
        for line in log:
            if not line.startswith("["):
                last.append(line)
            yield line

    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
        cwd=Path(__file__).parents[1],
    ) as process:  # fmt: skip
        sections = parse(lines(process.stderr))
    if process.returncode:
        raise RuntimeError("the cases failed:\n" + "".join(last))
    return sections


@dataclass(frozen=True)
class StepCount:
    """Operators of a denoising step of XL/2: of one block, of a copied block of a ControlNet, and of the rest.

    ``passes`` of the transformer: the limits are those of one.
    """

    size: int
    name: str
    block: Section
    rest: Section
    reads: list[str]
    copy: Section = field(default_factory=Section)
    passes: int = 1

    @property
    def count(self) -> int:
        """Operators of the whole step, views included."""
        return DEPTH * self.block.count + COPIES * self.copy.count + self.rest.count

    @property
    def limit(self) -> int:
        """Most operators that are allowed."""
        return self.passes * LIMITS[self.size]

    @property
    def old_path(self) -> Counter:
        """Operators that have no aclnn kernel, anywhere in the step."""
        return self.block.old_path() + self.copy.old_path() + self.rest.old_path()


def count_steps(sizes=tuple(LIMITS), compressions=tuple(COMPRESSIONS)) -> list[StepCount]:
    """Count the operators of a denoising step for every size and compression."""
    steps, cases = [], {}
    for size, name in itertools.product(sizes, compressions):
        operator, ratio = COMPRESSIONS[name]
        options = f"size={size}" + (f" operator={operator} ratio={ratio}" if operator else "")
        cases[size, name] = [f"denoise depth={depth} {options}" for depth in (1, 2)]
    sections = sections_of([name for pair in cases.values() for name in pair])
    for (size, name), pair in cases.items():
        one, two = (sections[case] for case in pair)
        steps.append(StepCount(size, name, two - one, one - (two - one), two.reads))
    return steps


def count_other_steps(size: int = 1024) -> list[StepCount]:
    """Count the operators of a step with perturbed attention and of one with a ControlNet."""
    cases = {
        "perturbed attention": ["depth=1 perturbed=1", "depth=2 perturbed=1"],
        "ControlNet": ["depth=2 copies=1", "depth=3 copies=1", "depth=3 copies=2"],
    }
    names = {kind: [f"denoise size={size} {case}" for case in group] for kind, group in cases.items()}
    sections = sections_of([name for group in names.values() for name in group])
    one, two = (sections[name] for name in names["perturbed attention"])
    steps = [StepCount(size, "perturbed attention", two - one, one - (two - one), two.reads, passes=2)]
    small, block, copy = (sections[name] for name in names["ControlNet"])
    block, copy = block - small, copy - block
    return [*steps, StepCount(size, "ControlNet", block, small - block - block - copy, small.reads, copy)]


def step_table(steps: list[StepCount]) -> tuple[Table, list[str]]:
    """Return the table of denoising steps, and the steps that are above a limit."""
    headings = "size", "blocks", "per block", "the rest", "step", "at most", "old path", "reads"
    table, bad = Table(*headings, title="Operators of a denoising step of XL/2 with guidance"), []
    for step in steps:
        old, reads = dict(step.old_path), len(step.reads)
        if step.count > step.limit or old or reads != step.passes:
            bad.append(f"{step.size}, {step.name}")
        per_block = f"{step.block.count}" + (f", {COPIES} copies {step.copy.count}" if step.copy.count else "")
        row = step.size, step.name, per_block, step.rest.count, step.count, step.limit, old or "none", reads
        table.add_row(*map(str, row))
    return table, bad


def operator_table(name: str, section: Section) -> tuple[Table, list[str]]:
    """Return the table of the operators of a section, and those on the old path that have no reason."""
    title = f"{name}: {section.count} operators, {len(section.reads)} reads"
    table, bad = Table("operator", "number", "path", "why", title=title), []
    for operator, number in section.operators.most_common():
        path = path_of(operator)
        reason = REASONS.get(operator, "") if path == "old path" else ""
        if path == "old path" and not reason:
            bad.append(f"{name}: {operator}")
        table.add_row(operator, str(number), path, reason)
    return table, bad


def main() -> None:
    """Print all tables; exit with an error above a limit or for an operator without a reason."""
    console = Console(width=150)
    tables = [step_table(count_steps() + count_other_steps())]
    tables += [operator_table(name, section) for name, section in sections_of(OTHER_CASES).items() if name != "end"]
    for table, _ in tables:
        console.print(table)
    bad = [place for _, places in tables for place in places]
    if bad:
        sys.exit("above a limit, or without a reason: " + "; ".join(bad))


if __name__ == "__main__":
    main()
