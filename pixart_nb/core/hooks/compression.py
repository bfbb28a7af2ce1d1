"""Study of token compression: predictions, images and attention maps of a run with and without it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from pixart_nb.core.backend import ms, to_numpy
from pixart_nb.core.cost import StepCost, key_count, step_cost, with_compression
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.hooks.attention_maps import softmax_rows
from pixart_nb.core.hooks.compression_loss import CompressionLoss, compression_loss
from pixart_nb.core.hooks.hook_points import attached
from pixart_nb.core.hooks.interventions import CompressionReplacement, compressions_of
from pixart_nb.core.hooks.recorder import TraceTooLargeError, trace
from pixart_nb.core.hooks.selection import Numbers, layer_names
from pixart_nb.core.hooks.trace import Trace
from pixart_nb.core.sampling.trajectory import Trajectory, follow, predicted_noise, predictions, relative_errors

#: Compressed keys that a study remembers, one entry for each layer, step, ratio, operator and row.
REMEMBERED_KEYS = 8


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
        self._keys: dict[tuple, np.ndarray] = {}

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
        for _ in self.run(layers, ratio, operator):
            pass
        return self.computed(layers, ratio, operator)

    def computed(self, layers: Sequence[int], ratio: int, operator: str = "mean") -> CompressionOutcome | None:
        """Return the outcome if it was computed already."""
        return self._outcomes.get((tuple(sorted(set(layers))), ratio, operator))

    @property
    def outcomes(self) -> list[CompressionOutcome]:
        """Outcomes so far, in the order of the calls."""
        return list(self._outcomes.values())

    def run(self, layers: Sequence[int], ratio: int, operator: str = "mean") -> Iterator[tuple[int, int]]:
        """Compute an outcome; yield the number of finished calls of the model and of all, after each.

        Closing the generator cancels it. The model is compressed only while it is called, not between two of them.
        """
        key = (tuple(sorted(set(layers))), ratio, operator)
        if key not in self._outcomes:
            yield from self._compressed(*key)

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
            for outcome in self.outcomes
        ]

    def errors_of(self, pipe: Any) -> np.ndarray:
        """Return ``errors`` of another pipeline of the same latents, such as a finetuned one: (S,)."""
        return relative_errors(predictions(pipe, self.reference), self.predicted)

    def loss(self, layers: Sequence[int], ratio: int, operator: str = "mean") -> CompressionLoss:
        """Return the ``compression_loss`` of these layers along the reference run."""
        with compression_loss(self.pipe, list(layers), ratio, operator) as loss:
            predictions(self.pipe, self.reference)
        return loss

    # ---- attention

    @cached_property
    def trace(self) -> Trace:
        """Self- and cross-attention along the reference run, of as many steps as half of the free memory holds.

        The first use calls the model once for each step.
        """
        steps = list(range(len(self.timesteps)))
        while True:
            try:
                with trace(self.pipe, steps=steps, announce=None) as record:
                    predictions(self.pipe, self.reference)
                return record
            except TraceTooLargeError:
                if len(steps) == 1:
                    raise
                steps = steps[:: -(-len(steps) // (len(steps) // 2))]

    def compressed_attention(
        self, layer: int, step: int, queries: Any, ratio: int, operator: str, heads: Numbers = None, row: int = 0
    ) -> np.ndarray:
        """Return the attention of queries with the keys of one layer compressed: (heads, queries, h // R, w // R).

        Queries and keys are those of the reference run, so this is the effect in the layer alone, computed without the
        model. Arguments as in ``Trace.rows``.
        """
        name = f"blocks.{layer}.attn"
        record, chosen, numbers = self.trace.selected(name, step, queries, heads, row)
        keys = self._compressed_keys(name, step, ratio, operator, row)[chosen]
        attention = softmax_rows(record.queries.unpacked(row, chosen, numbers), keys, record.scale)
        return attention.reshape(*attention.shape[:2], *(side // ratio for side in self.trace.grid))

    def _compressed_keys(self, name: str, step: int, ratio: int, operator: str, row: int) -> np.ndarray:
        """Return keys (H, M, d) float32."""
        key = (name, step, ratio, operator, row)
        if key not in self._keys:
            key_count(self.trace.grid, ratio)  # refuses a ratio that leaves no key
            compress = compressions_of(self.pipe.transformer, [name], ratio, operator)[name]
            full = self.trace.records[name, step].keys.unpacked(row, np.arange(len(self.trace.heads)))
            heads, tokens, size = full.shape
            rows = ms.Tensor(full.transpose(1, 0, 2).reshape(1, tokens, heads * size).astype(np.float32))
            small = compress(rows.astype(self.pipe.transformer.blocks[0].attn.qkv.dtype), *self.trace.grid)
            small = to_numpy(small).reshape(-1, heads, size).transpose(1, 0, 2)
            self._keys = dict(list(self._keys.items())[1 - REMEMBERED_KEYS :]) | {key: small}
        return self._keys[key]

    # ---- runs

    def _compressed(self, layers: tuple[int, ...], ratio: int, operator: str) -> Iterator[tuple[int, int]]:
        cost = self._cost(with_compression(self.pipe.transformer.config, layers, ratio, operator))
        predicted, latents, seconds = self.predicted, None, self.seconds
        if layers and ratio > 1:
            total, seconds, noises = 2 * len(self.timesteps), 0.0, []
            names = layer_names(len(self.layers), layers, "self")
            hook = CompressionReplacement(self.pipe.transformer, names, ratio, operator)
            for noise, _ in self._hooked(hook, lambda: predicted_noise(self.pipe, self.reference)):
                noises.append(noise)
                yield len(noises), total
            predicted = np.stack(noises)
            for number, (record, spent) in enumerate(self._hooked(hook, self._steps)):
                latents, seconds = getattr(record, "latents", None), seconds + spent
                yield len(noises) + number, total
        images = self.images if latents is None else self.pipe.decode_latents(latents)
        distance = float(np.sqrt(np.square(images - self.images).mean()))
        errors = relative_errors(predicted, self.predicted)
        outcome = CompressionOutcome(layers, ratio, operator, errors, images, distance, cost, seconds)
        self._outcomes[layers, ratio, operator] = outcome

    def _hooked(self, hook: CompressionReplacement, make: Callable[[], Iterator]) -> Iterator[tuple[Any, float]]:
        """Yield what a generator yields, with its seconds; the hook is attached only while it computes."""
        with attached(self.pipe, hook):
            records = make()
        while True:
            start = time.perf_counter()
            with attached(self.pipe, hook):
                record = next(records, None)
            if record is None:
                return
            yield record, time.perf_counter() - start

    def _steps(self) -> Iterator[Any]:
        """Return the generator of the reference run, from the same noise."""
        run, generator = self.reference, np.random.default_rng(self.seed)
        start = self.pipe.initial_latents(len(run.latents[0]), run.height, run.width, generator)
        prompts = [self.prompt] if isinstance(self.prompt, str) else list(self.prompt)
        size = {"height": run.height, "width": run.width, "guidance_scale": run.guidance_scale}
        return self.pipe.sample(prompts, generator=generator, latents=start, **self.call | size)

    def _sample(self) -> tuple[Trajectory, float]:
        start = time.perf_counter()
        run = follow(self.pipe, self.prompt, generator=np.random.default_rng(self.seed), **self.call)
        return run, time.perf_counter() - start

    def _cost(self, config: Any) -> StepCost:
        run = self.reference
        return step_cost(config, run.height, run.width, int(run.condition.prompt_attention_mask.sum(1).max()))
