"""Row-wise operators: the numbers of float64, by oneDNN as by NumPy, on parts of larger arrays too."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixart_nb.core import onednn
from pixart_nb.core.errors import PixArtNBError
from pixart_nb.core.models.low_precision import unsupported
from pixart_nb.core.onednn import (
    bfloat16_linear,
    gelu,
    gelu_gradient,
    has_blocks,
    in_blocks,
    layer_norm,
    linear,
    out_of_blocks,
    rounded_bits,
    softmax,
    softmax_gradient,
)

needs_bfloat16 = pytest.mark.skipif(bool(unsupported()), reason=unsupported())


@pytest.fixture(params=["oneDNN", "NumPy"])
def way(request, monkeypatch):
    if request.param == "NumPy":
        monkeypatch.setattr(onednn, "primitives", lambda: None)
        monkeypatch.setattr(onednn, "_rounds", lambda: False)
    elif onednn.primitives() is None:
        pytest.skip("MindSpore ships no oneDNN 2 here")


def rows(count, size, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal((count, size))).astype(np.float32)


def exact_gelu(x):
    x = x.astype(np.float64)
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def exact_softmax(x):
    x = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    return x / x.sum(1, keepdims=True)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_gelu_and_its_derivative(way, scale):
    x, dout, step = rows(37, 70, scale=scale), rows(37, 70, 1), 1e-6
    out, gradient = np.empty_like(x), dout.copy()
    gelu(x, out)
    np.testing.assert_allclose(out, exact_gelu(x), atol=2e-6, rtol=1e-6)
    wide = x.astype(np.float64)
    slope = (exact_gelu(wide + step) - exact_gelu(wide - step)) / (2 * step)
    gelu_gradient(x, gradient)
    np.testing.assert_allclose(gradient, dout * slope, atol=2e-5)
    gelu(x, x)
    assert np.array_equal(x, out)


@pytest.mark.parametrize("centre", [0.0, 5.0, -300.0])
def test_layer_norm_and_its_variances(way, centre):
    x, (gain, offset), eps = rows(9, 1152) + np.float32(centre), rows(2, 1152, 1), 1e-6
    out, wide = np.empty_like(x), x.astype(np.float64)
    normal = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + eps)
    variance = layer_norm(x, eps, out, gain, offset)
    np.testing.assert_allclose(out, normal * gain + offset, atol=1e-5 + 1e-6 * abs(centre))
    np.testing.assert_allclose(variance, wide.var(1), rtol=1e-5)
    layer_norm(x, eps, x)
    np.testing.assert_allclose(x, normal, atol=1e-5 + 1e-6 * abs(centre))


def test_equal_numbers_are_normalized_to_zeros(way):
    x = np.full((3, 64), 7.0, np.float32)
    layer_norm(x, 1e-6, x)
    assert np.abs(x).max() < 1e-3


@given(st.integers(1, 9), st.integers(1, 90), st.sampled_from([0.1, 3.0, 100.0]), st.integers(0, 9))
def test_softmax_and_its_gradient(count, size, scale, seed):
    x, dout = rows(count, size, seed, scale), rows(count, size, seed + 10)
    exact, change = exact_softmax(x), dout.copy()
    softmax(x, x)
    np.testing.assert_allclose(x, exact, atol=1e-6)
    softmax_gradient(x, change)
    np.testing.assert_allclose(change, exact * (dout - (exact * dout).sum(1, keepdims=True)), atol=3e-6)


def test_softmax_without_onednn(way):
    x, dout = rows(5, 33, 1, 4.0), rows(5, 33, 2)
    exact, change = exact_softmax(x), dout.copy()
    softmax(x, x)
    softmax_gradient(x, change)
    np.testing.assert_allclose(x, exact, atol=1e-6)
    np.testing.assert_allclose(change, exact * (dout - (exact * dout).sum(1, keepdims=True)), atol=3e-6)


def test_masked_keys_have_no_weight(way):
    x = np.array([[1.0, -1e9, 2.0, -1e9]], np.float32)
    softmax(x, x)
    np.testing.assert_allclose(x, [[0.26894143, 0, 0.7310586, 0]], atol=1e-6)


def test_numbers_are_rounded_to_the_nearest_bfloat16_and_nan_stays_nan(way):
    half, next_half = 1 + 2**-8, 1 + 3 * 2**-8  # between two neighbours: the even one
    x = np.array([[1, -2.5, half, next_half, 3e38, 3.4e38, np.inf, -np.inf, np.nan, 0, -0.0]], np.float32)
    expected = [0x3F80, 0xC020, 0x3F80, 0x3F82, 0x7F62, 0x7F80, 0x7F80, 0xFF80, 0x7FC0, 0, 0x8000]
    assert rounded_bits(x).tolist() == [expected]


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(way, number):
    x = rows(4, 40)
    x[2, 7] = number
    for operator in (lambda out: gelu(x, out), lambda out: softmax(x, out), lambda out: layer_norm(x, 1e-6, out)):
        out = np.empty_like(x)
        with np.errstate(all="ignore"):
            operator(out)
        assert np.isfinite(out).all(1).tolist() == [True, True, False, True]


def test_parts_of_a_larger_array_are_rounded(way):
    part = rows(20, 96)[3:11, 32:64]
    assert np.array_equal(rounded_bits(part), rounded_bits(np.ascontiguousarray(part)))


@needs_bfloat16
@pytest.mark.parametrize("with_gelu", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_linear_layers_of_bfloat16(with_gelu, dtype):
    x, weight, bias = rounded_bits(rows(50, 64)), rounded_bits(rows(33, 64, 1)), rows(1, 33, 2)[0]
    out = np.empty((50, 33), dtype)
    bfloat16_linear(x, weight, bias, out, with_gelu)
    wide = [(bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for bits in (x, weight)]
    exact = wide[0] @ wide[1].T + bias
    exact = exact_gelu(exact) if with_gelu else exact
    got = out if dtype == np.float32 else (out.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(got, exact, atol=1e-4, rtol=1e-5 if dtype == np.float32 else 2**-8)


@needs_bfloat16
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("count", [1, 2, 20, 300, 700])
def test_a_weight_in_blocks_gives_the_same_product(count, biased):
    x, weight = rows(count, 192), rounded_bits(rows(640, 192, 1))
    bias = rows(1, 640, 2)[0] if biased else None
    blocks = in_blocks(weight)
    assert (blocks.shape, blocks.dtype) == ((10, 192, 64), np.uint16)
    assert not np.array_equal(blocks.reshape(weight.shape), weight)
    np.testing.assert_allclose(linear(x, blocks, bias), linear(x, weight, bias), atol=2e-4)


@needs_bfloat16
@given(st.integers(1, 8), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_a_weight_comes_out_of_blocks_bit_for_bit(outputs, inputs, seed):
    weight = np.random.default_rng(seed).integers(0, 2**16, (64 * outputs, 64 * inputs)).astype(np.uint16)
    assert has_blocks(weight.shape)
    assert np.array_equal(out_of_blocks(in_blocks(weight)), weight)


def test_a_weight_without_whole_blocks_or_without_onednn_stays_as_it_is(monkeypatch):
    assert not has_blocks((65, 64))
    assert not has_blocks((64, 65))
    monkeypatch.setattr(onednn, "primitives", lambda: None)
    assert not has_blocks((64, 64))


def test_threads_compute_at_the_same_time_without_disturbing_each_other(way):
    inputs = [rows(300, 256, seed) for seed in range(4)]
    wrong = []

    def work(x):
        for _ in range(50):
            out = np.empty_like(x)
            softmax(x, out)
            if np.abs(out - exact_softmax(x)).max() > 1e-6:
                wrong.append(x)

    threads = [threading.Thread(target=work, args=(x,)) for x in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_threads_make_the_same_operator_at_the_same_time():
    """Without a lock, oneDNN 2.2 crashes in one of two runs."""
    meeting = threading.Barrier(2)

    def work(x):
        meeting.wait()
        out = np.empty_like(x)
        layer_norm(x, 1e-6, out)
        return out

    with ThreadPoolExecutor(2) as pool:
        for size in range(3, 800):
            x = rows(4, size)
            first, second = pool.map(work, [x, x.copy()])
            assert np.array_equal(first, second)


def test_arrays_of_different_layouts_are_refused():
    if onednn.primitives() is None:
        pytest.skip("MindSpore ships no oneDNN 2 here")
    part = rows(4, 16)[:, :8]
    for x, out in ((rows(4, 8), rows(4, 9)), (part, part), (rows(4, 8), rows(4, 8).astype(np.float64))):
        with pytest.raises(PixArtNBError, match="expected contiguous arrays of one shape and dtype"):
            gelu(x, out)
