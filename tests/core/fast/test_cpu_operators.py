"""Normalisation by NumPy's statistics gives the numbers of the operators, and of float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_data import relative_error

from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.fast import cpu_operators, fast_group_norms
from pixart_nb.core.fast.cpu_operators import (
    PART,
    attention_without_gradient,
    mlp_on_arrays,
    modulate,
    moments,
    split,
    token_attention,
)
from pixart_nb.core.models.layers import MLP, GroupNorm, LayerNorm, Linear
from pixart_nb.core.models.low_precision import unsupported
from pixart_nb.core.onednn import linear, rounded_bits

needs_products = pytest.mark.skipif(bool(unsupported()), reason=unsupported())


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


def exact_attention(q, k, v, mask=None, scale=None):
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2) * (q.shape[3] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = np.where(mask[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(1, 50), st.integers(1, 24), st.booleans(),
    st.sampled_from([None, 0.3]), st.sampled_from([16, 2**10, 2**19]),
)  # fmt: skip
def test_attention_is_that_of_float64_whatever_is_computed_at_a_time(
    batch, heads, queries, keys, size, masked, scale, scores
):
    rng = np.random.default_rng(queries * keys)
    q, k, v = (rng.standard_normal((batch, heads, n, size), np.float32) for n in (queries, keys, keys))
    mask = (np.arange(keys) < rng.integers(1, keys + 1, (batch, 1))) if masked else None
    expected = exact_attention(q, k, v, mask, scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_operators, "SCORES", scores)
        patch.setattr(cpu_operators, "QUERIES", 8)
        tensors = [ms.Tensor(x) for x in (q, k, v)]
        out = attention_without_gradient(*tensors, None if mask is None else ms.Tensor(mask), scale).asnumpy()
        np.testing.assert_allclose(out, expected, atol=5e-6)
        if not unsupported():
            half = attention_without_gradient(*tensors, None if mask is None else ms.Tensor(mask), scale, True)
            np.testing.assert_allclose(half.asnumpy(), expected, atol=0.05)


def test_heads_that_are_views_of_one_matrix_give_the_same_bits():
    qkv = np.random.default_rng(0).standard_normal((2, 30, 3, 4, 8), np.float32)
    views = [split(qkv[:, :, part].reshape(2, 30, 32), 4) for part in range(3)]
    copies = [ms.Tensor(np.ascontiguousarray(x)) for x in views]
    alone = attention_without_gradient(*copies).asnumpy()
    assert np.array_equal(token_attention(*views).reshape(2, 30, 4, 8), alone.transpose(0, 2, 1, 3))


@pytest.mark.parametrize("weights", ["float32", pytest.param("bfloat16", marks=needs_products)])
@pytest.mark.parametrize("rows", [1, 5, 300, 1100])
def test_a_linear_layer_of_all_threads(weights, rows):
    rng = np.random.default_rng(rows)
    x, weight, bias = (rng.standard_normal(shape, np.float32) for shape in ((rows, 64), (48, 64), (48,)))
    bits = rounded_bits(weight)
    half = weights == "bfloat16"
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    for own_bias in (bias, None):
        out = linear(x, bits if half else weight, own_bias)
        np.testing.assert_allclose(out, exact + (0 if own_bias is None else bias), atol=0.3 if half else 2e-5)


def test_gelu_layers_with_an_adapter_go_through_the_layer():
    mlp = MLP(16, 32, 16)
    for parameter in mlp.get_parameters():
        parameter.set_data(ms.Tensor(np.random.default_rng(1).standard_normal(parameter.shape).astype(np.float32)))
    x = np.random.default_rng(2).standard_normal((9, 16), np.float32)
    usual = mlp(ms.Tensor(x)).asnumpy()
    assert relative_error(mlp_on_arrays(mlp)(x.copy()), usual) < 2e-6

    class Doubled(Linear):
        def construct(self, x):
            return 2 * super().construct(x)

    doubled = Doubled(32, 16)
    doubled.weight, doubled.bias = mlp.fc2.weight, mlp.fc2.bias
    mlp.fc2 = doubled
    assert relative_error(mlp_on_arrays(mlp)(x.copy()), 2 * usual) < 2e-6
