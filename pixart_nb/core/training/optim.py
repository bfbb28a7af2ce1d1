"""Learning-rate schedules, gradient clipping, AdamW, and the moving average of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from mindspore import ops

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.io import CheckpointError

#: Numbers that the average of the weights works on at a time: what fits a processor's cache.
_CHUNK = 1 << 16
#: Pictures of an update for which a learning rate is meant, where it is scaled with them (official ``auto_lr``).
BASE_BATCH = 256


def learning_rate(
    step: int, peak: float, warmup: int, total: int, shape: str = "cosine", end: float = 0.0
) -> float:
    """Learning rate of a step that counts from 0: a linear warm-up, then by ``shape``.

    ``constant``: ``peak`` for ever. ``cosine``, ``linear``: falling to ``end`` at step ``total``.
    """
    if shape not in ("constant", "cosine", "linear"):
        raise PixArtNBError(
            f"learning-rate schedule {shape!r} is not known; expected 'constant', 'cosine' or 'linear'"
        )
    if step < warmup:
        return peak * (step + 1) / warmup
    if shape == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    left = 0.5 * (1 + math.cos(math.pi * done)) if shape == "cosine" else 1 - done
    return end + (peak - end) * left


def scaled_rate(rate: float, pictures: int, rule: str) -> float:
    """A learning rate for updates of ``pictures`` pictures: ``linear``, ``sqrt`` of their ratio to 256, or as it is."""
    if rule not in ("", "linear", "sqrt"):
        raise PixArtNBError(f"auto_lr {rule!r} is not known; expected 'linear', 'sqrt' or nothing")
    ratio = pictures / BASE_BATCH
    return rate * {"": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[rule]


def global_norm(gradients: Sequence[ms.Tensor]) -> float:
    """Euclidean norm over all gradients together; not finite as soon as one of their numbers is not."""
    if backend.on_ascend():  # the gradients stay on the device. Not run on Ascend
        squares = [(wide := gradient.astype(ms.float32)).mul(wide).sum() for gradient in gradients]
        return math.sqrt(float(sum(squares[1:], squares[0]).asnumpy()))
    flat = (gradient.asnumpy().reshape(-1) for gradient in gradients)
    return math.sqrt(
        sum(_squared(part if part.dtype == np.float32 else part.astype(np.float32)) for part in flat)
    )


def _squared(values: np.ndarray) -> float:
    return float(np.dot(values, values))


def clip_by_norm(
    gradients: Sequence[ms.Tensor], norm: float, largest: float | None, share: float = 1.0
) -> list[ms.Tensor]:
    """``share`` of the gradients, in float32, scaled so that its norm, ``share * norm``, is at most ``largest``."""
    if largest is not None:
        share *= min(1.0, largest / (share * norm + 1e-6))
    wide = [gradient.astype(ms.float32) for gradient in gradients]
    return wide if share == 1.0 else [gradient * share for gradient in wide]


class Moments:
    """What an optimizer remembers of each parameter: tensors in groups such as ``exp_avg``, by parameter name."""

    def __init__(self, parameters: Mapping[str, ms.Parameter]):
        self.parameters, self.updates = dict(parameters), 0
        self.memory: dict[str, dict[str, ms.Parameter]] = {}
        for name, parameter in self.parameters.items():
            for group, shape in self.rooms(tuple(parameter.shape)).items():
                zeros = ms.Parameter(ms.Tensor(np.zeros(shape, np.float32)), name=f"{group}.{name}")
                self.memory.setdefault(group, {})[name] = zeros

    @staticmethod
    def rooms(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Shapes of what is remembered of a parameter of this shape, by group."""
        raise NotImplementedError

    def state(self) -> dict[str, ms.Parameter]:
        """``"exp_avg/blocks.0..."`` -> tensor: everything but the number of updates."""
        return {f"{group}/{name}": t for group, tensors in self.memory.items() for name, t in tensors.items()}

    def restore(self, tensors: Mapping[str, np.ndarray], updates: int, source: object = "state") -> None:
        """Take back what ``state`` gave. ``CheckpointError`` if a tensor is missing or of another shape."""
        own = self.state()
        for name, parameter in own.items():
            if name not in tensors or tensors[name].shape != tuple(parameter.shape):
                found = tensors[name].shape if name in tensors else "nothing"
                raise CheckpointError(
                    f"{source}: the optimizer remembers {name} {tuple(parameter.shape)}, and finds {found}; it was "
                    "written with another optimizer or model"
                )
        for name, parameter in own.items():
            parameter.set_data(ms.Tensor(tensors[name]))
        self.updates = updates


class AdamW(Moments):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, Algorithm 2), in one pass over the numbers.

    The fused operator knows no bias correction. With a rate ``r' = r sqrt(1 - b2^t) / (1 - b1^t)`` and an epsilon
    ``e' = e sqrt(1 - b2^t)`` it takes the corrected step; the decay is divided by ``r' / r``: it keeps its size.
    """

    def __init__(
        self,
        parameters: Mapping[str, ms.Parameter],
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        super().__init__(parameters)
        self.betas, self.eps, self.weight_decay = tuple(betas), eps, weight_decay
        self._step = ops.AdamWeightDecay()

    @staticmethod
    def rooms(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Running averages of the gradient and of its square."""
        return {"exp_avg": shape, "exp_avg_sq": shape}

    def update(self, gradients: Mapping[str, ms.Tensor], rate: float) -> None:
        """Move every parameter by its gradient (float32)."""
        self.updates += 1
        first, second = self.betas
        root = math.sqrt(1 - second**self.updates)
        corrected = rate * root / (1 - first**self.updates)
        decay = self.weight_decay * rate / corrected if corrected else 0.0
        for name, parameter in self.parameters.items():
            moments = (self.memory[group][name] for group in ("exp_avg", "exp_avg_sq"))
            self._step(parameter, *moments, corrected, first, second, self.eps * root, decay, gradients[name])


class EMA:
    """Exponential moving average of parameters, in host memory.

    The rate rises with the number of updates, ``min(rate, (1 + n) / (10 + n))``, so that a short run is not an
    average of its initialisation.
    """

    def __init__(self, parameters: Sequence[ms.Parameter], rate: float):
        if not 0 <= rate < 1:
            raise PixArtNBError(f"EMA rate is {rate}; expected 0 <= rate < 1")
        self.rate, self.updates = rate, 0
        self.parameters = list(parameters)
        self.averages = [
            np.array(p.asnumpy(), np.float32) for p in self.parameters
        ]  # copies: asnumpy aliases

    def update(self) -> None:
        """Take the parameters as they are now into the average."""
        self.updates += 1
        rate = min(self.rate, (1 + self.updates) / (10 + self.updates))
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            _approach(average.reshape(-1), parameter.asnumpy().reshape(-1), np.float32(1 - rate))


def _approach(average: np.ndarray, values: np.ndarray, share: np.float32) -> None:
    """Move an average by ``share`` of its distance to values, in place. In chunks: twenty times as fast as whole."""
    for start in range(0, average.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        distance = values[part] - average[part]
        distance *= share
        average[part] += distance
