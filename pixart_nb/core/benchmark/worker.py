"""A process that does one kind of work whenever it is told to, and says how long it took.

Each system computes in a process of its own, so that neither's threads or memory are in the other's way.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from importlib import import_module
from types import TracebackType

from pixart_nb.core.benchmark.shapes import Shapes
from pixart_nb.core.memory import mapped_pages

#: What begins a line that is an answer: libraries print lines of their own.
ANSWER = "@benchmark "
SYSTEMS = {"ours": "pixart_nb.core.benchmark.ours", "peer": "pixart_nb.core.benchmark.peer"}


class Worker:
    """A started process, with the work prepared. ``run()`` does it once; use it in a ``with`` block."""

    def __init__(self, system: str, work: str, shapes: Shapes):
        command = [sys.executable, "-m", "pixart_nb.core.benchmark.worker", system, work]
        self.system, self.work = system, work
        self.process = subprocess.Popen(
            [*command, json.dumps(shapes.to_dict())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONWARNINGS": "ignore"},
        )
        self.ready = self._answer()

    def run(self) -> dict:
        """Do the work: ``seconds``, ``processor`` seconds of all threads, and whatever it tells of itself."""
        return self._ask("run")

    def peak(self, mapped: bool = True) -> float:
        """The process' largest resident size so far, in GB (10**9 bytes); on request without pages of mapped files."""
        found = self._ask("peak")
        return found["resident"] - (0.0 if mapped else found["mapped"])

    def profile(self) -> dict:
        """Do the work once more, with the time of each kind of operator."""
        return self._ask("profile")

    def _ask(self, what: str) -> dict:
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        code = self.process.wait()
        raise RuntimeError(
            f"the process that measured {self.work} ({self.system}) ended with code {code}; what it wrote is above. "
            "Code -9 usually means that memory ran out: give a smaller --depth, --text-layers or --size"
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        if kind is not None:
            self.process.terminate()
        self.process.wait()


def serve(system: str, work: str, shapes: Shapes) -> None:
    """Prepare, then answer every line of the input until it ends."""
    module = import_module(SYSTEMS[system])
    imported = time.perf_counter()
    made = module.WORK[work](shapes)
    _say({"versions": module.versions(), "prepared": time.perf_counter() - imported})
    mapped = mapped_pages()
    for line in sys.stdin:
        asked = line.strip()
        if asked == "peak":
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            _say({"resident": resident / 1e9, "mapped": mapped / 1e9})
        elif asked == "profile":
            from pixart_nb.core.benchmark.profile import profiled

            _say(profiled(made))
        else:
            started, spent = time.perf_counter(), time.process_time()
            told = made()
            passed = {"seconds": time.perf_counter() - started, "processor": time.process_time() - spent}
            mapped = max(mapped, mapped_pages())  # the system may drop them while nothing is asked
            _say(passed | told)


def _say(values: dict) -> None:
    print(f"{ANSWER}{json.dumps(values)}", flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], Shapes.from_dict(json.loads(sys.argv[3])))
