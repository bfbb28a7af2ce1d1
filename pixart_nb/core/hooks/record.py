"""``Trace``: what a traced run leaves, and the maps that are computed from it on demand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.hooks import maps
from pixart_nb.core.hooks.maps import Kept
from pixart_nb.core.hooks.selection import Layers, Numbers, as_list, chosen, is_cross
from pixart_nb.core.hooks.words import Text, Word, find_word


class Trace:
    """Queries and keys of the chosen layers, steps, heads and pictures of one run, and maps made of them.

    Attention maps are ``softmax(scale q k^T)`` of the layer, with its mask. Where a method takes layers (numbers, or
    names such as ``blocks.14.attn``), heads or steps, None is all that are kept and several are averaged. ``row``
    counts the pictures that are kept. A query is a patch of the picture, counted row by row in ``grid``.
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
        #: What each kept row of the batch is: ``conditional 0``, ``unconditional 0``, ...
        self.labels, self.model = list(labels), model or {}
        #: Timestep of each kept step, by the step's number.
        self.timestep_of: dict[int, float] = {}
        #: Prompts of the kept rows; a second entry where they were swapped during the run, and which entry a step has.
        self.texts: list[list[Text]] = []
        self.text_of: dict[int, int] = {}
        #: What interventions did to the run, in words.
        self.changes: list[str] = []
        self.kept: dict[tuple[str, int], Kept] = {}
        self._pictures: np.ndarray | None = None

    def __repr__(self) -> str:
        return (
            f"Trace({len(self.names)} layers, {len(self.steps)} steps, {len(self.heads)} heads, "
            f"{len(self.labels)} pictures of {self.grid[0]}x{self.grid[1]} tokens, {self.nbytes / 1e6:.1f} MB)"
        )

    # ---- what there is

    @property
    def steps(self) -> list[int]:
        """Numbers of the kept steps, counted from 0."""
        return list(self.timestep_of)

    @property
    def timesteps(self) -> list[float]:
        """Timesteps of ``steps``, noise level 999 .. 0."""
        return list(self.timestep_of.values())

    @property
    def nbytes(self) -> int:
        """Bytes that queries and keys take; keys that steps share count once."""
        return sum(
            {id(a): a.nbytes for kept in self.kept.values() for a in (kept.queries, kept.keys)}.values()
        )

    @property
    def prompts(self) -> list[str]:
        """Prompt of each kept row, as it was tokenized; empty where embeddings were given."""
        return [self.text(row).prompt for row in range(len(self.labels))]

    @property
    def pictures(self) -> np.ndarray | None:
        """The pictures of the kept rows, (rows, H, W, 3) uint8, if they were set; they are saved with the trace."""
        return self._pictures

    @pictures.setter
    def pictures(self, value: Any) -> None:
        array = np.stack([np.asarray(picture) for picture in value])
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[::3] != (len(self.labels), 3):
            raise PixArtNBError(
                f"expected {len(self.labels)} pictures of (H, W, 3) uint8, or PIL images of them; "
                f"got {array.shape} {array.dtype}"
            )
        self._pictures = array

    def text(self, row: int = 0, step: int | None = None) -> Text:
        """The prompt of a row, at a step (the first: None), with its tokens and words."""
        self._check_row(row)
        if step is not None and step not in self.timestep_of:
            raise PixArtNBError(f"the trace has no step {step!r}; it has {self.steps}")
        number = next(iter(self.text_of.values()), 0) if step is None else self.text_of[step]
        return self.texts[number][row] if self.texts else Text()

    def tokens(self, row: int = 0) -> list[str]:
        """The pieces of a picture's prompt."""
        return list(self.text(row).pieces)

    def words(self, row: int = 0) -> list[str]:
        """The words of a picture's prompt, special tokens among them; the order is that of ``word_maps``."""
        return [word.text for word in self.text(row).words]

    def word_tokens(self, row: int = 0) -> list[Word]:
        """The words of a picture's prompt with the numbers of their tokens."""
        return self.text(row).words

    def key_grid(self, name: str, step: int | None = None) -> tuple[int, int]:
        """(height, width) of the keys of a layer: ``grid`` shrunk by its ratio; (1, tokens) for cross-attention."""
        kept = self._entry(name, self.steps[0] if step is None and self.steps else step)
        if is_cross(name):
            return 1, kept.keys.count
        return self.grid[0] // kept.ratio, self.grid[1] // kept.ratio

    def compression(self, name: str, step: int | None = None) -> tuple[str | None, int]:
        """Operator and ratio that made a layer's keys; (None, 1) without compression."""
        kept = self._entry(name, self.steps[0] if step is None and self.steps else step)
        return kept.operator, kept.ratio

    # ---- maps

    def rows(self, name: str, step: int, queries, heads: Numbers = None, row: int = 0) -> np.ndarray:
        """Attention of chosen queries to all keys of a layer: (heads, queries, keys) float32; rows sum to one.

        ``queries``: numbers, a (h, w) bool mask, or None for all (which makes an N x M array: for small pictures).
        """
        kept, places = self._entry(name, step), self._queries(queries)
        self._check_row(row)
        parts = [part for _, part in maps.stream(kept, row, self._heads(heads), places)]
        return np.concatenate(parts, 1)

    def mean_map(
        self,
        layers: Layers = None,
        steps: Numbers = None,
        heads: Numbers = None,
        queries=None,
        row: int = 0,
        kind: str = "self",
    ) -> np.ndarray:
        """How much chosen queries (all: None) look at each key, on average: (kh, kw) of ``key_grid``, float32.

        The layers must have keys on the same grid. For ``kind="cross"`` it is (1, tokens).
        """
        names = self._names(layers, kind)
        shapes = {name: self.key_grid(name) for name in names}
        if len(set(shapes.values())) > 1:
            raise PixArtNBError(
                f"the layers have keys on different grids, {shapes}; choose layers with one grid"
            )
        found = self._over(names, steps, heads, queries, row, maps.query_mean)
        return found.mean((0, 1, 2)).reshape(shapes[names[0]]).astype(np.float32)

    def word_map(
        self,
        word: str | int,
        layers: Layers = None,
        heads: Numbers = None,
        steps: Numbers = None,
        row: int = 0,
    ) -> np.ndarray:
        """How much each patch attends to a word: (h, w) float32, mean over layers, heads and steps.

        The pieces of a word are summed, as are its occurrences; several words in a row are given as one text, and an
        int is the word of that number in ``words``. Raises ValueError that lists the words there are.
        """
        return self._token_sums(self._word_groups(word, steps, row), layers, heads, row)[0]

    def word_maps(
        self, layers: Layers = None, heads: Numbers = None, steps: Numbers = None, row: int = 0
    ) -> np.ndarray:
        """``word_map`` of every word of ``words(row)``: (words, h, w) float32; over the words it sums to one."""
        texts = {step: self.text(row, step) for step in self._steps(steps)}
        if len(set(texts.values())) > 1:
            raise PixArtNBError(
                f"the prompt changes during these steps; choose steps of one prompt: {self.text_of}"
            )
        groups = {step: [word.tokens for word in text.words] for step, text in texts.items()}
        return self._token_sums(groups, layers, heads, row)

    def _word_groups(self, word: str | int, steps: Numbers, row: int) -> dict[int, list[tuple[int, ...]]]:
        """Tokens of a word at each step. Steps whose prompt has no such word are left out if all were asked for."""
        found: dict[int, list[tuple[int, ...]]] = {}
        problem: ValueError | None = None
        for step in self._steps(steps):
            try:
                found[step] = [find_word(self.text(row, step), word)]
            except ValueError as error:
                problem = error
        if problem is not None and (steps is not None or not found):
            raise problem
        return found

    def _token_sums(self, groups: dict[int, list[tuple[int, ...]]], layers: Layers, heads: Numbers, row: int):
        """Maps of groups of tokens at some steps, mean over layers, heads and steps: (groups, h, w) float32."""
        places, total, count = self._heads(heads), 0.0, 0
        for name in self._names(layers, "cross"):
            for step, tokens in groups.items():
                found = maps.token_maps(self._entry(name, step), row, places, tokens)
                total, count = total + found.sum(0, dtype=np.float64), count + len(places)
        return (total / count).reshape(-1, *self.grid).astype(np.float32)

    # ---- numbers for each layer, step and head

    def entropy(
        self,
        layers: Layers = None,
        steps: Numbers = None,
        heads: Numbers = None,
        queries=None,
        row: int = 0,
        kind: str = "self",
    ) -> np.ndarray:
        """Mean entropy of the attention rows in nats: (layers, steps, heads). 0 is one key, log(keys) all alike.

        For large pictures give ``queries=t.sample(1024)``: all queries of all keys take long at 4K.
        """
        return self._over(self._names(layers, kind), steps, heads, queries, row, maps.entropy)

    def mean_distance(
        self,
        layers: Layers = None,
        steps: Numbers = None,
        heads: Numbers = None,
        queries=None,
        row: int = 0,
    ) -> np.ndarray:
        """Mean distance in tokens from a query to the keys it looks at, self-attention: (layers, steps, heads)."""
        measure = lambda *args: maps.mean_distance(*args, self.grid)  # noqa: E731
        return self._over(self._names(layers, "self"), steps, heads, queries, row, measure)

    def sample(self, count: int) -> np.ndarray:
        """Numbers of at most ``count`` queries spread evenly over the picture, for means over large pictures."""
        total = self.grid[0] * self.grid[1]
        return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(np.int64))

    def _over(self, names, steps, heads, queries, row, measure) -> np.ndarray:
        self._check_row(row)
        chosen_heads, places = self._heads(heads), self._queries(queries)
        return np.array(
            [
                [measure(self._entry(name, step), row, chosen_heads, places) for step in self._steps(steps)]
                for name in names
            ]
        )

    # ---- selections, checked

    def _entry(self, name: str, step: int | None) -> Kept:
        if name not in self.names:
            raise PixArtNBError(f"the trace has no layer {name!r}; it has {', '.join(self.names)}")
        if (name, step) not in self.kept:
            raise PixArtNBError(f"the trace has no step {step!r}; it has {self.steps}")
        return self.kept[name, step]

    def _names(self, layers: Layers, kind: str | None) -> list[str]:
        own = [n for n in self.names if kind is None or is_cross(n) == (kind == "cross")]
        if not own:
            raise PixArtNBError(f"the trace has no {kind}-attention; it has {', '.join(self.names)}")
        if layers is None:
            return own
        names = []
        for layer in as_list(layers):
            found = [n for n in own if n == layer or n.split(".")[1] == str(layer)]
            if not found:
                raise PixArtNBError(f"the trace has no layer {layer!r}; it has {', '.join(own)}")
            names += found
        return names

    def _steps(self, steps: Numbers) -> list[int]:
        return chosen("step", steps, self.steps)

    def _heads(self, heads: Numbers) -> np.ndarray:
        """Places of the heads among those that are kept."""
        return np.array([self.heads.index(head) for head in chosen("head", heads, self.heads)])

    def _check_row(self, row: int) -> None:
        if not 0 <= row < len(self.labels):
            listed = ", ".join(f"{number}: {label}" for number, label in enumerate(self.labels))
            raise PixArtNBError(f"the trace has no picture {row!r}; it has {listed or 'none'}")

    def _queries(self, queries) -> np.ndarray:
        total = self.grid[0] * self.grid[1]
        if queries is None:
            return np.arange(total)
        array = np.asarray(queries)
        if array.dtype == bool:
            if array.shape != self.grid or not array.any():
                raise PixArtNBError(
                    f"a mask of queries must be {self.grid} with at least one True, got {array.shape}"
                )
            return np.flatnonzero(array)
        array = np.atleast_1d(array)
        if array.size == 0 or array.min() < 0 or array.max() >= total:
            raise PixArtNBError(
                f"queries are {queries!r}; expected numbers 0 to {total - 1} of {self.grid} patches"
            )
        return array

    # ---- files

    def save(self, path: str | Path) -> None:
        """Write everything into one safetensors file, whole or not at all."""
        from pixart_nb.core.hooks.files import save_trace

        save_trace(self, path)

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> Trace:
        """Read a trace. ``model``: a pipeline or transformer that it must be of.

        Raises CheckpointError for a file that is damaged or no trace, and for a trace of another model.
        """
        from pixart_nb.core.hooks.files import load_trace

        return load_trace(path, model)
