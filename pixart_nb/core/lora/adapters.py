"""All the LoRAs of one transformer: made or loaded, active with weights, fused into its weights and taken out again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from mindspore import nn, ops

from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.lora.adapter import Adapter, untrained
from pixart_nb.core.lora.config import LoraConfig
from pixart_nb.core.lora.files import LoraFile, LoraModule
from pixart_nb.core.lora.layers import (
    Adapted,
    as_matrix,
    from_matrix,
    row_norms,
    to_matrix,
)
from pixart_nb.core.lora.targets import Layers, Place
from pixart_nb.core.models.transformer import PixArt


class Adapters:
    """All adapters of one transformer. ``Adapters.of(net)`` is the same object as long as the network lives.

    Active adapters stand beside the weights, or are fused into them. All values change in place, which a compiled graph
    sees; which layers are adapted is its structure, which it does not: after loading, activating, fusing, and their
    opposites, a graph has to be compiled again. The pipeline compiles nothing.
    """

    def __init__(self, net: PixArt):
        self.net, self.layers = net, Layers(net)
        self.adapters: dict[str, Adapter] = {}
        self.weights: dict[str, float] = {}  # of the active adapters
        self.enabled = True
        self.originals: dict[str, np.ndarray] = {}  # of the layers whose weights hold fused adapters

    @classmethod
    def of(cls, net: PixArt) -> Adapters:
        """The adapters of a network."""
        if getattr(net, "adapters", None) is None:
            net.adapters = cls(net)
        return net.adapters

    # ---- making

    def add(self, name: str, config: LoraConfig, seed: int = 0) -> Adapter:
        """A new adapter, which changes nothing yet (lora_B is 0), alone active.

        Raises ``ValueError`` for a target that is no layer, which lists those that are.
        """
        self._check_new(name)
        adapter = self._empty(name, config)
        rng = np.random.default_rng(seed)
        for module, place in self.layers.named(config.target_modules).items():
            adapter.add(module, place, self._fresh(module, place, config, rng))
        return self._adopt(adapter)

    def load(self, name: str, file: LoraFile) -> Adapter:
        """The adapter of a file, alone active. One that does not fit this network is refused as a whole.

        Raises ``CheckpointError`` that says which modules are unknown and which have another shape.
        """
        self._check_new(name)
        places = self._fitting(file)
        self.layers.check_overlap(places)
        adapter = self._empty(name, None)
        for module, place in places.items():
            adapter.add(self.layers.canonical(place), place, file.modules[module])
        return self._adopt(adapter)

    def _check_new(self, name: str) -> None:
        self._check_unfused("a LoRA can be added")
        if not isinstance(name, str) or not name:
            raise PixArtNBError(f"the name of an adapter is {name!r}; expected a text")
        if name in self.adapters:
            raise PixArtNBError(
                f"there is an adapter {name!r} already; choose another name, or delete it first (delete_adapters)"
            )

    def _check_unfused(self, what: str) -> None:
        if self.originals:
            raise PixArtNBError(
                f"adapters are fused into the weights; unfuse them (unfuse_lora) before {what}"
            )

    def _empty(self, name: str, config: LoraConfig | None) -> Adapter:
        return Adapter(name, self.layers, untrained(np.zeros(1), f"{name}.strength"), config)

    def _adopt(self, adapter: Adapter) -> Adapter:
        self.adapters[adapter.name] = adapter
        self.activate([adapter.name])
        return adapter

    def _fresh(self, module: str, place: Place, config: LoraConfig, rng: np.random.Generator) -> LoraModule:
        weight = self.layers.cells[place.layer].weight
        rank, size = config.rank(module), int(np.prod(weight.shape[1:]))
        if config.init_lora_weights == "gaussian":
            down = rng.standard_normal((rank, size)) / rank
        else:
            down = rng.uniform(-1, 1, (rank, size)) / np.sqrt(size)
        magnitude = None
        if config.use_dora:
            rows = as_matrix(weight)[place.start : place.stop].astype(ms.float32)
            magnitude = row_norms(rows).asnumpy()
        down = from_matrix(down.astype(np.float32), weight.shape)
        up = np.zeros((place.stop - place.start, rank), np.float32)
        return LoraModule(down, up, config.scale(module), magnitude)

    def _fitting(self, file: LoraFile) -> dict[str, Place]:
        places = {name: self.layers.places.get(name) for name in file.modules}
        unknown = [name for name, place in places.items() if place is None]
        wrong = []
        for name, place in places.items():
            if place is not None and (problem := self._misfit(place, file.modules[name])):
                wrong.append(f"{name}: {problem}")
        if unknown or wrong:
            raise CheckpointError(self._another_model(file, unknown, wrong))
        return places

    def _misfit(self, place: Place, part: LoraModule) -> str:
        shape = self.layers.cells[place.layer].weight.shape
        wanted, given = (place.stop - place.start, *shape[1:]), (len(part.up), *part.down.shape[1:])
        return "" if wanted == given else f"LoRA {given}, model {wanted}"

    def _another_model(self, file: LoraFile, unknown: list[str], wrong: list[str]) -> str:
        parts = [
            f"{len(names)} {what} ({'; '.join(names[:4])}{'; ...' if len(names) > 4 else ''})"
            for what, names in (("are of another shape", wrong), ("are not in the model", unknown))
            if names
        ]
        config = self.net.config
        return (
            f"{file.source} is a LoRA for another model: of its {len(file.modules)} modules {' and '.join(parts)}. "
            f"This model has {config.depth} blocks of width {config.hidden_size}. Nothing was changed."
        )

    # ---- choosing

    @property
    def active(self) -> list[str]:
        """Names of the adapters that count."""
        return list(self.weights) if self.enabled else []

    def activate(self, names: Sequence[str], weights: float | Sequence[float] | None = None) -> None:
        """Let these adapters count, each with its weight (1 unless told), and no others."""
        self._check_unfused("others are chosen")
        self.weights = dict(zip(self._known(names), _as_many(weights, len(names)), strict=True))
        self.enabled = True
        self._install()

    def enable(self, enabled: bool) -> None:
        """Switch the active adapters off and on again."""
        self._check_unfused("they are switched on or off")
        self.enabled = enabled
        self._install()

    def delete(self, names: Sequence[str]) -> None:
        """Forget adapters; the others stay as they are."""
        self._check_unfused("one is deleted")
        for name in self._known(names):
            del self.adapters[name]
            self.weights.pop(name, None)
        self._install()

    def clear(self) -> None:
        """Forget all adapters. Weights that they are fused into stay as they are, and cannot be restored any more."""
        self.adapters, self.weights, self.originals = {}, {}, {}
        self._install()

    def named(self, name: str) -> Adapter:
        """An adapter by its name; ``ValueError`` lists those that there are."""
        return self.adapters[self._known([name])[0]]

    def _known(self, names: Sequence[str]) -> list[str]:
        missing = [name for name in names if name not in self.adapters]
        if missing:
            raise PixArtNBError(
                f"no adapter is called {missing[0]!r}; there are {list(self.adapters) or 'none'}"
            )
        if len(set(names)) != len(names):
            raise PixArtNBError(f"adapters {list(names)}: one of them is named twice")
        return list(names)

    def _install(self) -> None:
        """Put into each layer's place the layer itself, or the layer with what the active adapters add to it."""
        beside = [] if self.originals else [self.adapters[name] for name in self.active]
        for name, adapter in self.adapters.items():
            strength = self.weights[name] if adapter in beside else 0.0
            ops.assign(adapter.strength, ms.Tensor([strength], ms.float32))
        for layer, cell in self.layers.cells.items():
            changes = [change for adapter in beside if (change := adapter.on(layer))]
            if changes:
                cell, training = Adapted(cell, changes), self.net.training
                cell.set_train(training)
            _replace(self.net, layer, cell)

    # ---- fusing

    def fuse(self, scale: float = 1.0, names: Iterable[str] | None = None) -> None:
        """Add the changes of the active adapters (or of ``names`` among them), times ``scale``, to the weights.

        The original weights are kept, in memory of the processor, until ``unfuse`` or ``clear``.
        """
        self._check_unfused("they are fused again")
        chosen = self._known(list(self.active if names is None else names))
        idle = [name for name in chosen if name not in self.active]
        if idle or not chosen:
            what = f"adapter {idle[0]!r} is not active" if idle else "no adapter is active"
            raise PixArtNBError(f"{what}; choose the ones to fuse first (set_adapters)")
        originals = {}
        for layer, cell in self.layers.cells.items():
            matrix = to_matrix(cell.weight.asnumpy())
            adapters = [self.adapters[name] for name in chosen if self.adapters[name].on(layer)]
            changes = [self.weights[a.name] * a.change(layer, matrix) for a in adapters]
            if changes:
                originals[layer] = np.array(cell.weight.asnumpy())
                self.originals = originals
                _assign(cell.weight, from_matrix(matrix + scale * sum(changes), cell.weight.shape))
        self._install()

    def unfuse(self) -> None:
        """Give the layers the weights back that they had before, bit for bit."""
        if not self.originals:
            raise PixArtNBError("no adapter is fused into the weights; there is nothing to take out")
        for layer, weight in self.originals.items():
            _assign(self.layers.cells[layer].weight, weight)
        self.originals = {}
        self._install()


def _as_many(weights: float | Sequence[float] | None, count: int) -> list[float]:
    values = [1.0 if weights is None else weights] * count if not isinstance(weights, Sequence) else weights
    try:
        values = [1.0 if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        raise PixArtNBError(f"the weights of adapters are {weights!r}; expected numbers") from None
    if len(values) != count or not np.isfinite(values).all():
        raise PixArtNBError(f"{values} for {count} adapters; expected a finite weight for each")
    return values


def _assign(parameter: ms.Parameter, values: np.ndarray) -> None:
    """Change a parameter in place: compiled graphs see that, and not a parameter that is replaced."""
    ops.assign(parameter, ms.Tensor(np.ascontiguousarray(values)).astype(parameter.dtype))


def _replace(net: nn.Cell, path: str, cell: nn.Cell) -> None:
    """Put a cell into another's place. Past ``setattr``, which would give its parameters other names."""
    *parents, leaf = path.split(".")
    for name in parents:
        net = net._cells[name]
    net._cells[leaf] = cell
