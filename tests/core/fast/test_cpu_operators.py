"""Normalisation by NumPy's statistics gives the numbers of the operators, and of float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference_data import relative_error

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.fast import fast_group_norms
from pixart_nb.core.fast.cpu_operators import PART, modulate, moments
from pixart_nb.core.models.layers import GroupNorm, LayerNorm


@given(
    st.integers(1, 3), st.sampled_from([1, 7, PART, 2 * PART + 5]), st.sampled_from([0.0, 1.0, -40.0, 3e3]),
    st.sampled_from([1e-3, 1.0, 50.0]), st.integers(0, 99),
)  # fmt: skip
def test_mean_and_variance_are_those_of_float64(groups, count, centre, spread, seed):
    rng = np.random.default_rng(seed)
    rows = (centre + spread * rng.standard_normal((groups, count))).astype(np.float32)
    mean, variance = moments(rows)
    wide = rows.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean(1), rtol=1e-5, atol=1e-4 * spread + 1e-6 * abs(centre))
    np.testing.assert_allclose(variance, wide.var(1), rtol=2e-3, atol=1e-12)


def norm(groups=4, channels=12):
    cell = GroupNorm(groups, channels)
    rng = np.random.default_rng(0)
    cell.weight.set_data(ms.Tensor(rng.standard_normal(channels).astype(np.float32)))
    cell.bias.set_data(ms.Tensor(rng.standard_normal(channels).astype(np.float32)))
    return cell


def test_images_of_a_batch_are_normalised_each_by_itself_as_by_the_operator():
    cell, rng = norm(), np.random.default_rng(1)
    x = ms.Tensor((rng.standard_normal((3, 12, 9, 14)) * [[[[1]]], [[[5]]], [[[30]]]] + 2).astype(np.float32))
    usual = cell(x).asnumpy()
    with fast_group_norms([cell]):
        result = cell(x).asnumpy()
    assert relative_error(result, usual) < 2e-6
    assert cell.statistics is None
    assert np.array_equal(cell(x).asnumpy(), usual)


def test_half_precision_stays_half_precision():
    cell, x = norm(), np.random.default_rng(2).standard_normal((1, 12, 8, 8)).astype(np.float16)
    with fast_group_norms([cell]):
        result = cell(ms.Tensor(x))
        wide = cell(ms.Tensor(x.astype(np.float32))).asnumpy()
    assert result.dtype == ms.float16
    assert relative_error(result.asnumpy().astype(np.float32), wide) < 1e-3


def test_an_error_leaves_the_norms_as_they_were():
    cell = norm()
    with pytest.raises(RuntimeError), fast_group_norms([cell]):
        raise RuntimeError
    assert cell.statistics is None


def test_on_ascend_the_operator_stays(monkeypatch):
    monkeypatch.setattr(backend, "_DEVICE", "Ascend")
    cell = norm()
    with fast_group_norms([cell]):
        assert cell.statistics is None


def test_rows_are_normalised_as_by_the_layer():
    rng = np.random.default_rng(3)
    centres, spreads = np.array([[0.0], [2.0], [-500.0], [0.0]]), np.array([[1.0], [1e-3], [0.5], [1e3]])
    x = (centres + spreads * rng.standard_normal((4, 1152))).astype(np.float32)
    usual, zeros = LayerNorm(1152, 1e-6, affine=False)(ms.Tensor(x)).asnumpy(), np.zeros(1152, np.float32)
    result = modulate(x, 1e-6, zeros, zeros)
    np.testing.assert_allclose(result, usual, rtol=2e-3, atol=2e-3)
    assert relative_error(result, usual) < 1e-3
