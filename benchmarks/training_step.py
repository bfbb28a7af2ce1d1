"""Training step of a small transformer in two checkouts of the project: CPU time of alternating steps, in one run.

    git worktree add ../before COMMIT
    python benchmarks/training_step.py ../before .                # PyNative
    python benchmarks/training_step.py ../before . --compile      # one graph

256 tokens, width 256, 8 heads, as the bundled model has. Prints minimum and median for each checkout, the ratio of the
first to the second, and the loss after the last step, which has to be the same.

Measured on two busy cores of an AMD EPYC with AVX-512 (``--batch 16``), before and after heads were split by gathering
rows: ratio of the medians 1.36 in PyNative (1.50 of the minima), 1.11 (1.09) as one graph. Matrix products, at the peak
of the processor, are 70% of the time before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def training_step(batch: int, depth: int, compiled: bool) -> Callable[[], float]:
    """Return a function that trains one step on the same batch and returns the loss."""
    from pixart_nb.core.backend import ms
    from pixart_nb.core.models.transformer import PixArt, PixArtConfig
    from pixart_nb.core.training.loss import coefficients, diffusion_loss
    from pixart_nb.core.training.optimizers import AdamW, clip_by_norm, global_norm

    rng = np.random.default_rng(0)
    net = PixArt(PixArtConfig(hidden_size=256, num_heads=8, depth=depth, caption_channels=128, input_size=32))
    net.initialize(rng, zero_cross_attention=False)
    net.set_train(True)
    latents, noise = rng.standard_normal((2, batch, 4, 32, 32), dtype=np.float32)
    timesteps = rng.integers(0, 1000, batch)
    captions = rng.standard_normal((batch, 20, 128), dtype=np.float32)
    mask = np.arange(20) < rng.integers(3, 21, (batch, 1))
    arrays = [latents, noise, coefficients(timesteps), timesteps.astype(np.float32), captions, mask]
    tensors = [*map(ms.Tensor, arrays), ms.Tensor(np.ones(batch, np.float32)), net.positions(32, 32)]
    parameters = {name: p for name, p in net.parameters_and_names() if name != "y_embedder.y_embedding"}
    optimizer = AdamW(parameters)
    gradient = ms.value_and_grad(diffusion_loss(net), None, list(parameters.values()), has_aux=True)
    gradient = ms.jit(gradient, jit_level="O0") if compiled else gradient

    def step() -> float:
        (loss, *_), gradients = gradient(*tensors)
        gradients = clip_by_norm(gradients, global_norm(gradients), 1.0)
        optimizer.update(dict(zip(parameters, gradients, strict=True)), 1e-4)
        return float(loss.asnumpy())

    return step


def serve(batch: int, depth: int, compiled: bool) -> None:
    """Train one step, then one for each line of the standard input; print CPU seconds and loss of each."""
    step = training_step(batch, depth, compiled)
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        started = time.process_time()
        loss = step()
        print(json.dumps([time.process_time() - started, loss]), flush=True)


def main() -> None:
    """Compare the two checkouts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkouts", nargs=2, type=Path, help="folders of the project")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="compute loss and gradients as one graph")
    options = parser.parse_args()
    command = "import runpy, sys; runpy.run_path(sys.argv[1])['serve'](*map(int, sys.argv[2:]))"
    words = [sys.executable, "-c", command, __file__, *map(str, (options.batch, options.depth, int(options.compile)))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [
        subprocess.Popen(words, env=os.environ | {"PYTHONPATH": str(folder.resolve())}, cwd=folder, **pipes)
        for folder in options.checkouts
    ]
    for worker in workers:
        worker.stdout.readline()
    rows = []
    for _ in range(options.steps):
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
            rows.append(json.loads(worker.stdout.readline()))
    for worker in workers:
        worker.stdin.close()
        worker.wait()
    seconds = [[row[0] for row in rows[k::2]] for k in (0, 1)]
    for folder, values, (_, loss) in zip(options.checkouts, seconds, rows[-2:], strict=True):
        print(f"{folder}: minimum {min(values):.2f} s, median {statistics.median(values):.2f} s, last loss {loss:.7f}")
    before, after = seconds
    ratios = [f"{name} {f(before) / f(after):.2f}" for name, f in (("minimum", min), ("median", statistics.median))]
    print("ratio:", ", ".join(ratios))


if __name__ == "__main__":
    main()
