"""Error that token compression makes in the keys and outputs of each layer during a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pixart_nb.core.backend import ms, to_numpy
from pixart_nb.core.cost import key_count
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.hooks.hook_points import AttentionCall, Hook, HookedRun, LayerCompression, attached, transformer_of
from pixart_nb.core.hooks.interventions import CompressionReplacement, compressions_of
from pixart_nb.core.hooks.selection import Layers, Numbers, as_list, layer_names
from pixart_nb.core.models.attention import attention, merge_heads, split_heads
from pixart_nb.core.sampling.trajectory import relative_errors


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
            key_count(run.grid, self.ratio)  # refuses a ratio that leaves no key
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
        if not run.first or not self.applies(name, run):
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
            return to_numpy(layer.proj(merge_heads(attention(q, *heads, None, call.scale))))

        full, compressed = output(k, v), output(small_k, small_v)
        keys = to_numpy(k).reshape(count, *grid, -1)
        cells = spread(to_numpy(small_k), grid, compression.ratio)
        covered = ~np.isnan(cells[0, ..., 0])
        return LayerLoss(
            cosine(keys, cells),
            cosine(full, compressed).reshape(-1, *grid),
            relative_errors(cells[:, covered], keys[:, covered]),
            relative_errors(compressed, full),
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
