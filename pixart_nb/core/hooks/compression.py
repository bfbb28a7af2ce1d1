"""What token compression loses: full keys and outputs beside the compressed ones, layer by layer, in a real run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.hooks.interventions import ReplaceCompression, check_ratio, made_compression
from pixart_nb.core.hooks.seam import Call, Compression, Observer, Part, Run, attached, parts_of
from pixart_nb.core.hooks.selection import Layers, Numbers, check_steps, layer_names, step_numbers
from pixart_nb.core.models.attention import attention, merge_heads, split_heads
from pixart_nb.core.models.kv_compression import check_compression


@dataclass(frozen=True)
class Loss:
    """Of one layer at one step, for each row that follows a prompt.

    ``key_similarity``: cosine between each token's full key and the compressed key of its cell, (rows, h, w); NaN for
    tokens in rows and columns that fill no whole cell. ``output_similarity``: cosine between what the layer gives with
    full and with compressed keys and values, (rows, h, w). ``key_error`` and ``output_error``: the same as
    ||compressed - full|| / ||full|| over all tokens, (rows,).
    """

    key_similarity: np.ndarray
    output_similarity: np.ndarray
    key_error: np.ndarray
    output_error: np.ndarray


@dataclass
class CompressionLoss:
    """The losses of a run. ``by_layer`` and ``maps`` average over the steps unless one is named."""

    names: list[str]
    grid: tuple[int, int] = (0, 0)
    #: Operator and ratio that were looked at, by layer.
    compression: dict[str, tuple[str | None, int]] = field(default_factory=dict)
    timestep_of: dict[int, float] = field(default_factory=dict)
    losses: dict[tuple[str, int], Loss] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        """Numbers of the steps."""
        return list(self.timestep_of)

    def values(self, what: str, row: int = 0) -> np.ndarray:
        """(layers, steps): a field of ``Loss``, mean over tokens where it has them."""
        found = [[np.nanmean(getattr(self._loss(n, s), what)[row]) for s in self.steps] for n in self.names]
        return np.array(found, np.float64).reshape(len(self.names), len(self.steps))

    def map(self, what: str, name: str, steps: Numbers = None, row: int = 0) -> np.ndarray:
        """(h, w): ``key_similarity`` or ``output_similarity`` of one layer, mean over steps (all: None)."""
        numbers = self.steps if steps is None else step_numbers(steps)
        return np.mean([getattr(self._loss(name, step), what)[row] for step in numbers], axis=0)

    def table(self, row: int = 0) -> list[dict[str, Any]]:
        """One record for each layer: its name, operator, ratio, and the four numbers, mean over steps and tokens."""
        fields = ("key_similarity", "output_similarity", "key_error", "output_error")
        columns = {what: self.values(what, row).mean(1) for what in fields}
        return [
            {"layer": name, "operator": self.compression[name][0], "ratio": self.compression[name][1]}
            | {what: float(column[number]) for what, column in columns.items()}
            for number, name in enumerate(self.names)
        ]

    def _loss(self, name: str, step: int) -> Loss:
        if name not in self.names:
            raise PixArtNBError(f"nothing is known of layer {name!r}; there are {', '.join(self.names)}")
        if (name, step) not in self.losses:
            raise PixArtNBError(f"nothing is known of step {step!r}; there are {self.steps}")
        return self.losses[name, step]


@contextmanager
def compression_loss(
    model: Any,
    layers: Layers = None,
    ratio: int | None = None,
    operator: str | None = None,
    steps: Numbers = None,
) -> Iterator[CompressionLoss]:
    """Measure, during a run, what compression loses in each self-attention layer. The run itself is not changed.

    Given ``ratio`` and ``operator``, what they would lose, in layers of a model that may not compress at all; the
    weights of ``conv`` are those of ``replace_compression``. Given neither, what the layers' own compression (or
    one that ``replace_compression`` put in its place) loses; None of the layers compressing is a ValueError.
    Both attentions are computed, so a large picture takes as long as without compression.
    """
    net, _ = parts_of(model)
    if (ratio is None) != (operator is None):
        raise PixArtNBError(f"ratio is {ratio!r} and operator {operator!r}; give both or neither")
    names = layer_names(len(net.blocks), layers, ("self",))
    probe = LossProbe(net, names, ratio, operator, steps)
    with attached(model, probe):
        yield probe.found


class LossProbe(Part):
    """Fills a ``CompressionLoss``."""

    order = 2

    def __init__(self, net, names: Sequence[str], ratio: int | None, operator: str | None, steps: Numbers):
        self.found, self.steps, self.ratio = CompressionLoss(list(names)), step_numbers(steps), ratio
        self.net, self.given, self.full = net, {}, {}
        if ratio is not None:
            check_compression(operator, ratio, tuple(range(len(net.blocks))), len(net.blocks))
            self.given = {name: made_compression(_layer(net, name), ratio, operator) for name in names}

    def expect(self, run: Run, observer: Observer) -> None:
        check_steps(self.steps, run.timesteps)
        self.step(run, observer)

    def step(self, run: Run, observer: Observer) -> None:
        if self.ratio is not None:
            check_ratio(self.ratio, run.grid)
        elif not any(_may_compress(name, run, observer) for name in self.found.names):
            raise PixArtNBError(
                f"none of {', '.join(self.found.names)} compresses its keys; give ratio and operator to see what they "
                "would lose"
            )
        self.found.grid = run.grid
        self.full.clear()

    def _wants(self, name: str, run: Run) -> bool:
        return name in self.found.names and (self.steps is None or run.index in self.steps)

    def uncompressed(self, name: str, x: ms.Tensor) -> None:
        if name in self.found.names:
            self.full.setdefault(name, []).append(x)

    def before(self, call: Call) -> None:
        full = self.full.pop(call.name, None)
        if not self._wants(call.name, call.run):
            return
        compression = self.given.get(call.name, call.compression)
        self.found.compression[call.name] = compression.operator, compression.ratio
        self.found.timestep_of[call.run.index] = call.run.timestep
        self.found.losses[call.name, call.run.index] = self._measure(call, *full, compression)

    def _measure(self, call: Call, k: ms.Tensor, v: ms.Tensor, compression: Compression) -> Loss:
        if compression.ratio == 1:
            return _no_loss(call.run)
        layer, rows, grid = _layer(self.net, call.name), slice(call.run.conditional[0], None), call.run.grid
        k, v, q = k[rows], v[rows], call.q[rows]
        small_k, small_v = compression(k, *grid), compression(v, *grid)

        def output(keys: ms.Tensor, values: ms.Tensor) -> np.ndarray:
            heads = [split_heads(part, layer.heads) for part in (keys, values)]
            return _numbers(layer.proj(merge_heads(attention(q, *heads, None, call.scale))))

        whole, lossy = output(k, v), output(small_k, small_v)
        keys = _numbers(k).reshape(len(whole), *grid, -1)
        near = spread(_numbers(small_k), grid, compression.ratio)
        covered = ~np.isnan(near[0, ..., 0])
        return Loss(
            cosine(keys, near),
            cosine(whole, lossy).reshape(-1, *grid),
            _error(near[:, covered], keys[:, covered]),
            _error(lossy, whole),
        )


def _may_compress(name: str, run: Run, observer: Observer) -> bool:
    """Whether a layer compresses, or another part may make it compress at some step."""
    changed = any(isinstance(part, ReplaceCompression) and name in part.names for part in observer.parts)
    return changed or observer.compression(name, run).ratio > 1


def _no_loss(run: Run) -> Loss:
    ones = np.ones((run.rows, *run.grid), np.float32)
    return Loss(ones, ones, np.zeros(run.rows), np.zeros(run.rows))


def spread(compressed: np.ndarray, grid: tuple[int, int], ratio: int) -> np.ndarray:
    """Compressed tokens (rows, M, D) at every token of their cell, (rows, h, w, D); NaN where no whole cell is."""
    height, width = grid[0] // ratio, grid[1] // ratio
    cells = compressed.reshape(len(compressed), height, width, -1)
    out = np.full((len(compressed), *grid, cells.shape[-1]), np.nan, np.float32)
    out[:, : height * ratio, : width * ratio] = cells.repeat(ratio, 1).repeat(ratio, 2)
    return out


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of the angle between vectors of the last axis; 0 where one of them is zero."""
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.einsum("...d,...d->...", a, b) / np.where(norms == 0, 1, norms)


def _error(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    rows = (len(ours), -1)
    return np.linalg.norm((ours - theirs).reshape(rows), axis=1) / np.linalg.norm(
        theirs.reshape(rows), axis=1
    )


def _layer(net: Any, name: str) -> Any:
    return net.blocks[int(name.split(".")[1])].attn


def _numbers(x: ms.Tensor) -> np.ndarray:
    return x.astype(ms.float32).asnumpy()
