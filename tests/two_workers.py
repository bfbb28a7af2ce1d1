"""Run by msrun in two processes: small trainings in which each worker has its share of every batch, and averages."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from line_training import batch, trainer

from pixart_nb.core.backend import join_workers, ms
from pixart_nb.core.training.distributed import Workers

CAME = {"optimizer": "came", "betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16)}
RUNS = {"adamw": {}, "came": CAME, "parts": {"accumulate": 2}, "small": {"shard_threshold": 3}, "fused": {}}
#: Gradients that are averaged.
GRADIENTS = 100


def share(workers):
    """Return the function of a batch number that returns this worker's rows."""
    return lambda number: tuple(np.split(part, workers.size)[workers.rank] for part in batch(number))


def average(workers: Workers) -> None:
    """Average many gradients in flat buffers, and by collectives that MindSpore joins."""
    rng = np.random.default_rng(workers.rank)
    arrays = [rng.standard_normal((64, 64 + k % 3)).astype((np.float32, np.float16)[k % 2]) for k in range(GRADIENTS)]
    gradients = [ms.Tensor(array) for array in arrays]
    expected = workers.mean(gradients)
    for ours, theirs in zip(replace(workers, fused=True).mean(gradients), expected, strict=True):
        assert ours.dtype == ms.float32
        assert np.array_equal(ours.asnumpy(), theirs.asnumpy())


def main(folder: Path, workers: Workers) -> None:
    """Train each way, stop in the middle, go on; tell what this worker keeps."""
    kept = {}
    for name, options in RUNS.items():
        workers = replace(workers, fused=name == "fused")
        options = dict(steps=8, save_every=3, start_learning_rate=0.01) | options
        start = trainer(folder / name, share(workers), more={"workers": workers}, **options)
        if workers.rank:  # workers that start apart end up together
            assert np.array_equal(start.masters["map.bias"].asnumpy(), np.zeros(2))
        start.run(until=5)
        again = trainer(folder / name, share(workers), more={"workers": workers}, **options)
        assert again.step == 5
        again.run()
        kept[name] = sorted(again.optimizer.parameters)
        again.state()  # every worker helps to collect it
        (folder / f"{name}-{workers.rank}.json").write_text(
            json.dumps({n: p.asnumpy().tolist() for n, p in again.masters.items()})
        )
    (folder / f"keeps-{workers.rank}.json").write_text(json.dumps(kept))


if __name__ == "__main__":
    joined = Workers(*join_workers())
    main(Path(sys.argv[1]), joined)
    average(joined)
