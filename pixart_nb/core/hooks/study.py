"""Choices of token compression tried on one model and one run: how far its predictions and pictures move away."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixart_nb.core.cost import Cost, step_cost, with_compression
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.hooks.compression import CompressionLoss, compression_loss
from pixart_nb.core.hooks.interventions import replace_compression
from pixart_nb.core.sampling.trajectory import Trajectory, follow, predictions


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one choice of compression did.

    ``errors`` (S,): ||predicted - reference|| / ||reference|| of the guided noise at the reference run's latents, over
    all pictures. ``pictures`` (N, H, W, 3) float: what is drawn from the same noise with compression all along;
    ``picture_error`` is their root mean square distance from the reference's. ``seconds`` of the drawing.
    """

    layers: tuple[int, ...]
    ratio: int
    operator: str
    errors: np.ndarray
    pictures: np.ndarray
    picture_error: float
    cost: Cost
    seconds: float

    @property
    def error(self) -> float:
        """Mean of ``errors`` over the steps."""
        return float(self.errors.mean())


class CompressionStudy:
    """One run of a model as it is, and the outcome of any compression against it. Outcomes are kept.

    ``call``: arguments of ``pipe.sample``, height and width among them. Raises ValueError for a model whose layers
    compress already: then there is nothing uncompressed to compare with.
    """

    def __init__(self, pipe: Any, prompt: str | Sequence[str], seed: int = 0, **call: Any):
        if pipe.transformer.config.kv_layers and pipe.transformer.config.kv_ratio > 1:
            raise PixArtNBError(
                f"layers {list(pipe.transformer.config.kv_layers)} of this model compress already; give a model "
                "that was trained without compression, or open replace_compression(pipe, ratio=1) first"
            )
        self.pipe, self.seed, self.prompt, self.call = pipe, seed, prompt, call
        self.reference, self.seconds = self._timed()
        self.pictures = pipe.decode_latents(self.reference.latents[-1])
        self.predicted = predictions(pipe, self.reference)
        self._outcomes: dict[tuple, Outcome] = {}

    @property
    def layers(self) -> range:
        """Numbers of the model's layers."""
        return range(self.pipe.transformer.config.depth)

    @property
    def timesteps(self) -> np.ndarray:
        """Timesteps of the run, (S,)."""
        return self.reference.timesteps

    @property
    def cost(self) -> Cost:
        """Cost of a step without compression."""
        return self._cost(self.pipe.transformer.config)

    def outcome(self, layers: Sequence[int], ratio: int, operator: str = "mean") -> Outcome:
        """Compress these layers in one run; the same question again is answered from memory."""
        key = (tuple(sorted(set(layers))), ratio, operator)
        if key not in self._outcomes:
            self._outcomes[key] = self._measured(*key)
        return self._outcomes[key]

    def table(self) -> list[dict[str, Any]]:
        """A record for each outcome so far, in the order in which they were asked for."""
        return [
            {
                "operator": outcome.operator,
                "ratio": outcome.ratio,
                "layers": ", ".join(map(str, outcome.layers)),
                "keys": outcome.cost.keys,
                "error of the prediction": outcome.error,
                "rms distance of pictures": outcome.picture_error,
                "seconds of the run": outcome.seconds,
            }
            for outcome in self._outcomes.values()
        ]

    def errors_of(self, pipe: Any) -> np.ndarray:
        """``errors`` of another pipeline of the same latents, such as one that was adapted: (S,)."""
        return relative_errors(predictions(pipe, self.reference), self.predicted)

    def loss(self, layers: Sequence[int], ratio: int, operator: str = "mean") -> CompressionLoss:
        """What compression would lose of keys and outputs in each of these layers, along the reference run."""
        with compression_loss(self.pipe, list(layers), ratio, operator) as loss:
            predictions(self.pipe, self.reference)
        return loss

    def _measured(self, layers: tuple[int, ...], ratio: int, operator: str) -> Outcome:
        cost = self._cost(with_compression(self.pipe.transformer.config, layers, ratio, operator))
        if not layers or ratio == 1:
            nothing = np.zeros(len(self.timesteps))
            return Outcome(layers, ratio, operator, nothing, self.pictures, 0.0, cost, self.seconds)
        with replace_compression(self.pipe, layers, ratio, operator):
            predicted = predictions(self.pipe, self.reference)
            run, seconds = self._timed()
        pictures = self.pipe.decode_latents(run.latents[-1])
        distance = float(np.sqrt(np.square(pictures - self.pictures).mean()))
        errors = relative_errors(predicted, self.predicted)
        return Outcome(layers, ratio, operator, errors, pictures, distance, cost, seconds)

    def _timed(self) -> tuple[Trajectory, float]:
        started = time.perf_counter()
        run = follow(self.pipe, self.prompt, generator=np.random.default_rng(self.seed), **self.call)
        return run, time.perf_counter() - started

    def _cost(self, config: Any) -> Cost:
        run = self.reference
        return step_cost(config, run.height, run.width, int(run.condition.prompt_attention_mask.sum(1).max()))


def relative_errors(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """||predicted - reference|| / ||reference|| of each step, (S, ...) -> (S,)."""
    rows = (len(predicted), -1)
    differences = np.linalg.norm((predicted - reference).reshape(rows).astype(np.float64), axis=1)
    return differences / np.linalg.norm(reference.reshape(rows).astype(np.float64), axis=1)
