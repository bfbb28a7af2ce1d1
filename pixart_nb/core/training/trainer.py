"""Training loop that can be stopped at any moment and resumes to the same numbers."""

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
from mindspore import nn
from tqdm.auto import tqdm

from pixart_nb.core.backend import as_tensor, kept_memory, leave_graph_mode, ms, pin_threads, to_numpy
from pixart_nb.core.fast.cpu_training import use_fast_blocks
from pixart_nb.core.io import folder_lock
from pixart_nb.core.models.operators import assign
from pixart_nb.core.training.checkpoints import CheckpointFolder, TrainingState, check_fits, read_state
from pixart_nb.core.training.distributed import ALL, SINGLE, Workers, owners
from pixart_nb.core.training.divergence import DivergenceError, find_divergence
from pixart_nb.core.training.log import CurveLog
from pixart_nb.core.training.optimizers import CAME, EMA, AdamW, clip_by_norm, global_norm
from pixart_nb.core.training.options import TrainerOptions

#: ``batch(number)`` -> NumPy arrays or tensors. A function of the number only: this makes a resumed training the same
#: training. Step s takes the batches from s * accumulate on; each worker gets its own rows.
Batch = Callable[[int], tuple[np.ndarray | ms.Tensor, ...]]
OPTIMIZERS = {"adamw": AdamW, "came": CAME}
#: Weight of the latest step in the running mean of the seconds per step.
_LATEST = 0.1


class Trainer:
    """Minimizes ``loss(*tensors) -> (loss, further values...)`` over ``parameters``.

    Every ``save_every`` steps, at the end and when it is interrupted, the state (weights, optimizer state, EMA, loss
    scale, step) is written to ``folder``; a trainer on the same folder resumes from the newest whole state. Half-
    precision parameters are updated through float32 copies. The folder is written to, and locked, inside ``session``
    only, which ``steps`` enters by itself.

    Args:
        names: names of the further values in the log.
        network: cell whose blocks are computed by ``core.fast``, and searched when a value is not finite.
        identity: settings that a resumed training has to share with the one that it resumes.
        describe: returns a description of a batch from its number.
        workers: gradients are averaged over them, each keeps the optimizer state of its share of the parameters, and
            the first one writes.
        averages: parameters, by the same names, that hold the EMA on every worker, for a loss that reads it.
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
        workers: Workers = SINGLE,
        tensorboard: bool = False,
        dtype: ms.Type = ms.float32,
        averages: Mapping[str, ms.Parameter] | None = None,
    ):
        leave_graph_mode()
        self.parameters, self.batch, self.options = dict(parameters), batch, options
        self.folder, self.names, self.network = Path(folder), tuple(names), network
        self.identity, self.describe, self.workers = dict(identity or {}), describe, workers
        self.files, self.tensorboard = CheckpointFolder(self.folder, options.keep), tensorboard
        self.masters = {name: _master(name, p, dtype) for name, p in self.parameters.items()}
        self._assign(workers.from_owners(self.masters, dict.fromkeys(self.masters, 0)))
        sizes = {name: p.size for name, p in self.masters.items()}
        self.owner = owners(sizes, workers.size, options.shard_threshold)
        own = {name: p for name, p in self.masters.items() if self.owner[name] in (workers.rank, ALL)}
        self.optimizer = OPTIMIZERS[options.optimizer](own, options.betas, options.eps, options.weight_decay)
        keep_ema = options.ema_rate is not None and (workers.is_main or averages is not None)
        self.ema = EMA(self.masters, options.ema_rate, averages) if keep_ema else None
        self.scale = options.new_loss_scale()
        self.step, self.log, self._seconds, self._saved = 0, None, 0.0, -1
        self._stop_requested = self._stopped = False
        if network is not None:
            use_fast_blocks(network, not options.compile)
        self.loss, self._gradient = loss, self._gradient_function(loss)
        self._resume()

    def _gradient_function(self, loss: Callable) -> Callable:
        def scaled(*tensors):  # the last one is the scale
            values = loss(*tensors[:-1])
            return (values[0] * tensors[-1], *values)

        function = scaled if self.scale.used else loss
        gradient = ms.value_and_grad(function, None, list(self.parameters.values()), has_aux=True)
        return ms.jit(gradient, jit_level="O0") if self.options.compile else gradient

    # ---- running

    def run(self, until: int | None = None) -> None:
        """Train up to step ``until``, or to the end, with a progress bar.

        Raises ``KeyboardInterrupt`` after SIGINT or SIGTERM, once the state is saved; otherwise as ``steps``.
        """
        with on_signal(self.request_stop):
            for _ in self.steps(until, bar=True):
                pass

    def steps(self, until: int | None = None, bar: bool = False) -> Iterator[dict[str, float]]:
        """Train up to step ``until``, or to the end, and yield the log row of each step.

        A row has ``step`` (from 1), ``loss``, ``grad_norm``, ``learning_rate``, the further values of the loss, and
        where they are known ``images_per_second``, ``seconds_left`` and ``loss_scale``. The state is also saved when
        the caller stops iterating. ``bar`` shows progress, speed and the time left.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM. The running step was finished and the state is saved.
            DivergenceError: a loss or gradient is not finite. Nothing was updated or saved.
            WriteError: a state could not be written.
            FolderInUseError: another process trains in the folder.
        """
        last = min(self.options.steps if until is None else until, self.options.steps)
        if self.step > self.options.steps:
            tqdm.write(f"{self.folder} is at step {self.step} already; nothing to train to step {self.options.steps}")
        pin_threads()
        with self.session(), kept_memory(), self._bar(last, bar) as progress:
            try:
                while self.step < last:
                    with on_signal(self.request_stop):
                        row = self._logged_step(last)
                        _show(progress, row)
                        if self._stopped or self.step == last or self.step % self.options.save_every == 0:
                            self.save()
                    if self._stopped:
                        raise KeyboardInterrupt(f"stopped at step {self.step}; run the same again to resume")
                    yield row
            except (GeneratorExit, KeyboardInterrupt):
                self._stop_requested = self._stopped = False
                if self._saved != self.step:
                    with on_signal(self.request_stop):
                        self.save()
                raise

    def request_stop(self, *_: object) -> None:
        """Stop after the running step; a signal handler."""
        self._stop_requested = True

    @contextmanager
    def session(self) -> Iterator[None]:
        """Lock the folder, resume from a state that was written meanwhile, and open the log. Reentrant."""
        if self.log is not None or not self.workers.is_main:
            yield
            return
        with folder_lock(self.folder):
            newer = [path for path in self.files.paths() if path > self.files.path(self.step)]
            if newer and self.workers.size == 1:
                self._resume()
            if self._saved == self.step and self.files.path(self.step).exists():
                self.files.remove_old(self.files.path(self.step))  # a killed process may have left them
            self.log = CurveLog(self.folder, self.step, self.tensorboard)
            try:
                yield
            finally:
                self.log.close()
                self.log = None

    def _bar(self, last: int, show: bool) -> tqdm:
        hidden = not (show and self.workers.is_main)
        return tqdm(total=last, initial=self.step, desc=self.folder.name, disable=hidden)

    def _logged_step(self, last: int) -> dict[str, float]:
        started = time.perf_counter()
        row = self._one_step()
        seconds = time.perf_counter() - started
        self._seconds += (seconds - self._seconds) * (_LATEST if self._seconds else 1.0)
        if self.options.images:
            row["images_per_second"] = self.options.images / self._seconds
            row["seconds_left"] = max(0, last - self.step) * self._seconds
        if self.log and self.step % self.options.log_every == 0:
            self.log.write(row)
        return row

    def _one_step(self) -> dict[str, float]:
        rate = self.options.rate(self.step)
        values, gradients = self._accumulated()
        share = 1.0 / (self.scale.value * self.options.accumulate)
        norm = share * global_norm(gradients)
        row = {"step": self.step + 1, "loss": values[0], "grad_norm": norm, "learning_rate": rate}
        row |= dict(zip(self.names, values[1:], strict=True))
        if self.scale.used:
            row["loss_scale"] = self.scale.value
        if self._is_finite(row, gradients):
            self._update(clip_by_norm(gradients, norm / share, self.options.max_grad_norm, share), rate)
        self.step += 1
        return row

    def _accumulated(self) -> tuple[list[float], list[ms.Tensor]]:
        """Return the mean values, and the sum over the batches of a step of the gradients averaged over workers."""
        total, sums = None, None
        count = self.options.accumulate
        for number in range(self.step * count, (self.step + 1) * count):
            values, gradients = self._gradient(*self._tensors(number))
            values = values[1:] if self.scale.used else values
            numbers = np.array([float(value.asnumpy()) for value in values])
            total = numbers if total is None else total + numbers
            if count > 1:  # half-precision gradients are added up in float32
                gradients = [gradient.astype(ms.float32) for gradient in gradients]
            sums = gradients if sums is None else [a + b for a, b in zip(sums, gradients, strict=True)]
        reduced = self.workers.all_reduce([*(total / count), float(self._stop_requested)])
        self._stopped = reduced.pop() > 0  # all workers stop at the same step
        return [value / self.workers.size for value in reduced], self.workers.mean(sums)

    def _tensors(self, number: int) -> list[ms.Tensor]:
        scale = [np.float32(self.scale.value)] if self.scale.used else []
        return list(map(as_tensor, (*self.batch(number), *scale)))

    def _is_finite(self, row: Mapping[str, float], gradients: list[ms.Tensor]) -> bool:
        """Return False for an overflow of the scaled loss, which skips the step; raise if the loss diverged."""
        if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]):
            self.scale.succeeded()
            return True
        if math.isfinite(row["loss"]) and self.scale.overflowed():
            return False
        raise DivergenceError(self._divergence(row, gradients))

    def _divergence(self, row: Mapping[str, float], gradients: list[ms.Tensor]) -> str:
        count, where, number = self.options.accumulate, "", 0
        by_name = dict(zip(self.parameters, gradients, strict=True))
        for number in range(self.step * count, (self.step + 1) * count):
            tensors = self._tensors(number)[: -1 if self.scale.used else None]
            where = find_divergence(self.loss, tensors, self.parameters, by_name, self.network)
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
        self._assign(self.workers.from_owners(self.masters, self.owner))
        if self.ema:
            self.ema.update()

    def _assign(self, values: Mapping[str, ms.Tensor | np.ndarray]) -> None:
        """Set the parameters and their float32 copies to values in float32."""
        for name, master in self.masters.items():
            value, parameter = values[name], self.parameters[name]
            if value is not master:
                assign(master, as_tensor(value))
            if parameter is not master:
                assign(parameter, master)

    # ---- weights and state

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Replace the parameters by their averages for a while, on the main worker and if there are averages."""
        if not self.ema:
            yield
            return
        kept = {name: np.array(master.asnumpy()) for name, master in self.masters.items()}
        try:
            for name, average in self.ema.averages.items():
                assign(self.parameters[name], average)
            yield
        finally:
            with on_signal(self.request_stop):  # a second interrupt must not leave averages behind
                self._assign(kept)

    def weights(self) -> dict[str, np.ndarray]:
        """Return the trained weights, float32: the averages, or the parameters if there are no averages."""
        return self.ema.arrays() if self.ema else {name: m.asnumpy() for name, m in self.masters.items()}

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints in the folder, oldest first."""
        return self.files.paths()

    def state(self) -> dict[str, np.ndarray]:
        """Return everything that the next step depends on. A collective: every worker has to call it."""
        tensors = {f"model/{name}": master.asnumpy() for name, master in self.masters.items()}
        if self.ema:
            tensors |= {f"ema/{name}": array for name, array in self.ema.arrays().items()}
        own, owner, state = self.optimizer.state(), {}, {}
        for name, master in self.masters.items():
            for group, shape in self.optimizer.state_shapes(tuple(master.shape)).items():
                key = f"{group}/{name}"
                owner[key] = self.owner[name]
                state[key] = own[key] if key in own else ms.Tensor(np.zeros(shape, np.float32))
        return tensors | {key: t.asnumpy() for key, t in self.workers.from_owners(state, owner).items()}

    def save(self) -> Path | None:
        """Write the state and remove old ones; return its path on the main worker. A collective."""
        tensors = self.state()
        self._saved = self.step
        if not self.workers.is_main:
            return None
        metadata = {
            "options": json.dumps(asdict(self.options)),
            "identity": json.dumps(self.identity, sort_keys=True),
            "updates": str(self.optimizer.updates),
            "loss_scale": str(self.scale.value),
            "good_updates": str(self.scale.good),
        }
        if self.log:
            self.log.sync()
        return self.files.save(self.step, tensors, metadata)

    def _resume(self) -> None:
        """Load the newest whole state, if there is one. A collective.

        Raises ``CheckpointError`` for the state of another model, or of a training with another ``identity``.
        """
        main = self.workers.is_main
        state = self.files.newest() if main else None
        step = int(self.workers.all_reduce([state.step if state else -1 if main else 0])[0])
        if step >= self.step:
            self._restore(state or read_state(self.files.path(step)))

    def _restore(self, state: TrainingState) -> None:
        shapes = {name: tuple(master.shape) for name, master in self.masters.items()}
        check_fits(state, shapes, ["model", "ema"] if self.ema else ["model"], self.identity)
        metadata = state.metadata
        self.optimizer.restore(state.tensors, int(metadata.get("updates", state.step)), state.path)
        self._assign({name: state.tensors[f"model/{name}"] for name in self.masters})
        if self.ema:
            for name, average in self.ema.averages.items():
                assign(average, ms.Tensor(state.tensors[f"ema/{name}"]))
            self.ema.updates = self.optimizer.updates
        self.scale.value = float(metadata.get("loss_scale", self.scale.value))
        self.scale.good = int(metadata.get("good_updates", 0))
        self.step = self._saved = state.step


@contextmanager
def on_signal(handler: Callable) -> Iterator[None]:
    """Handle SIGINT and SIGTERM with ``handler`` for a while; Python gives signals to the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _show(bar: tqdm, row: Mapping[str, float]) -> None:
    keys = [key for key in ("loss", "grad_norm", "images_per_second") if key in row]
    bar.set_postfix({key: f"{row[key]:.4g}" for key in keys}, refresh=False)
    bar.update()


def _master(name: str, parameter: ms.Parameter, dtype: ms.Type) -> ms.Parameter:
    """Return the parameter itself, or a float32 copy if it is, or is cast here to, half precision."""
    if parameter.dtype == dtype == ms.float32:
        return parameter
    master = ms.Parameter(ms.Tensor(np.array(to_numpy(parameter))), name=f"master.{name}")
    if dtype != ms.float32:
        parameter.set_dtype(dtype)
    return master
