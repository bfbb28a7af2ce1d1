"""A training loop that can be stopped at any moment and goes on to the same numbers."""

from __future__ import annotations

import csv
import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from mindspore import ops
from mindspore.experimental.optim import AdamW
from tqdm.auto import tqdm

from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.store import (
    CheckpointError,
    load_metadata,
    load_tensors,
    save_tensors,
    write_text,
)
from pixart_nb.core.training.optim import EMA, clip_by_norm, global_norm, learning_rate


@dataclass(frozen=True)
class TrainerOptions:
    """How to train. Steps count from 0; ``save_every`` and ``log_every`` count steps.

    ``compile``: the step as one graph. Off for convolutions on the CPU, whose graphs were seen never to end.
    """

    steps: int
    start_learning_rate: float = 2e-5
    warmup_steps: int = 0
    schedule: str = "constant"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    ema_rate: float = 0.9999
    save_every: int = 500
    log_every: int = 20
    keep: int = 2
    compile: bool = True


#: ``batch(step)`` -> NumPy arrays. A function of the step alone: that is what makes a resumed run the same run.
Batch = Callable[[int], tuple[np.ndarray, ...]]


class Trainer:
    """Minimises ``loss(*tensors) -> (loss, {} or tuple of further numbers)`` over ``parameters``.

    ``loss`` is compiled with its gradient where that helps; ``names`` name the further numbers in the log. Every
    ``save_every`` steps, at the end and on SIGINT or SIGTERM the whole state (weights, moments, EMA, step) goes into
    ``folder`` as one safetensors file; a trainer on the same folder resumes from the newest that is whole.
    """

    def __init__(
        self,
        loss,
        parameters: dict[str, ms.Parameter],
        batch: Batch,
        options: TrainerOptions,
        folder,
        names=(),
    ):
        self.parameters, self.batch, self.options = parameters, batch, options
        self.folder, self.names = Path(folder), tuple(names)
        self.folder.mkdir(parents=True, exist_ok=True)
        weights = list(parameters.values())
        self.optimizer = AdamW(
            weights, lr=options.start_learning_rate, betas=options.betas, weight_decay=options.weight_decay
        )
        self.ema = EMA(weights, options.ema_rate)
        self.step, self._stop = 0, False
        self._gradients = self._compile(loss, weights)
        self.resume()

    def _compile(self, loss, weights):
        gradient = ms.value_and_grad(loss, None, weights, has_aux=True)
        largest = self.options.max_grad_norm

        def gradients(*tensors):
            values, grads = gradient(*tensors)
            norm = global_norm(grads)
            return values, clip_by_norm(grads, norm, largest), norm

        return ms.jit(gradients, jit_level="O0") if self.options.compile else gradients

    # ---- running

    def run(self, until: int | None = None) -> None:
        """Train up to step ``until`` (all of them unless told), from wherever the folder stands."""
        last = min(until or self.options.steps, self.options.steps)
        with (
            _on_signal(self._request_stop),
            tqdm(total=last, initial=self.step, desc=self.folder.name) as bar,
        ):
            while self.step < last and not self._stop:
                row = self._one_step()
                bar.set_postfix({key: f"{row[key]:.4g}" for key in ("loss", "grad_norm")}, refresh=False)
                bar.update()
                if self.step % self.options.log_every == 0:
                    self._log(row)
                if self.step % self.options.save_every == 0 and self.step < last:
                    self.save()
        self.save()
        if self._stop:
            raise KeyboardInterrupt(f"stopped at step {self.step}; run the same command to go on")

    def _one_step(self) -> dict[str, float]:
        options = self.options
        rate = learning_rate(
            self.step, options.start_learning_rate, options.warmup_steps, options.steps, options.schedule
        )
        tensors = [ms.Tensor(array) for array in self.batch(self.step)]
        values, gradients, norm = self._gradients(*tensors)
        numbers = [float(value.asnumpy()) for value in values]
        row = {
            "step": self.step + 1,
            "loss": numbers[0],
            "grad_norm": float(norm.asnumpy()),
            "learning_rate": rate,
        }
        row |= dict(zip(self.names, numbers[1:], strict=True))
        self._refuse_nan(row)
        ops.assign(self.optimizer.lrs[0], ms.Tensor(rate, ms.float32))
        self.optimizer(gradients)
        self.ema.update()
        self.step += 1
        return row

    def _refuse_nan(self, row: dict[str, float]) -> None:
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise FloatingPointError(
                f"step {self.step}: loss {row['loss']}, gradient norm {row['grad_norm']}. Weights were not updated; "
                f"the last good checkpoint is in {self.folder}. Lower the learning rate or look at batch {self.step}."
            )

    def _request_stop(self, *_: object) -> None:
        self._stop = True

    def _log(self, row: dict[str, float]) -> None:
        path = self.folder / "curve.csv"
        fresh = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)

    def _trim_log(self) -> None:
        """Drop the rows of steps that will be done again."""
        path = self.folder / "curve.csv"
        if not path.exists():
            return
        header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [row for row in rows if row.endswith("\n")]  # a killed process may have left half a row
        kept = [row for row in whole if int(row.split(",", 1)[0]) <= self.step]
        write_text(path, "".join([header, *kept]))

    # ---- state

    def checkpoints(self) -> list[Path]:
        """Checkpoints in the folder, oldest first."""
        return sorted(self.folder.glob("step-*.safetensors"))

    def state(self) -> dict[str, np.ndarray]:
        """Everything that the next step depends on."""
        tensors = {}
        moments = (self.optimizer.exp_avg, self.optimizer.exp_avg_sq)
        for index, (name, parameter) in enumerate(self.parameters.items()):
            tensors[f"model/{name}"] = parameter.asnumpy()
            tensors[f"ema/{name}"] = self.ema.averages[index]
            tensors[f"exp_avg/{name}"], tensors[f"exp_avg_sq/{name}"] = (m[index].asnumpy() for m in moments)
        return tensors

    def save(self) -> Path:
        """Write the state whole, then remove all but the newest ``keep``."""
        path = self.folder / f"step-{self.step:08d}.safetensors"
        save_tensors(
            path, self.state(), {"step": str(self.step), "options": json.dumps(asdict(self.options))}
        )
        for old in self.checkpoints()[: -self.options.keep]:
            old.unlink()
        return path

    def resume(self) -> None:
        """Load the newest checkpoint that is whole; without one the run starts at step 0."""
        for path in reversed(self.checkpoints()):
            try:
                tensors, step = load_tensors(path), int(load_metadata(path)["step"])
            except CheckpointError as error:
                tqdm.write(f"skipped: {error}")
                continue
            self._restore(tensors, step, path)
            break
        self._trim_log()

    def _restore(self, tensors: dict[str, np.ndarray], step: int, path: Path) -> None:
        missing = [name for name in self.parameters if f"model/{name}" not in tensors]
        if missing:
            raise CheckpointError(
                f"{path} is of another model: it lacks {missing[:3]} ({len(missing)} in all)"
            )
        for index, (name, parameter) in enumerate(self.parameters.items()):
            if tensors[f"model/{name}"].shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{path}: {name} is {tensors[f'model/{name}'].shape}, the model's is {tuple(parameter.shape)}"
                )
            parameter.set_data(ms.Tensor(tensors[f"model/{name}"]))
            self.ema.averages[index] = np.array(tensors[f"ema/{name}"])
            self.optimizer.exp_avg[index].set_data(ms.Tensor(tensors[f"exp_avg/{name}"]))
            self.optimizer.exp_avg_sq[index].set_data(ms.Tensor(tensors[f"exp_avg_sq/{name}"]))
        self.step = self.ema.updates = step
        self.optimizer.state_step.set_data(ms.Tensor(step, ms.int32))


@contextmanager
def _on_signal(handler) -> Iterator[None]:
    """Let SIGINT and SIGTERM finish the step and save; restore their handlers afterwards."""
    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
