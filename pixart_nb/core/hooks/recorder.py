"""``with trace(model) as t:`` records the queries and keys of a run, in 16 bits each, and changes nothing."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pixart_nb.core import memory
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError, pluralized
from pixart_nb.core.hooks.attention_maps import LayerRecord, Packed, pack
from pixart_nb.core.hooks.hook_points import AttentionCall, Hook, HookedRun, PerLayer, attached, transformer_of
from pixart_nb.core.hooks.selection import Layers, Numbers, Text, as_list, head_numbers, is_cross, layer_names
from pixart_nb.core.hooks.trace import Trace
from pixart_nb.core.hooks.trace_files import model_fingerprint

ROWS = ("conditional", "unconditional", "all")
#: Share of the free memory (or disk) that a trace may take by default.
FREE_SHARE = 0.5


class TraceTooLargeError(PixArtNBError):
    """A trace needs more memory than its limit."""


@contextmanager
def trace(
    model,
    layers: Layers = None,
    timesteps: Sequence[float] | None = None,
    heads: Numbers = None,
    attention: str | Sequence[str] = ("self", "cross"),
    *,
    steps: Numbers = None,
    rows: str = "conditional",
    memory_limit: int | None = None,
    folder: str | Path | None = None,
    announce: Callable[[str], None] | None = print,
) -> Iterator[Trace]:
    """Record queries and keys of one sampling run (or of calls of a transformer) for maps on demand.

    Args:
        model: a pipeline, or a transformer. Words are available if a pipeline encodes the prompt.
        layers: numbers, or names such as ``blocks.14.attn``; None is all.
        timesteps: timesteps of the run to record (of ``pipe.plan(20).timesteps``), or ``steps``: their numbers, counted
            from 0. None is all.
        heads: numbers; None is all.
        attention: ``self``, ``cross`` or both.
        rows: rows of a guided batch: ``conditional`` (they follow the prompt), ``unconditional`` or ``all``.
        memory_limit: bytes that the trace may take; None is half of the free memory.
        folder: keep the arrays in unnamed files there instead of in memory; they disappear with the trace.
        announce: called before the run with a line that says how much memory the trace takes. None is silent.

    Raises:
        PixArtNBError: a layer, head, step or timestep that the model or the run does not have (the message lists what
            there is), or a second run in the same block. TraceTooLargeError, before the run: too little memory.
    """
    net = transformer_of(model)
    record = Trace(layer_names(len(net.blocks), layers, attention), head_numbers(net.config.num_heads, heads))
    record.model = model_fingerprint(net)
    recorder = Recorder(record, timesteps, steps, rows, memory_limit, folder, announce)
    try:
        with attached(model, recorder):
            yield record
    finally:
        recorder.drop_unfinished()
    recorder.check_complete()


class Recorder(Hook):
    """Hook of ``trace``. Runs last, so that it records the attention that is really computed."""

    order = 2

    def __init__(self, record: Trace, timesteps, steps, rows: str, limit: int | None, folder, announce):
        super().__init__(record.names, steps)
        if timesteps is not None and steps is not None:
            raise PixArtNBError("both timesteps and steps were given; give one of them")
        if rows not in ROWS:
            raise PixArtNBError(f"rows is {rows!r}; expected one of {', '.join(ROWS)}")
        self.trace, self.row_choice, self.limit, self.announce = record, rows, limit, announce
        self.timesteps = None if timesteps is None else [float(t) for t in as_list(timesteps)]
        self.folder = None if folder is None else Path(folder)
        self.run: HookedRun | None = None
        self.rows: list[int] = []  # rows of the batch that are recorded
        self.caption_keys = PerLayer()

    # ---- before the run

    def on_plan(self, run: HookedRun) -> None:
        planned = [float(t) for t in run.timesteps]
        super().on_plan(run)
        if missing := [t for t in self.timesteps or () if t not in planned]:
            raise PixArtNBError(f"the run does not visit timesteps {missing}; it visits {planned}")
        self._open(run)
        self._check_size(sum(self._recorded(step, timestep) for step, timestep in enumerate(planned)), run)

    def _open(self, run: HookedRun) -> None:
        if self.trace.records:
            raise PixArtNBError("this trace already holds a run; open another `with trace(...)` for the next one")
        self.run, batch = run, range(run.batch)
        rows = {"conditional": run.conditional, "unconditional": range(run.conditional[0])}
        self.rows = list(rows.get(self.row_choice, batch))
        if not self.rows:
            raise PixArtNBError("rows is 'unconditional', but a run without guidance has none; use 'conditional'")
        self.trace.grid = run.grid
        self.trace.labels = [f"{'un' * (row not in run.conditional)}conditional {row % run.rows}" for row in self.rows]
        self.trace.changes = [hook.description for hook in self.manager.hooks if hook.description]

    def _check_size(self, count: int, run: HookedRun) -> None:
        """Announce the memory that the trace takes with ``count`` more steps, and refuse them if it is too much."""
        t = self.trace
        size, count = t.nbytes + self._bytes_of(count, run), len(t.steps) + count
        if self.limit is None:
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
            free = memory.available_on_host() if self.folder is None else shutil.disk_usage(self.folder).free
            self.limit = int(free * FREE_SHARE)
        blocks, steps, heads = map(pluralized, (t.block_count, count, len(t.heads)), ("block", "step", "head"))
        parts = f"{blocks} x {steps} x {len(self.rows)} of {run.batch} rows, {heads}"
        need = (
            f"{format_bytes(size)} ({parts}, {t.grid[0]}x{t.grid[1]} tokens); the limit is {format_bytes(self.limit)}"
        )
        if size > self.limit:
            advice = "Record fewer layers, steps or heads, raise memory_limit, or give a folder to keep it in"
            raise TraceTooLargeError(f"this trace would take {need}. {advice}")
        if self.announce is not None and not t.records:
            self.announce(f"trace: {need}")

    def _bytes_of(self, count: int, run: HookedRun) -> int:
        """Return the bytes of queries and keys of ``count`` steps, with as many prompt tokens as there may be."""
        vectors = sets = 0
        for name in self.trace.names:
            ratio = self.manager.compression(name, run).ratio
            keys = run.length if is_cross(name) else count * (run.grid[0] // ratio) * (run.grid[1] // ratio)
            vectors += count * run.grid[0] * run.grid[1] + keys
            sets += count + (1 if is_cross(name) else count)
        size = self.manager.net.config.hidden_size // self.manager.net.config.num_heads
        return len(self.rows) * len(self.trace.heads) * (vectors * (2 * size + 4) + sets * 4 * size)

    # ---- during the run

    def on_step(self, run: HookedRun) -> None:
        if run is not self.run:
            self._open(run)
        if run.timesteps is None and self._recorded(run.index, run.timestep):  # the number of steps is not known
            self._check_size(1, run)

    def _recorded(self, step: int, timestep: float) -> bool:
        if self.steps is not None:
            return step in self.steps
        return self.timesteps is None or timestep in self.timesteps

    def before(self, call: AttentionCall) -> None:
        run, t = call.run, self.trace
        if not run.first or not self._recorded(run.index, run.timestep):
            return
        t.timestep_of[run.index] = run.timestep
        if is_cross(call.name):  # an intervention may have swapped the prompts
            texts = [call.texts[row] or Text() for row in self.rows]
            if texts not in t.texts:
                t.texts.append(texts)
            t.text_of[run.index] = t.texts.index(texts)
        if call.name in t.names:
            t.records[call.name, run.index] = self._record(call)

    def _record(self, call: AttentionCall) -> LayerRecord:
        pack_keys = partial(self._packed, call.k, call.name)  # the caption's keys are the same at every step
        keys = self.caption_keys(call.name, call.k, pack_keys) if is_cross(call.name) else pack_keys()
        mask = None if call.mask is None else call.mask.asnumpy().astype(bool)[self.rows]
        bias = None if call.bias is None else call.bias[self.rows][:, self.trace.heads]
        compression = call.compression.ratio, call.compression.operator
        return LayerRecord(self._packed(call.q, call.name), keys, mask, bias, float(call.scale), *compression)

    def _packed(self, x: ms.Tensor, name: str) -> Packed:
        """Pack the recorded rows and heads of (B, H, N, d)."""
        array = (x if x.dtype in (ms.float32, ms.float16) else x.astype(ms.float32)).asnumpy()
        try:
            return pack(array, self.rows, self.trace.heads, self.folder)
        except PixArtNBError as error:
            raise PixArtNBError(f"{name} at step {self.run.index}: {error}; leave this layer out") from None

    # ---- after the run

    def drop_unfinished(self) -> None:
        """Remove a step that was interrupted."""
        t = self.trace
        for step in t.steps:
            if any((name, step) not in t.records for name in t.names):
                del t.timestep_of[step]
                t.text_of.pop(step, None)
                t.records = {key: record for key, record in t.records.items() if key[1] != step}

    def check_complete(self) -> None:
        """Warn if nothing was recorded; refuse steps that the run never reached."""
        if self.run is None:
            warnings.warn("nothing was traced: the model did not run in this block", stacklevel=4)
        elif self.run.timesteps is None:
            recorded = self.trace.timestep_of
            missing = [s for s in self.steps or () if s not in recorded]
            missing += [t for t in self.timesteps or () if t not in recorded.values()]
            if missing:
                raise PixArtNBError(f"the run never reached {missing}; it had {recorded} (step: timestep)")


def format_bytes(size: int) -> str:
    """Return a size in GB, MB or kB."""
    unit, factor = next((u, f) for u, f in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if size >= f or u == "kB")
    return f"{size / factor:.{2 if unit == 'GB' else 1}f} {unit}"
