"""A process that runs one benchmark on request and reports its time.

Each system runs in a process of its own, so that threads and memory of the other do not disturb it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from types import TracebackType

from benchmarks.shapes import Shapes
from pixart_nb.core.memory import mapped_pages

#: Start of a line that is an answer; libraries print lines of their own.
ANSWER = "@benchmark "
#: System -> module with its benchmarks.
SYSTEMS = {"mindspore": "benchmarks.mindspore_work", "diffusers": "benchmarks.diffusers_work"}
ROOT = Path(__file__).resolve().parents[1]


class Worker:
    """Started process with a prepared benchmark. ``run()`` runs it once. Use it in a ``with`` block."""

    def __init__(self, system: str, work: str, shapes: Shapes):
        command = [sys.executable, "-m", "benchmarks.worker", system, work]
        self.system, self.work = system, work
        self.process = subprocess.Popen(
            [*command, json.dumps(shapes.to_dict())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
            cwd=ROOT,
        )
        self.ready = self._answer()

    def run(self) -> dict:
        """Run once. Return ``seconds``, ``cpu_seconds`` of all threads, and what the benchmark adds."""
        return self._ask("run")

    def peak(self, mapped: bool = True) -> float:
        """Return the largest resident size so far in GB (10**9 bytes), with or without pages of mapped files."""
        answer = self._ask("peak")
        return answer["resident"] - (0.0 if mapped else answer["mapped"])

    def profile(self) -> dict:
        """Run once more and return the time of each type of operator."""
        return self._ask("profile")

    def _ask(self, request: str) -> dict:
        self.process.stdin.write(f"{request}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        code = self.process.wait()
        raise RuntimeError(
            f"the process that measured {self.work} ({self.system}) ended with exit code {code}; its output is above. "
            "Exit code -9 usually means that memory ran out: choose a smaller --depth, --text_layers or --size"
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, error_type: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        if error_type is not None:
            self.process.terminate()
        self.process.wait()


def serve(system: str, work: str, shapes: Shapes) -> None:
    """Prepare the benchmark, then answer every line of the standard input."""
    module = import_module(SYSTEMS[system])
    imported = time.perf_counter()
    benchmark = module.WORK[work](shapes)
    _answer({"versions": module.versions(), "prepared": time.perf_counter() - imported})
    mapped = mapped_pages()
    for line in sys.stdin:
        request = line.strip()
        if request == "peak":
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            _answer({"resident": resident / 1e9, "mapped": mapped / 1e9})
        elif request == "profile":
            from benchmarks.profile import profiled

            _answer(profiled(benchmark))
        else:
            started, spent = time.perf_counter(), time.process_time()
            result = benchmark()
            times = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - spent}
            mapped = max(mapped, mapped_pages())  # the system may drop them later
            _answer(times | result)


def _answer(values: dict) -> None:
    print(f"{ANSWER}{json.dumps(values)}", flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], Shapes.from_dict(json.loads(sys.argv[3])))
