"""The benchmark of bfloat16's errors compares each system with itself in float32."""

import numpy as np
import pytest

from benchmarks import precision
from pixart_nb.core.models.low_precision import unsupported


@pytest.mark.skipif(bool(unsupported()), reason=f"needs bfloat16 products: {unsupported()}")
def test_bfloat16_is_close_to_float32(monkeypatch):
    monkeypatch.setattr(precision, "run_in_subprocess", lambda task, function, *arguments: function(*arguments))
    inputs = precision.random_inputs(128, 8)
    ((name, forward, sampled),) = precision.errors(
        precision.BUNDLED, inputs, 2, {"mindspore": precision.mindspore_results}
    )
    assert name == "mindspore, bf16 against fp32"
    assert 1e-5 < forward < 2e-2
    assert 1e-5 < sampled < 1e-1


def test_systems_are_compared_with_the_first_one_in_float32(monkeypatch):
    monkeypatch.setattr(precision, "run_in_subprocess", lambda task, function, *arguments: function(*arguments))

    def results(scale):
        return lambda folder, inputs, steps, dtype: {
            part: np.full(4, scale + (dtype == "bf16")) for part in ("forward", "sampled")
        }

    lines = precision.errors(None, {}, 20, {"mindspore": results(4.0), "diffusers": results(2.0)})
    assert lines == [
        ("mindspore, bf16 against fp32", 0.25, 0.25),
        ("diffusers, bf16 against fp32", 0.5, 0.5),
        ("mindspore against diffusers, fp32", 1.0, 1.0),
    ]
