"""Memory and time of converting a checkpoint of PixArt-Sigma XL/2's size: 0.6 billion random weights, 1.2 GB in fp16.

    python benchmarks/convert_memory.py

The file is made in the official layout, then converted around: .pth -> diffusers folder -> .ckpt -> .pth, and once to
another dtype. Every conversion runs in a process of its own. Three numbers are read from Linux: the largest resident
size; how far it lies above what the process held before it opened the file; and the largest part of it that is the
process's own (anonymous), which leaves out pages of the mapped source that the system can drop at any time. Each is
given in sizes of the source. The target's numbers are compared with the source's, bit for bit, after each conversion.
The command fails if a peak is above 1.3 sizes of the source, or a bit differs.

Measured on two busy CPU cores: peaks of 0.34 to 0.40 sizes (0.42 to 0.49 GB, of which Python and
MindSpore are 0.40), 5 to 13 s for each conversion that keeps the bits, 21 to 38 s to another dtype.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

#: (source, target, dtype) of each conversion.
ROUTE = [
    ("official.pth", "diffusers", "keep"),
    ("diffusers", "back.ckpt", "keep"),
    ("back.ckpt", "back.pth", "keep"),
    ("official.pth", "bf16.safetensors", "bf16"),
]
SAMPLE_SIZE = 128
#: Largest peak that is allowed, in sizes of the source.
LIMIT = 1.3


def measure(source: Path, target: Path, dtype: str) -> None:
    """Convert and print the numbers as JSON. For a process of its own."""
    from pixart_nb.core.checkpoints.convert import convert, plan_conversion

    before, watch = memory("VmHWM"), Watch()
    started = time.perf_counter()
    with watch:
        convert(plan_conversion(source, target, sample_size=SAMPLE_SIZE, dtype=dtype))
    seconds = time.perf_counter() - started
    print(json.dumps({"peak": memory("VmHWM"), "before": before, "own": watch.peak, "seconds": seconds}))


class Watch:
    """The largest anonymous resident size while a block of code runs, looked at every few milliseconds."""

    def __init__(self):
        self.peak, self.done = memory("RssAnon"), threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self.done.wait(0.003):
            self.peak = max(self.peak, memory("RssAnon"))

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def memory(name: str) -> float:
    """A line of /proc/self/status in GB. (ru_maxrss would count the process that started this one, too.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024 / 1e9


def same_numbers(source: Path, target: Path, dtype: str) -> bool:
    """Whether the target holds the source's numbers, rounded if another dtype was asked for, under official names."""
    from pixart_nb.core.checkpoints.convert import DTYPES
    from pixart_nb.core.checkpoints.files import open_checkpoint
    from pixart_nb.core.checkpoints.layouts import to_official_names
    from pixart_nb.core.checkpoints.lazy_tensor import same_bits

    first, second = (to_official_names(open_checkpoint(path)).tensors for path in (source, target))
    return same_bits({name: t.astype(DTYPES[dtype] or t.dtype) for name, t in first.items()}, second)


def report(size: float, found: Mapping[str, float]) -> str:
    """One line: peak, growth and own memory in sizes of the source."""
    parts = {"peak": found["peak"], "grown by": found["peak"] - found["before"], "own": found["own"]}
    sizes = [f"{name} {value:.2f} GB = {value / size:.2f} x" for name, value in parts.items()]
    return "   ".join([*sizes, f"{found['seconds']:.1f} s"])


def measured(source: Path, target: Path, dtype: str) -> bool:
    """Run and report one conversion; whether it kept the numbers and the limit."""
    size = sum(file.stat().st_size for file in (source, *source.glob("*.safetensors"))) / 1e9
    command = [sys.executable, __file__, "--measure", str(source), str(target), dtype]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    same = same_numbers(source, target, dtype)
    kept = "the same bits" if same else "DIFFERENT BITS"
    print(
        f"{source.name} ({size:.2f} GB) -> {target.name} ({dtype}): {kept}\n  {report(size, found)}",
        flush=True,
    )
    return same and found["peak"] <= LIMIT * size


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=28, help="blocks; XL/2 has 28")
    parser.add_argument(
        "--folder", type=Path, help="where to write, about five times the file; a temporary one"
    )
    parser.add_argument("--measure", nargs=3, metavar=("SOURCE", "TARGET", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(Path(options.measure[0]), Path(options.measure[1]), options.measure[2])
        return 0
    from pixart_nb.core import PixArtConfig
    from pixart_nb.core.checkpoints.convert import write_random

    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        write_random(folder / ROUTE[0][0], PixArtConfig(depth=options.depth), dtype="fp16")
        return 0 if all(measured(folder / a, folder / b, dtype) for a, b, dtype in ROUTE) else 1


if __name__ == "__main__":
    sys.exit(main())
