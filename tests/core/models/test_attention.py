"""One attention function: the same numbers whole, in chunks, and by Ascend's operator."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_data import relative_error

from benchmarks.ascend_stand_ins import ascend
from pixart_nb.core import backend
from pixart_nb.core.backend import ms
from pixart_nb.core.models import attention as attention_module
from pixart_nb.core.models.attention import attention, check_mask


def arrays(queries=10, keys=7, head_size=72, heads=2, rows=3, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((rows, heads, n, head_size)).astype(np.float32) for n in (queries, keys, keys))
    mask = rng.random((rows, keys)) < 0.6
    mask[:, 0] = True
    return q, k, v, mask


def direct(q, k, v, mask=None, bias=0.0, scale=None):
    """softmax(q k^T) v in float64."""
    q, k, v = (part.astype(np.float64) for part in (q, k, v))
    scores = q @ k.transpose(0, 1, 3, 2) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    if mask is not None:
        scores = np.where(mask[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def compute_attention(q, k, v, mask=None, **options):
    mask = None if mask is None else ms.Tensor(mask)
    return attention(ms.Tensor(q), ms.Tensor(k), ms.Tensor(v), mask, **options).asnumpy()


@settings(max_examples=25, deadline=None)
@given(
    queries=st.integers(1, 20), keys=st.integers(1, 9), head_size=st.integers(1, 33), rows=st.integers(1, 130),
    masked=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_mask_and_chunk_equals_the_direct_formula(queries, keys, head_size, rows, masked, seed):
    q, k, v, mask = arrays(queries, keys, head_size, seed=seed)
    mask = mask if masked else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "ATTENTION_CHUNK_BYTES", 4 * keys * rows)
        patch.setattr(attention_module, "CHUNK_QUERIES", 1)
        assert relative_error(compute_attention(q, k, v, mask), direct(q, k, v, mask)) < 1e-5


def test_bias_and_scale_are_those_of_the_text_encoder(monkeypatch):
    monkeypatch.setattr(backend, "ATTENTION_CHUNK_BYTES", 4 * 6 * 7 * 2)  # two queries at a time
    q, k, v, mask = arrays(queries=7)
    bias = np.random.default_rng(1).standard_normal((1, 2, 7, 7)).astype(np.float32)
    out = compute_attention(q, k, v, mask, scale=1.0, bias=ms.Tensor(bias))
    assert relative_error(out, direct(q, k, v, mask, bias, 1.0)) < 1e-5


@pytest.mark.parametrize(
    ("rows", "least", "expected"),
    [
        (24, 1, [(6, 4), (6, 4), (6, 2)]),
        (12, 512, [(1, 10)] * 6),
        (23, 512, [(2, 10)] * 3),
        (7, 512, [(1, 7), (1, 3)] * 6),
        (59, 512, [(5, 10), (1, 10)]),
    ],
)
def test_the_chunk_follows_the_memory_budget(monkeypatch, rows, least, expected):
    """Chunks of 3 images with 2 heads, 10 queries and 7 keys, for a budget of so many rows of scores."""
    sizes = []
    compute = attention_module.scaled_dot_product_attention
    monkeypatch.setattr(
        attention_module, "scaled_dot_product_attention", lambda *x: sizes.append(x[0].shape) or compute(*x)
    )
    monkeypatch.setattr(backend, "ATTENTION_CHUNK_BYTES", 4 * 7 * rows)
    monkeypatch.setattr(attention_module, "CHUNK_QUERIES", least)
    q, k, v, _ = arrays()
    out = compute_attention(q, k, v)
    assert [(shape[0] * shape[1], shape[2]) for shape in sizes] == expected
    assert relative_error(out, direct(q, k, v)) < 1e-5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("head_size", [72, 64, 12])
def test_the_fused_operator_is_called_by_its_contract(masked, head_size):
    q, k, v, mask = (
        part.astype(np.float16) if part.dtype == np.float32 else part for part in arrays(head_size=head_size)
    )
    mask = mask if masked else None
    calls = []
    with ascend(wrap=lambda name, f: lambda *a: calls.append(name) or f(*a)):
        out = compute_attention(q, k, v, mask)
    assert calls == ["flash_attention_score"]
    assert relative_error(out, direct(q, k, v, mask)) < 2e-3


@pytest.mark.parametrize(("head_size", "dtype"), [(72, np.float32), (272, np.float16), (512, np.float16)])
def test_float32_and_large_heads_are_computed_exactly_on_ascend(head_size, dtype):
    q, k, v, mask = arrays(head_size=head_size)
    q, k, v = (part.astype(dtype) for part in (q, k, v))
    with ascend(wrap=lambda name, f: None):  # no operator of Ascend is called
        out = compute_attention(q, k, v, mask)
    assert relative_error(out, direct(q, k, v, mask)) < (1e-5 if dtype == np.float32 else 5e-3)


def test_a_row_that_may_see_nothing_is_refused():
    with pytest.raises(ValueError, match=r"rows \[0, 2\].*at least one token"):
        check_mask(np.array([[0, 0], [1, 0], [0, 0]], bool))
