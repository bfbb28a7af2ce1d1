"""CAME against the update rule of its paper, written out in float64."""

import numpy as np
import pytest

from pixart_nb.core.backend import ms
from pixart_nb.core.io import CheckpointError
from pixart_nb.core.training.optimizers import CAME

SHAPES = {
    "matrix": (6, 10), "wide": (3, 70), "vector": (7,), "kernel": (5, 2, 2, 3), "one": (4, 1),
    "matrix 2": (6, 10), "vector 2": (7,), "kernel 2": (5, 2, 2, 3), "matrix 3": (6, 10), "number": (),
}  # fmt: skip
BETAS, EPS = (0.9, 0.999, 0.9999), (1e-30, 1e-16)


def parameters(rng):
    return {
        name: ms.Parameter(ms.Tensor(rng.standard_normal(shape).astype(np.float32)), name=name)
        for name, shape in SHAPES.items()
    }


class Reference:
    """Algorithm 2 of arXiv 2307.02047, line by line, for one matrix; sums, not means, as printed there."""

    def __init__(self, theta, decay):
        self.theta, self.decay, self.m = theta.astype(np.float64), decay, 0.0
        self.r = self.c = self.big_r = self.big_c = self.v = 0.0

    def step(self, g, rate):
        g, (b1, b2, b3), (e1, e2) = g.astype(np.float64), BETAS, EPS
        if g.ndim == 1:
            self.v = b2 * self.v + (1 - b2) * (g**2 + e1)
            u = g / np.sqrt(self.v)
        else:
            n, m = g.shape
            self.r = b2 * self.r + (1 - b2) * (g**2 + e1) @ np.ones(m)
            self.c = b2 * self.c + (1 - b2) * np.ones(n) @ (g**2 + e1)
            u = g / np.sqrt(np.outer(self.r, self.c) / self.r.sum())
        u = u / max(1.0, np.sqrt(np.mean(u**2)))
        self.m = b1 * self.m + (1 - b1) * u
        self.theta = self.theta * (1 - rate * self.decay)
        if g.ndim == 1:
            self.theta = self.theta - rate * self.m
            return
        instability = (u - self.m) ** 2 + e2
        self.big_r = b3 * self.big_r + (1 - b3) * instability.sum(1)
        self.big_c = b3 * self.big_c + (1 - b3) * instability.sum(0)
        s = np.outer(self.big_r, self.big_c) / self.big_r.sum()
        self.theta = self.theta - rate / np.sqrt(s) * self.m


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_matrices_and_vectors_follow_the_paper(decay):
    rng = np.random.default_rng(0)
    weights = {name: p for name, p in parameters(rng).items() if len(SHAPES[name]) in (1, 2)}
    expected = {name: Reference(p.asnumpy(), decay) for name, p in weights.items()}
    optimizer = CAME(weights, BETAS, EPS, decay)
    for number in range(30):
        scale = 10.0 ** (number % 5 - 3)
        gradients = {name: (scale * rng.standard_normal(p.shape)).astype(np.float32) for name, p in weights.items()}
        optimizer.update({name: ms.Tensor(g) for name, g in gradients.items()}, 1e-3)
        for name, gradient in gradients.items():
            expected[name].step(gradient, 1e-3)
    for name, weight in weights.items():
        moved = np.linalg.norm(weight.asnumpy() - expected[name].theta) / np.linalg.norm(expected[name].theta)
        assert moved < 2e-6, name


@pytest.mark.parametrize("elements", [0, 130, 10**6])
def test_tensors_of_one_shape_that_are_updated_together_move_as_alone(elements):
    """Their gradients have other sizes, so that some are clipped and some are not."""
    alone, together = parameters(np.random.default_rng(6)), parameters(np.random.default_rng(6))
    optimizers = (
        CAME(alone, weight_decay=0.1, stack_elements=0),
        CAME(together, weight_decay=0.1, stack_elements=elements),
    )
    assert len(optimizers[0].stacks) == len(SHAPES)
    assert len(optimizers[1].stacks) == {0: 10, 130: 7, 10**6: 6}[elements]
    for number in range(10):
        rng = np.random.default_rng((7, number))
        gradients = {
            name: (10.0 ** rng.integers(-4, 2) * rng.standard_normal(shape)).astype(np.float32)
            for name, shape in SHAPES.items()
        }
        for optimizer in optimizers:
            optimizer.update({name: ms.Tensor(g.copy()) for name, g in gradients.items()}, 1e-3)
    first, second = (optimizer.state() for optimizer in optimizers)
    assert set(first) == set(second)
    for ours, expected in ((together, alone), (second, first)):
        for name, tensor in expected.items():
            assert ours[name].asnumpy() == pytest.approx(tensor.asnumpy(), rel=1e-5, abs=1e-7), name


def test_a_kernel_is_a_stack_of_matrices():
    rng = np.random.default_rng(1)
    kernel = rng.standard_normal((5, 2, 2, 3)).astype(np.float32)
    weight = ms.Parameter(ms.Tensor(kernel), name="kernel")
    optimizer = CAME({"kernel": weight}, clip_threshold=1e9)  # the clipping looks at the whole tensor
    parts = [ms.Parameter(ms.Tensor(part.copy()), name=f"p{k}") for k, part in enumerate(kernel.reshape(10, 2, 3))]
    alone = CAME({p.name: p for p in parts}, clip_threshold=1e9)
    for _ in range(5):
        gradient = rng.standard_normal(kernel.shape).astype(np.float32)
        optimizer.update({"kernel": ms.Tensor(gradient)}, 1e-3)
        alone.update(
            {p.name: ms.Tensor(g.copy()) for p, g in zip(parts, gradient.reshape(10, 2, 3), strict=True)}, 1e-3
        )
    assert weight.asnumpy().reshape(10, 2, 3) == pytest.approx(np.stack([p.asnumpy() for p in parts]), abs=1e-6)


def test_gradients_that_are_zero_change_nothing():
    weights = parameters(np.random.default_rng(2))
    before = {name: p.asnumpy().copy() for name, p in weights.items()}
    optimizer = CAME(weights)
    for _ in range(3):
        optimizer.update({name: ms.Tensor(np.zeros(s, np.float32)) for name, s in SHAPES.items()}, 1e-2)
    assert all(np.array_equal(p.asnumpy(), before[name]) for name, p in weights.items())


def test_it_remembers_rows_and_columns_and_goes_on_bit_for_bit():
    def run(weights, optimizer, first, last):
        for number in range(first, last):
            rng = np.random.default_rng((3, number))
            optimizer.update({n: ms.Tensor(rng.standard_normal(s).astype(np.float32)) for n, s in SHAPES.items()}, 1e-3)
        return {name: p.asnumpy().copy() for name, p in weights.items()}

    whole = parameters(np.random.default_rng(4))
    expected = run(whole, CAME(whole), 0, 8)
    half = parameters(np.random.default_rng(4))
    optimizer = CAME(half)
    run(half, optimizer, 0, 4)
    state = {name: t.asnumpy().copy() for name, t in optimizer.state().items()}
    assert state["exp_avg_sq_row/matrix"].shape == (6,)
    assert state["exp_avg_res_col/kernel"].shape == (5, 2, 3)
    assert "exp_avg_sq/matrix" not in state
    again = CAME(half)
    again.restore(state, optimizer.updates)
    got = run(half, again, 4, 8)
    assert all(np.array_equal(got[name], expected[name]) for name in expected)


def test_the_memory_of_another_optimizer_is_refused():
    weights = parameters(np.random.default_rng(5))
    with pytest.raises(CheckpointError, match=r"exp_avg_sq_row/matrix.*another optimizer"):
        CAME(weights).restore({f"exp_avg/{n}": np.zeros(s, np.float32) for n, s in SHAPES.items()}, 3)
