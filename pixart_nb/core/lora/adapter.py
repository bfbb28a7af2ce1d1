"""One LoRA on a transformer: its branches, its dropout, its file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from mindspore import nn, ops

from pixart_nb.core.backend import ms
from pixart_nb.core.lora.config import LoraConfig
from pixart_nb.core.lora.files import LoraModule, write_lora
from pixart_nb.core.lora.layers import (
    PHASES,
    Branch,
    DoraBranch,
    Dropout,
    Unchanged,
    from_matrix,
    to_matrix,
)
from pixart_nb.core.lora.targets import Layers, Place


class Adapter:
    """One LoRA on a transformer: a branch for each module, and how strongly all of them count.

    ``config`` is what it was made with, None for one that was read from a file.
    """

    def __init__(self, name: str, layers: Layers, strength: ms.Parameter, config: LoraConfig | None):
        self.name, self.layers, self.strength, self.config = name, layers, strength, config
        self.places: dict[str, Place] = {}
        self.branches: dict[str, Branch] = {}
        self.phases: ms.Parameter | None = None
        if config is not None and config.lora_dropout:
            self.phases = untrained(np.zeros(PHASES), f"{name}.phases")

    def add(self, module: str, place: Place, part: LoraModule) -> None:
        """Make the branch of a module."""
        title = f"{self.name}.{module}"
        down, up = to_matrix(part.down), part.up.reshape(len(part.up), -1)
        dropout = None
        if self.phases is not None:
            dropout = Dropout(down.shape[1], self.config.lora_dropout, self.phases, f"{title}.columns")
        common = (title, down, up, part.scale, self.strength, dropout)
        branch = Branch(*common) if part.magnitude is None else DoraBranch(*common, part.magnitude)
        self.places[module], self.branches[module] = place, branch

    def parameters(self) -> dict[str, ms.Parameter]:
        """Everything that is trained, by module and PEFT's name of the part."""
        return {
            f"{module}.{part}": parameter
            for module, branch in self.branches.items()
            for part, parameter in branch.parameters().items()
        }

    @property
    def size(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.size for parameter in self.parameters().values())

    def on(self, layer: str) -> list[tuple[int, int, nn.Cell]]:
        """The branches of a layer in order, with the gaps between them: (start, stop, branch)."""
        own = sorted((p.start, p.stop, self.branches[m]) for m, p in self.places.items() if p.layer == layer)
        out, reached = [], 0
        for start, stop, branch in own:
            out += [(reached, start, Unchanged(start - reached))] if start > reached else []
            out.append((start, stop, branch))
            reached = stop
        rows = self.layers.cells[layer].weight.shape[0]
        return out + ([(reached, rows, Unchanged(rows - reached))] if own and reached < rows else [])

    def change(self, layer: str, weight: np.ndarray) -> np.ndarray:
        """What a strength of 1 adds to a layer's weight, a matrix (out, in): the same shape, float64."""
        out = np.zeros(weight.shape, np.float64)
        for start, stop, branch in self.on(layer):
            if isinstance(branch, Branch):
                out[start:stop] = branch.change(weight[start:stop])
        return out

    # ---- dropout

    def draw_dropout(self, *key: int) -> None:
        """Draw the noise of the next step, from a generator of its own for a key such as (seed, step)."""
        if self.phases is None:
            return
        rng = np.random.default_rng((*key, 8))
        for phases in (self.phases, *(branch.dropout.columns for branch in self.branches.values())):
            ops.assign(phases, ms.Tensor(rng.random(phases.shape, np.float32)))

    def with_dropout(self, batch: Callable[[int], tuple], seed: int) -> Callable[[int], tuple]:
        """``batch(step)``, which also draws the dropout of that step: it is to be called right before the step."""

        def drawn(step: int) -> tuple:
            self.draw_dropout(seed, step)
            return batch(step)

        return drawn if self.phases is not None else batch

    # ---- files

    def modules(self) -> dict[str, LoraModule]:
        """What the adapter does, under diffusers' names: a fused layer's branch is one for each of its parts."""
        out = {}
        for module, place in self.places.items():
            for name, part in self.layers.diffusers.items():
                if part.layer == place.layer and place.start <= part.start and part.stop <= place.stop:
                    out[name] = self._rows(module, part.start - place.start, part.stop - place.start)
        return out

    def _rows(self, module: str, start: int, stop: int) -> LoraModule:
        branch, shape = self.branches[module], self.layers.cells[self.places[module].layer].weight.shape
        parts = {name: np.array(p.asnumpy()) for name, p in branch.parameters().items()}
        up, magnitude = parts["lora_B"][start:stop], parts.get("lora_magnitude_vector")
        return LoraModule(
            from_matrix(parts["lora_A"], shape),
            up.reshape(*up.shape, 1, 1) if len(shape) == 4 else up,
            branch.scale,
            None if magnitude is None else magnitude[start:stop],
        )

    def save(self, folder: str | Path, layout: str = "diffusers") -> Path:
        """Write the adapter as ``diffusers`` or ``peft`` lays it out; the path of its weights."""
        config = self.config
        extra = {"use_rslora": config.use_rslora, "lora_dropout": config.lora_dropout} if config else {}
        return write_lora(folder, self.modules(), layout, extra)


def untrained(values: np.ndarray, name: str) -> ms.Parameter:
    """A float32 parameter that no optimizer is given."""
    return ms.Parameter(ms.Tensor(values.astype(np.float32)), name=name, requires_grad=False)
