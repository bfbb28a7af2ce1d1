"""A training loop that can be stopped at any moment and goes on to the same numbers."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import nn, ops
from tqdm.auto import tqdm

from pixart_nb.core.backend import ms, pin_threads
from pixart_nb.core.training.came import CAME
from pixart_nb.core.training.checkpoint import CheckpointFolder, State, check_fits, read_state
from pixart_nb.core.training.curve_log import CurveLog
from pixart_nb.core.training.distributed import ALONE, EVERYONE, Workers, owners
from pixart_nb.core.training.divergence import DivergenceError, find_divergence
from pixart_nb.core.training.optim import EMA, AdamW, clip_by_norm, global_norm, learning_rate
from pixart_nb.core.training.options import TrainerOptions

__all__ = ["Batch", "Trainer", "TrainerOptions"]

#: ``batch(number)`` -> NumPy arrays (or tensors that are there already). A function of the number alone: that is what
#: makes a resumed run the same run. Step s takes the batches from s * accumulate on; each worker gets its own rows.
Batch = Callable[[int], tuple[np.ndarray | ms.Tensor, ...]]
OPTIMIZERS = {"adamw": AdamW, "came": CAME}
#: How much of the time of a step the latest one counts for.
_LATEST = 0.1


class Trainer:
    """Minimises ``loss(*tensors) -> (loss, further numbers...)`` over ``parameters``.

    ``names`` name the further numbers in the log. Every ``save_every`` steps, at the end and on SIGINT or SIGTERM the
    whole state (weights, moments, EMA, loss scale, step) goes into ``folder`` as one safetensors file; a trainer on the
    same folder resumes from the newest that is whole. Parameters in half precision, or that ``dtype`` turns into it,
    are updated through float32 copies.

    ``network`` is looked into when a number is not finite. ``identity``: what a run must share with the one that it
    goes on with; ``describe(number)`` says what a batch is made of. Under several ``workers`` gradients are averaged,
    each keeps the moments of its share of the parameters, and the first writes.
    """

    def __init__(
        self,
        loss: Callable,
        parameters: Mapping[str, ms.Parameter],
        batch: Batch,
        options: TrainerOptions,
        folder: str | Path,
        names: tuple[str, ...] = (),
        *,
        network: nn.Cell | None = None,
        identity: Mapping[str, Any] | None = None,
        describe: Callable[[int], str] = "batch {}".format,
        workers: Workers = ALONE,
        tensorboard: bool = False,
        dtype: ms.Type = ms.float32,
    ):
        self.parameters, self.batch, self.options = dict(parameters), batch, options
        self.folder, self.names, self.network = Path(folder), tuple(names), network
        self.identity, self.describe, self.workers = dict(identity or {}), describe, workers
        self.files = CheckpointFolder(self.folder, options.keep)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.masters = {name: _master(name, p, dtype) for name, p in self.parameters.items()}
        for parameter in self.masters.values():
            workers.send(parameter)
        sizes = {name: p.size for name, p in self.masters.items()}
        self.owner = owners(sizes, workers.size, options.shard_threshold)
        own = {name: p for name, p in self.masters.items() if self.owner[name] in (workers.rank, EVERYONE)}
        self.optimizer = OPTIMIZERS[options.optimizer](own, options.betas, options.eps, options.weight_decay)
        averaged = options.ema_rate is not None and workers.writes
        self.ema = EMA(list(self.masters.values()), options.ema_rate) if averaged else None
        self.scale = options.new_loss_scale()
        self.step, self._stop, self._seconds = 0, False, 0.0
        self.loss, self._gradient = loss, self._compiled(loss)
        self.resume()
        self.log = CurveLog(self.folder, self.step, tensorboard) if workers.writes else None

    def _compiled(self, loss: Callable) -> Callable:
        def scaled(*tensors):  # the last of them is the scale
            values = loss(*tensors[:-1])
            return (values[0] * tensors[-1], *values)

        function = scaled if self.scale.used else loss
        gradient = ms.value_and_grad(function, None, list(self.parameters.values()), has_aux=True)
        return ms.jit(gradient, jit_level="O0") if self.options.compile else gradient

    # ---- running

    def run(self, until: int | None = None) -> None:
        """Train up to step ``until`` (all of them unless told), from wherever the folder stands, with a bar.

        Raises ``KeyboardInterrupt`` after SIGINT or SIGTERM, once the state is saved; else as ``steps``.
        """
        for _ in self.steps(until, bar=True):
            pass
        if self.step < self._last(until):
            raise KeyboardInterrupt(f"stopped at step {self.step}; run the same command to go on")

    def steps(self, until: int | None = None, bar: bool = False) -> Iterator[dict[str, float]]:
        """The steps up to ``until``, one by one: yields the row of the log after each.

        A row has ``step`` (from 1), ``loss``, ``grad_norm``, ``learning_rate``, the further numbers of the loss, and
        ``images_per_second``, ``seconds_left``, ``loss_scale`` where they are known. The state is saved when the last
        step is done, when a signal asks to stop (then it ends early), and when the caller stops asking for rows.
        ``bar`` shows progress, speed and the time that is left.

        Raises:
            DivergenceError: a loss or gradient is not finite. Nothing was updated or saved.
            CheckpointError: a state could not be written, or another process trains in the folder.
        """
        last = self._last(until)
        pin_threads()
        with self._alone(), _on_signal(self._request_stop), self._bar(last, bar) as shown:
            try:
                while self.step < last and not self._stop:
                    row = self._one_step(last)
                    _show(shown, row)
                    if self.log and self.step % self.options.log_every == 0:
                        self.log.write(row)
                    if self.step % self.options.save_every == 0 and self.step < last:
                        self.save()
                    yield row
            except GeneratorExit:
                self.save()
                raise
            self.save()

    def _bar(self, last: int, wanted: bool) -> tqdm:
        hidden = not (wanted and self.workers.writes)
        return tqdm(total=last, initial=self.step, desc=self.folder.name, disable=hidden)

    def _last(self, until: int | None) -> int:
        return min(self.options.steps if until is None else until, self.options.steps)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if self.workers.writes:
            with self.files.alone():
                yield
        else:
            yield

    def _one_step(self, last: int = 0) -> dict[str, float]:
        started, options = time.perf_counter(), self.options
        rate = learning_rate(
            self.step,
            options.start_learning_rate,
            options.warmup_steps,
            options.steps,
            options.schedule,
            options.end_learning_rate,
        )
        numbers, gradients = self._accumulated()
        share = 1.0 / (self.scale.value * options.accumulate)
        norm = share * global_norm(gradients)
        row = {"step": self.step + 1, "loss": numbers[0], "grad_norm": norm, "learning_rate": rate}
        row |= dict(zip(self.names, numbers[1:], strict=True))
        if self.scale.used:
            row["loss_scale"] = self.scale.value
        if self._finite(row, gradients):
            self._update(clip_by_norm(gradients, norm / share, options.max_grad_norm, share), rate)
        self.step += 1
        return row | self._speed(time.perf_counter() - started, last)

    def _accumulated(self) -> tuple[list[float], list[ms.Tensor]]:
        """Mean numbers, and the sum over the batches of a step of the mean over the workers of the gradients."""
        total, sums = None, None
        count = self.options.accumulate
        for number in range(self.step * count, (self.step + 1) * count):
            values, gradients = self._gradient(*self._tensors(number))
            values = values[1:] if self.scale.used else values
            numbers = np.array([float(value.asnumpy()) for value in values])
            total = numbers if total is None else total + numbers
            sums = gradients if sums is None else [a + b for a, b in zip(sums, gradients, strict=True)]
        told = self.workers.total([*(total / count), float(self._stop)])
        self._stop = told.pop() > 0  # all workers stop at the same step
        return [value / self.workers.size for value in told], self.workers.mean(sums)

    def _tensors(self, number: int) -> list[ms.Tensor]:
        scale = [np.float32(self.scale.value)] if self.scale.used else []
        return [a if isinstance(a, ms.Tensor) else ms.Tensor(a) for a in (*self.batch(number), *scale)]

    def _finite(self, row: Mapping[str, float], gradients: list[ms.Tensor]) -> bool:
        """Whether the step can be taken; False for an overflow of the scaled loss, which costs only this step."""
        if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
            self.scale.succeeded()
            return True
        if math.isfinite(row["loss"]) and self.scale.overflowed():
            return False
        raise DivergenceError(self._what_went_wrong(row, gradients))

    def _what_went_wrong(self, row: Mapping[str, float], gradients: list[ms.Tensor]) -> str:
        count, where, number = self.options.accumulate, "", 0
        named = dict(zip(self.parameters, gradients, strict=True))
        for number in range(self.step * count, (self.step + 1) * count):
            tensors = self._tensors(number)[: -1 if self.scale.used else None]
            where = find_divergence(self.loss, tensors, self.parameters, named, self.network)
            if "gradient" not in where:
                break
        older = self.files.paths()
        kept = f"the last good checkpoint is {older[-1]}" if older else "there is no checkpoint yet"
        return (
            f"step {self.step}, {self.describe(number)}: loss {row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}; "
            f"{where}. The weights were not updated; {kept}. Lower the learning rate, compute in fp32, or look at that "
            "batch."
        )

    def _update(self, gradients: list[ms.Tensor], rate: float) -> None:
        self.optimizer.update(dict(zip(self.masters, gradients, strict=True)), rate)
        for name, master in self.masters.items():
            if self.owner[name] != EVERYONE:
                self.workers.send(master, self.owner[name])
            self._follow(name)
        if self.ema:
            self.ema.update()

    def _follow(self, name: str) -> None:
        """Let a parameter in half precision take the value of its float32 copy."""
        parameter, master = self.parameters[name], self.masters[name]
        if parameter is not master:
            ops.assign(parameter, master.astype(parameter.dtype))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the parameters be their averages for a while, on the worker that writes and if averages are kept."""
        if not self.ema:
            yield
            return
        kept = {name: np.array(master.asnumpy()) for name, master in self.masters.items()}
        for parameter, average in zip(self.parameters.values(), self.ema.averages, strict=True):
            ops.assign(parameter, ms.Tensor(average).astype(parameter.dtype))
        try:
            yield
        finally:
            for name, master in self.masters.items():
                ops.assign(master, ms.Tensor(kept[name]))
                self._follow(name)

    def weights(self) -> dict[str, np.ndarray]:
        """What the training has come to, float32: the averages, or without them the weights."""
        averages = self.ema.averages if self.ema else [m.asnumpy() for m in self.masters.values()]
        return dict(zip(self.masters, averages, strict=True))

    def _speed(self, seconds: float, last: int) -> dict[str, float]:
        self._seconds += (seconds - self._seconds) * (_LATEST if self._seconds else 1.0)
        if not self.options.pictures:
            return {}
        left = max(0, last - self.step) * self._seconds
        return {"images_per_second": self.options.pictures / self._seconds, "seconds_left": left}

    def _request_stop(self, *_: object) -> None:
        self._stop = True

    # ---- state

    def checkpoints(self) -> list[Path]:
        """Checkpoints in the folder, oldest first."""
        return self.files.paths()

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on, on the first worker; the others help to collect it."""
        tensors = {f"model/{name}": master.asnumpy() for name, master in self.masters.items()}
        if self.ema:
            tensors |= {f"ema/{name}": a for name, a in zip(self.masters, self.ema.averages, strict=True)}
        own = self.optimizer.state()
        for name, master in self.masters.items():
            for group, shape in self.optimizer.rooms(tuple(master.shape)).items():
                key = f"{group}/{name}"
                array = own[key].asnumpy() if key in own else np.zeros(shape, np.float32)
                shared = self.owner[name] != EVERYONE
                tensors[key] = self.workers.sent(array, self.owner[name]) if shared else array
        return tensors

    def save(self) -> Path | None:
        """Write the state whole, then remove all but the newest ``keep``; its path, on the worker that writes."""
        tensors = self.state()
        if not self.workers.writes:
            return None
        told = {
            "options": json.dumps(asdict(self.options)),
            "identity": json.dumps(self.identity, sort_keys=True),
            "updates": str(self.optimizer.updates),
            "loss_scale": str(self.scale.value),
            "good_updates": str(self.scale.good),
        }
        if self.log:
            self.log.sync()
        return self.files.save(self.step, tensors, told)

    def resume(self) -> None:
        """Load the newest checkpoint that is whole; without one the run starts at step 0.

        Raises ``CheckpointError`` for a checkpoint of another model, or of a run with another ``identity``.
        """
        found = self.files.newest() if self.workers.writes else None
        step = int(self.workers.total([found.step if found else -1 if self.workers.writes else 0])[0])
        if step < 0:
            return
        if found is None:
            found = read_state(self.files.path(step))
        self._restore(found)

    def _restore(self, state: State) -> None:
        shapes = {name: tuple(master.shape) for name, master in self.masters.items()}
        check_fits(state, shapes, ["model", "ema"] if self.ema else ["model"], self.identity)
        for name, master in self.masters.items():
            ops.assign(master, ms.Tensor(state.tensors[f"model/{name}"]))
            self._follow(name)
        self.step = state.step
        told = state.metadata
        self.optimizer.restore(state.tensors, int(told.get("updates", state.step)), state.path)
        if self.ema:
            self.ema.averages = [np.array(state.tensors[f"ema/{name}"]) for name in self.masters]
            self.ema.updates = self.optimizer.updates
        self.scale.value = float(told.get("loss_scale", self.scale.value))
        self.scale.good = int(told.get("good_updates", 0))


def _show(bar: tqdm, row: Mapping[str, float]) -> None:
    keys = [key for key in ("loss", "grad_norm", "images_per_second") if key in row]
    bar.set_postfix({key: f"{row[key]:.4g}" for key in keys}, refresh=False)
    bar.update()


def _master(name: str, parameter: ms.Parameter, dtype: ms.Type) -> ms.Parameter:
    """The parameter itself, or a float32 copy of one that is, or now becomes, half precision."""
    if parameter.dtype == dtype == ms.float32:
        return parameter
    master = ms.Parameter(ms.Tensor(np.array(parameter.astype(ms.float32).asnumpy())), name=f"master.{name}")
    if dtype != ms.float32:
        parameter.set_dtype(dtype)
    return master


@contextmanager
def _on_signal(handler: Callable) -> Iterator[None]:
    """Let SIGINT and SIGTERM finish the step and save; restore their handlers afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python gives signals to the main thread alone
        return
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
