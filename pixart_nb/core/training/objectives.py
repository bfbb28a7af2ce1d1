"""Training objectives: the network, the loss and the parameters of each kind of training, and what it writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from mindspore import nn

from pixart_nb.config import ConfigError, TrainConfig
from pixart_nb.core.backend import ms
from pixart_nb.core.checkpoints.components import write_transformer
from pixart_nb.core.checkpoints.controlnet import load_controlnet, save_controlnet
from pixart_nb.core.checkpoints.load import init_empty
from pixart_nb.core.models.controlnet import PixArtControlNet
from pixart_nb.core.models.transformer import PixArt
from pixart_nb.core.sampling.schedulers import Scheduler
from pixart_nb.core.training.loss import NAMES, control_loss, diffusion_loss
from pixart_nb.core.training.options import trained_edges
from pixart_nb.core.training.weak_to_strong import EMPTY


class Objective:
    """The diffusion loss of the transformer, of which other objectives change parts.

    ``network`` is the one that is trained and samples validation images, ``frozen`` are networks that are not trained,
    and ``blocks`` those whose activations can be recomputed. ``result`` is the folder that is written. ``scheduler`` is
    that of the result, if it needs one of its own. ``averages`` are parameters that hold the moving average, if the
    loss reads it. ``spacing``: timesteps are the last of so many each.
    """

    names: tuple[str, ...] = NAMES
    result = "pipeline"
    scheduler: Scheduler | None = None
    averages: Mapping[str, ms.Parameter] | None = None
    spacing = 1
    extras: Callable[[int, int, np.ndarray, tuple[int, ...]], tuple] | None = None

    def __init__(self, config: TrainConfig, net: PixArt):
        self.config, self.net, self.network = config, net, net
        self.frozen: tuple[nn.Cell, ...] = ()

    def loss(self, empty: np.ndarray) -> Callable:
        """Return the loss function, of the arguments that ``DiffusionBatches`` makes.

        ``empty`` (tokens, C) is the embedding of the empty caption.
        """
        return diffusion_loss(self.net)

    def parameters(self) -> dict[str, ms.Parameter]:
        """Return the trained parameters by name; not the embedding of the empty caption, as in the official code."""
        return {name: p for name, p in self.network.parameters_and_names() if name != EMPTY}

    @property
    def blocks(self) -> list[nn.Cell]:
        """Blocks that the loss goes back through."""
        return list(self.net.blocks)

    def write(self, folder: Path, weights: Mapping[str, np.ndarray]) -> None:
        """Write the trained weights into the folder of the result."""
        write_transformer(folder / "transformer", self.net, weights=weights)


class ControlObjective(Objective):
    """The diffusion loss of a ControlNet, whose copied blocks alone are trained (PixArt-delta, section 4)."""

    result = "controlnet"

    def __init__(self, config: TrainConfig, net: PixArt):
        super().__init__(config, net)
        self.network = PixArtControlNet.from_transformer(net, config.copy_blocks_num)
        if config.controlnet:
            self._start_from(load_controlnet(config.controlnet, base_model=net))
        self.frozen = (net,)

    def _start_from(self, trained: PixArtControlNet) -> None:
        """Take the weights of a ControlNet; blocks that it does not copy stay copies of the model's."""
        copies, count = len(trained.controlnet), len(self.network.controlnet)
        if copies > count:
            raise ConfigError(
                f"{self.config.controlnet} copies {copies} blocks, and copy_blocks_num is {count}; give at least "
                f"{copies}"
            )
        own = dict(self.network.controlnet.parameters_and_names())
        for name, parameter in trained.controlnet.parameters_and_names():
            own[name].set_data(parameter.value())

    def loss(self, empty: np.ndarray) -> Callable:
        return control_loss(self.network)

    def parameters(self) -> dict[str, ms.Parameter]:
        return {name: p for name, p in self.network.parameters_and_names() if name.startswith("controlnet.")}

    @property
    def blocks(self) -> list[nn.Cell]:
        return [*self.net.blocks, *(copy.copied_block for copy in self.network.controlnet)]

    def write(self, folder: Path, weights: Mapping[str, np.ndarray]) -> None:
        save_controlnet(folder, weights, None if self.config.control_dir else trained_edges(self.config))


def copy_of(net: PixArt, prefix: str, shared: bool = False) -> PixArt:
    """Return a copy of a transformer that is not trained, or with ``shared`` a second one with the same parameters.

    Names of parameters begin with ``prefix``, as a graph needs them to be unique.
    """
    other = init_empty(lambda: PixArt(net.config), ms.float32) if shared else PixArt(net.config)
    if shared:
        sources = dict(net.cells_and_names())
        for name, cell in other.cells_and_names():
            for key in list(cell._params):
                setattr(cell, key, getattr(sources[name], key))
        return other
    for target, source in zip(other.get_parameters(), net.get_parameters(), strict=True):
        target.set_data(source.value().copy())
        target.requires_grad, target.name = False, f"{prefix}.{target.name}"
    return other
