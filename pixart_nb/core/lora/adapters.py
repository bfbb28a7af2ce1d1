"""LoRA and DoRA adapters of a transformer: created or loaded, active with weights, fused into the weights and back.

To train one, give ``Trainer`` the parameters of ``Adapters.of(net).add(name, LoraConfig(...), seed)`` in place of the
network's, and its ``with_dropout(batch, seed)`` in place of the batches, as ``pixart-nb train`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from mindspore import nn, ops

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError, counted
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.lora.config import LayerTargets, LoraConfig, Target, check_overlap
from pixart_nb.core.lora.files import DeltaModule, LoraFile, LoraModule, write_lora
from pixart_nb.core.lora.layers import (
    PHASES,
    AdaptedLayer,
    DeltaBranch,
    DoraBranch,
    LoraBranch,
    LoraDropout,
    ZeroBranch,
    as_matrix,
    from_matrix,
    row_norms,
    to_matrix,
)
from pixart_nb.core.models.transformer import PixArt


class Adapter:
    """One adapter of a transformer: a branch for each module, and the strength of all of them.

    ``config``: None for an adapter that was read from a file.
    """

    def __init__(self, name: str, layers: LayerTargets, config: LoraConfig | None):
        self.name, self.layers, self.config = name, layers, config
        self.source = ""  # file that it was read from
        self.strength = _constant(np.zeros(1), f"{name}.strength")
        self.targets: dict[str, Target] = {}
        self.branches: dict[str, LoraBranch] = {}
        dropout = config is not None and config.lora_dropout
        self.phases = _constant(np.zeros(PHASES), f"{name}.phases") if dropout else None

    def add(self, module: str, target: Target, values: LoraModule | DeltaModule) -> None:
        """Create the branch of a module."""
        title = f"{self.name}.{module}"
        self.targets[module] = target
        if isinstance(values, DeltaModule):
            shape = self.layers.cells[target.layer].weight.shape
            delta = to_matrix(values.delta.reshape(-1, *shape[1:]))
            self.branches[module] = DeltaBranch(title, delta, values.scale, self.strength)
            return
        down, up = to_matrix(values.down), values.up.reshape(len(values.up), -1)
        dropout = None
        if self.phases is not None:
            dropout = LoraDropout(down.shape[1], self.config.lora_dropout, self.phases, f"{title}.columns")
        common = (title, down, up, values.scale, self.strength, dropout)
        branch = LoraBranch(*common) if values.magnitude is None else DoraBranch(*common, values.magnitude)
        self.branches[module] = branch

    def parameters(self) -> dict[str, ms.Parameter]:
        """Return all trained parameters, by module and PEFT's name of the part."""
        branches = self.branches.items()
        return {f"{module}.{part}": p for module, branch in branches for part, p in branch.parameters().items()}

    @property
    def size(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.size for parameter in self.parameters().values())

    def on(self, layer: str) -> list[tuple[int, int, nn.Cell]]:
        """Return the branches of a layer in order, with the gaps between them: (start, stop, branch)."""
        targets = [(target, self.branches[m]) for m, target in self.targets.items() if target.layer == layer]
        rows = self.layers.cells[layer].weight.shape[0]
        out, end = [], 0
        for target, branch in sorted(targets, key=lambda pair: pair[0]):
            out += [(end, target.start, ZeroBranch(target.start - end))] if target.start > end else []
            out.append((target.start, target.stop, branch))
            end = target.stop
        return out + ([(end, rows, ZeroBranch(rows - end))] if out and end < rows else [])

    def change(self, layer: str, weight: np.ndarray) -> np.ndarray:
        """Return the update of a layer's weight, a matrix (out, in), by a strength of 1: the same shape, float64."""
        out = np.zeros(weight.shape, np.float64)
        for start, stop, branch in self.on(layer):
            out[start:stop] = branch.exact_update(weight[start:stop])
        return out

    def with_dropout(self, batch: Callable[[int], tuple], seed: int) -> Callable[[int], tuple]:
        """Return ``batch(step)`` that also draws the dropout noise of that step; call it right before the step."""

        def drawn(step: int) -> tuple:
            rng = np.random.default_rng((seed, step, 8))
            for phases in (self.phases, *(branch.dropout.columns for branch in self.branches.values())):
                ops.assign(phases, ms.Tensor(rng.random(phases.shape, np.float32)))
            return batch(step)

        return drawn if self.phases is not None else batch

    def modules(self) -> dict[str, LoraModule]:
        """Return the values under diffusers' names; the branch of a fused layer becomes one for each of its parts."""
        out = {}
        for module, target in self.targets.items():
            for name, part in self.layers.diffusers.items():
                if part.layer == target.layer and target.start <= part.start and part.stop <= target.stop:
                    out[name] = self._rows(module, slice(part.start - target.start, part.stop - target.start))
        return out

    def _rows(self, module: str, rows: slice) -> LoraModule:
        branch, shape = self.branches[module], self.layers.cells[self.targets[module].layer].weight.shape
        if isinstance(branch, DeltaBranch):
            raise PixArtNBError(f"adapter {self.name!r} is a LoKr or LoHa, whose updates have no factors to save")
        parts = {name: np.array(p.asnumpy()) for name, p in branch.parameters().items()}
        up, magnitude = parts["lora_B"][rows], parts.get("lora_magnitude_vector")
        up = up.reshape(*up.shape, 1, 1) if len(shape) == 4 else up
        magnitude = None if magnitude is None else magnitude[rows]
        return LoraModule(from_matrix(parts["lora_A"], shape), up, branch.scale, magnitude)

    def save(self, folder: str | Path, layout: str = "diffusers") -> Path:
        """Write the adapter in the layout ``diffusers`` or ``peft``; returns the path of its weights."""
        config = self.config
        extra = {"use_rslora": config.use_rslora, "lora_dropout": config.lora_dropout} if config else {}
        return write_lora(folder, self.modules(), layout, extra)


class Adapters:
    """All adapters of one transformer. ``Adapters.of(net)`` is the same object as long as the network lives.

    Active adapters are beside the weights, or fused into them. Values change in place, which a compiled graph sees;
    which layers are adapted is its structure, which it does not see: after loading, activating, fusing, and their
    opposites, a graph has to be compiled again. The pipeline compiles nothing.
    """

    def __init__(self, net: PixArt):
        self.net, self.layers = net, LayerTargets(net)
        self.adapters: dict[str, Adapter] = {}
        self.weights: dict[str, float] = {}  # of the active adapters
        self.enabled = True
        self.originals: dict[str, np.ndarray] = {}  # of the layers whose weights hold fused adapters

    @classmethod
    def of(cls, net: PixArt) -> Adapters:
        """Return the adapters of a network."""
        if getattr(net, "adapters", None) is None:
            net.adapters = cls(net)
        return net.adapters

    def add(self, name: str, config: LoraConfig, seed: int = 0) -> Adapter:
        """Create an adapter, which changes nothing yet (lora_B is 0), and activate it alone.

        Raises ``PixArtNBError`` for a target that is no layer, with the names of all.
        """
        self._check_new(name)
        adapter = Adapter(name, self.layers, config)
        rng = np.random.default_rng(seed)
        for module, target in self.layers.named(config.target_modules).items():
            adapter.add(module, target, _initial(module, target, self.layers.cells[target.layer].weight, config, rng))
        return self._adopt(adapter)

    def load(self, name: str, file: LoraFile) -> Adapter:
        """Load the adapter of a file and activate it alone.

        Raises ``CheckpointError`` for one that does not fit this network; nothing is changed then.
        """
        self._check_new(name)
        targets = self._fitting(file)
        check_overlap(targets)
        adapter = Adapter(name, self.layers, None)
        adapter.source = file.source
        for module, target in targets.items():
            adapter.add(self.layers.canonical(target), target, file.modules[module])
        return self._adopt(adapter)

    def _check_new(self, name: str) -> None:
        self._check_unfused("a LoRA can be added")
        if not isinstance(name, str) or not name:
            raise PixArtNBError(f"the name of an adapter is {name!r}; expected a text")
        if name in self.adapters:
            raise PixArtNBError(
                f"there is an adapter {name!r} already; choose another name, or delete it first (delete_adapters)"
            )

    def _check_unfused(self, action: str) -> None:
        if self.originals:
            raise PixArtNBError(f"adapters are fused into the weights; unfuse them (unfuse_lora) before {action}")

    def _adopt(self, adapter: Adapter) -> Adapter:
        self.adapters[adapter.name] = adapter
        self.activate([adapter.name])
        return adapter

    def _fitting(self, file: LoraFile) -> dict[str, Target]:
        """Return the targets of the modules of a file, all of which must exist in this network with their shapes."""
        targets = {name: self.layers.targets.get(name) for name in file.modules}
        problems = {"are of another shape": [], "are not in the model": [n for n, t in targets.items() if t is None]}
        for name, target in targets.items():
            if target is not None:
                module, shape = file.modules[name], self.layers.cells[target.layer].weight.shape
                sizes = (module.shape_on(shape), (target.stop - target.start, *shape[1:]))
                text = f"{name}: LoRA {sizes[0]}, model {sizes[1]}"
                problems["are of another shape"] += [text] if sizes[0] != sizes[1] else []
        if parts := counted(problems):
            config = self.net.config
            raise CheckpointError(
                f"{file.source} is a LoRA for another model: of its {len(file.modules)} modules {' and '.join(parts)}. "
                f"This model has {config.depth} blocks of width {config.hidden_size}. Nothing was changed."
            )
        return targets

    # ---- choosing

    @property
    def active(self) -> list[str]:
        """Names of the active adapters."""
        return list(self.weights) if self.enabled else []

    def activate(self, names: Sequence[str], weights: float | Sequence[float] | None = None) -> None:
        """Activate these adapters, each with its weight (1 by default), and no others."""
        self._check_unfused("others are chosen")
        self.weights = dict(zip(self.checked(names), _as_weights(weights, len(names)), strict=True))
        self.enable(True)

    def enable(self, enabled: bool) -> None:
        """Switch the active adapters off and on again."""
        self._check_unfused("they are switched on or off")
        self.enabled = enabled
        self._install()

    @contextmanager
    def chosen(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Activate adapters with these weights inside the block; after it those that were active before are again."""
        before = self.weights, self.enabled
        try:
            self.activate(list(weights), list(weights.values()))
            yield
        finally:
            self.weights, self.enabled = before
            self._install()

    def delete(self, names: Sequence[str]) -> None:
        """Delete adapters; the others stay as they are."""
        self._check_unfused("one is deleted")
        for name in self.checked(names):
            del self.adapters[name]
            self.weights.pop(name, None)
        self._install()

    def clear(self) -> None:
        """Delete all adapters. Weights that they are fused into stay, and cannot be restored any more."""
        self.adapters, self.weights, self.originals = {}, {}, {}
        self._install()

    def checked(self, names: Sequence[str]) -> list[str]:
        """Return names of adapters; raises ``PixArtNBError`` for unknown and repeated ones."""
        missing = [name for name in names if name not in self.adapters]
        if missing:
            raise PixArtNBError(f"no adapter is called {missing[0]!r}; there are {list(self.adapters) or 'none'}")
        if len(set(names)) != len(names):
            raise PixArtNBError(f"adapters {list(names)}: one of them is named twice")
        return list(names)

    def _install(self) -> None:
        """Put the updates of the active adapters beside their layers, and remove those of the others."""
        beside = [] if self.originals else [self.adapters[name] for name in self.active]
        for name, adapter in self.adapters.items():
            strength = self.weights[name] if adapter in beside else 0.0
            ops.assign(adapter.strength, ms.Tensor([strength], ms.float32))
        for layer, cell in self.layers.cells.items():
            updates = [update for adapter in beside if (update := adapter.on(layer))]
            if updates:
                cell, training = AdaptedLayer(cell, updates), self.net.training
                cell.set_train(training)
            _replace(self.net, layer, cell)

    # ---- fusing

    def fuse(self, scale: float = 1.0, names: Iterable[str] | None = None) -> None:
        """Add the updates of the active adapters (or of ``names`` among them), times ``scale``, to the weights.

        The original weights are kept in host memory until ``unfuse`` or ``clear``.
        """
        self._check_unfused("they are fused again")
        chosen = self.checked(list(self.active if names is None else names))
        idle = [name for name in chosen if name not in self.active]
        if idle or not chosen:
            problem = f"adapter {idle[0]!r} is not active" if idle else "no adapter is active"
            raise PixArtNBError(f"{problem}; choose the ones to fuse first (set_adapters)")
        originals = {}
        for layer, cell in self.layers.cells.items():
            weight = _array(cell.weight)
            matrix = to_matrix(weight)
            adapters = [self.adapters[name] for name in chosen if self.adapters[name].on(layer)]
            changes = [self.weights[a.name] * a.change(layer, matrix) for a in adapters]
            if changes:
                originals[layer] = np.array(weight)
                self.originals = originals
                _assign(cell.weight, from_matrix(matrix + scale * sum(changes), cell.weight.shape))
        self._install()

    def unfuse(self) -> None:
        """Restore the weights that the layers had before, bit for bit."""
        if not self.originals:
            raise PixArtNBError("no adapter is fused into the weights; there is nothing to take out")
        for layer, weight in self.originals.items():
            _assign(self.layers.cells[layer].weight, weight)
        self.originals = {}
        self._install()


def _initial(
    module: str, target: Target, weight: ms.Parameter, config: LoraConfig, rng: np.random.Generator
) -> LoraModule:
    """Return the initial values of a module: a random lora_A, and a lora_B of zeros."""
    rank, size = config.rank(module), int(np.prod(weight.shape[1:]))
    if config.init_lora_weights == "gaussian":
        down = rng.standard_normal((rank, size)) / rank
    else:
        down = rng.uniform(-1, 1, (rank, size)) / np.sqrt(size)
    magnitude = None
    if config.use_dora:
        magnitude = row_norms(as_matrix(weight)[target.start : target.stop].astype(ms.float32)).asnumpy()
    up = np.zeros((target.stop - target.start, rank), np.float32)
    return LoraModule(from_matrix(down.astype(np.float32), weight.shape), up, config.scale(module), magnitude)


def _constant(values: np.ndarray, name: str) -> ms.Parameter:
    """Return a float32 parameter that is not trained."""
    return ms.Parameter(ms.Tensor(values.astype(np.float32)), name=name, requires_grad=False)


def _as_weights(weights: float | Sequence[float] | None, count: int) -> list[float]:
    weights = backend.as_array(weights).tolist() if isinstance(weights, np.ndarray | ms.Tensor) else weights
    values = weights if isinstance(weights, Sequence) else [weights] * count
    values = [value.get("transformer") if isinstance(value, Mapping) else value for value in values]
    try:
        if isinstance(weights, str):
            raise TypeError(weights)
        values = [1.0 if value is None else float(value) for value in values]
    except (TypeError, ValueError):
        raise PixArtNBError(f"the weights of adapters are {weights!r}; expected numbers") from None
    if len(values) != count or not np.isfinite(values).all():
        raise PixArtNBError(f"{values} for {count} adapters; expected a finite weight for each")
    return values


def _array(parameter: ms.Parameter) -> np.ndarray:
    """Return the values of a parameter, bfloat16 as float32, which NumPy can add."""
    return (parameter.astype(ms.float32) if parameter.dtype == ms.bfloat16 else parameter).asnumpy()


def _assign(parameter: ms.Parameter, values: np.ndarray) -> None:
    """Change a parameter in place: compiled graphs see that, and not a parameter that is replaced."""
    tensor = ms.Tensor(np.ascontiguousarray(values)).astype(parameter.dtype)
    if parameter.dtype == ms.bfloat16 and not backend.on_ascend():  # Assign knows no bfloat16 there
        parameter.set_data(tensor)
    else:
        ops.assign(parameter, tensor)


def _replace(net: nn.Cell, path: str, cell: nn.Cell) -> None:
    """Replace a cell without ``setattr``, which would rename its parameters."""
    *parents, leaf = path.split(".")
    for name in parents:
        net = net._cells[name]
    net._cells[leaf] = cell
