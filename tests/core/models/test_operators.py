"""Operators with gradients of their own: values and gradients against float64 references, eager and compiled."""

import numpy as np
import pytest

from pixart_nb.core.backend import ms
from pixart_nb.core.models import operators
from pixart_nb.core.models.operators import (
    assign,
    gelu_tanh,
    linear,
    masked_attention,
    merge_heads,
    normalize,
    repeat_tokens,
    scaled_dot_product_attention,
    silu,
    split_heads,
    split_parts,
)


def float64_softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def reference_linear(x, weight, bias):
    return x @ weight.T + bias


def reference_normalize(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def reference_attention(q, k, v):
    return float64_softmax(q @ k.swapaxes(-1, -2)) @ v


def reference_repeat(x):
    return np.repeat(x, 5, axis=1)


def reference_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def reference_silu(x):
    return x / (1 + np.exp(-x))


def five_tokens(x):
    return repeat_tokens(x, 5)


def normalized(x):
    return normalize(x, 1e-6)


def reference_masked(q, k, v):
    return float64_softmax(q @ k.swapaxes(-1, -2) + 2 * COLUMN.swapaxes(-1, -2)) @ v


def masked(q, k, v):
    return masked_attention(q, k, v, ms.Tensor((2 * COLUMN).astype(np.float32)))


def middle_part(x):
    query, key, value = split_parts(x, 3, 2)
    return query + 2 * key * value


def reference_middle_part(x):
    query, key, value = x.reshape(2, 5, 3, 2, 4).transpose(2, 0, 3, 1, 4)
    return query + 2 * key * value


def two_heads(x):
    return split_heads(x, 2)


def reference_two_heads(x):
    return x.reshape(2, 5, 2, 3).transpose(0, 2, 1, 3)


def reference_merged(x):
    return x.transpose(0, 2, 1, 3).reshape(2, 5, -1)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


COLUMN = numbers(2, 3, 7, 1)
CASES = {
    "linear": (linear, reference_linear, [numbers(2, 3, 7), numbers(4, 7), numbers(4)]),
    "wide linear": (linear, reference_linear, [numbers(3, 1), numbers(600, 1), numbers(600)]),
    "masked_attention": (masked, reference_masked, [numbers(2, 3, s, 4) for s in (5, 7, 7)]),
    "split_parts": (middle_part, reference_middle_part, [numbers(2, 5, 24)]),
    "split_heads": (two_heads, reference_two_heads, [numbers(2, 5, 6)]),
    "merge_heads": (merge_heads, reference_merged, [numbers(2, 3, 5, 4)]),
    "normalize": (normalized, reference_normalize, [3 + 2 * numbers(6, 9)]),
    "scaled_dot_product_attention": (
        scaled_dot_product_attention,
        reference_attention,
        [numbers(2, 3, 5, 4), numbers(2, 3, 7, 4), numbers(2, 3, 7, 4)],
    ),
    "gelu_tanh": (gelu_tanh, reference_gelu, [3 * numbers(5, 7)]),
    "silu": (silu, reference_silu, [3 * numbers(5, 7)]),
    "repeat_tokens": (five_tokens, reference_repeat, [numbers(2, 1, 4)]),
}


def numerical_gradients(function, arrays, direction, step=1e-6):
    """Central differences of sum(direction * function) in float64, input by input."""
    gradients = []
    for number, array in enumerate(arrays):
        gradient = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            shifted = [a.copy() for a in arrays]
            ends = []
            for sign in (1, -1):
                shifted[number][index] = array[index] + sign * step
                ends.append((direction * function(*shifted)).sum())
            gradient[index] = (ends[0] - ends[1]) / (2 * step)
        gradients.append(gradient)
    return gradients


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", [*CASES, "linear of a large weight"])
def test_values_and_gradients_equal_a_float64_reference(name, compiled, monkeypatch):
    if name not in CASES:
        monkeypatch.setattr(operators, "LARGE_WEIGHT", 1)  # the product is computed as its transpose
        name = "linear"
    function, reference, arrays = CASES[name]
    expected = reference(*arrays)
    direction = numbers(*expected.shape, seed=1)
    weights = ms.Tensor(direction.astype(np.float32))

    def weighted(*tensors):
        out = function(*tensors)
        return (out * weights).sum(), out

    gradient = ms.value_and_grad(weighted, tuple(range(len(arrays))), has_aux=True)
    gradient = ms.jit(gradient) if compiled else gradient
    (_, out), gradients = gradient(*[ms.Tensor(a.astype(np.float32)) for a in arrays])
    np.testing.assert_allclose(out.asnumpy(), expected, rtol=1e-4, atol=1e-5)
    gradients = gradients if isinstance(gradients, tuple) else (gradients,)
    for result, expected in zip(gradients, numerical_gradients(reference, arrays, direction), strict=True):
        np.testing.assert_allclose(result.asnumpy(), expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("rows", [1, 2, 64, 65])
def test_few_rows_of_a_large_weight_give_the_usual_numbers(rows):
    weight = numbers(2048, 2048).astype(np.float32)
    x = numbers(rows, 2048, seed=1).astype(np.float32)
    result = linear(ms.Tensor(x), ms.Tensor(weight)).asnumpy()
    np.testing.assert_allclose(result, x @ weight.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["gelu_tanh", "silu"])
def test_activations_of_half_precision_are_rounded_once(name):
    function, reference, _ = CASES[name]
    x = np.linspace(-30, 300, 5000).astype(np.float16)
    result = function(ms.Tensor(x))
    assert result.dtype == ms.float16
    expected = reference(x.astype(np.float64))
    np.testing.assert_allclose(result.asnumpy().astype(np.float64), expected, rtol=2**-10, atol=2**-14)


@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])
def test_a_parameter_takes_a_part_of_a_tensor_in_its_own_dtype(dtype):
    parameter = ms.Parameter(ms.Tensor(np.zeros((2, 3), np.float32)).astype(dtype), name="w")
    numbers = ms.Tensor(np.arange(5000, dtype=np.float32))
    assign(parameter, numbers[4:10].reshape(2, 3))
    assert parameter.dtype == dtype
    assert parameter.asnumpy().tolist() == [[4, 5, 6], [7, 8, 9]]
