"""Few collectives for many tensors, and the worker that keeps the state of each parameter."""

import numpy as np
import pytest

from pixart_nb.core.backend import ms
from pixart_nb.core.training import distributed
from pixart_nb.core.training.distributed import ALL, Workers, owners

SHAPES = [(3, 2), (4,), (1, 1), (7, 5), (), (2, 2, 2)]


@pytest.fixture
def world(monkeypatch):
    """Two workers in one process: the sum over workers is that of what each of them passes, which is recorded."""
    calls = []

    class AllReduce:
        def __call__(self, tensor):
            calls.append(tensor)
            return tensor * 2

    monkeypatch.setattr(distributed.ops, "AllReduce", AllReduce)
    return calls


def tensors(count, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [ms.Tensor(rng.standard_normal(SHAPES[k % len(SHAPES)]).astype(dtype)) for k in range(count)]


@pytest.mark.parametrize("count", [1, 3, 435])
def test_gradients_are_averaged_by_at_most_three_collectives(world, count):
    gradients = tensors(count, np.float16)
    means = Workers(0, 2).mean(gradients)
    assert 1 <= len(world) <= 3
    for mean, gradient in zip(means, gradients, strict=True):
        assert (mean.dtype, mean.shape) == (ms.float32, gradient.shape)
        assert np.array_equal(mean.asnumpy(), gradient.asnumpy().astype(np.float32))


def test_parameters_come_from_their_owners_by_at_most_three_collectives(world):
    values = {f"p{k}": tensor for k, tensor in enumerate(tensors(435))}
    owner = {name: (0, 1, ALL)[k % 3] for k, name in enumerate(values)}
    received = Workers(0, 2).from_owners(values, owner)
    assert 1 <= len(world) <= 3
    for name, value in values.items():
        factor = {0: 2, 1: 0, ALL: 1}[owner[name]]  # the other worker of this test passes the same
        assert np.array_equal(received[name].asnumpy(), factor * value.asnumpy())


def test_owners_share_the_numbers_evenly():
    sizes = {f"p{k}": size for k, size in enumerate([100, 90, 50, 40, 30, 20, 10, 1])}
    owner = owners(sizes, 3)
    loads = [sum(size for name, size in sizes.items() if owner[name] == rank) for rank in range(3)]
    assert set(owner) == set(sizes)
    assert max(loads) - min(loads) <= 10
    assert owners(sizes, 1) == dict.fromkeys(sizes, 0)
    assert owners(dict(reversed(sizes.items())), 3) == owner  # whatever the order


def test_small_parameters_are_everyones():
    sizes = {"large": 100, "larger": 200, "small": 9, "smaller": 1}
    assert owners(sizes, 2, 10) == {"larger": 0, "large": 1, "small": ALL, "smaller": ALL}
    assert set(owners(sizes, 2, 1000).values()) == {ALL}
