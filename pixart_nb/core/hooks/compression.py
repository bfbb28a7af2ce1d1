"""Error of token compression: keys, outputs, predictions and images with and without it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.cost import StepCost, step_cost, with_compression
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.hooks.hook_points import AttentionCall, Hook, HookedRun, LayerCompression, attached, transformer_of
from pixart_nb.core.hooks.interventions import CompressionReplacement, check_ratio, compressions_of, replace_compression
from pixart_nb.core.hooks.selection import Layers, Numbers, as_list, layer_names
from pixart_nb.core.models.attention import attention, merge_heads, split_heads
from pixart_nb.core.sampling.trajectory import Trajectory, follow, predictions

# ---- keys and outputs, layer by layer


@dataclass(frozen=True)
class LayerLoss:
    """Error of one layer at one step, for each row that follows a prompt.

    ``key_similarity``: cosine between each token's key and the compressed key of its cell, (rows, h, w); NaN for
    tokens that are in no whole cell. ``output_similarity``: cosine between the layer's outputs with full and with
    compressed keys and values, (rows, h, w). ``key_error`` and ``output_error``: ||compressed - full|| / ||full|| over
    all tokens, (rows,).
    """

    key_similarity: np.ndarray
    output_similarity: np.ndarray
    key_error: np.ndarray
    output_error: np.ndarray


@dataclass
class CompressionLoss:
    """Errors of the layers ``names`` in a run; ``compression`` holds operator and ratio of each."""

    names: list[str]
    grid: tuple[int, int] = (0, 0)
    compression: dict[str, tuple[str | None, int]] = field(default_factory=dict)
    timestep_of: dict[int, float] = field(default_factory=dict)
    losses: dict[tuple[str, int], LayerLoss] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        """Step numbers."""
        return list(self.timestep_of)

    def values(self, measure: str, row: int = 0) -> np.ndarray:
        """Return a field of ``LayerLoss``, mean over tokens: (layers, steps)."""
        means = [[np.nanmean(getattr(self._loss(n, s), measure)[row]) for s in self.steps] for n in self.names]
        return np.array(means, np.float64).reshape(len(self.names), len(self.steps))

    def map(self, measure: str, name: str, steps: Numbers = None, row: int = 0) -> np.ndarray:
        """Return ``key_similarity`` or ``output_similarity`` of a layer, mean over steps (None is all): (h, w)."""
        numbers = self.steps if steps is None else as_list(steps)
        return np.mean([getattr(self._loss(name, step), measure)[row] for step in numbers], axis=0)

    def _loss(self, name: str, step: int) -> LayerLoss:
        if name not in self.names:
            raise PixArtNBError(f"layer {name!r} was not measured; measured were {', '.join(self.names)}")
        if (name, step) not in self.losses:
            raise PixArtNBError(f"step {step!r} was not measured; measured were {self.steps}")
        return self.losses[name, step]


@contextmanager
def compression_loss(
    model: Any, layers: Layers = None, ratio: int | None = None, operator: str | None = None, steps: Numbers = None
) -> Iterator[CompressionLoss]:
    """Measure the error of compression in each self-attention layer during a run, which is not changed.

    With ``ratio`` and ``operator``, the error that they would make, in a model that need not compress; the weights of
    ``conv`` are those of ``replace_compression``. With neither, the error of the layers' own compression (or of an open
    ``replace_compression``); if no layer compresses, PixArtNBError is raised. Both attentions are computed, so a large
    image takes as long as without compression.
    """
    net = transformer_of(model)
    if (ratio is None) != (operator is None):
        raise PixArtNBError(f"ratio is {ratio!r} and operator {operator!r}; give both or neither")
    hook = LossHook(net, layer_names(len(net.blocks), layers, "self"), ratio, operator, steps)
    with attached(model, hook):
        yield hook.result


class LossHook(Hook):
    """Fills a ``CompressionLoss``."""

    order = 2

    def __init__(self, net, names: Sequence[str], ratio: int | None, operator: str | None, steps: Numbers):
        super().__init__(names, steps)
        self.result, self.ratio = CompressionLoss(self.names), ratio
        self.compressions = {} if ratio is None else compressions_of(net, names, ratio, operator)
        self.uncompressed: dict[str, list[ms.Tensor]] = {}

    def check(self, run: HookedRun) -> None:
        if self.ratio is not None:
            check_ratio(self.ratio, run.grid)
        else:
            self._check_compressed(run)
        self.result.grid = run.grid
        self.uncompressed.clear()

    def _check_compressed(self, run: HookedRun) -> None:
        """Refuse a run in which no layer compresses, and no ``replace_compression`` may make it at some step."""
        replaced = {n for h in self.manager.hooks if isinstance(h, CompressionReplacement) for n in h.names}
        if not any(name in replaced or self.manager.compression(name, run).ratio > 1 for name in self.names):
            names = ", ".join(self.names)
            raise PixArtNBError(f"none of {names} compresses its keys; give ratio and operator to measure theirs")

    def on_tokens(self, name: str, x: ms.Tensor) -> None:
        if name in self.names:
            self.uncompressed.setdefault(name, []).append(x)

    def before(self, call: AttentionCall) -> None:
        name, run, result = call.name, call.run, self.result
        keys_values = self.uncompressed.pop(name, None)
        if not self.applies(name, run):
            return
        compression = self.compressions.get(name, call.compression)
        result.compression[name] = compression.operator, compression.ratio
        result.timestep_of[run.index] = run.timestep
        result.losses[name, run.index] = self._measure(call, *keys_values, compression)

    def _measure(self, call: AttentionCall, k: ms.Tensor, v: ms.Tensor, compression: LayerCompression) -> LayerLoss:
        grid, count = call.run.grid, call.run.rows
        if compression.ratio == 1:
            return LayerLoss(*[np.ones((count, *grid), np.float32)] * 2, *[np.zeros(count)] * 2)
        layer, rows = self.manager.layers[call.name], slice(call.run.conditional[0], None)
        k, v, q = k[rows], v[rows], call.q[rows]
        small_k, small_v = compression(k, *grid), compression(v, *grid)

        def output(keys: ms.Tensor, values: ms.Tensor) -> np.ndarray:
            heads = [split_heads(part, layer.heads) for part in (keys, values)]
            return _array(layer.proj(merge_heads(attention(q, *heads, None, call.scale))))

        full, compressed = output(k, v), output(small_k, small_v)
        keys = _array(k).reshape(count, *grid, -1)
        cells = spread(_array(small_k), grid, compression.ratio)
        covered = ~np.isnan(cells[0, ..., 0])
        return LayerLoss(
            cosine(keys, cells),
            cosine(full, compressed).reshape(-1, *grid),
            _row_errors(cells[:, covered], keys[:, covered]),
            _row_errors(compressed, full),
        )


def spread(compressed: np.ndarray, grid: tuple[int, int], ratio: int) -> np.ndarray:
    """Repeat compressed tokens (rows, M, D) at every token of their cell, (rows, h, w, D); NaN outside whole cells."""
    height, width = grid[0] // ratio, grid[1] // ratio
    cells = compressed.reshape(len(compressed), height, width, -1)
    out = np.full((len(compressed), *grid, cells.shape[-1]), np.nan, np.float32)
    out[:, : height * ratio, : width * ratio] = cells.repeat(ratio, 1).repeat(ratio, 2)
    return out


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine between vectors of the last axis; 0 where one of them is zero."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.einsum("...d,...d->...", a, b) / np.where(norms == 0, 1, norms)


def _row_errors(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    rows = (len(actual), -1)
    differences = np.linalg.norm((actual - expected).reshape(rows), axis=1)
    return differences / np.linalg.norm(expected.reshape(rows), axis=1)


def _array(x: ms.Tensor) -> np.ndarray:
    return x.astype(ms.float32).asnumpy()


# ---- predictions and images


@dataclass(frozen=True, eq=False)
class CompressionOutcome:
    """Effect of one choice of compression on a run.

    ``errors`` (S,): ||predicted - reference|| / ||reference|| of the guided noise at the latents of the reference run,
    over all images. ``images`` (N, H, W, 3) float: images from the same noise with compression in every step;
    ``image_error`` is their root mean square distance from the reference's. ``seconds`` of the sampling.
    """

    layers: tuple[int, ...]
    ratio: int
    operator: str
    errors: np.ndarray
    images: np.ndarray
    image_error: float
    cost: StepCost
    seconds: float

    @property
    def error(self) -> float:
        """Mean of ``errors`` over the steps."""
        return float(self.errors.mean())


class CompressionStudy:
    """A reference run of a model, and the outcome of any compression against it. Outcomes are cached.

    ``call``: arguments of ``pipe.sample``, height and width among them. A model that compresses already is refused.
    """

    def __init__(self, pipe: Any, prompt: str | Sequence[str], seed: int = 0, **call: Any):
        config = pipe.transformer.config
        if config.kv_layers and config.kv_ratio > 1:
            problem = f"layers {list(config.kv_layers)} of this model compress already"
            raise PixArtNBError(f"{problem}; expected a model that was trained without compression")
        self.pipe, self.seed, self.prompt, self.call = pipe, seed, prompt, call
        self.reference, self.seconds = self._sample()
        self.images = pipe.decode_latents(self.reference.latents[-1])
        self.predicted = predictions(pipe, self.reference)
        self._outcomes: dict[tuple, CompressionOutcome] = {}

    @property
    def layers(self) -> range:
        """Numbers of the model's layers."""
        return range(self.pipe.transformer.config.depth)

    @property
    def timesteps(self) -> np.ndarray:
        """Timesteps of the run, (S,)."""
        return self.reference.timesteps

    @property
    def cost(self) -> StepCost:
        """Cost of a step without compression."""
        return self._cost(self.pipe.transformer.config)

    def outcome(self, layers: Sequence[int], ratio: int, operator: str = "mean") -> CompressionOutcome:
        """Return the outcome of compressing these layers in one run."""
        key = (tuple(sorted(set(layers))), ratio, operator)
        if key not in self._outcomes:
            self._outcomes[key] = self._compressed(*key)
        return self._outcomes[key]

    def table(self) -> list[dict[str, Any]]:
        """Return a record for each outcome so far, in the order of the calls."""
        return [
            {
                "operator": outcome.operator,
                "ratio": outcome.ratio,
                "layers": ", ".join(map(str, outcome.layers)),
                "keys": outcome.cost.keys,
                "error of the prediction": outcome.error,
                "rms distance of images": outcome.image_error,
                "seconds of the run": outcome.seconds,
            }
            for outcome in self._outcomes.values()
        ]

    def errors_of(self, pipe: Any) -> np.ndarray:
        """Return ``errors`` of another pipeline of the same latents, such as a finetuned one: (S,)."""
        return relative_errors(predictions(pipe, self.reference), self.predicted)

    def loss(self, layers: Sequence[int], ratio: int, operator: str = "mean") -> CompressionLoss:
        """Return the ``compression_loss`` of these layers along the reference run."""
        with compression_loss(self.pipe, list(layers), ratio, operator) as loss:
            predictions(self.pipe, self.reference)
        return loss

    def _compressed(self, layers: tuple[int, ...], ratio: int, operator: str) -> CompressionOutcome:
        cost = self._cost(with_compression(self.pipe.transformer.config, layers, ratio, operator))
        if not layers or ratio == 1:
            zeros = np.zeros(len(self.timesteps))
            return CompressionOutcome(layers, ratio, operator, zeros, self.images, 0.0, cost, self.seconds)
        with replace_compression(self.pipe, layers, ratio, operator):
            predicted = predictions(self.pipe, self.reference)
            run, seconds = self._sample()
        images = self.pipe.decode_latents(run.latents[-1])
        distance = float(np.sqrt(np.square(images - self.images).mean()))
        errors = relative_errors(predicted, self.predicted)
        return CompressionOutcome(layers, ratio, operator, errors, images, distance, cost, seconds)

    def _sample(self) -> tuple[Trajectory, float]:
        start = time.perf_counter()
        run = follow(self.pipe, self.prompt, generator=np.random.default_rng(self.seed), **self.call)
        return run, time.perf_counter() - start

    def _cost(self, config: Any) -> StepCost:
        run = self.reference
        return step_cost(config, run.height, run.width, int(run.condition.prompt_attention_mask.sum(1).max()))


def relative_errors(predicted: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return ||predicted - reference|| / ||reference|| of each step, (S, ...) -> (S,); finite for a zero reference."""
    rows = (len(predicted), -1)
    differences = np.linalg.norm((predicted - reference).reshape(rows).astype(np.float64), axis=1)
    norms = np.linalg.norm(reference.reshape(rows).astype(np.float64), axis=1)
    return differences / np.where(norms == 0, 1, norms)
