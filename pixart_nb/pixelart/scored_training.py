"""Trainings that are judged as they go: after some steps the model draws scenes, and the evaluator reads them back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.config import TrainConfig
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.components import LOADERS
from pixart_nb.core.io import (
    CheckpointError,
    load_metadata,
    load_tensors,
    read_json,
    save_tensors,
)
from pixart_nb.core.sampling.pipeline import PixArtSigmaPipeline
from pixart_nb.core.training.log import read_curve
from pixart_nb.core.training.run import Training
from pixart_nb.pixelart.evaluation import evaluate_model
from pixart_nb.pixelart.scenes import Scene


@dataclass(frozen=True)
class ScoredRun:
    """A training and how well its model drew on the way.

    ``result``: the folder of the trained pipeline (or LoRA). ``report``: the error at step 0, empty unless it was
    measured. ``rows``: those of curve.csv. ``scores`` and ``pictures`` by step: ``accuracy`` of ``evaluate_model``, and
    what was drawn, (N, H, W, 3) uint8.
    """

    result: Path
    report: dict[str, float]
    rows: list[dict[str, float]]
    scores: dict[int, dict[str, float]]
    pictures: dict[int, np.ndarray]

    def losses(self, over: int = 10) -> tuple[list[float], list[float]]:
        """The curve of the loss: steps, and means over as many steps each. A single loss jumps with its timesteps."""
        parts = [self.rows[k : k + over] for k in range(0, len(self.rows), over)]
        middles = [float(np.mean([row["step"] for row in part])) for part in parts]
        return middles, [float(np.mean([row["loss"] for row in part])) for part in parts]

    def shares(self, of: str = "all") -> tuple[list[int], list[float]]:
        """The curve of a score: steps, and shares of the pictures with the right ``object``, ``colour``, ..."""
        return list(self.scores), [score[of] for score in self.scores.values()]


def train_and_score(
    config: TrainConfig, scenes: Sequence[Scene], points: Iterable[int], bar: bool = True, **drawing: Any
) -> ScoredRun:
    """Train as a configuration says, and judge the model after the steps ``points``, 0 among them if it is to be.

    It draws ``scenes`` at the size that it trains at; ``drawing`` goes to ``evaluate_model``. What was drawn is kept in
    the folder of the training: one that was interrupted goes on, and draws nothing twice.

    Raises ``KeyboardInterrupt`` after SIGINT or SIGTERM, once the state is saved; ``CheckpointError`` where the folder
    holds what was drawn of other scenes or otherwise.
    """
    training, wanted = Training(config), sorted(set(points))
    judge, trainer = _Judge(training, scenes, drawing), training.trainer
    if trainer.step in wanted:  # it may have been stopped after that step, before it was judged
        judge.at(trainer.step)
    for row in training.steps(bar=bar):
        if row["step"] in wanted:
            judge.at(row["step"])
    start = training.folder / "start.json"
    return ScoredRun(
        training.finish(),
        training.report or (read_json(start) if start.exists() else {}),
        read_curve(training.folder / "curve.csv"),
        *judge.known(wanted),
    )


class _Judge:
    """Draws scenes with a model in training; what was drawn stays in the training's folder, a file for each step."""

    def __init__(self, training: Training, scenes: Sequence[Scene], drawing: dict[str, Any]):
        side = 8 * training.net.config.input_size
        self.training, self.scenes = training, list(scenes)
        self.drawing = {"height": side, "width": side} | drawing
        self.asked = json.dumps([[asdict(scene) for scene in scenes], self.drawing], sort_keys=True)
        self.folder = training.folder / "scores"
        for path in self.folder.glob("*.safetensors"):
            self._score(path)
        networks, places = training.networks, training.networks.paths
        parts = [LOADERS[name](places[name], ms.float32) for name in ("tokenizer", "text_encoder")]
        self.pipe = PixArtSigmaPipeline(*parts, networks.vae, training.net, networks.scheduler())

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def _score(self, path: Path) -> dict[str, float]:
        told = load_metadata(path)
        if told.get("asked") != self.asked:
            raise CheckpointError(
                f"{path} was drawn of other scenes or with other settings; remove it with the rest of its folder, or "
                "give another output_path"
            )
        return json.loads(told["accuracy"])

    def at(self, step: int) -> None:
        """Draw and judge with the weights as they are, averaged if averages are kept."""
        if self._path(step).exists():
            return
        net = self.training.net
        with self.training.trainer.ema_scope():
            net.set_train(False)
            found = evaluate_model(self.pipe, self.scenes, **self.drawing)
            net.set_train(True)
        told = {"accuracy": json.dumps(found["accuracy"]), "asked": self.asked}
        save_tensors(self._path(step), {"pictures": found["pictures"]}, told)

    def known(self, steps: Iterable[int]) -> tuple[dict[int, dict[str, float]], dict[int, np.ndarray]]:
        """Scores and pictures of those of the steps that were judged."""
        found = {step: self._path(step) for step in steps if self._path(step).exists()}
        scores = {step: self._score(path) for step, path in found.items()}
        return scores, {step: load_tensors(path)["pictures"] for step, path in found.items()}
