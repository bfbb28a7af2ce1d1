"""``with trace(model) as t:`` keeps the queries and keys of a run, in 16 bits each, and changes nothing."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from pixart_nb.core import memory
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.hooks.maps import Kept
from pixart_nb.core.hooks.packed import Packed, pack, packed_bytes
from pixart_nb.core.hooks.record import Trace
from pixart_nb.core.hooks.seam import Call, Observer, Part, Remembered, Run, attached, parts_of
from pixart_nb.core.hooks.selection import (
    Layers,
    Numbers,
    as_list,
    check_steps,
    head_numbers,
    is_cross,
    layer_names,
    step_numbers,
)
from pixart_nb.core.hooks.words import Text

ROWS = ("conditional", "unconditional", "all")
#: Share of the free memory (or of the free disk) that a trace may take unless told.
FREE_SHARE = 0.5


class TraceTooLargeError(PixArtNBError):
    """A trace that would take more memory than it may."""


@contextmanager
def trace(
    model: Any,
    layers: Layers = None,
    timesteps: Sequence[float] | None = None,
    heads: Numbers = None,
    kinds: Sequence[str] = ("self", "cross"),
    *,
    steps: Numbers = None,
    rows: str = "conditional",
    memory_limit: int | None = None,
    folder: str | Path | None = None,
    announce: Callable[[str], None] | None = print,
) -> Iterator[Trace]:
    """Keep queries and keys of one sampling run (or of calls of a transformer) for maps on demand.

    Args:
        model: a pipeline, or a transformer. Words are known where a pipeline encodes the prompt.
        layers: numbers, or names such as ``blocks.14.attn``; None is all.
        timesteps: those of the run to keep (as ``pipe.plan(20).timesteps`` has them); or ``steps``: their numbers,
            counted from 0. None is all.
        heads: numbers; None is all.
        kinds: of ``self`` and ``cross``.
        rows: of a guided batch, ``conditional`` (the rows that follow the prompt), ``unconditional`` or ``all``.
        memory_limit: bytes that the trace may take; half of what is free unless told.
        folder: keep the arrays in unnamed files there instead of in memory; they go with the trace.
        announce: is given one line that says, before the run, how much memory the trace will take. None: silent.

    Raises:
        ValueError: a layer, head, kind, step or timestep that there is not (the message lists what there is), or a
            second run in the same block. TraceTooLargeError, before the run: more memory than the limit.
    """
    net, _ = parts_of(model)
    record = Trace(layer_names(len(net.blocks), layers, kinds), head_numbers(net.config.num_heads, heads))
    record.model = model_mark(net)
    recorder = Recorder(record, timesteps, steps, rows, memory_limit, folder, announce)
    try:
        with attached(model, recorder):
            yield record
    finally:
        recorder.drop_unfinished()
    recorder.check_complete()


class Recorder(Part):
    """Fills a trace. Comes last, so that it keeps what is really computed."""

    order = 2

    def __init__(self, record: Trace, timesteps, steps, rows: str, limit: int | None, folder, announce):
        if timesteps is not None and steps is not None:
            raise PixArtNBError("both timesteps and steps were given; give one of them")
        if rows not in ROWS:
            raise PixArtNBError(f"rows is {rows!r}; expected one of {', '.join(ROWS)}")
        self.trace, self.which, self.limit, self.announce = record, rows, limit, announce
        self.timesteps = None if timesteps is None else [float(t) for t in as_list(timesteps)]
        self.steps = step_numbers(steps)
        self.folder = None if folder is None else Path(folder)
        self.run: Run | None = None
        self.places: list[int] = []  # rows of the batch that are kept
        self.shared = Remembered()  # a caption's keys are the same at every step

    # ---- before the run

    def expect(self, run: Run, observer: Observer) -> None:
        if self.trace.kept:
            raise PixArtNBError(
                "this trace already holds a run; open another `with trace(...)` for the next one"
            )
        planned = [float(t) for t in run.timesteps]
        check_steps(self.steps, planned)
        if missing := [t for t in self.timesteps or () if t not in planned]:
            raise PixArtNBError(f"the run does not visit timesteps {missing}; it visits {planned}")
        self._open(run, observer)
        count = sum(self._wants(step, timestep) for step, timestep in enumerate(planned))
        self._admit(count, run, observer)

    def _open(self, run: Run, observer: Observer) -> None:
        self.run, every = run, range(run.batch)
        rows = {
            "conditional": run.conditional,
            "unconditional": [row for row in every if row not in run.conditional],
        }
        self.places = list(rows.get(self.which, every))
        if not self.places:
            raise PixArtNBError(
                "rows is 'unconditional', but a run without guidance has none; use 'conditional'"
            )
        names = ["conditional" if place in run.conditional else "unconditional" for place in self.places]
        self.trace.labels = [
            f"{name} {place % run.rows}" for name, place in zip(names, self.places, strict=True)
        ]
        self.trace.grid = run.grid
        self.trace.changes = [part.description for part in observer.parts if part.description]

    def _admit(self, count: int, run: Run, observer: Observer) -> None:
        """Say how much memory the trace takes with ``count`` more steps, and refuse them if it is too much."""
        t = self.trace
        size, count = t.nbytes + self._bytes_of(count, run, observer), len(t.steps) + count
        if self.limit is None:
            self.limit = int(self._free() * FREE_SHARE)
        said = (
            f"{len(t.names)} layers x {count} steps x {len(self.places)} of {run.batch} rows, {len(t.heads)} heads, "
            f"{t.grid[0]}x{t.grid[1]} tokens"
        )
        if size > self.limit:
            raise TraceTooLargeError(
                f"this trace would take {said_bytes(size)} ({said}); the limit is {said_bytes(self.limit)}. Keep fewer "
                "layers, steps or heads, raise memory_limit, or give a folder to keep it in"
            )
        if self.announce is not None and not t.kept:
            self.announce(f"trace: {said_bytes(size)} ({said}); the limit is {said_bytes(self.limit)}")

    def _free(self) -> int:
        if self.folder is None:
            return memory.available()
        self.folder.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self.folder).free

    def _bytes_of(self, count: int, run: Run, observer: Observer) -> int:
        """Bytes of queries and keys of ``count`` steps; of a prompt the most tokens that it may have."""
        vectors = sets = 0
        for name in self.trace.names:
            ratio = observer.compression(name, run).ratio
            keys = run.length if is_cross(name) else count * (run.grid[0] // ratio) * (run.grid[1] // ratio)
            vectors += count * run.grid[0] * run.grid[1] + keys
            sets += count + (1 if is_cross(name) else count)
        copies, config = len(self.places) * len(self.trace.heads), observer.net.config
        return packed_bytes(vectors * copies, config.hidden_size // config.num_heads, sets * copies)

    # ---- during the run

    def step(self, run: Run, observer: Observer) -> None:
        if run is not self.run:
            if self.trace.kept:
                raise PixArtNBError(
                    "this trace already holds a run; open another `with trace(...)` for the next one"
                )
            self._open(run, observer)
        if run.timesteps is None and self._wants(run.index, run.timestep):  # nobody said how many steps come
            self._admit(1, run, observer)

    def _wants(self, step: int, timestep: float) -> bool:
        if self.steps is not None:
            return step in self.steps
        return self.timesteps is None or timestep in self.timesteps

    def before(self, call: Call) -> None:
        run = call.run
        if not self._wants(run.index, run.timestep):
            return
        self.trace.timestep_of[run.index] = run.timestep
        if is_cross(call.name):
            self._keep_texts(call)
        if call.name in self.trace.names:
            mask = None if call.mask is None else call.mask.asnumpy().astype(bool)[self.places]
            bias = None if call.bias is None else call.bias[self.places][:, self.trace.heads]
            made = (call.compression.ratio, call.compression.operator)
            self.trace.kept[call.name, run.index] = Kept(
                self._packed(call.q, call.name), self._keys(call), mask, bias, float(call.scale), *made
            )

    def _keep_texts(self, call: Call) -> None:
        """Which prompts are in force at this step: an intervention may have swapped them."""
        texts = [call.texts[place] or Text() for place in self.places]
        if texts not in self.trace.texts:
            self.trace.texts.append(texts)
        self.trace.text_of[call.run.index] = self.trace.texts.index(texts)

    def _keys(self, call: Call) -> Packed:
        if not is_cross(call.name):
            return self._packed(call.k, call.name)
        return self.shared(call.name, (call.k,), lambda: self._packed(call.k, call.name))

    def _packed(self, x: ms.Tensor, name: str) -> Packed:
        """Kept rows and heads of (B, H, N, d)."""
        array = (x if x.dtype in (ms.float32, ms.float16) else x.astype(ms.float32)).asnumpy()
        try:
            return pack(array, self.places, self.trace.heads, self.folder)
        except ValueError as error:
            raise PixArtNBError(f"{name} at step {self.run.index}: {error}; leave this layer out") from None

    # ---- after it

    def drop_unfinished(self) -> None:
        """Forget a step in whose middle the run was stopped."""
        t = self.trace
        for step in t.steps:
            if any((name, step) not in t.kept for name in t.names):
                del t.timestep_of[step]
                t.text_of.pop(step, None)
                t.kept = {key: kept for key, kept in t.kept.items() if key[1] != step}

    def check_complete(self) -> None:
        """After a block that ended without an error: say that nothing was kept, or which steps never came."""
        if self.run is None:
            warnings.warn("nothing was traced: the model did not run in this block", stacklevel=4)
        elif self.run.timesteps is None:
            there = self.trace.timestep_of
            missing = [s for s in self.steps or () if s not in there]
            missing += [t for t in self.timesteps or () if t not in there.values()]
            if missing:
                raise PixArtNBError(f"the run never came to {missing}; it had {there} (step: timestep)")


def model_mark(net: Any) -> dict[str, Any]:
    """What tells one model from another: its configuration, and a digest of a sample of every weight."""
    digest = sha256()
    for name, weight in net.parameters_and_names():
        values = weight.reshape(-1)[:: max(1, weight.size // 64)].astype(ms.float32).asnumpy()
        digest.update(name.encode() + values.tobytes())
    return {"config": net.config.to_dict(), "weights": digest.hexdigest()}


def said_bytes(size: int) -> str:
    """A size for people."""
    unit, factor = next((u, f) for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= f or u == "kB")
    return f"{size / factor:.{2 if unit == 'GB' else 1}f} {unit}"
