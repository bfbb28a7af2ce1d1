"""``Trace``: queries and keys of a run, and attention maps that are computed from them on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.errors import PixArtNBError, did_you_mean, pluralized
from pixart_nb.core.hooks import attention_maps, selection
from pixart_nb.core.hooks.attention_maps import LayerRecord
from pixart_nb.core.hooks.selection import Layers, Numbers, Text, Word, as_list, is_cross, select
from pixart_nb.core.hooks.trace_files import check_model, read_trace, write_trace


class Trace:
    """Queries and keys of the chosen layers, steps, heads and images of one run, and maps made of them.

    Attention maps are ``softmax(scale q k^T)`` of the layer, with its mask. Where a method takes layers (numbers, or
    names such as ``blocks.14.attn``), heads or steps, None is all that were kept, and several are averaged. ``row`` is
    the number of the image. A query is a patch of the image, counted row by row in ``grid`` (height, width).
    """

    def __init__(
        self,
        names: Sequence[str],
        heads: Sequence[int],
        grid: tuple[int, int] = (0, 0),
        labels: Sequence[str] = (),
        model: dict[str, Any] | None = None,
    ):
        self.names, self.heads, self.grid = list(names), list(heads), grid
        #: Name of each kept row of the batch: ``conditional 0``, ``unconditional 0``, ...
        self.labels, self.model = list(labels), model or {}
        #: Timestep of each kept step, by the step's number.
        self.timestep_of: dict[int, float] = {}
        #: Prompts of the kept rows, one entry for each prompt in turn; ``text_of`` has the entry of each step.
        self.texts: list[list[Text]] = []
        self.text_of: dict[int, int] = {}
        #: Descriptions of the interventions in the run.
        self.changes: list[str] = []
        self.records: dict[tuple[str, int], LayerRecord] = {}
        self._images: np.ndarray | None = None

    def __repr__(self) -> str:
        sizes = {"block": self.block_count, "step": len(self.steps), "head": len(self.heads)}
        parts = ", ".join(pluralized(count, name) for name, count in sizes.items())
        images = f"{pluralized(len(self.labels), 'image')} of {self.grid[0]}x{self.grid[1]} tokens"
        return f"Trace({parts}, {images}, {self.nbytes / 1e6:.1f} MB)"

    # ---- content

    @property
    def block_count(self) -> int:
        """Number of blocks with a kept layer; self- and cross-attention of a block count once."""
        return len({name.rpartition(".")[0] for name in self.names})

    @property
    def steps(self) -> list[int]:
        """Numbers of the kept steps, counted from 0."""
        return list(self.timestep_of)

    @property
    def timesteps(self) -> list[float]:
        """Timesteps of ``steps``, 999 (noise) .. 0."""
        return list(self.timestep_of.values())

    @property
    def nbytes(self) -> int:
        """Bytes of queries and keys; keys that several steps share count once."""
        arrays = [array for record in self.records.values() for array in (record.queries, record.keys)]
        return sum({id(array): array.nbytes for array in arrays}.values())

    @property
    def prompts(self) -> list[str]:
        """Prompt of each kept row, as it was tokenized; empty where embeddings were given."""
        return [self.text(row).prompt for row in range(len(self.labels))]

    @property
    def images(self) -> np.ndarray | None:
        """Images of the kept rows, (rows, H, W, 3) uint8, if they were set; they are saved with the trace."""
        return self._images

    @images.setter
    def images(self, value: Any) -> None:
        array = np.stack([np.asarray(image) for image in value])
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[::3] != (len(self.labels), 3):
            raise PixArtNBError(
                f"expected {len(self.labels)} images of (H, W, 3) uint8, or PIL images; got {array.shape} {array.dtype}"
            )
        self._images = array

    def text(self, row: int = 0, step: int | None = None) -> Text:
        """Return the prompt of a row at a step (None is the first), with its tokens and words."""
        self._check_row(row)
        if step is not None:
            select("step", step, self.steps)
        number = next(iter(self.text_of.values()), 0) if step is None else self.text_of.get(step, 0)
        return self.texts[number][row] if self.texts else Text()

    def words(self, row: int = 0) -> list[str]:
        """Return the words of an image's prompt, special tokens among them, in the order of ``word_maps``."""
        return [word.text for word in self.word_tokens(row)]

    def word_tokens(self, row: int = 0) -> list[Word]:
        """Return the words of an image's prompt with the numbers of their tokens."""
        return self.text(row).words

    def key_grid(self, name: str, step: int | None = None) -> tuple[int, int]:
        """Return (height, width) of a layer's keys: the grid divided by its ratio; (1, tokens) for cross-attention."""
        record = self._record(name, step)
        if is_cross(name):
            return 1, record.keys.count
        return self.grid[0] // record.ratio, self.grid[1] // record.ratio

    def compression(self, name: str, step: int | None = None) -> tuple[str | None, int]:
        """Return operator and ratio of a layer's keys; (None, 1) without compression."""
        record = self._record(name, step)
        return record.operator, record.ratio

    # ---- maps

    def rows(self, name: str, step: int, queries, heads: Numbers = None, row: int = 0) -> np.ndarray:
        """Return the attention of queries to all keys of a layer: (heads, queries, keys) float32; rows sum to one.

        ``queries``: numbers, a (h, w) bool mask, or None for all (an N x M array: for small images).
        """
        record, chosen, numbers = self.selected(name, step, queries, heads, row)
        chunks = attention_maps.attention_chunks(record, row, chosen, numbers)
        return np.concatenate([attention for _, attention in chunks], 1)

    def selected(
        self, name: str, step: int, queries, heads: Numbers = None, row: int = 0
    ) -> tuple[LayerRecord, np.ndarray, np.ndarray]:
        """Return the record of a layer, positions of the heads in it, and numbers of the queries, all checked."""
        self._check_row(row)
        return self._record(name, step), self._heads(heads), self._queries(queries)

    def mean_map(
        self,
        layers: Layers = None,
        steps: Numbers = None,
        heads: Numbers = None,
        queries=None,
        row: int = 0,
        attention: str = "self",
    ) -> np.ndarray:
        """Return the mean attention of queries (None is all) to each key: (kh, kw) of ``key_grid``, float32.

        The layers must have keys on the same grid. For ``attention="cross"`` it is (1, tokens).
        """
        names = self._names(layers, attention)
        grids = {name: self.key_grid(name) for name in names}
        if len(set(grids.values())) > 1:
            raise PixArtNBError(f"the layers have keys on different grids, {grids}; choose layers with one grid")
        means = self._measure(attention_maps.query_mean, names, steps, heads, queries, row)
        return means.mean((0, 1, 2)).reshape(grids[names[0]]).astype(np.float32)

    def word_map(
        self, word: str | int, layers: Layers = None, heads: Numbers = None, steps: Numbers = None, row: int = 0
    ) -> np.ndarray:
        """Return the attention of each patch to a word: (h, w) float32, mean over layers, heads and steps.

        The pieces of a word are summed, as are its occurrences. Several words in a row may be given as one text; an int
        is the number of a word in ``words``. PixArtNBError lists the words if there is no such word.
        """
        groups: dict[int, list[tuple[int, ...]]] = {}
        problem: PixArtNBError | None = None
        for step in select("step", steps, self.steps):
            try:
                groups[step] = [selection.find_word(self.text(row, step), word)]
            except PixArtNBError as error:  # after a swap of prompts, steps without the word are left out
                problem = error
        if problem is not None and (steps is not None or not groups):
            raise problem
        return self._token_sums(groups, layers, heads, row)[0]

    def word_maps(
        self, layers: Layers = None, heads: Numbers = None, steps: Numbers = None, row: int = 0
    ) -> np.ndarray:
        """Return ``word_map`` of every word of ``words(row)``: (words, h, w) float32; the sum over words is one."""
        texts = {step: self.text(row, step) for step in select("step", steps, self.steps)}
        if len(set(texts.values())) > 1:
            raise PixArtNBError(f"the prompt changes during these steps; choose steps of one prompt: {self.text_of}")
        groups = {step: [word.tokens for word in text.words] for step, text in texts.items()}
        return self._token_sums(groups, layers, heads, row)

    def _token_sums(self, groups: dict[int, list[tuple[int, ...]]], layers: Layers, heads: Numbers, row: int):
        """Return maps of groups of tokens at some steps, mean over layers, heads and steps: (groups, h, w) float32."""
        numbers, total, count = self._heads(heads), 0.0, 0
        for name in self._names(layers, "cross"):
            for step, tokens in groups.items():
                maps = attention_maps.token_maps(self._record(name, step), row, numbers, tokens)
                total, count = total + maps.sum(0, dtype=np.float64), count + len(numbers)
        return (total / count).reshape(-1, *self.grid).astype(np.float32)

    # ---- numbers for each layer, step and head

    def entropy(
        self,
        layers: Layers = None,
        steps: Numbers = None,
        heads: Numbers = None,
        queries=None,
        row: int = 0,
        attention: str = "self",
    ) -> np.ndarray:
        """Return the mean entropy of the attention rows in nats, 0 .. log(keys): (layers, steps, heads).

        For large images give ``queries=t.sample(1024)``: all queries of all keys take long at 4K.
        """
        names = self._names(layers, attention)
        return self._measure(attention_maps.entropy, names, steps, heads, queries, row)

    def mean_distance(
        self, layers: Layers = None, steps: Numbers = None, heads: Numbers = None, queries=None, row: int = 0
    ) -> np.ndarray:
        """Return the mean distance in tokens from a query to the keys it attends to: (layers, steps, heads)."""
        measure = partial(attention_maps.mean_distance, grid=self.grid)
        return self._measure(measure, self._names(layers, "self"), steps, heads, queries, row)

    def sample(self, count: int) -> np.ndarray:
        """Return at most ``count`` query numbers, spread evenly over the image."""
        total = self.grid[0] * self.grid[1]
        return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))

    def _measure(self, measure: Callable, names: list[str], steps, heads, queries, row: int) -> np.ndarray:
        self._check_row(row)
        heads, queries, steps = self._heads(heads), self._queries(queries), select("step", steps, self.steps)
        return np.array([[measure(self._record(n, step), row, heads, queries) for step in steps] for n in names])

    # ---- checked selections

    def _record(self, name: str, step: int | None) -> LayerRecord:
        if name not in self.names:
            listed = f"the trace has no layer {name!r}; it has {', '.join(self.names)}"
            raise PixArtNBError(listed + did_you_mean(name, self.names))
        step = self.steps[0] if step is None and self.steps else step
        if (name, step) not in self.records:
            raise PixArtNBError(f"the trace has no step {step!r}; it has {self.steps}")
        return self.records[name, step]

    def _names(self, layers: Layers, attention: str) -> list[str]:
        own = [name for name in self.names if is_cross(name) == (attention == "cross")]
        if not own:
            raise PixArtNBError(f"the trace has no {attention}-attention; it has {', '.join(self.names)}")
        names = own if layers is None else []
        for layer in () if layers is None else as_list(layers):
            matching = [name for name in own if layer == name or str(layer) == str(selection.layer_number(name))]
            if not matching:
                listed = f"the trace has no layer {layer!r}; it has {', '.join(own)}"
                raise PixArtNBError(listed + did_you_mean(layer, own))
            names += matching
        return names

    def _heads(self, heads: Numbers) -> np.ndarray:
        """Return the positions of heads among the kept ones."""
        return np.array([self.heads.index(head) for head in select("head", heads, self.heads)])

    def _check_row(self, row: int) -> None:
        if not 0 <= row < len(self.labels):
            listed = ", ".join(f"{number}: {label}" for number, label in enumerate(self.labels))
            raise PixArtNBError(f"the trace has no image {row!r}; it has {listed or 'none'}")

    def _queries(self, queries) -> np.ndarray:
        total = self.grid[0] * self.grid[1]
        if queries is None:
            return np.arange(total)
        array = np.atleast_1d(np.asarray(queries))
        if array.dtype == bool:
            if array.shape != self.grid or not array.any():
                raise PixArtNBError(f"a mask of queries must be {self.grid} with at least one True, got {array.shape}")
            return np.flatnonzero(array)
        if array.size == 0 or array.min() < 0 or array.max() >= total:
            raise PixArtNBError(f"queries are {queries!r}; expected numbers 0 to {total - 1} of {self.grid} patches")
        return array

    # ---- files

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file, atomically."""
        header = {name: getattr(self, name) for name in ("names", "heads", "grid", "labels", "model", "changes")}
        header |= {"timesteps": list(self.timestep_of.items()), "text_of": list(self.text_of.items())}
        header["texts"] = [[[text.prompt, text.pieces] for text in rows] for rows in self.texts]
        write_trace(path, header, self.records, self._images)

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> Trace:
        """Read a trace, optionally checked to be of ``model`` (a pipeline or transformer).

        A damaged file, one that is not a trace, and a trace of another model raise CheckpointError.
        """
        header, records, images = read_trace(path)
        if model is not None:
            check_model(header.model, model)
        trace = cls(header.names, header.heads, header.grid, header.labels, header.model)
        trace.timestep_of, trace.text_of = dict(header.timesteps), dict(header.text_of)
        trace.texts = [[Text(prompt, tuple(pieces)) for prompt, pieces in rows] for rows in header.texts]
        trace.changes, trace.records, trace._images = header.changes, records, images
        return trace
