"""Training with scores: after some steps the model draws scenes, and the evaluator reads them back."""

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
from pixart_nb.core.io import CheckpointError, load_metadata, load_tensors, read_json, save_tensors
from pixart_nb.core.sampling.pipeline import PixArtSigmaPipeline
from pixart_nb.core.training.log import read_curve
from pixart_nb.core.training.run import Training
from pixart_nb.pixelart.evaluation import evaluate_model
from pixart_nb.pixelart.scenes import Scene


@dataclass(frozen=True)
class ScoredRun:
    """A finished training and the scores of its model on the way.

    ``result``: folder of the trained pipeline (or LoRA). ``report``: the error at step 0, empty if it was not measured.
    ``rows``: rows of curve.csv. ``scores`` and ``images`` by step: ``accuracy`` of ``evaluate_model``, and the drawn
    images (N, H, W, 3) uint8.
    """

    result: Path
    report: dict[str, float]
    rows: list[dict[str, float]]
    scores: dict[int, dict[str, float]]
    images: dict[int, np.ndarray]

    def losses(self, over: int = 10) -> tuple[list[float], list[float]]:
        """Return the smoothed loss curve: steps, and means over ``over`` steps each."""
        parts = [self.rows[k : k + over] for k in range(0, len(self.rows), over)]
        middles = [float(np.mean([row["step"] for row in part])) for part in parts]
        return middles, [float(np.mean([row["loss"] for row in part])) for part in parts]

    def shares(self, part: str = "all") -> tuple[list[int], list[float]]:
        """Return the curve of a score: steps, and shares of images with the right ``object``, ``colour``, ..."""
        return list(self.scores), [score[part] for score in self.scores.values()]


def train_and_score(
    config: TrainConfig, scenes: Sequence[Scene], points: Iterable[int], bar: bool = True, **drawing: Any
) -> ScoredRun:
    """Train with a configuration, and score the model after the steps ``points``; 0 is before the first step.

    It draws ``scenes`` at its training size; ``drawing`` are options of ``evaluate_model``. Drawn images are stored in
    the folder of the training, so that an interrupted one resumes and draws nothing twice.

    Raises ``KeyboardInterrupt`` after SIGINT or SIGTERM, once the state is saved; ``CheckpointError`` if the folder
    holds images of other scenes or settings.
    """
    training, points = Training(config), sorted(set(points))
    scorer, trainer = _Scorer(training, scenes, drawing), training.trainer
    if trainer.step in points:  # it may have been interrupted between that step and its score
        scorer.score(trainer.step)
    for row in training.steps(bar=bar):
        if row["step"] in points:
            scorer.score(row["step"])
    start = training.folder / "start.json"
    return ScoredRun(
        training.finish(),
        training.report or (read_json(start) if start.exists() else {}),
        read_curve(training.folder / "curve.csv"),
        *scorer.results(points),
    )


class _Scorer:
    """Draws scenes with a model in training, and stores images and scores in its folder, a file for each step."""

    def __init__(self, training: Training, scenes: Sequence[Scene], drawing: dict[str, Any]):
        side = 8 * training.net.config.input_size
        self.training, self.scenes = training, list(scenes)
        self.drawing = {"height": side, "width": side} | drawing
        self.request = json.dumps([[asdict(scene) for scene in scenes], self.drawing], sort_keys=True)
        self.folder = training.folder / "scores"
        for path in self.folder.glob("*.safetensors"):
            self._accuracy(path)
        networks, paths = training.networks, training.networks.paths
        parts = [LOADERS[name](paths[name], ms.float32) for name in ("tokenizer", "text_encoder")]
        self.pipe = PixArtSigmaPipeline(*parts, networks.vae, training.net, networks.scheduler())

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.safetensors"

    def _accuracy(self, path: Path) -> dict[str, float]:
        metadata = load_metadata(path)
        if metadata.get("request") != self.request:
            raise CheckpointError(
                f"{path} was drawn from other scenes or with other settings; remove it with the rest of its folder, or "
                "choose another output_path"
            )
        return json.loads(metadata["accuracy"])

    def score(self, step: int) -> None:
        """Draw and evaluate with the current weights, or their moving averages if there are any."""
        if self._path(step).exists():
            return
        net = self.training.net
        with self.training.trainer.ema_scope():
            net.set_train(False)
            result = evaluate_model(self.pipe, self.scenes, **self.drawing)
            net.set_train(True)
        metadata = {"accuracy": json.dumps(result["accuracy"]), "request": self.request}
        save_tensors(self._path(step), {"images": result["images"]}, metadata)

    def results(self, steps: Iterable[int]) -> tuple[dict[int, dict[str, float]], dict[int, np.ndarray]]:
        """Return scores and images of those steps that were scored."""
        paths = {step: self._path(step) for step in steps if self._path(step).exists()}
        scores = {step: self._accuracy(path) for step, path in paths.items()}
        return scores, {step: load_tensors(path)["images"] for step, path in paths.items()}
