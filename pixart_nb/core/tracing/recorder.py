"""``with trace(model) as t:`` keeps the queries and keys of a run, in half precision, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import psutil

from pixart_nb.core.backend import ms
from pixart_nb.core.tracing.maps import Kept
from pixart_nb.core.tracing.record import Layers, Numbers, Trace
from pixart_nb.core.tracing.seam import KINDS, Call, Observer, Part, Run, attached, parts_of
from pixart_nb.core.tracing.words import Text

ROWS = ("conditional", "unconditional", "all")
#: Share of the memory that is free when a trace begins, which it may take unless told.
MEMORY_SHARE = 0.5


class TraceTooLargeError(ValueError):
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
        memory_limit: bytes that the trace may take; half of the free memory unless told.
        announce: is given one line that says, before the run, how much memory the trace will take. None: silent.

    Raises:
        ValueError: a layer, head, kind, step or timestep that there is not (the message lists what there is), or a
            second run in the same block. TraceTooLargeError, before the run: more memory than the limit.
    """
    net, _ = parts_of(model)
    recorder = Recorder(net, layers, timesteps, heads, kinds, steps, rows, memory_limit, announce)
    with attached(model, recorder):
        yield recorder.trace
    recorder.check_complete()


class Recorder(Part):
    """Fills a trace."""

    watches = True

    def __init__(self, net, layers, timesteps, heads, kinds, steps, rows, memory_limit, announce):
        if timesteps is not None and steps is not None:
            raise ValueError("both timesteps and steps were given; give one of them")
        if rows not in ROWS:
            raise ValueError(f"rows is {rows!r}; expected one of {', '.join(ROWS)}")
        self.trace = Trace(chosen_names(net, layers, kinds), chosen_heads(net, heads))
        self.trace.model = model_mark(net)
        self.timesteps = None if timesteps is None else [float(t) for t in np.atleast_1d(timesteps)]
        self.steps = None if steps is None else [int(s) for s in np.atleast_1d(steps)]
        self.which, self.limit, self.announce = rows, memory_limit, announce
        self.run: Run | None = None
        self.places: list[int] = []  # rows of the batch that are kept
        self.shared: dict[
            str, tuple[Any, np.ndarray]
        ] = {}  # cross-attention's keys do not change from step to step

    # ---- before the run

    def expect(self, run: Run, observer: Observer) -> None:
        if self.trace.kept:
            raise ValueError(
                "this trace already holds a run; open another `with trace(...)` for the next one"
            )
        self._check_steps(run.timesteps)
        self._open(run, observer)
        kept = [n for n, t in enumerate(run.timesteps) if self._wants(n, t)]
        self._admit(len(kept), observer, run)

    def _check_steps(self, planned: np.ndarray) -> None:
        values = [float(t) for t in planned]
        if missing := [s for s in self.steps or () if not 0 <= s < len(values)]:
            raise ValueError(f"the run has no steps {missing}; it has 0 to {len(values) - 1}")
        if missing := [t for t in self.timesteps or () if t not in values]:
            raise ValueError(f"the run does not visit timesteps {missing}; it visits {values}")

    def _open(self, run: Run, observer: Observer) -> None:
        self.run = run
        inverse = [row for row in range(run.batch) if row not in run.conditional]
        self.places = {"conditional": list(run.conditional), "unconditional": inverse}.get(
            self.which, list(range(run.batch))
        )
        if not self.places:
            raise ValueError(
                "rows='unconditional', but the run has no guidance, so no such rows; use 'conditional'"
            )
        trace = self.trace
        trace.grid = run.grid
        trace.labels = [
            f"{'conditional' if p in run.conditional else 'unconditional'} {p % run.rows}"
            for p in self.places
        ]
        trace.texts = [self._texts(run.texts, run)]

    def _texts(self, texts: Sequence[Text], run: Run) -> list[Text]:
        every = [Text()] * (run.batch - run.rows) + list(texts or [Text()] * run.rows)
        return [every[place] for place in self.places]

    def _admit(self, count: int, observer: Observer, run: Run) -> None:
        """Say how much memory ``count`` steps take, and refuse them if it is too much."""
        size = self.bytes_of(count, observer, run)
        limit = int(psutil.virtual_memory().available * MEMORY_SHARE) if self.limit is None else self.limit
        t = self.trace
        said = (
            f"{len(t.names)} layers x {count} steps x {len(self.places)} of {run.batch} rows, {len(t.heads)} heads, "
            f"{t.grid[0]}x{t.grid[1]} tokens: {megabytes(size)}"
        )
        if size > limit:
            raise TraceTooLargeError(
                f"this trace would take {megabytes(size)} ({said}), more than the limit of {megabytes(limit)}; "
                "keep fewer layers, timesteps or heads, or raise memory_limit"
            )
        if self.announce is not None:
            self.announce(f"trace of {said} (limit {megabytes(limit)})")

    def bytes_of(self, count: int, observer: Observer, run: Run) -> int:
        """Bytes of queries and keys of ``count`` steps."""
        tokens, total = run.grid[0] * run.grid[1], 0
        for name in self.trace.names:
            if name.endswith(KINDS["cross"]):
                total += count * tokens + run.length
            else:
                ratio = observer.compression(name).ratio
                total += count * (tokens + (run.grid[0] // ratio) * (run.grid[1] // ratio))
        config = observer.net.config
        return 2 * len(self.places) * len(self.trace.heads) * (config.hidden_size // config.num_heads) * total

    def begin(self, run: Run) -> None:
        if run is self.run:
            self.trace.texts = [self._texts(run.texts, run)]

    # ---- during the run

    def step(self, run: Run, observer: Observer) -> None:
        if run is not self.run:
            if self.trace.kept:
                raise ValueError(
                    "this trace already holds a run of another shape; open another `with trace(...)` for the next one"
                )
            self._open(run, observer)
        if run.timesteps is None and self._wants(run.index, run.timestep):
            size = self.trace.nbytes + self.bytes_of(1, observer, run)
            self._admit(len(self.trace.steps) + 1, observer, run) if not self.trace.kept else None
            if self.limit is not None and size > self.limit:
                raise TraceTooLargeError(
                    f"the trace would take {megabytes(size)}, limit {megabytes(self.limit)}"
                )

    def _wants(self, step: int, timestep: float) -> bool:
        if self.steps is not None:
            return step in self.steps
        return self.timesteps is None or float(timestep) in self.timesteps

    def before(self, call: Call) -> None:
        run = call.run
        if call.name not in self.trace.names or not self._wants(run.index, run.timestep):
            return
        self.trace.timestep_of[run.index] = run.timestep
        mask = None if call.mask is None else call.mask.asnumpy().astype(bool)[self.places]
        self.trace.kept[call.name, run.index] = Kept(
            self._half(call.q, call.name),
            self._keys(call),
            mask,
            float(call.scale),
            call.compression.ratio,
            call.compression.operator,
            self._text(call),
        )

    def _keys(self, call: Call) -> np.ndarray:
        if not call.is_cross:
            return self._half(call.k, call.name)
        known = self.shared.get(call.name)
        if known is None or known[0] is not call.k:
            known = self.shared[call.name] = (call.k, self._half(call.k, call.name))
        return known[1]

    def _half(self, x: ms.Tensor, name: str) -> np.ndarray:
        """Kept rows and heads of (B, H, N, d) as float16."""
        array = (x if x.dtype in (ms.float32, ms.float16) else x.astype(ms.float32)).asnumpy()
        heads = slice(None) if len(self.trace.heads) == array.shape[1] else self.trace.heads
        half = np.stack([array[place][heads].astype(np.float16) for place in self.places])
        if not np.isfinite(half).all():
            raise ValueError(
                f"{name}: queries or keys leave the range of half precision, so cannot be traced"
            )
        return half

    def _text(self, call: Call) -> int:
        """Number of the prompts in force, which an intervention may have swapped."""
        texts = [call.texts[place] or Text() for place in self.places]
        if texts not in self.trace.texts:
            self.trace.texts.append(texts)
        return self.trace.texts.index(texts)

    # ---- after it

    def check_complete(self) -> None:
        """Refuse a trace whose steps never came; called where the block ended without an error."""
        if self.run is None:
            return
        there = self.trace.timestep_of
        missing = [s for s in self.steps or () if s not in there]
        missing += [t for t in self.timesteps or () if t not in there.values()]
        if missing:
            raise ValueError(f"the run never came to {missing}; kept are steps {there}")


def chosen_names(net: Any, layers: Layers, kinds: Sequence[str]) -> list[str]:
    """Names of the layers to keep, in the model's order."""
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"kinds has {unknown}; expected of {', '.join(KINDS)}")
    every = [f"blocks.{n}.{KINDS[k]}" for n in range(len(net.blocks)) for k in KINDS]
    if layers is None:
        wanted = {f"blocks.{n}.{KINDS[k]}" for n in range(len(net.blocks)) for k in kinds}
    else:
        given = [layers] if isinstance(layers, (int, str, np.integer)) else list(layers)
        wanted = {n for layer in given for n in _named(layer, kinds)}
    missing = sorted(wanted - set(every))
    if missing or not wanted:
        raise ValueError(
            f"the model has no layers {missing or '(none was given)'}; it has "
            f"blocks.0 to blocks.{len(net.blocks) - 1}, each with attn and cross_attn"
        )
    return [name for name in every if name in wanted]


def _named(layer: int | str, kinds: Sequence[str]) -> list[str]:
    if isinstance(layer, str) and not layer.isdigit():
        return [layer]
    return [f"blocks.{layer}.{KINDS[kind]}" for kind in kinds]


def chosen_heads(net: Any, heads: Numbers) -> list[int]:
    """Numbers of the heads to keep, rising."""
    count = net.config.num_heads
    if heads is None:
        return list(range(count))
    wanted = sorted({int(head) for head in np.atleast_1d(heads)})
    if not wanted or wanted[0] < 0 or wanted[-1] >= count:
        raise ValueError(f"heads is {heads!r}; the model has heads 0 to {count - 1}")
    return wanted


def model_mark(net: Any) -> dict[str, Any]:
    """What tells one model from another: its configuration, and a sum over weights that every training changes."""
    from hashlib import sha256

    digest = sha256()
    for name, weight in net.parameters_and_names():
        if name.endswith("scale_shift_table") or name == "final_layer.linear.weight":
            digest.update(weight.astype(ms.float32).asnumpy().tobytes())
    return {"config": net.config.to_dict(), "weights": digest.hexdigest()}


def megabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
